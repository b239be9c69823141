"""What a model's visual tokens look like beside each other: the profile of the ``capsule`` codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from kvferry.analyze.source import Asked
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs.capsule import Capsule, CapsuleCoder
from kvferry.codecs.capsule_profile import CapsuleProfile, Network
from kvferry.codecs.grids import NEAREST, PLACE, cosines, pictures, plan
from kvferry.codecs.side import What
from kvferry.errors import InputError
from kvferry.evaluate.divergence import divergence
from kvferry.files import write_whole
from kvferry.fit.learn import History, Schedule, Stream, held_out, learn
from kvferry.fit.rows import TOKENS_OF_ANSWER, rows_of, slopes_of
from kvferry.fit.transform import root
from kvferry.lazy import torch

if TYPE_CHECKING:
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM

FEWEST = 10
"""Calibration prompts with pictures, two of which are held out."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Of the tokens, from which networks learn to rebuild the rest; one is drawn for every picture."""
TRIED = 0.4
"""The share at which errors are compared: the paper's 60 % smaller."""
JUDGED = 40
"""Held-out prompts whose answers decide between errors."""
FOLLOWED = 100
"""Prompts whose gradients are taken for the weighted error, at most."""
Errors = Literal["plain", "weighted"]
"""What is learned to be small: the squared error of keys and values, or as far as it moves the answer's logits."""
Measure = dict[What, torch.Tensor]
"""By side, float32 ``[layers, heads, dim, dim]``: an error ``e`` costs ``|e @ measure|^2``."""
_BOTH: tuple[What, What] = ("keys", "values")


class Example(NamedTuple):
    """The pictures of one prompt: rows, columns, and by side un-rotated keys and values, ``[layers, n, width]``."""

    pictures: tuple[tuple[int, int, dict[What, torch.Tensor]], ...]

    @property
    def nbytes(self) -> int:
        """In memory."""
        return sum(x.nbytes for *_, sides in self.pictures for x in sides.values())


@dataclass(frozen=True)
class Plan:
    """What to learn.

    Parameters
    ----------
    hidden : int
        Inner units of a network; 0 for twice a row's width.
    most : float
        Share of a picture's components that the profile holds.
    variants : bool
        Networks of values and components of keys as well.
    probes : int
        Random directions of the logits per prompt, for the weighted error.
    """

    hidden: int = 0
    most: float = 0.6
    variants: bool = False
    probes: int = 2
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if not 0 < self.most <= 1 or self.hidden < 0:
            raise InputError("--most is a share above 0 and up to 1, and a network has at least one inner unit")

    @property
    def mlp(self) -> tuple[What, ...]:
        """Sides with networks."""
        return _BOTH if self.variants else ("keys",)

    @property
    def pca(self) -> tuple[What, ...]:
        """Sides with components."""
        return _BOTH if self.variants else ("values",)


@dataclass(frozen=True)
class Fitted:
    """A profile and what was seen on the way.

    Parameters
    ----------
    kl : dict of error to float
        Mean KL of held-out answers at :data:`TRIED`, in nats, by error; ``chosen`` is the least.
    states : tuple of Path
        Of trainings that would be gone on with.
    """

    profile: CapsuleProfile
    kl: dict[Errors, float]
    chosen: Errors
    states: tuple[Path, ...]

    def write(self, out: Path) -> int:
        """The profile as a file; its bytes. What would be gone on with is removed."""
        blob = self.profile.to_bytes()
        write_whole(out, blob)
        for state in self.states:
            state.unlink(missing_ok=True)
        return len(blob)


