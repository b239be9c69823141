"""The grown model's code on a small Llama in a GGUF file, with SmolLM2's first tokens."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from kvferry.models.unpacked import HOME
from kvferry.testbed.smol.pupil import Plan, Pupil
from tests.models.gguf_files import small_llama, write_gguf


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME, str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", small_llama(), gguf.GGMLQuantizationType.BF16)


@pytest.fixture
def pupil(language: Path) -> Pupil:
    return Pupil(str(language), "testbed/control", Plan(rank=4), seed=0, device="cpu")
