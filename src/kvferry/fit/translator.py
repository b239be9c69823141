"""What a small model's cache is in a larger model's terms: :class:`kvferry.translator.Translator`.

First a ridge regression in closed form, then a small network beside it, which learns to reconstruct keys and values;
tokens that are far from the mean one count more, since most of a picture is background. Where wanted, both then go on
learning by what the large model says on top of the translation: the Kullback-Leibler divergence from what it says on
its own full cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.data import Asked
from kvferry.errors import FingerprintError, InputError, UnsupportedModelError
from kvferry.fit.learn import History, Schedule, Stream, learn
from kvferry.lazy import torch
from kvferry.translator import Shapes, Translator, apply, layers_of, rows_of, turns, width

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvferry.cache import KVCache
    from kvferry.models import VLM
    from kvferry.models.translated import Asking

FEWEST = 20
"""Scenes, so that a fifth of them judges."""
RIDGE = 1e-4
"""Of the mean square of a standardised input, added to every one."""
TOKENS_OF_ANSWER = 16
AT_ONCE = 5
"""Questions on a scene that a step learns from."""
RECONSTRUCTION = 0.5
"""Weight of the keys' and values' error beside the divergence of the answer."""


@dataclass(frozen=True)
class Scene:
    """Pictures, and questions that are asked of them, each with its answer where that is known."""

    name: str
    images: tuple[Any, ...]
    context: str | None
    questions: tuple[tuple[str, str | None], ...]


def scenes_of(questions: Iterable[Asked]) -> Iterator[Scene]:
    """Questions on the same pictures that follow each other, together; those without a picture are left out."""
    for _, several in groupby((x for x in questions if x.images), key=lambda x: x.group):
        first, *others = several
        asked = tuple((x.question, x.answer) for x in (first, *others))
        yield Scene(first.name, first.images, first.context, asked)


def drawn_scenes(split: str, n: int) -> list[Scene]:
    """Scenes of the testbed with one question of every kind that they have."""
    from kvferry.testbed.data import samples
    from kvferry.testbed.questions import KINDS, ask, ask_pair

    found = []
    for one in samples(split, n):
        rng = np.random.default_rng((n, one.index))
        if len(one.scenes) > 1:
            more = [ask_pair(rng, (one.scenes[0], one.scenes[1])) for _ in range(3)]
        else:
            more = [ask(rng, one.scenes[0], kind) for kind in KINDS if kind not in ("pair", "lookup", one.kind)]
        asked = [(one.question, one.answer), *((x.text, x.answer) for x in more if x is not None)]
        found.append(Scene(f"{split} {one.index}", tuple(one.images), None, tuple(asked)))
    return found


@dataclass(frozen=True)
class Example:
    """One scene as both models have it.

    Parameters
    ----------
    rows : float16 ``[k, p]``
        Of the small model, see :func:`kvferry.translator.rows_of`; ``k`` visual tokens.
    wanted : float16 ``[k, q]``
        Of the large one.
    index : int64 ``[k]``
        Where they stand in the prompt.
    where : int64 ``[axes, k]``
    asked : tuple of Asking
    said : tuple of float16 ``[answer + 1, vocabulary]``
        Logarithms of the large model's probabilities on its own cache.
    """

    rows: torch.Tensor
    wanted: torch.Tensor
    index: torch.Tensor
    where: torch.Tensor
    asked: tuple[Asking, ...]
    said: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """In memory."""
        return sum(x.nbytes for x in (self.rows, self.wanted, self.index, self.where, *self.said))


class Pair:
    """Two models whose prompts are the same, and what is learned between them.

    Raises
    ------
    FingerprintError
        They split words or pictures differently.
    UnsupportedModelError
        One of them turns keys by no fixed rotation.
    InputError
        They are one and the same.
    """

    def __init__(self, small: VLM, large: VLM) -> None:
        if small.prompt_fingerprint != large.prompt_fingerprint:
            raise FingerprintError(
                f"{small.name} and {large.name} split words or pictures differently (tokenizer, template or patch "
                "grid), so that their tokens have no counterparts; take two models of one family"
            )
        if small.fingerprint == large.fingerprint:
            raise InputError(f"{small.name} and {large.name} are the same model, whose caches need no translation")
        if not large.has_vision:
            raise UnsupportedModelError(f"{large.name} reads text only, which needs no translation; use mode prompt")
        self.small, self.large = small, large
        self.rotary = turns(small.rotary), turns(large.rotary)
        self.shapes: tuple[Shapes, Shapes] = small.bounds.shapes, large.bounds.shapes

    def example(self, scene: Scene, ask: bool = True) -> Example:
        """What both models make of a scene, and where wanted (``ask``) of its questions.

        Raises
        ------
        InputError
            A model's keys or values are no numbers, or the scene holds no picture.
        """
        from kvferry.models.translated import Asking, answer_logits

        here, there = (x.prefill(scene.images, context=scene.context).cache for x in (self.small, self.large))
        layout = there.layout
        if not np.array_equal(here.layout.token_ids, layout.token_ids):
            raise InputError(f"{scene.name}: the two models read different prompts; take two of one family")
        index = torch.from_numpy(np.flatnonzero(layout.visual[: there.length]))
        if not len(index):
            raise InputError(f"{scene.name} holds no picture, so that there is nothing to translate; leave it out")
        where = torch.from_numpy(layout.positions[:, index.numpy()].astype(np.int64))
        both = [_rows(cache, way, index, where) for cache, way in zip((here, there), self.rotary, strict=True)]
        if not all(bool(x.isfinite().all()) for x in both):
            raise InputError(
                f"{scene.name}: keys or values hold NaN or infinity, most likely because float16 overflowed; load the "
                "models with --dtype bfloat16 or float32"
            )
        asked = []
        for question, answer in scene.questions if ask else ():
            prompt = self.large.prompt_of(scene.images, question, None, scene.context)[1]
            said = self.large.tokenizer(answer, add_special_tokens=False)["input_ids"] if answer else ()
            said = said or self.large.resume(there, question, max_new_tokens=TOKENS_OF_ANSWER).token_ids
            asked.append(Asking(prompt, tuple(said)))
        told: list[torch.Tensor] = []
        if asked:
            own = layers_of(both[1], self.shapes[1], self.rotary[1], where)
            with torch.no_grad():
                told = answer_logits(self.large.model, own, index, asked)
        logs = tuple(x.log_softmax(-1).cpu().half() for x in told)
        return Example(both[0].half(), both[1].half(), index, where, tuple(asked), logs)


def _rows(cache: KVCache, rotary: Sequence[Any], index: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    layers = [x.take(index.to(x.positions.device).expand(x.heads, -1)) for x in cache]
    return rows_of(layers, rotary, where.to(layers[0].keys.device)).cpu()


class Regression:
    """Sums over tokens, from which ridge regression follows in closed form; memory does not grow with the tokens."""

    def __init__(self, p: int, q: int) -> None:
        self._n = 0
        self._x, self._y, self._yy = (torch.zeros(k, dtype=torch.float64) for k in (p, q, q))
        self._xx, self._xy = torch.zeros(p, p, dtype=torch.float64), torch.zeros(p, q, dtype=torch.float64)

    def add(self, rows: torch.Tensor, wanted: torch.Tensor) -> None:
        """Tokens ``[k, p]`` and what they should become, ``[k, q]``."""
        x, y = rows.double(), wanted.double()
        self._n += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._yy += y.square().sum(0)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def tensors(self, shapes: Shapes, hidden: int) -> dict[str, torch.Tensor]:
        """Those of a :class:`~kvferry.translator.Translator` whose network says nothing yet.

        Outputs have one scale for each layer's keys and one for its values, so that no faint channel weighs as much as
        a loud one.
        """
        mean_in, mean_out = self._x / self._n, self._y / self._n
        xx = self._xx / self._n - mean_in[:, None] * mean_in
        scale_in = xx.diagonal().clamp(min=1e-12).sqrt()
        square = (self._yy / self._n - mean_out.square()).clamp(min=1e-12)
        sizes = [heads * dim for heads, dim in shapes for _ in range(2)]
        scale_out = torch.cat([part.mean().sqrt().expand(len(part)) for part in torch.split(square, sizes)])
        xy = (self._xy / self._n - mean_in[:, None] * mean_out) / scale_in[:, None] / scale_out
        correlation = xx / scale_in[:, None] / scale_in
        linear = torch.linalg.solve(correlation + RIDGE * torch.eye(len(xx), dtype=xx.dtype), xy)
        generator = torch.Generator().manual_seed(0)
        p, q = linear.shape
        found = {
            "mean_in": mean_in, "scale_in": scale_in, "mean_out": mean_out, "scale_out": scale_out, "linear": linear,
            "offset": torch.zeros(q), "into": torch.randn(p, hidden, generator=generator) / p**0.5,
            "into_offset": torch.zeros(hidden), "out": torch.zeros(hidden, q),
        }  # fmt: skip
        return {name: x.float() for name, x in found.items()}


LEARNED = ("linear", "offset", "into", "into_offset", "out")


class Network(torch.nn.Module):
    """The numbers of a translator that are learned beyond the regression."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.fixed = {name: x for name, x in tensors.items() if name not in LEARNED}
        self.learned = torch.nn.ParameterDict({name: torch.nn.Parameter(tensors[name].clone()) for name in LEARNED})

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them."""
        return self.fixed | dict(self.learned.items())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[k, p]`` to ``[k, q]``."""
        return apply(self.tensors, rows)


