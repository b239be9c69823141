"""Carry on from a cache: kept tokens as a Transformers cache, and a greedy loop on top."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvferry.cache import KVCache, LayerCache, Modality, PromptLayout, Role
from kvferry.errors import FingerprintError, InputError
from kvferry.models.attention import Session, attached, session
from kvferry.models.cache_layers import KeptLayer, RaggedLayer
from kvferry.models.rotary import check_same_turn
from kvferry.models.support import kv_shapes, layer_windows, tied_heads


@dataclass(frozen=True)
class Continuation:
    """What a model said.

    Parameters
    ----------
    text : str
    token_ids : tuple of int
        Without the token that ended the answer.
    first_token_seconds : float
        From the call until the first token was known.
    seconds : float
        From the call until the end.
    cache : KVCache, optional
        The prompt and what was said, where that was to be kept: what the next turn of a conversation goes on from.
    """

    text: str
    token_ids: tuple[int, ...]
    first_token_seconds: float
    seconds: float
    cache: KVCache | None = None


def kept_layers(
    model: PreTrainedModel, caches: Sequence[KVCache], length: int, like: Sequence[torch.Tensor] = ()
) -> list[KeptLayer]:
    """The layers of a batch of caches; ``caches`` are not touched.

    ``length`` is that of the prompts with the padding on their left. ``like`` has per layer a tensor of the wanted
    device and dtype, by default the model's.
    """
    windows = layer_windows(model)
    for cache in caches:
        check_fit(model, cache)
    like = like or [torch.empty(0, dtype=model.dtype, device=model.device)] * len(windows)
    starts = [length - cache.length for cache in caches]
    return [
        (RaggedLayer if any(x.counts for x in layers) else KeptLayer)(layers, starts, length, window, wanted)
        for *layers, window, wanted in zip(*caches, windows, like, strict=True)
    ]


def check_fit(model: PreTrainedModel, cache: KVCache) -> None:
    """A cache may come from far away: shapes and token ids must be what this model can take."""
    wanted = kv_shapes(model)
    shapes = [(layer.heads, t.shape[2]) for layer in cache for t in (layer.keys, layer.values)]
    if shapes != [shape for shape in wanted for _ in range(2)]:
        raise FingerprintError(
            f"a cache of {len(cache.layers)} layers and (heads, channels) {sorted(set(shapes))} does not fit a model "
            f"of {len(wanted)} layers and {sorted(set(wanted))}; load the model that made it"
        )
    replace(cache, tied_heads=tied_heads(model))  # refuses heads that keep different tokens


def check_token_ids(model: PreTrainedModel, token_ids: Iterable[int]) -> None:
    """Refuse token ids outside the model's vocabulary: on a GPU they would end the process."""
    size = model.get_input_embeddings().num_embeddings
    for token in token_ids:
        if not 0 <= token < size:
            raise InputError(f"token id {token} is outside the model's vocabulary of {size}; use its own tokenizer")