class _Learned(torch.nn.Module):
    """:class:`Network` in the making; at first it adds nothing to the neighbours' mean."""

    def __init__(self, layers: int, width: int, hidden: int) -> None:
        super().__init__()
        inputs = NEAREST * width + PLACE
        self.first = torch.nn.Parameter(torch.randn(layers, inputs, hidden) / inputs**0.5)
        self.bias = torch.nn.Parameter(torch.zeros(layers, hidden))
        self.second = torch.nn.Parameter(torch.zeros(layers, hidden, width))
        self.offset = torch.nn.Parameter(torch.zeros(layers, width))

    def frozen(self) -> Network:
        """As it is now."""
        return Network(*(x.detach().cpu().clone() for x in (self.first, self.bias, self.second, self.offset)))

    def forward(self) -> Network:
        """To learn with."""
        return Network(self.first, self.bias, self.second, self.offset)


def fit_capsule(
    vlm: VLM, questions: Iterable[Asked], how: Plan, facts: dict[str, Any], out: Path, *,
    said: Callable[[str, History], None] = lambda name, history: None,
    looked: Callable[[str, int], None] = lambda what, of: None,
) -> Fitted:  # fmt: skip
    """Learn a profile by both :data:`Errors`, and keep the one whose held-out answers stay nearest to the full cache's.

    Parameters
    ----------
    out : Path
        Where it will be written; the states of trainings are kept beside it, as ``OUT.NAME.partial``.
    said, looked : callable
        Get the losses after every pass, and what is looked at, once for each of so many.

    Raises
    ------
    InputError
        Fewer than :data:`FEWEST` prompts have pictures, NaN, or a model whose family has no grid.
    TrainingError
        See :func:`kvferry.fit.learn.learn`.
    """
    asked = [x for x in questions if x.images]
    training, judged = held_out(asked, FEWEST, "a capsule (from prompts with pictures)")

    def make(one: Asked) -> Example:
        return example_of(vlm, _prefill(vlm, one).cache, one.name)

    streams = [Stream(x, make, lambda e: e.nbytes) for x in (training, judged)]
    means, deviations = statistics(_told(streams[0], looked, "looking at caches"))
    weights = measure_of(vlm, _told(training[:FOLLOWED], looked, "following gradients"), how.probes)
    histories: dict[str, History] = {}
    profiles: dict[Errors, CapsuleProfile] = {}
    states: list[Path] = []
    for error in ("plain", "weighted"):
        measure = weights if error == "weighted" else {side: torch.eye(vlm.head_dim) for side in _BOTH}
        measure = {side: _scaled(measure[side], deviations[side], vlm) for side in _BOTH}
        networks = {}
        for side in how.mlp:
            torch.manual_seed(0)
            width = vlm.kv_heads * vlm.head_dim
            network = _Learned(vlm.layers, width, how.hidden or 2 * width)
            name = f"{side}, {error}"
            loss = _loss(network, side, means[side], deviations[side], measure[side])
            states.append(out.with_name(f"{out.name}.{side}-{error}.partial"))
            about = {"fingerprint": vlm.fingerprint, "name": name, "data": facts.get("data", ""), "n": len(asked)}
            histories[name] = learn(
                network, loss, streams[0], streams[1], how.schedule, about=about,
                partial=states[-1], said=partial(said, name),
            )  # fmt: skip
            networks[side] = network.frozen()
        bases = components(streams[0], means, measure, how)
        shape = (vlm.layers, vlm.kv_heads, vlm.head_dim)
        profiles[error] = CapsuleProfile(vlm.fingerprint, means, deviations, networks, bases, vlm.rotary, shape, facts)
    kl = answers_moved(vlm, _told(judged[:JUDGED], looked, "asking"), profiles)
    chosen: Errors = min(kl, key=kl.__getitem__)
    grid = list(profiles[chosen].bases["values"].shape[1:3])
    learned = {
        "losses": {name: history.as_dict() for name, history in histories.items()},
        "held_out_kl": {name: round(x, 6) for name, x in kl.items()}, "error": chosen, "largest_grid": grid,
        "prompts": {"training": len(training), "held_out": len(judged)},
    }  # fmt: skip
    return Fitted(replace(profiles[chosen], facts=facts | learned), kl, chosen, tuple(states))


