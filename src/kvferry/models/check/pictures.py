"""Random pictures for a small model of any family, and a prompt that shows them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvferry.cache import Modality
from kvferry.models.check.build import words
from kvferry.models.support import visual_token_ids

Inputs = dict[str, torch.Tensor]
BEFORE, BETWEEN, AFTER = 5, 3, 12


def picture_inputs(model: PreTrainedModel) -> Inputs | None:
    """A prompt with one or two pictures that ``model`` reads, and that it reads otherwise with other pictures.

    None where no form of pixels is known for this family.
    """
    ids = [token for token, kind in visual_token_ids(model.config).items() if kind is Modality.IMAGE]
    for pixels in _forms(model) if ids else ():
        try:
            inputs = _prompt(model, pixels, ids[0])
            if inputs is not None and _looks(model, inputs):
                return inputs
        except Exception:  # a form that this family's code does not take may fail in any way
            continue
    return None


def _prompt(model: PreTrainedModel, pixels: Inputs, image: int) -> Inputs | None:
    runs = _runs(model, pixels)
    if not runs:
        return None
    gaps = [words(BEFORE), *[words(BETWEEN, seed) for seed in range(1, len(runs))], words(AFTER, 9)]
    parts = [x for gap, run in zip(gaps, [*runs, 0], strict=True) for x in (gap, torch.full((run,), image))]
    input_ids = torch.cat(parts)[None]
    inputs = {"input_ids": input_ids, **pixels}
    known = inspect.signature(type(model).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in known:
            inputs[name] = (input_ids == image).long()
    return inputs


def _runs(model: PreTrainedModel, pixels: Inputs) -> list[int]:
    """How many tokens each picture takes, from what the tower and the projector make of it."""
    inner = model if hasattr(model, "get_image_features") else model.base_model
    with torch.no_grad():
        features = inner.get_image_features(**pixels, return_dict=True)
    found = getattr(features, "pooler_output", features)
    if isinstance(found, torch.Tensor):
        return [found[0].numel() // found.shape[-1]] * len(found) if found.ndim > 2 else [len(found)]
    return [x.numel() // x.shape[-1] for x in found]


def _looks(model: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether the model reads this prompt, and its answer depends on the pictures."""
    with torch.no_grad():
        seen = model(**inputs).logits[0, -1]
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits[0, -1]
    return bool(seen.isfinite().all()) and float((seen - other).abs().max()) > 1e-3 * float(seen.std())


def _forms(model: PreTrainedModel) -> Iterator[Inputs]:
    """Ways of handing over pixels, as the family's forward pass names them."""
    known = inspect.signature(type(model).forward).parameters
    vision = _vision(model.config)
    for make in (_grid, _shapes, _places, _plain):
        yield from make(known, vision)


def _vision(config: PreTrainedConfig) -> dict[str, Any]:
    for name in ("vision_config", "vision_tower_config", "image_config"):
        found = getattr(config, name, None)
        if found is not None:
            return found.to_dict() if isinstance(found, PreTrainedConfig) else dict(found)
    return {}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _number(vision: dict[str, Any], *names: str, default: int) -> int:
    for name in names:
        value = vision.get(name)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return default


def _channels(vision: dict[str, Any]) -> int:
    return _number(vision, "in_channels", "num_channels", "in_chans", default=3)


def _patch(vision: dict[str, Any]) -> int:
    return _number(vision, "patch_size", default=4)


def _grid(known: Any, vision: dict[str, Any]) -> Iterator[Inputs]:
    """Patches in a row, and how many stand in each direction."""
    name = next((x for x in ("image_grid_thw", "image_grid_hw") if x in known), None)
    if name is None:
        return
    merge = _number(vision, "spatial_merge_size", "merge_size", default=2)
    grid = torch.tensor([[1, 2 * merge, 2 * merge], [1, 2 * merge, 3 * merge]])
    patches, channels, side = int(grid.prod(1).sum()), _channels(vision), _patch(vision)
    grids = {name: grid if name.endswith("thw") else grid[:, 1:]}
    if "image_merge_sizes" in known:
        grids["image_merge_sizes"] = torch.full((len(grid),), merge)
    for depth in dict.fromkeys((_number(vision, "temporal_patch_size", default=1), 1, 2)):
        yield {"pixel_values": _noise(patches, channels * depth * side * side), **grids}
    yield {"pixel_values": _noise(patches, channels, side, side), **grids}
    yield {"pixel_values": _noise(1, patches, channels, side, side), **grids}


def _shapes(known: Any, vision: dict[str, Any]) -> Iterator[Inputs]:
    """Rows of patches with padding (NaViT)."""
    if "spatial_shapes" not in known:
        return
    channels, side = _channels(vision), _patch(vision)
    shapes = torch.tensor([[4, 4], [2, 4]])
    mask = torch.arange(16) < shapes.prod(1)[:, None]
    yield {
        "pixel_values": _noise(2, 16, channels * side * side),
        "spatial_shapes": shapes,
        "pixel_attention_mask": mask.long(),
    }


def _places(known: Any, vision: dict[str, Any]) -> Iterator[Inputs]:
    """Patches with a place each."""
    if "image_position_ids" not in known:
        return
    pool = _number(vision, "pooling_kernel_size", default=1)
    channels, side = _channels(vision), _patch(vision)
    rows = 2 * pool
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(rows), indexing="xy"), -1).view(1, -1, 2)
    for width in (channels * side * side, channels * side * side * pool * pool):
        yield {"pixel_values": _noise(1, rows * rows, width).abs(), "image_position_ids": place}


def _plain(known: Any, vision: dict[str, Any]) -> Iterator[Inputs]:
    """Square pictures, by themselves or with a leading axis for the prompt; masks and sizes where asked for."""
    if "pixel_values" not in known:
        return
    channels = _channels(vision)
    for side in dict.fromkeys((_number(vision, "image_size", default=16), 16, 32)):
        for many in ((2,), (1,), (1, 2), (1, 3)):
            pixels = {"pixel_values": _noise(*many, channels, side, side)}
            if "pixel_attention_mask" in known:
                yield {**pixels, "pixel_attention_mask": torch.ones(*many, side, side, dtype=torch.long)}
            if "image_sizes" in known:
                yield {**pixels, "image_sizes": torch.tensor([[side, side]]).expand(many[0], 2)}
            yield pixels
