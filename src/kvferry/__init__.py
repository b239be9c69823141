"""kvferry compresses a vision-language model's KV cache on an edge device and carries it to the cloud.

The names below are loaded when they are first used, so that ``import kvferry`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvferry.errors import (
    AccessError,
    BitstreamError,
    BudgetError,
    CancelledError,
    CorruptError,
    DeadlineError,
    EvidenceError,
    FingerprintError,
    InputError,
    KVFerryError,
    LinkError,
    ModelError,
    PluginError,
    RecipeError,
    TrainingError,
    TruncatedError,
    UnsupportedModelError,
    VersionError,
)

if TYPE_CHECKING:
    from kvferry.cache import KVCache, PromptLayout
    from kvferry.edge import Answer, Edge
    from kvferry.evidence import Evidence, Prefilled
    from kvferry.models.compressing import compressing
    from kvferry.models.decoding import Decoding
    from kvferry.models.load import load
    from kvferry.models.pruning import Pruning
    from kvferry.models.tower_pruning import TowerPruning
    from kvferry.models.vlm import VLM
    from kvferry.recipe import Recipe, compress, decompress

__version__ = "0.5.0"

_HOMES = {
    "Answer": "edge",
    "Decoding": "models",
    "Edge": "edge",
    "Evidence": "evidence",
    "KVCache": "cache",
    "Prefilled": "evidence",
    "PromptLayout": "cache",
    "Pruning": "models",
    "Recipe": "recipe",
    "TowerPruning": "models",
    "VLM": "models",
    "compress": "recipe",
    "compressing": "models",
    "decompress": "recipe",
    "decompress_layers": "bitstream",
    "load": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "VLM",
    "AccessError",
    "Answer",
    "BitstreamError",
    "BudgetError",
    "CancelledError",
    "CorruptError",
    "DeadlineError",
    "Decoding",
    "Edge",
    "Evidence",
    "EvidenceError",
    "FingerprintError",
    "InputError",
    "KVCache",
    "KVFerryError",
    "LinkError",
    "ModelError",
    "PluginError",
    "Prefilled",
    "PromptLayout",
    "Pruning",
    "Recipe",
    "RecipeError",
    "TowerPruning",
    "TrainingError",
    "TruncatedError",
    "UnsupportedModelError",
    "VersionError",
    "__version__",
    "compress",
    "compressing",
    "decompress",
    "decompress_layers",
    "load",
]