def divergence(pair: Pair, network: Network, example: Example, at_once: int = AT_ONCE) -> torch.Tensor:
    """What the answers lose, and a little of what keys and values lose; on all questions where nothing is learned."""
    from kvferry.models.translated import answer_logits

    rows = network(example.rows.float())
    count = len(example.asked)
    some = torch.randperm(count)[:at_once].tolist() if network.training else list(range(count))
    pairs = layers_of(rows, pair.shapes[1], pair.rotary[1], example.where)
    told = answer_logits(pair.large.model, pairs, example.index, [example.asked[i] for i in some])
    wanted = torch.cat([example.said[i] for i in some]).float()
    found = torch.cat([x.log_softmax(-1).cpu() for x in told])
    lost = (wanted.exp() * (wanted - found)).sum(-1).mean()
    return lost + RECONSTRUCTION * error(network, rows, example)


def error(network: Network, rows: torch.Tensor, example: Example) -> torch.Tensor:
    """Mean square error in units of the outputs' scales; tokens that are far from the mean one count more."""
    fixed = network.fixed
    wanted = example.wanted.float()
    off = ((wanted - fixed["mean_out"]) / fixed["scale_out"]).square().mean(1)
    wrong = ((rows - wanted) / fixed["scale_out"]).square().mean(1)
    return (off * wrong).sum() / off.sum()


