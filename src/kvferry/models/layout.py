"""From raw Hugging Face inputs to a :class:`PromptLayout`: token ids decide what each token stands for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from kvferry.cache import Modality, PromptLayout, Role
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models.support import visual_token_ids

Inputs = Mapping[str, Any]

_QUESTION_TOKENS = 32
_SPECIAL_NAMES = (
    "bos_token_id", "eos_token_id", "pad_token_id", "vision_start_token_id", "vision_end_token_id",
    "boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id",
)  # fmt: skip


def token_ids_of(inputs: Inputs) -> npt.NDArray[np.int32]:
    """The one unpadded prompt in ``inputs``, int32 ``[n]``.

    Raises
    ------
    InputError
        No ``input_ids``, or an empty prompt.
    UnsupportedModelError
        More than one prompt, or padding.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.numel() == 0:
        raise InputError("the inputs need non-empty input_ids of shape [1, n]")
    if ids.ndim != 2 or len(ids) != 1:
        raise UnsupportedModelError("only one prompt at a time can be read here; call once per prompt")
    mask = inputs.get("attention_mask")
    if mask is not None and not bool((mask != 0).all()):
        raise UnsupportedModelError("a padded prompt cannot be read here; pass the prompt without padding")
    token_ids: npt.NDArray[np.int32] = ids[0].detach().cpu().numpy().astype(np.int32)
    return token_ids


def prompts_of(model: PreTrainedModel, inputs: Inputs) -> list[dict[str, Any]]:
    """The prompts of a batch one by one and without their padding, as :func:`layout_of` reads them.

    Parameters
    ----------
    inputs : mapping
        ``input_ids`` ``[b, n]``, ``attention_mask`` ``[b, n]`` (0 on padding) and whatever the model's processor
        returned beside.

    Raises
    ------
    InputError
        No ``input_ids``, or padding anywhere but on the left.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.numel() == 0:
        raise InputError("the inputs need non-empty input_ids of shape [batch, n]")
    prompts = _pictures_of(model, inputs, ids)
    for row, (prompt, start) in enumerate(zip(prompts, _starts(inputs, ids), strict=True)):
        for name in ("input_ids", "mm_token_type_ids"):
            if inputs.get(name) is not None:
                prompt[name] = inputs[name][row : row + 1, start:]
        positions = inputs.get("position_ids")
        if positions is not None and positions.ndim == 3:
            prompt["position_ids"] = positions.expand(-1, len(ids), -1)[:, row : row + 1, start:]
    return prompts


def _starts(inputs: Inputs, ids: torch.Tensor) -> list[int]:
    """How many padding tokens stand before each prompt."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return [0] * len(ids)
    real = mask != 0
    if real.shape != ids.shape or not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise InputError(
            "prompts of a batch are padded on the left only: set tokenizer.padding_side = 'left', and pass an "
            "attention_mask of the same shape as input_ids"
        )
    starts: list[int] = (~real).sum(1).tolist()
    return starts


def _pictures_of(model: PreTrainedModel, inputs: Inputs, ids: torch.Tensor) -> list[dict[str, Any]]:
    """For each prompt its rows of ``image_grid_thw`` and the like, which hold the pictures of the batch in a row."""
    found: list[dict[str, Any]] = [{} for _ in ids]
    names = {Modality.IMAGE: ["image_grid_thw"], Modality.VIDEO: ["video_grid_thw", "second_per_grid_ts"]}
    for token, kind in visual_token_ids(model.config).items():
        present = [name for name in names[kind] if inputs.get(name) is not None]
        if not present:
            continue
        tokens = inputs[present[0]].prod(1) // _merge_size(model) ** 2
        upto = torch.searchsorted(tokens.cumsum(0), (ids == token).sum(1).cumsum(0), right=True).tolist()
        for prompt, first, last in zip(found, [0, *upto], upto, strict=False):
            prompt.update({name: inputs[name][first:last] for name in present})
    return found


def _merge_size(model: PreTrainedModel) -> int:
    """How many patches a visual token spans in each direction."""
    return int(getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1))


def layout_of(model: PreTrainedModel, inputs: Inputs, question_mask: npt.ArrayLike | None = None) -> PromptLayout:
    """What each prompt token of raw Hugging Face inputs is.

    Parameters
    ----------
    inputs : mapping
        ``input_ids`` ``[1, n]`` and whatever the model's processor returned beside.
    question_mask : bool ``[n]``, optional
        True on the question. By default: the text after the last visual token up to the generation prompt, or, in
        a prompt without pictures, the last 32 tokens.

    Raises
    ------
    InputError, UnsupportedModelError
        See :func:`token_ids_of`.
    """
    ids = token_ids_of(inputs)
    modality = np.full(len(ids), Modality.TEXT, dtype=np.uint8)
    for token, kind in visual_token_ids(model.config).items():
        modality[ids == token] = kind
    special = np.isin(ids, list(_special_ids(model)))
    role = np.where(special & (modality == Modality.TEXT), Role.SPECIAL, Role.CONTEXT).astype(np.uint8)
    if question_mask is None:
        question_mask = _guess_question(model, ids, modality, special)
    asked = np.asarray(question_mask, dtype=bool)
    if asked.shape != ids.shape:
        raise InputError(f"question_mask must have one entry for each of the {len(ids)} tokens")
    role[asked] = Role.QUESTION
    positions, delta = rotary_positions(model, inputs, modality)
    return PromptLayout(ids, modality, role, positions, delta, grids_of(model, inputs, modality))


