"""What :func:`kvferry.load` takes beside a name, by Transformers' names."""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Any

from kvferry.errors import InputError, ModelError, UnsupportedModelError

NAMES = (
    "device", "dtype", "device_map", "revision", "quantization_config", "attn_implementation", "min_pixels",
    "max_pixels",
)  # fmt: skip


def check_names(unknown: dict[str, Any]) -> None:
    """Refuse what :func:`kvferry.load` does not take.

    Raises
    ------
    InputError
        A keyword that is none of :data:`NAMES`; it lists them.
    UnsupportedModelError
        ``trust_remote_code=True``.
    """
    if unknown.pop("trust_remote_code", False):
        raise UnsupportedModelError(
            "kvferry runs no code that comes with a checkpoint (trust_remote_code); take one that Transformers has, "
            "or hand yours to kvferry.VLM or kvferry.compressing yourself"
        )
    if unknown:
        name = min(unknown)
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"load() takes no {name!r}; {hint}(there are {', '.join(NAMES)})")


def weights_options(device: Any, device_map: Any, quantization_config: Any, attn_implementation: Any) -> dict[str, Any]:
    """What ``from_pretrained`` gets of the model.

    Raises
    ------
    InputError
        Both ``device`` and ``device_map``.
    """
    if device is not None and device_map is not None:
        raise InputError("device and device_map both say where the model lies; pass one of them")
    given = {
        "device_map": device_map,
        "quantization_config": quantization_config,
        "attn_implementation": attn_implementation,
    }
    return {name: value for name, value in given.items() if value is not None}


def with_pixels(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The image processor with other bounds for the size that it scales pictures to.

    Raises
    ------
    InputError
        A family that scales pictures otherwise, or bounds that are none.
    """
    if min_pixels is None and max_pixels is None:
        return image_processor
    known = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    size = getattr(image_processor, "size", None)
    if not {"min_pixels", "max_pixels"} <= set(known) or size is None:
        raise InputError("this model scales pictures to sizes of its own; leave min_pixels and max_pixels out")
    low = size["shortest_edge"] if min_pixels is None else min_pixels
    high = size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < low <= high:
        raise InputError(f"min_pixels is above 0 and not above max_pixels, not {low} and {high}")
    return type(image_processor)(**{**image_processor.to_dict(), "size": {"shortest_edge": low, "longest_edge": high}})


def quantized(fingerprint: str, quantization_config: Any) -> str:
    """The fingerprint of the same weights in fewer bits, whose caches are others."""
    if quantization_config is None:
        return fingerprint
    facts = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    text = fingerprint + json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[: len(fingerprint)]


def check_placed(model: Any) -> None:
    """Refuse a model of which a part lies on no device.

    Raises
    ------
    ModelError
        ``device_map`` left layers on the disk.
    """
    places = getattr(model, "hf_device_map", None) or {}
    if away := sorted(name for name, place in places.items() if str(place) in ("disk", "meta")):
        raise ModelError(f"device_map leaves {away[0]} on the disk; take a smaller model, fewer bits, or more devices")
