"""Visual tokens dropped and merged before the language model, by what the vision tower itself attends to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    apply_rotary_pos_emb_vision,
)

from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.evidence import Evidence, Prefilled
from kvferry.models.attention import Session, current_session, session
from kvferry.models.support import tied_heads
from kvferry.selection.eviction import kept_count

if TYPE_CHECKING:
    from kvferry.models.layout import Inputs

PAPER_SHARE = 10 / 64
"""Of the paper's smallest setting: 54 dominant and 10 contextual tokens."""
ROWS = 512
"""Query patches whose attention weights are held at once."""


@dataclass(frozen=True)
class TowerPruning:
    """Which visual tokens reach the language model at all.

    After VisionZip (S. Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv
    2412.04467): *dominant* tokens are those that the vision tower attends to most; of the others, evenly spaced
    targets stay as *contextual* tokens, each merged with those whose keys are most like its own. No question is
    needed, and every layer of the language model computes and caches only what stays, at its own positions.

    What differs from the paper, which works on CLIP: these towers have no class token, so a patch counts by the
    attention it receives from all patches of its frame in the last block, and a token by the mean of its patches; keys
    are compared before their rotation, mean over heads and patches; merging takes the mean of the projected
    embeddings, target included. (Public copies of the method's code were seen to add the others' mean to the target's
    features before the projector; the authors' own was not looked at.)

    Parameters
    ----------
    fraction : float
        Of each picture's visual tokens that stay, in (0, 1]; at least one.
    contextual : float
        Share of these that are merged from the others, in [0, 1). Of a picture that stays whole nothing is merged.
    """

    fraction: float
    contextual: float = PAPER_SHARE

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0 or not 0.0 <= self.contextual < 1.0:
            raise InputError(
                f"pruning to {self.fraction:g} of the visual tokens, {self.contextual:g} of them merged: the fraction "
                "is in (0, 1], and the merged share in [0, 1)"
            )


def check_tower(model: PreTrainedModel) -> Qwen2VisionTransformerPretrainedModel:
    """The tower whose attention can be read; what is refused, is refused by name.

    Raises
    ------
    UnsupportedModelError
        Another tower than Qwen2-VL's: its patches stand in another order, or its attention is elsewhere.
    """
    tower = getattr(getattr(model, "model", None), "visual", None)
    if type(tower) is not Qwen2VisionTransformerPretrainedModel:
        raise UnsupportedModelError(
            f"the vision tower of {model.config.model_type} cannot rank its tokens: only that of qwen2_vl is read; "
            "prune inside the language model, Pruning(layer, fraction), or compress after prefill"
        )
    return tower