def _told(items: Iterable[Any], looked: Callable[[str, int], None], what: str) -> Iterator[Any]:
    of = len(items)  # type: ignore[arg-type]
    for item in items:
        yield item
        looked(what, of)


def _prefill(vlm: VLM, asked: Asked) -> Prefilled:
    return vlm.prefill(asked.images, asked.question, context=asked.context)


def example_of(vlm: VLM, cache: KVCache, name: str) -> Example:
    """The pictures of a whole cache. Raises as :func:`kvferry.fit.rows.rows_of` and ``codecs.grids.pictures``."""
    rows, index = rows_of(vlm, cache, name)
    both = rows.view(len(rows), vlm.layers, vlm.kv_heads, 2, vlm.head_dim)
    at = np.full(len(cache.layout), -1)
    at[index] = np.arange(len(index))
    found = []
    for height, width, tokens in pictures(cache.layout):
        mine = both[torch.from_numpy(at[tokens])].permute(3, 1, 0, 2, 4).flatten(3)
        sides: dict[What, torch.Tensor] = {"keys": mine[0].bfloat16(), "values": mine[1].bfloat16()}
        found.append((height, width, sides))
    return Example(tuple(found))


def statistics(examples: Iterable[Example]) -> tuple[dict[What, torch.Tensor], dict[What, torch.Tensor]]:
    """Means and standard deviations of every layer's channels, by side, float32 ``[layers, width]``."""
    count, totals = 0, dict[What, torch.Tensor]()
    for example in examples:
        for *_, sides in example.pictures:
            count += sides["keys"].shape[1]
            for side, x in sides.items():
                more = torch.stack([x.double().sum(1), x.double().square().sum(1)])
                totals[side] = totals[side] + more if side in totals else more
    means = {side: total[0] / count for side, total in totals.items()}
    spread = {side: (total[1] / count - means[side].square()).clamp(min=1e-12).sqrt() for side, total in totals.items()}
    return {side: x.float() for side, x in means.items()}, {side: x.float() for side, x in spread.items()}


def measure_of(vlm: VLM, asked: Iterable[Asked], probes: int, seed: int = 0) -> Measure:
    """Square roots of the Gauss-Newton matrix of the answers' logits, by layer and head, of visual tokens."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(vlm.layers, vlm.kv_heads, 2, vlm.head_dim, vlm.head_dim, dtype=torch.float64)
    for one in asked:
        cache = _prefill(vlm, one).cache
        _, index = rows_of(vlm, cache, one.name)
        slopes = slopes_of(vlm, cache, cache, index, probes, generator, one.name)
        mine = slopes[:, torch.from_numpy(cache.layout.visual[index])].flatten(0, 1)
        g = mine.view(len(mine), vlm.layers, vlm.kv_heads, 2, vlm.head_dim)
        total += torch.einsum("nlhsi,nlhsj->lhsij", g, g).double()
    roots = root(total.flatten(0, 2) / max(float(total.diagonal(dim1=3, dim2=4).mean()), 1e-300))
    keys, values = roots.view(total.shape).unbind(2)
    return {"keys": keys, "values": values}


def _scaled(measure: torch.Tensor, deviation: torch.Tensor, vlm: VLM) -> torch.Tensor:
    """So that the mean of every layer costs as much as its tokens' variance does: losses are shares of that."""
    layers, heads, dim = vlm.layers, vlm.kv_heads, vlm.head_dim
    wide = measure.expand(layers, heads, dim, dim)
    cost = (wide.square().sum(3) * deviation.view(layers, heads, dim).square()).sum((1, 2)).mean()
    return wide / cost.clamp(min=1e-12).sqrt()


