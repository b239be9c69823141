"""Language models in a GGUF file: read once by Transformers, then kept as an ordinary model folder."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kvferry.errors import ModelError
from kvferry.models.unpacked import made_once

_LAYOUT = 1
"""Of what is written; a change makes old folders go unused."""


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
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
