"""The generated code is what the schema gives."""

from pathlib import Path

import pytest

from kvferry.wire import generate as module


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    written = module.generate(tmp_path)
    assert {path.name for path in written} >= {"bitstream_pb2.py", "bitstream_pb2.pyi"}
    for path in written:
        committed = module.HERE / path.name
        assert path.read_text() == committed.read_text(), f"{path.name}: run python -m kvferry.wire.generate"


def test_outside_a_checkout(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    with pytest.raises(FileNotFoundError, match="checkout"):
        module.generate(tmp_path, tmp_path)
