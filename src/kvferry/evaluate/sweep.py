"""Recipes x questions -> JSON lines: one line per question and protocol, paired over all recipes by construction.

A question is prefilled once per protocol; every recipe then compresses that same cache to real bytes, decodes them
and answers. A file can be continued: questions it already holds are skipped.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from kvferry.checkpoint import known_as
from kvferry.errors import BudgetError, InputError
from kvferry.evaluate.divergence import divergence, output_error
from kvferry.evaluate.forced import forced_logits, says
from kvferry.evaluate.pool import begin, in_processes, written
from kvferry.evaluate.ray_pool import over_ray
from kvferry.evaluate.records import Line, Outcome, Protocol
from kvferry.recipe import Recipe, decompress, write_frames
from kvferry.selection.full import Full
from kvferry.summary import summarise_cache

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from kvferry.cache import KVCache
    from kvferry.evidence import EvidenceRequest, Prefilled
    from kvferry.models import VLM
    from kvferry.selection import Selection
    from kvferry.testbed import Sample

T = TypeVar("T")
Check = Literal["generate", "forced"]
Apply = Literal["post_hoc", "construction"]

PROXY_QUESTION = "how many shapes are there?"
"""Stands in for the unknown question in protocol B. Fixed in advance, never chosen by its score."""

NEEDS_QUESTION = ("question", "post_vision")
"""Rows that a scene without a question does not have: protocol B scores them with a proxy and with an oracle. A window
exists without a question too, so window scorers run all three ways."""


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Parameters
    ----------
    model : str
        Anything ``kvferry.load`` takes.
    recipes : tuple of str
        Where a policy must keep more of a prompt than a recipe's fraction, the smallest that works is taken there; the
        bytes are those.
    protocols : tuple of {"A", "B"}
    split : str
        Of the testbed's questions.
    n, start : int
        Which questions.
    check : {"generate", "forced"}
        How an answer is judged: generate greedily and compare texts, or feed the true answer and see whether every
        token of it, and the end after it, is the most likely one. Greedy decoding says the true answer exactly when
        that holds, so where one text has one tokenisation (the testbed's words) the second is the same, in one pass.
    kinds : tuple of str
        Which kinds of question take turns; empty for all of them.
    apply : {"post_hoc", "construction"}
        Evict from the finished cache, or prefill a second time with the dropped tokens hidden from the first row on.
        One sweep does one of the two, so that no table mixes them.
    jpeg : tuple of int
        Qualities at which the pictures are also sent as they are, and the cloud prefills what it decodes. Bytes are
        those of the files alone. Not in protocol B, which would be the same.
    embeds : tuple of str
        Codecs in which the projector's visual embeddings are also sent (mode ``embeds``), and the cloud prefills the
        language model. Bytes are those of the embeddings alone.
    device, dtype : str
        Of the model; see :func:`kvferry.load`. Empty for the CPU.
    """

    model: str
    recipes: tuple[str, ...]
    protocols: tuple[Protocol, ...] = ("A", "B")
    split: str = "test"
    n: int = 500
    start: int = 0
    max_new_tokens: int = 12
    check: Check = "generate"
    kinds: tuple[str, ...] = ()
    apply: Apply = "post_hoc"
    jpeg: tuple[int, ...] = ()
    embeds: tuple[str, ...] = ()
    device: str = ""
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError("a sweep needs at least one question (--n)")
        object.__setattr__(self, "recipes", tuple(dict.fromkeys(str(Recipe.parse(r)) for r in self.recipes)))
        if self.apply == "construction" and "B" in self.protocols:
            raise InputError("construction-time selection needs the question before the cache is built: --protocols A")


def grid(
    selections: Sequence[str],
    fractions: Sequence[float],
    codecs: Sequence[str],
    lossless: str = "zstd",
    *,
    budgets: Sequence[str] = ("uniform",),
    modalities: Sequence[str] = ("uniform",),
) -> tuple[str, ...]:
    """Every selection x fraction x budget x modality policy x codec; ceiling and floor once per codec."""
    tail = f"|{lossless}" if lossless else ""
    ends = [f"{s}|{c}{tail}" for s in ("full", "none") for c in codecs]
    ways = [
        "".join(f",{key}={value}" for key, value in (("budget", b), ("modality", m)) if value != "uniform")
        for b, m in product(budgets, modalities)
    ]
    kept = [f for f in fractions if f < 1]
    middle = [f"{s}@{f:g}{way}|{c}{tail}" for s, way, f, c in product(selections, ways, kept, codecs)]
    return tuple(ends + middle)


def provenance(model: VLM | None = None) -> dict[str, Any]:
    """Where a result comes from: commit, versions, machine, and model where there is one."""
    import torch
    import transformers

    import kvferry

    return {
        "kvferry": kvferry.__version__,
        "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno", "--", ".") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **({} if model is None else _identity(model)),
    }


