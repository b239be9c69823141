"""Compile every ``proto/**/*.proto`` into this package: ``python -m kvferry.wire.generate`` (in a checkout)."""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).parent
PROTO = HERE.parents[2] / "proto"


def generate(target: Path = HERE, source: Path = PROTO) -> list[Path]:
    """Write ``*_pb2.py``, their stubs and, where there is a service, ``*_pb2_grpc.py`` into ``target``.

    The schema's package is ``kvferry.v1``; its Python lives in ``kvferry.wire``, so imports between the generated
    files are rewritten.

    Raises
    ------
    FileNotFoundError
        Outside a checkout, where there is no schema to compile.
    RuntimeError
        The compiler refused the schema; it has said why on standard error.
    """
    protoc = importlib.import_module("grpc_tools.protoc")  # a development dependency
    schemas = sorted(source.rglob("*.proto"))
    if not schemas:
        raise FileNotFoundError(f"no .proto files under {source}; run this in a checkout of kvferry")
    well_known = resources.files("grpc_tools") / "_proto"
    written = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        arguments = ["protoc", f"-I{source}", f"-I{well_known}", *outputs, *map(str, schemas)]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc refused the schema")
        services = {path.stem for path in schemas if "\nservice " in path.read_text()}
        for path in sorted(Path(folder).rglob("*.py*")):
            if path.name.endswith("_grpc.py") and path.name.removesuffix("_pb2_grpc.py") not in services:
                continue
            text = path.read_text().replace("from kvferry.v1 import", "from kvferry.wire import")
            written.append(target / path.name)
            written[-1].write_text(text)
    return written


if __name__ == "__main__":
    for file in generate():
        print(file.name, file=sys.stderr)
