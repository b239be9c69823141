"""What a stopped run goes on from, in one file: tensors as safetensors, all else as JSON in its header. Nothing in it
can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def save_state(state: Any, path: Path) -> None:
    """Write dictionaries, lists and tuples of tensors, numbers, words and None; whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    shape = json.dumps(_taken_apart(state, tensors))
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"state": shape})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: Path) -> Any:
    """What was saved, to the bit; tensors lie on the CPU."""
    with safe_open(path, "pt") as file:
        return _put_together(json.loads(file.metadata()["state"]), file)


def _taken_apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()  # two names of one tensor are two tensors there
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_taken_apart(key, tensors), _taken_apart(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_taken_apart(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a state holds tensors, numbers and words, not {type(value).__name__}")


def _put_together(value: Any, file: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return file.get_tensor(inner)
    if kind == "dict":
        return {_put_together(key, file): _put_together(item, file) for key, item in inner}
    return {"list": list, "tuple": tuple}[kind](_put_together(item, file) for item in inner)