def _identity(model: VLM) -> dict[str, Any]:
    return {
        "model": known_as(model.name),
        "fingerprint": model.fingerprint,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "architecture": type(model.model).__name__,
        "parameters": sum(x.numel() for x in model.model.parameters()),
    }


def _git(*words: str) -> str:
    """Output of a git command in the source tree; empty where there is none."""
    try:
        here = Path(__file__).parents[1]
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def run_sample(vlm: VLM, sample: Sample, sweep: Sweep, protocol: Protocol) -> Line:
    """Prefill one question, then compress, decompress and answer once per recipe."""
    from kvferry.overlay import jpeg_bytes

    full: Prefilled | None = None
    caches: dict[str, KVCache] = {}
    sizes: dict[str, int] = {}
    chosen: dict[str, float | None] = {}
    scene = partial(vlm.prefill, sample.images)
    for row, prefilled in prefills(scene, sample.question, sweep.recipes, protocol, PROXY_QUESTION):
        full = full or prefilled
        recipe = Recipe.parse(row.split(" ")[0])
        if sweep.apply == "construction" and not isinstance(recipe.selection, Full):
            kept = with_room(partial(_select, prefilled), recipe)
            chosen[row] = kept.summary(prefilled.cache).scored_share
            prefilled = vlm.prefill(sample.images, sample.question, construct=kept)
            recipe = Recipe(Full(), codec=recipe.codec, lossless=recipe.lossless)
        caches[row], sizes[row], scored = with_room(partial(carry, prefilled), recipe)
        chosen.setdefault(row, scored)
    if full is None:
        raise InputError("a sweep needs at least one recipe")
    if protocol == "A":
        for row, blob_size, pictures in pictures_sent(vlm, sample.images, sweep.jpeg, sweep.embeds):
            caches[row], sizes[row] = vlm.prefill(pictures, sample.question).cache, blob_size
    judged = _judge(vlm, caches, None if protocol == "A" else sample.question, sample.answer, sweep)
    return Line(
        index=sample.index,
        kind=sample.kind,
        protocol=protocol,
        bf16_bytes=full.cache.full_bf16_bytes,
        image_bytes=sum(len(jpeg_bytes(image)) for image in sample.images),
        tokens=len(full.cache.layout),
        length=full.cache.length,
        outcomes={
            row: Outcome(int(right), sizes[row], *far)._replace(scored=chosen.get(row))
            for row, (right, far) in judged.items()
        },
    )


class Carried(NamedTuple):
    """What arrives of a cache, in how many bytes, and what share of its tokens the scorer chose."""

    cache: KVCache
    bytes: int
    scored: float | None


def carry(source: Prefilled, recipe: Recipe) -> Carried:
    """Compress and decompress; raises as :func:`kvferry.compress` does."""
    kept, importance = recipe.rank(source)
    blob = b"".join(write_frames(kept, recipe, importance))
    scored = summarise_cache(kept).scored_share
    return Carried(decompress(blob), len(blob), None if scored is None else round(scored, 4))


def pictures_sent(
    vlm: VLM, images: Sequence[Image], jpeg: Sequence[int], embeds: Sequence[str]
) -> Iterator[tuple[str, int, list[Any]]]:
    """Of every way of sending the pictures themselves: its row, its bytes, and what the cloud then prefills."""
    from kvferry.modes.embeds import EmbedsMode, pack_embeds, unpack_embeds
    from kvferry.overlay import jpeg_bytes
    from kvferry.pictures import open_picture

    for quality in jpeg:
        files = [jpeg_bytes(image, quality) for image in images]
        yield f"image:{quality}", sum(map(len, files)), [open_picture(x) for x in files]
    seen = vlm.look(list(images)) if embeds else []
    for name in embeds:
        codec = EmbedsMode.parse(name).codec
        packed = [pack_embeds(picture, codec) for picture in seen]
        hidden = vlm.model.config.get_text_config(decoder=True).hidden_size
        merge = int(getattr(vlm.image_processor, "merge_size", 1))
        yield f"embeds:{name}", sum(map(len, packed)), [unpack_embeds(x, codec, hidden, merge) for x in packed]


def _select(source: Prefilled, recipe: Recipe) -> Selection:
    return recipe.select(source)


def with_room(work: Callable[[Recipe], T], recipe: Recipe) -> T:
    """``work(recipe)``; with the smallest fraction that works where its own leaves no room for what must stay."""
    try:
        return work(recipe)
    except BudgetError as error:
        if error.smallest is None:
            raise
        return work(replace(recipe, fraction=error.smallest))


