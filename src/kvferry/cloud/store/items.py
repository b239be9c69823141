"""What sessions hold, as bytes and back: JSON and safetensors, nothing that could run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import CorruptError, KVFerryError
from kvferry.lazy import torch

VERSION = 1
_HEAD = 4
LAYOUT = ("token_ids", "modality", "role", "positions")


@dataclass(frozen=True)
class Entry:
    """One thing held, and whose it is.

    Parameters
    ----------
    owner : str
        The identity that opened the session.
    fingerprint : str
        Of the model that it was held for.
    nbytes : int
        In memory, by the mode's own account.
    """

    item: object
    digest: bytes
    nbytes: int
    owner: str
    fingerprint: str


def pack(entry: Entry) -> bytes | None:
    """An entry as bytes; None for what a plug-in's mode holds that is none of the kinds known here."""
    parts = _parts(entry.item)
    if parts is None:
        return None
    from safetensors.torch import save

    kind, told, tensors = parts
    head = {"version": VERSION, "kind": kind, "digest": entry.digest.hex(), "nbytes": entry.nbytes}
    head |= {"owner": entry.owner, "fingerprint": entry.fingerprint, **told}
    text = json.dumps(head).encode()
    return b"".join((len(text).to_bytes(_HEAD, "little"), text, save(tensors)))


def unpack(data: bytes) -> Entry:
    """Undo :func:`pack`.

    Raises
    ------
    CorruptError
        It is not what :func:`pack` makes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        size = int.from_bytes(data[:_HEAD], "little")
        head = json.loads(data[_HEAD : _HEAD + size])
        if head["version"] != VERSION:
            raise CorruptError(f"an entry of version {head['version']}; this one reads {VERSION}")
        item = _made(head, load(data[_HEAD + size :]))
        return Entry(item, bytes.fromhex(head["digest"]), int(head["nbytes"]), head["owner"], head["fingerprint"])
    except (ValueError, KeyError, TypeError, IndexError, KVFerryError, SafetensorError) as error:
        raise CorruptError(f"an entry cannot be read ({type(error).__name__})") from None


def _parts(item: object) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]] | None:
    """Kind, what is told in JSON, and tensors."""
    if isinstance(item, bytes):
        return "bytes", {}, {"data": _tensor(np.frombuffer(item, np.uint8))}
    if isinstance(item, np.ndarray):
        return "array", {}, {"data": _tensor(item)}
    if isinstance(item, KVCache):
        return _cache_parts(item)
    from kvferry.models.embeds import VisualEmbeds

    if isinstance(item, VisualEmbeds):
        return "embeds", {"grid": [int(x) for x in item.grid]}, {"data": item.embeds.detach().cpu().contiguous()}
    return None


def _cache_parts(cache: KVCache) -> tuple[str, dict[str, Any], dict[str, torch.Tensor]]:
    layout = cache.layout
    tensors = {name: _tensor(getattr(layout, name)) for name in LAYOUT}
    for number, layer in enumerate(cache):
        for name in ("keys", "values", "positions"):
            tensors[f"{number}.{name}"] = getattr(layer, name).detach().cpu().contiguous().clone()
    told = {
        "layers": len(cache.layers),
        "counts": [list(layer.counts) for layer in cache],
        "rope_delta": layout.rope_delta,
        "grids": [list(grid) for grid in layout.grids],
        "length": cache.length,
        "made_by": cache.fingerprint,
        "recipe": cache.recipe,
        "model_name": cache.model_name,
        "tied_heads": cache.tied_heads,
    }
    return "cache", told, tensors


def _made(head: dict[str, Any], tensors: dict[str, torch.Tensor]) -> object:
    if head["kind"] == "bytes":
        return tensors["data"].numpy().tobytes()
    if head["kind"] == "array":
        return tensors["data"].numpy()
    if head["kind"] == "embeds":
        from kvferry.models.embeds import VisualEmbeds

        frames, rows, columns = head["grid"]
        return VisualEmbeds(tensors["data"], (frames, rows, columns))
    if head["kind"] != "cache":
        raise CorruptError(f"there is no kind {head['kind']!r}")
    token_ids, modality, role, positions = (tensors[name].numpy() for name in LAYOUT)
    grids = tuple((a, b, c) for a, b, c in head["grids"])
    layout = PromptLayout(token_ids, modality, role, positions, head["rope_delta"], grids)
    layers = tuple(
        LayerCache(tensors[f"{n}.keys"], tensors[f"{n}.values"], tensors[f"{n}.positions"], tuple(head["counts"][n]))
        for n in range(head["layers"])
    )
    return KVCache(
        layers, layout, head["length"], head["made_by"], head["recipe"], head["model_name"],
        tied_heads=head["tied_heads"],
    )  # fmt: skip


def _tensor(array: Any) -> torch.Tensor:
    made: torch.Tensor = torch.from_numpy(np.array(array, copy=True).reshape(math.prod(array.shape)))
    return made.reshape(array.shape)