def _loss(
    network: _Learned, side: What, mean: torch.Tensor, deviation: torch.Tensor, measure: torch.Tensor
) -> Callable[[Example], torch.Tensor]:
    """Of one prompt: the error of left-out tokens at a share drawn for every picture, as a share of their variance."""
    layers, heads, dim, _ = measure.shape

    def loss(example: Example) -> torch.Tensor:
        found = []
        for rows, columns, sides in example.pictures:
            share = SHARES[int(torch.randint(len(SHARES), ()))]
            how = plan(rows, columns, max(1, round(share * rows * columns)))
            x = (sides[side].float() - mean[:, None]) / deviation[:, None]
            rebuilt = network().rebuilt(x[:, how.kept], how, slice(0, layers))
            off = ((rebuilt - x[:, how.absent]) * deviation[:, None]).view(layers, -1, heads, dim)
            found.append(torch.einsum("lnhd,lhde->lnhe", off, measure).square().sum((2, 3)).mean())
        return torch.stack(found).mean()

    return loss


def components(
    examples: Iterable[Example], means: dict[What, torch.Tensor], measure: Measure, how: Plan
) -> dict[What, torch.Tensor]:
    """Principal axes along a picture's tokens, turned into cosines: of the channels, as far as their errors cost."""
    grids = [(rows, columns) for example in examples for rows, columns, _ in example.pictures]
    most = max(rows for rows, _ in grids), max(columns for _, columns in grids)
    grams: dict[What, torch.Tensor] = {}
    for example in examples:
        for rows, columns, sides in example.pictures:
            for side in how.pca:
                layers, heads, dim, _ = measure[side].shape
                off = (sides[side].float() - means[side][:, None]).view(layers, -1, heads, dim)
                off = torch.einsum("lnhd,lhde->lnhe", off, measure[side]).reshape(layers, rows, columns, -1)
                waves = torch.einsum("ru,lrcx,cv->luvx", cosines(rows).float(), off, cosines(columns).float())
                wide = torch.zeros(layers, *most, waves.shape[3])
                wide[:, :rows, :columns] = waves
                flat = wide.flatten(1, 2)
                more = (flat @ flat.mT).double()
                grams[side] = grams[side] + more if side in grams else more
    held = max(1, round(how.most * most[0] * most[1]))
    axes = {side: torch.linalg.eigh(gram).eigenvectors.flip(2)[:, :, :held].float() for side, gram in grams.items()}
    return {side: x.reshape(len(x), *most, held) for side, x in axes.items()}


def answers_moved(vlm: VLM, asked: Iterable[Asked], profiles: dict[Errors, CapsuleProfile]) -> dict[Errors, float]:
    """Mean KL of answers from the full cache's, in nats, with :data:`TRIED` of the visual tokens carried exactly."""
    capsule, moved = Capsule(TRIED, codec="bf16"), {name: list[float]() for name in profiles}
    for one in asked:
        full = _prefill(vlm, one).cache
        answer = vlm.resume(full, max_new_tokens=TOKENS_OF_ANSWER).token_ids
        reference = vlm.score(full, answer)
        for name, profile in profiles.items():
            logits = vlm.score(carried(full, capsule, profile), answer)
            moved[name].append(divergence(reference, logits))
    return {name: float(np.mean(values)) for name, values in moved.items()}


def carried(cache: KVCache, capsule: Capsule, profile: CapsuleProfile) -> KVCache:
    """What arrives of a cache in a capsule of this profile, which need not be in a file."""
    coder = CapsuleCoder(capsule, cache.fingerprint, profile, bytes(4))
    layers: Sequence[LayerCache] = [
        LayerCache(
            *coder.decode(
                i,
                coder.encode(i, x.keys.cpu(), x.values.cpu(), x.positions.cpu(), cache.layout),
                (x.keys.shape[0], x.keys.shape[1], x.keys.shape[2]),
                (x.values.shape[0], x.values.shape[1], x.values.shape[2]),
                x.positions.cpu(),
                cache.layout,
            ),
            x.positions,
        )
        for i, x in enumerate(cache)
    ]
    return replace(cache, layers=tuple(layers))