def fit_translator(
    pair: Pair,
    training: Sequence[Scene],
    judged: Sequence[Scene],
    hidden: int,
    schedules: tuple[Schedule, Schedule | None],
    facts: dict[str, Any],
    partial: Path | None = None,
    said: Callable[[str, History], None] = lambda stage, history: None,
    seen: Callable[[Stream[Scene, Example]], Iterable[Example]] = lambda stream: stream,
) -> Translator:
    """Learn a translator of ``pair``; see :func:`kvferry.fit.learn.learn` for what is refused.

    Parameters
    ----------
    schedules
        Of the reconstruction alone, then of what the answers lose (None: not learned from).
    seen : callable
        Around the first pass over all examples, for a progress bar.
    """
    if len(training) + len(judged) < FEWEST:
        raise InputError(
            f"a translator needs at least {FEWEST} calibration prompts with pictures, not "
            f"{len(training) + len(judged)}; give it more (--n)"
        )
    ask = schedules[1] is not None
    streams = [Stream(scenes, lambda x: pair.example(x, ask), lambda x: x.nbytes) for scenes in (training, judged)]
    regression = Regression(width(pair.shapes[0]), width(pair.shapes[1]))
    for example in seen(streams[0]):
        regression.add(example.rows, example.wanted)
    network = Network(regression.tensors(pair.shapes[1], hidden))
    for weight in pair.large.model.parameters():
        weight.requires_grad_(False)
    made: dict[str, Any] = {}
    losses = {
        "reconstruction": lambda x: error(network, network(x.rows.float()), x),
        "answers": lambda x: divergence(pair, network, x),
    }
    about = {"source": pair.small.fingerprint, "target": pair.large.fingerprint, "hidden": hidden} | {
        "scenes": [len(training), len(judged)],
        "first": [scenes[0].name for scenes in (training, judged)],
    }
    for (stage, loss), schedule in zip(losses.items(), schedules, strict=True):
        if schedule is None:
            continue
        mine = None if partial is None else partial.with_name(f"{partial.name}-{stage}")
        told = lambda history, stage=stage: said(stage, history)  # noqa: E731
        kind = about | {"stage": stage}
        history = learn(network, loss, streams[0], streams[1], schedule, about=kind, partial=mine, said=told)
        made[stage] = history.as_dict()
    tensors = {name: x.detach() for name, x in network.tensors.items()}
    return Translator(
        pair.small.fingerprint, pair.large.fingerprint, pair.large.prompt_fingerprint, *pair.shapes,
        rotary=tuple(pair.rotary[0]), tensors=tensors, facts=facts | {"hidden": hidden, "losses": made},
    )  # fmt: skip


def nbytes(shapes: Shapes, target: Shapes, hidden: int) -> int:
    """Bytes of a file, by formula."""
    p, q = width(shapes), width(target)
    return 2 * (p * q + hidden * (p + q + 1) + q) + 8 * (p + q)
