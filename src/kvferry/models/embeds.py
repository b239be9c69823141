"""The vision tower alone: pictures to the embeddings that the language model reads in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from kvferry.errors import InputError, UnsupportedModelError

Grid = tuple[int, int, int]
MAX_VISUAL_TOKENS = 16_384
"""Of all pictures of one prompt."""


@dataclass(frozen=True)
class VisualEmbeds:
    """One picture as the projector gives it to the language model; stands for the picture in ``VLM.prefill``.

    Parameters
    ----------
    embeds : float ``[tokens, hidden]``
        One row per visual token, in prompt order.
    grid : (frames, rows, columns)
        In patches, before they are merged into tokens.
    """

    embeds: torch.Tensor
    grid: Grid

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.embeds.nbytes


def look(model: PreTrainedModel, image_processor: Any, pictures: Sequence[Image.Image]) -> list[VisualEmbeds]:
    """Run the vision tower and the projector, and nothing else.

    All pictures go through at once, as in a prefill, so that the embeddings are those of a prefill to the last bit.

    Raises
    ------
    UnsupportedModelError
        The language model needs more than one embedding per visual token, or its pictures have no patch grid.
    """
    check_embeds(model, image_processor)
    if not pictures:
        return []
    pixels = image_processor(images=list(pictures), return_tensors="pt")
    grids = pixels["image_grid_thw"]
    with torch.inference_mode():
        features = model.get_image_features(
            pixels["pixel_values"].to(model.device, model.dtype),
            image_grid_thw=grids.to(model.device),
            return_dict=True,
        )
    each = zip(features.pooler_output, grids.tolist(), strict=True)
    return [VisualEmbeds(embeds, (grid[0], grid[1], grid[2])) for embeds, grid in each]


def check_embeds(model: PreTrainedModel, image_processor: Any) -> None:
    """Refuse models whose pictures are more to the language model than one embedding per token."""
    if not hasattr(image_processor, "merge_size"):
        raise UnsupportedModelError(
            f"{model.config.model_type} has no patch grid that visual embeddings could be placed by; send the cache "
            "(mode kv) or the picture (mode image)"
        )
    if getattr(model.config.vision_config, "deepstack_visual_indexes", None):
        raise UnsupportedModelError(
            f"{model.config.model_type} feeds its vision tower into several layers, which visual embeddings alone do "
            "not hold; send the cache (mode kv) or the picture (mode image)"
        )


def embedded_inputs(model_hidden: int, merge_size: int, pictures: Sequence[VisualEmbeds]) -> dict[str, Any]:
    """What stands for ``pixel_values`` and ``image_grid_thw`` in the inputs of a forward pass.

    Raises
    ------
    InputError
        The embeddings do not fit their grid or the model, or are not finite.
    """
    for picture in pictures:
        check_shape(picture, model_hidden, merge_size)
    return {
        "visual_embeds": torch.cat([picture.embeds for picture in pictures]),
        "image_grid_thw": torch.tensor([picture.grid for picture in pictures], dtype=torch.long),
    }


def visual_tokens(grid: Grid, merge_size: int) -> int:
    """How many tokens a grid of patches makes.

    Raises
    ------
    InputError
        A grid that cannot be, or of too many tokens.
    """
    frames, rows, columns = grid
    if min(grid) < 1 or rows % merge_size or columns % merge_size or max(grid) > MAX_VISUAL_TOKENS * merge_size**2:
        raise InputError(f"a picture of {frames} x {rows} x {columns} patches cannot be; use the model's own grid")
    count = frames * rows * columns // merge_size**2
    if count > MAX_VISUAL_TOKENS:
        raise InputError(f"a picture of {count:,} visual tokens, more than {MAX_VISUAL_TOKENS:,}; scale it down")
    return count


def check_total(total: int) -> None:
    """Refuse more visual tokens than one prompt takes, before the next picture is unfolded."""
    if total > MAX_VISUAL_TOKENS:
        raise InputError(f"pictures of {total:,} visual tokens, more than {MAX_VISUAL_TOKENS:,}; scale them down")


def check_shape(picture: VisualEmbeds, hidden: int, merge_size: int) -> None:
    """Refuse embeddings that this model cannot read."""
    wanted = (visual_tokens(picture.grid, merge_size), hidden)
    if tuple(picture.embeds.shape) != wanted:
        raise InputError(f"visual embeddings of shape {list(picture.embeds.shape)}, where {list(wanted)} were expected")
    if not bool(picture.embeds.isfinite().all()):
        raise InputError("visual embeddings hold NaN or infinity; look for what broke the vision tower")


def placed(model: PreTrainedModel, input_ids: torch.Tensor, visual: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Input embeddings ``[1, n, hidden]`` with ``embeds`` where ``visual`` (bool ``[n]``) is true."""
    with torch.inference_mode():
        words: torch.Tensor = model.get_input_embeddings()(input_ids.to(model.device))
        words[0, torch.from_numpy(visual).to(words.device)] = embeds.to(words)
        return words
