"""PyTorch, imported when something of it is first used: a recipe is parsed, and a mistake in it found, without."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]


class Deferred(ModuleType):
    """Stands for a module until the first look at it; every name is looked up there once."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module(self.__name__), name)
        self.__dict__[name] = value
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = Deferred("torch")