def _judge(
    vlm: VLM, caches: dict[str, KVCache], question: str | None, truth: str, sweep: Sweep
) -> dict[str, tuple[bool, tuple[float, ...]]]:
    """Whether the model says ``truth`` on top of each cache, and how far it is from the full one: KL, attention."""
    from kvferry.testbed import exact_match

    if sweep.check == "generate":
        most = sweep.max_new_tokens
        said = {r: vlm.answer(c, question, max_new_tokens=most) for r, c in caches.items()}
        return {r: (exact_match(text, truth), ()) for r, text in said.items()}
    outputs: dict[str, list[torch.Tensor]] = {}
    logits = forced_logits(vlm, caches, truth, question, outputs)
    full = next((row for row in logits if row.startswith("full|bf16")), None)
    judged: dict[str, tuple[bool, tuple[float, ...]]] = {}
    for row in caches:
        far: tuple[float, ...] = ()
        if full is not None:
            kl, moved = divergence(logits[full], logits[row]), output_error(outputs[full], outputs[row])
            far = round(kl, 6), round(moved, 5)
        judged[row] = says(vlm, logits[row], truth), far
    return judged


def prefills(
    scene: Callable[..., Prefilled], question: str, recipes: Sequence[str], protocol: Protocol, proxy: str
) -> Iterator[tuple[str, Prefilled]]:
    """Row names with the prefill they start from; each distinct prefill runs once.

    Parameters
    ----------
    scene : callable
        :meth:`kvferry.VLM.prefill` of the pictures and the context: takes what else it takes.
    question, proxy : str
        What is asked, and what stands for it in protocol B as long as it is unknown.
    """
    requests = {r: Recipe.parse(r).requests for r in recipes}
    if protocol == "A":
        prefilled = scene(question, requests=union(requests.values()))
        yield from ((recipe, prefilled) for recipe in recipes)
        return
    blind = [r for r in recipes if not any(q.rows in NEEDS_QUESTION for q in requests[r])]
    before = scene(requests=union(requests[r] for r in blind))
    yield from ((recipe, before) for recipe in blind)
    aware = [r for r in recipes if any(q.rows in (*NEEDS_QUESTION, "window") for q in requests[r])]
    if not aware:
        return
    for label, asked in (("proxy", proxy), ("oracle", question)):
        before = scene(requests=union(requests[r] for r in aware), proxy_question=asked)
        yield from ((f"{recipe} {label}", before) for recipe in aware)


def union(requests: Iterable[Sequence[EvidenceRequest]]) -> tuple[EvidenceRequest, ...]:
    """All requests, each once."""
    return tuple(dict.fromkeys(request for each in requests for request in each))


def run(sweep: Sweep, out: Path, processes: int = 1, command: str = "", ray: str = "") -> Iterator[Line]:
    """Run what ``out`` does not hold yet, append it line by line, yield each line as it comes.

    ``command`` is what a person types to get the same file; tables quote it. ``ray`` is the address of a cluster that
    does the work instead of ``processes`` (:func:`kvferry.evaluate.ray_pool.over_ray`).

    Raises
    ------
    InputError
        ``out`` holds the results of another sweep or of another model.
    """
    head = {"sweep": json.loads(json.dumps(asdict(sweep))), "command": command, **provenance(_load(sweep))}
    fixed = ("model", "recipes", "split", "max_new_tokens", "check", "kinds", "apply", "jpeg", "embeds", "dtype")
    absent = {"kinds": [], "apply": "post_hoc", "jpeg": [], "embeds": [], "dtype": "auto"}
    done = begin(out, head, fixed, absent)
    jobs = [(i, p) for i in range(sweep.start, sweep.start + sweep.n) for p in sweep.protocols if (i, p) not in done]
    if ray:
        yield from written(out, over_ray(partial(_anywhere, sweep), jobs, ray))
    else:
        yield from written(out, in_processes(partial(_start, sweep), _job, jobs, processes))


def _load(sweep: Sweep) -> VLM:
    from kvferry.models import load

    return load(sweep.model, device=sweep.device or None, dtype=sweep.dtype)


_state: dict[str, Any] = {}


def _start(sweep: Sweep) -> None:
    """Load the model once per process; one thread each, so that processes do not fight over cores."""
    import torch

    torch.set_num_threads(1)
    _state.update(vlm=_load(sweep), sweep=sweep)


def _anywhere(sweep: Sweep, job: tuple[int, Protocol]) -> Line:
    """One job in a worker that may have done some of this sweep, or of another one."""
    if _state.get("sweep") != sweep:
        _start(sweep)
    return _job(job)


def _job(job: tuple[int, Protocol]) -> Line:
    from kvferry.testbed import samples

    index, protocol = job
    sweep: Sweep = _state["sweep"]
    (sample,) = samples(sweep.split, 1, start=index, kinds=sweep.kinds or None)
    return run_sample(_state["vlm"], sample, sweep, protocol)
