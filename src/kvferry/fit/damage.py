"""What quantization does to answers: any mixture of widths, asked on the same questions as the full cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kvferry.cache import KVCache, LayerCache
from kvferry.codecs.mixed import PARTS, ByPart, Widths
from kvferry.errors import InputError
from kvferry.evaluate.divergence import divergence
from kvferry.lazy import torch
from kvferry.recipe import compress, decompress

if TYPE_CHECKING:
    from kvferry.models import VLM

Plan = tuple[Widths, ...]
"""Widths of every layer."""
LONGEST = 16
"""Tokens of the full cache's own answer, where nobody gives the true one."""


class Question(Protocol):
    """What is asked: a sample of the testbed, or :class:`kvferry.analyze.Asked`."""

    @property
    def images(self) -> Sequence[Any]: ...

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str | None:
        """The true one; None stands for what the full cache says."""
        ...


@dataclass(frozen=True)
class Damage:
    """Answers of ``p`` caches to ``n`` questions, beside the full cache's.

    Parameters
    ----------
    full : bool ``[n]``
        Whether the full cache gives the answer.
    right : bool ``[n, p]``
        Whether each of the others does.
    divergence : float64 ``[n, p]``
        KL in nats from the full cache's next-token distribution, the mean over the answer's tokens and its end.
    sizes : int64 ``[n, p]``
        Bytes: whole bitstreams from :func:`compare`, payloads from :func:`measure`.
    vectors : int64 ``[n, layers, parts]``
        Tokens times heads of each of :data:`~kvferry.codecs.mixed.PARTS`.
    dims : int64 ``[layers, parts]``
        Numbers per vector.
    tokens : int64 ``[n]``
        In the cache.
    """

    full: npt.NDArray[np.bool_]
    right: npt.NDArray[np.bool_]
    divergence: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.int64]
    dims: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @property
    def losses(self) -> npt.NDArray[np.float64]:
        """Share of the full cache's accuracy that each of the others loses, ``[p]``; negative where it gains.

        Raises
        ------
        InputError
            There is no accuracy to lose.
        """
        if not self.full.any():
            raise InputError(
                "the full cache answers none of the questions, so that no loss can be measured; "
                "ask what the model can answer, or leave the answers out of --data"
            )
        losses: npt.NDArray[np.float64] = 1 - self.right.mean(0) / self.full.mean()
        return losses


class Probe:
    """One question, read once, whose answer can be asked for on top of any cache of it."""

    def __init__(self, vlm: VLM, asked: Question) -> None:
        context = getattr(asked, "context", None)
        self.prefilled = vlm.prefill(list(asked.images), asked.question, context=context)
        self.full: KVCache = self.prefilled.cache
        self._vlm = vlm
        self._layers: dict[tuple[int, Widths], tuple[LayerCache, int]] = {}
        if asked.answer is None:
            self._answer = list(vlm.resume(self.full, max_new_tokens=LONGEST).token_ids)
        else:
            self._answer = list(vlm.tokenizer(asked.answer, add_special_tokens=False)["input_ids"])
        self._logits = self._ask(self.full)
        said = self._logits.argmax(-1).tolist()
        self._wanted = said if asked.answer is None else [*self._answer, None]

    def ask(self, cache: KVCache) -> tuple[bool, float]:
        """Whether greedy decoding gives the answer, and the KL in nats from the full cache's distributions."""
        logits = self._ask(cache)
        return self._says_it(logits), divergence(self._logits, logits)

    @property
    def right(self) -> bool:
        """Whether the full cache gives the answer."""
        return self._says_it(self._logits)

    def mixture(self, plan: Plan) -> tuple[KVCache, int]:
        """The cache by way of its encoded layers, and the bytes of their payloads."""
        parts = [self._layer(index, widths) for index, widths in enumerate(plan)]
        return replace(self.full, layers=tuple(layer for layer, _ in parts)), sum(size for _, size in parts)

    def vectors(self) -> npt.NDArray[np.int64]:
        """Tokens times heads of every layer's parts."""
        visual = int(self.full.layout.visual[: self.full.length].sum())
        per_head = np.array([visual, self.full.length - visual] * 2)
        return np.array([layer.heads * per_head for layer in self.full])

    def dims(self) -> npt.NDArray[np.int64]:
        """Numbers per vector of every layer's parts."""
        return np.array([[t.shape[2] for t in (x.keys, x.keys, x.values, x.values)] for x in self.full])

    def _layer(self, index: int, widths: Widths) -> tuple[LayerCache, int]:
        if (index, widths) not in self._layers:
            layer, codec = self.full.layers[index], ByPart((widths,) * (index + 1))
            where = layer.positions, self.full.layout
            payload = codec.encode(index, layer.keys, layer.values, *where)
            key_shape, value_shape = ((x.shape[0], x.shape[1], x.shape[2]) for x in (layer.keys, layer.values))
            decoded = codec.decode(index, payload, key_shape, value_shape, *where)
            keys, values = (x.to(layer.keys.device) for x in decoded)
            self._layers[index, widths] = replace(layer, keys=keys, values=values), len(payload)
        return self._layers[index, widths]

    def _ask(self, cache: KVCache) -> torch.Tensor:
        return self._vlm.score(cache, self._answer)

    def _says_it(self, logits: torch.Tensor) -> bool:
        from kvferry.models.resume import stop_ids

        *said, end = logits.argmax(-1).tolist()
        *wanted, stop = self._wanted
        return said == wanted and (end in stop_ids(self._vlm.model) if stop is None else end == stop)


def measure(vlm: VLM, questions: Iterable[Question], plans: Sequence[Plan]) -> Damage:
    """Ask every question on top of every mixture of widths."""

    def caches(probe: Probe) -> Iterator[tuple[KVCache, int]]:
        return (probe.mixture(plan) for plan in plans)

    return _ask_all((Probe(vlm, asked) for asked in questions), caches)


def compare(vlm: VLM, questions: Iterable[Question], recipes: Sequence[str]) -> Damage:
    """Ask every question on top of what comes out of every recipe's bitstream."""

    def caches(probe: Probe) -> Iterator[tuple[KVCache, int]]:
        for recipe in recipes:
            blob = compress(probe.prefilled, recipe)
            yield decompress(blob), len(blob)

    return _ask_all((Probe(vlm, asked) for asked in questions), caches)


def uniform(layers: int, bits: int) -> Plan:
    """The same width everywhere."""
    return ((bits, bits, bits, bits),) * layers


def alone(layers: int, layer: int, parts: Iterable[int], bits: int) -> Plan:
    """16 bits everywhere but in some of one layer's parts."""
    chosen = set(parts)
    a, b, c, d = (bits if part in chosen else 16 for part in range(len(PARTS)))
    return tuple((a, b, c, d) if index == layer else (16, 16, 16, 16) for index in range(layers))


def _ask_all(probes: Iterable[Probe], caches: Callable[[Probe], Iterable[tuple[KVCache, int]]]) -> Damage:
    rows = []
    for probe in probes:
        asked = [(*probe.ask(cache), size) for cache, size in caches(probe)]
        rows.append((probe.right, *zip(*asked, strict=True), probe.vectors(), probe.full.length))
    if not rows:
        raise InputError("there is no question to measure on; ask for at least one")
    full, right, divergence, sizes, vectors, tokens = (np.array(column) for column in zip(*rows, strict=True))
    return Damage(full, right, divergence, sizes, vectors, probe.dims(), tokens)