def layout_with_roles(model: PreTrainedModel, inputs: Inputs, roles: npt.NDArray[np.uint8], scene: int) -> PromptLayout:
    """The layout of a prompt whose tokens' roles are known, uint8 ``[n]``; the question starts at ``scene``.

    A scene without a question (``scene`` is n) borrows one text token, so that it knows what position follows.
    """
    n = len(roles)
    if n > scene:
        return replace(layout_of(model, inputs, np.zeros(n, dtype=bool)), role=roles)
    longer = {**inputs, "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 1))}
    for name in ("mm_token_type_ids", "token_type_ids", "attention_mask"):
        if name in longer:
            longer[name] = torch.nn.functional.pad(longer[name], (0, 1), value=int(name == "attention_mask"))
    return replace(layout_of(model, longer, np.zeros(n + 1, dtype=bool)).head(n), role=roles)


def _special_ids(model: PreTrainedModel) -> set[int]:
    found: set[int] = set()
    generation = model.generation_config
    for config in (model.config, model.config.get_text_config(), generation):
        for name in _SPECIAL_NAMES:
            value = getattr(config, name, None)
            if value is not None:
                found.update([value] if isinstance(value, int) else value)
    return found


def _end_ids(model: PreTrainedModel) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = getattr(model.config.get_text_config(), "eos_token_id", None) if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _guess_question(
    model: PreTrainedModel,
    ids: npt.NDArray[np.int32],
    modality: npt.NDArray[np.uint8],
    special: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    index = np.arange(len(ids))
    seen = np.flatnonzero(modality)
    if not len(seen):
        last: npt.NDArray[np.bool_] = index >= len(ids) - _QUESTION_TOKENS
        return last
    after: npt.NDArray[np.bool_] = index > seen[-1]
    asked = after & ~special
    ends = np.flatnonzero(np.isin(ids, _end_ids(model)) & after)
    if len(ends) and asked[: ends[-1]].any():
        asked[ends[-1] :] = False
    return asked if asked.any() else after


def rotary_positions(
    model: PreTrainedModel, inputs: Inputs, modality: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int32], int]:
    """Rotary positions ``[1 or 3, n]`` as the model itself would number them, and the offset of what follows."""
    n = len(modality)
    inner = getattr(model, "model", model)
    if not hasattr(inner, "get_rope_index"):
        return np.arange(n, dtype=np.int32)[None], 0
    positions = inputs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        return _with_offset(positions[-3:, 0], modality)
    if not modality.any():
        return np.tile(np.arange(n, dtype=np.int32), (3, 1)), 0
    given = {"mm_token_type_ids": torch.from_numpy(modality.astype(np.int64))[None], **inputs}
    known = set(inspect.signature(inner.get_rope_index).parameters) - {"attention_mask"}
    near = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in given.items() if k in known}
    positions, _ = inner.get_rope_index(**near)
    return _with_offset(positions[:, 0], modality)


def _with_offset(positions: torch.Tensor, modality: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], int]:
    """Text goes on where the last text token stood, as in ``generate()``; a long video may reach further in time."""
    last = positions[:, -1] if modality[-1] == Modality.TEXT else positions
    return positions.cpu().numpy().astype(np.int32), int(last.max()) + 1 - len(modality)


def grids_of(
    model: PreTrainedModel, inputs: Inputs, modality: npt.NDArray[np.uint8]
) -> tuple[tuple[int, int, int], ...]:
    """(frames, rows, columns) in merged visual tokens for each run of visual tokens, where the family has a grid."""
    runs = [(kind, len(list(run))) for kind, run in groupby(modality.tolist()) if kind != Modality.TEXT]
    merge = _merge_size(model)
    sizes = {
        Modality.IMAGE: _grids(inputs.get("image_grid_thw"), merge),
        Modality.VIDEO: _grids(inputs.get("video_grid_thw"), merge, "qwen3" in model.config.model_type),
    }
    grids = []
    for kind, count in runs:
        grid = _square(model.config, count) or next(sizes[Modality(kind)], None)
        if grid is None:
            return ()
        frames, rows, columns = grid
        if count != frames * rows * columns:
            return ()
        grids.append(grid)
    return tuple(grids)


def _grids(thw: Any, merge: int, frame_by_frame: bool = False) -> Iterator[tuple[int, int, int]]:
    """Qwen3-VL writes a time stamp before every frame of a video, so that each is a run of its own."""
    for frames, rows, columns in [] if thw is None else thw.tolist():
        runs, depth = (frames, 1) if frame_by_frame else (1, frames)
        yield from [(int(depth), int(rows) // merge, int(columns) // merge)] * int(runs)


def _square(config: Any, count: int) -> tuple[int, int, int] | None:
    """Families whose every picture is one square of tokens."""
    side = round(count**0.5)
    if config.model_type in ("llava", "gemma3") and side * side == count:
        return 1, side, side
    return None