@torch.inference_mode()
def ranked(
    attention: VisionAttention,
    hidden: torch.Tensor,
    bounds: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    patches: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that each token received in a block, and its key.

    Parameters
    ----------
    hidden : ``[p, hidden]``
        The block's normalised input, in the order of tokens.
    bounds : int ``[frames + 1]``
        Where frames begin and end; patches see their own frame.
    patches : int
        That make a token; they stand side by side.

    Returns
    -------
    received : float32 ``[tokens]``
        Mean over heads, the frame's queries and the token's patches.
    keys : float32 ``[tokens, d]``
        Before rotation; mean over heads and patches.
    """
    query, plain, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).permute(1, 0, 2, 3)
    query, key = (x.float().transpose(0, 1) for x in apply_rotary_pos_emb_vision(query, plain, *position_embeddings))
    received = torch.zeros(len(hidden), device=hidden.device)
    edges = bounds.tolist()
    for low, high in pairwise(edges):
        seen = key[:, low:high].transpose(1, 2)
        for start in range(low, high, ROWS):
            rows = query[:, start : min(start + ROWS, high)]
            weights = (rows @ seen * attention.scaling).softmax(-1)
            received[low:high] += weights.sum((0, 1)) / (attention.num_heads * (high - low))
    return received.view(-1, patches).mean(1), plain.float().mean(1).view(len(received) // patches, patches, -1).mean(1)


def merged(
    embeds: torch.Tensor, received: torch.Tensor, keys: torch.Tensor, pruning: TowerPruning
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stays of one picture.

    Parameters
    ----------
    embeds : ``[t, hidden]``
        As the language model would read them.
    received, keys : ``[t]``, ``[t, d]``
        See :func:`ranked`.

    Returns
    -------
    kept : int64 ``[k]``
        Indices of the tokens that stay, ascending.
    embeds : ``[k, hidden]``
        Theirs; contextual ones hold their group's mean.
    """
    total = len(embeds)
    count = kept_count(pruning.fraction, total)
    if count == total:
        return torch.arange(total, device=embeds.device), embeds
    targets = min(round(pruning.contextual * count), count - 1)
    dominant = received.topk(count - targets).indices
    kept = torch.zeros(total, dtype=torch.bool, device=embeds.device)
    kept[dominant] = True
    found = embeds.clone()
    if targets:
        others = (~kept).nonzero()[:, 0]
        chosen = torch.zeros(len(others), dtype=torch.bool, device=embeds.device)
        chosen[torch.arange(0, len(others), len(others) // targets, device=embeds.device)[:targets]] = True
        centres, rest = others[chosen], others[~chosen]
        unit = torch.nn.functional.normalize(keys, dim=-1)
        group = (unit[rest] @ unit[centres].T).argmax(1)
        sums = embeds[centres].float().index_add(0, group, embeds[rest].float())
        sizes = 1 + torch.bincount(group, minlength=targets)
        found[centres] = (sums / sizes[:, None]).to(found)
        kept[centres] = True
    where = kept.nonzero()[:, 0]
    return where, found[where]


@contextmanager
def _watching(tower: Qwen2VisionTransformerPretrainedModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What :func:`ranked` finds in the last block, of passes in this thread's session."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention, mine = tower.blocks[-1].attn, current_session()
    patches = tower.spatial_merge_size**2

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if current_session() is mine:
            hidden = args[0] if args else kwargs["hidden_states"]
            bounds, turned = kwargs["cu_seqlens"], kwargs["position_embeddings"]
            found.append(ranked(attention, hidden, bounds, turned, patches))

    handle = attention.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.inference_mode()
def zipped(
    model: PreTrainedModel, inputs: Inputs, layout: PromptLayout, pruning: TowerPruning
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the language model gets to read of a prompt.

    Returns
    -------
    kept : int64 ``[k]``
        Positions in the prompt: all text, and the visual tokens that stay.
    embeds : ``[k, hidden]``
        Theirs.

    Raises
    ------
    UnsupportedModelError
        See :func:`check_tower`; or videos.
    InputError
        Pictures come as embeddings, whose attention is gone.
    """
    tower = check_tower(model)
    if inputs.get("pixel_values_videos") is not None:
        raise UnsupportedModelError("frames of videos are not pruned by the tower; leave prune out")
    if inputs.get("pixel_values") is None:
        raise InputError("pruning by the tower needs the pictures themselves, not their embeddings; pass the pictures")
    device = model.device
    with _watching(tower) as found:
        pixels = inputs["pixel_values"].to(device, model.dtype)
        grids = inputs["image_grid_thw"].to(device)
        pictures = model.get_image_features(pixels, image_grid_thw=grids, return_dict=True).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"].to(device))[0]
    ((received, keys),) = found
    visual = torch.from_numpy(layout.visual).to(device)
    places, kept, start = visual.nonzero()[:, 0], ~visual, 0
    for picture in pictures:
        part = slice(start, start + len(picture))
        where, few = merged(picture, received[part], keys[part], pruning)
        embeds[places[part][where]] = few.to(embeds)
        kept[places[part][where]] = True
        start = part.stop
    if start != len(places):
        raise UnsupportedModelError(f"the tower made {start} tokens of pictures, where the prompt has {len(places)}")
    positions = kept.nonzero()[:, 0]
    return positions, embeds[positions]


def read_zipped(
    model: PreTrainedModel,
    inputs: Inputs,
    layout: PromptLayout,
    pruning: TowerPruning,
    *,
    length: int,
    fingerprint: str,
    scene: bool = False,
) -> Prefilled:
    """:func:`kvferry.models.prefill.read_prompt` with fewer visual tokens in every layer.

    The cache holds exactly the tokens that were computed; its layout is that of the whole prompt. It cannot be ranked
    again; a codec still applies (``full|int4``).

    Raises
    ------
    UnsupportedModelError, InputError
        See :func:`zipped`.
    """
    began = time.perf_counter()
    past = DynamicCache()
    with torch.inference_mode(), session(Session()):
        positions, embeds = zipped(model, inputs, layout, pruning)
        if scene:
            embeds, positions = embeds[positions < length], positions[positions < length]
        axes = torch.from_numpy(layout.positions).long().to(model.device)[:, positions]
        output = model(
            inputs_embeds=embeds[None],
            position_ids=axes if len(axes) == 1 else axes[:, None],
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
    held = positions[positions < length]
    layers = []
    for layer in past.layers:
        keys, values = (
            x[0, :, : len(held)].clone(memory_format=torch.contiguous_format) for x in (layer.keys, layer.values)
        )
        layers.append(LayerCache(keys, values, held.expand(len(keys), -1).contiguous()))
    cache = KVCache(
        tuple(layers), layout.head(length) if scene else layout, length, fingerprint=fingerprint,
        tied_heads=tied_heads(model), model_name=str(getattr(model, "name_or_path", "")),
    )  # fmt: skip
    return Prefilled(cache, Evidence(), output.logits[0, -1].float().clone(), time.perf_counter() - began)