class Decoder:
    """Feeds tokens on top of caches of one prompt, at their true positions and without any state in the model."""

    def __init__(self, model: PreTrainedModel, *caches: KVCache) -> None:
        self.model = model
        self._layout, self.length = caches[0].layout, caches[0].length
        self._reach = self._layout.next_position
        if any(x.length != self.length or x.layout.rope_delta != self._layout.rope_delta for x in caches):
            raise InputError("these caches stand for different prompts; feed each of them alone")
        self._caches = caches
        self._batch = len(caches)
        self._fed: list[int] = []
        self._kept = kept_layers(model, caches, self.length)
        self._past = Cache(layers=self._kept)

    def feed(
        self,
        token_ids: Sequence[int] | Sequence[Sequence[int]],
        logits: int = 1,
        outputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits after the last ``logits`` of the given tokens, float32 ``[caches, logits, vocabulary]``.

        The tokens are the same for all caches, or as many for each. ``outputs`` gets every layer's attention output,
        ``[caches, tokens, query_heads, d]``.

        Raises
        ------
        InputError
            A token outside the vocabulary.
        UnsupportedModelError
            The tokens reach to where the model turns keys otherwise than those in the cache.
        """
        rows = torch.tensor(token_ids, dtype=torch.long)
        rows = rows if rows.ndim == 2 else rows[None]
        check_token_ids(self.model, rows.flatten().tolist())
        device = self.model.device
        positions = positions_after(self._layout, self.length, rows.shape[1]).to(device)
        reach = max(self._reach, int(positions.max()) + 1)
        check_same_turn(self.model, self._reach, reach)
        self._reach = reach
        wide = positions[:, None].expand(-1, self._batch, -1)
        with torch.inference_mode(), session(Session(kept=self._kept, outputs=outputs)):
            output = self.model(
                input_ids=rows.expand(self._batch, -1).to(device),
                position_ids=wide[0] if len(wide) == 1 else wide,
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=logits,
            )
        self.length += rows.shape[1]
        self._fed += rows[0].tolist()
        scores: torch.Tensor = output.logits.float()
        return scores

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """What the layers of the one cache hold now."""
        return tuple(x.stored() for x in self._kept)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the caches only."""
        for layer in self._kept:
            layer.batch_select_indices(torch.tensor(rows))
        self._caches = tuple(self._caches[row] for row in rows)
        self._batch = len(rows)

    def cache(self, roles: Sequence[Role]) -> KVCache:
        """The one cache with all that was fed on top of it; ``roles`` are those of the tokens beyond its prompt."""
        (before,) = self._caches
        return longer_cache(before, self.layers, self._fed, roles)


def longer_cache(
    before: KVCache, layers: Sequence[LayerCache], fed: Sequence[int], roles: Sequence[Role]
) -> KVCache:
    """``before`` with all that was fed on top of it; ``roles`` are those of the tokens beyond its prompt."""
    layout = before.layout
    new = fed[len(layout) - before.length :]
    positions = positions_after(layout, len(layout), len(new)).numpy().astype(np.int32)
    longer = replace(
        layout,
        token_ids=np.concatenate([layout.token_ids, np.array(new, dtype=np.int32)]),
        modality=np.concatenate([layout.modality, np.full(len(new), Modality.TEXT, dtype=np.uint8)]),
        role=np.concatenate([layout.role, np.array(roles, dtype=np.uint8)]),
        positions=np.concatenate([layout.positions, positions], axis=1),
    )
    return replace(before, layers=tuple(layers), layout=longer, length=before.length + len(fed))


def positions_after(layout: PromptLayout, start: int, count: int) -> torch.Tensor:
    """Rotary positions of tokens ``start`` to ``start + count``, int64 ``[axes, count]``."""
    axes, n = layout.positions.shape
    written = layout.positions[:, start : start + count].astype(np.int64)
    beyond = np.arange(max(start, n), start + count) + layout.rope_delta
    return torch.from_numpy(np.concatenate([written, np.tile(beyond, (axes, 1))], axis=1))


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The token ids that end an answer, from the model's generation configuration."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def continue_from(
    model: PreTrainedModel,
    cache: KVCache,
    token_ids: Sequence[int] | None = None,
    max_new_tokens: int = 16,
    *,
    stop: Collection[int] | None = None,
    on_token: Callable[[int], None] | None = None,
    keep: Sequence[Role] | None = None,
) -> Continuation:
    """Greedy decoding on top of a cache; the cache is not changed.

    Parameters
    ----------
    token_ids : sequence of int, optional
        Fed first; by default the prompt tokens that are not in the cache yet.
    max_new_tokens : int
        At least 1.
    stop : collection of int, optional
        Tokens that end the answer; by default the generation configuration's.
    on_token : callable, optional
        Called with every token as soon as it is known.
    keep : sequence of Role, optional
        Keep the longer cache too, which ends with the last token said; these are the roles of what was fed and is not
        in the cache's prompt.

    Raises
    ------
    InputError
        Nothing to feed, or ``max_new_tokens`` below 1.
    """
    began = time.perf_counter()
    feed = cache.pending.tolist() if token_ids is None else [int(x) for x in token_ids]
    if not feed:
        raise InputError("this cache holds no question; pass one to get an answer")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    ends = stop_ids(model) if stop is None else stop
    said: list[int] = []
    first = 0.0
    with attached(model):
        decoder = Decoder(model, cache)
        for _ in range(max_new_tokens):
            token = int(decoder.feed(feed)[0, -1].argmax())
            first = first or time.perf_counter() - began
            if token in ends:
                break
            said.append(token)
            if on_token is not None:
                on_token(token)
            feed = [token]
        else:
            if keep is not None:
                decoder.feed(feed)
    longer = None if keep is None else decoder.cache([*keep, *[Role.CONTEXT] * len(said)])
    return Continuation("", tuple(said), first, time.perf_counter() - began, longer)
