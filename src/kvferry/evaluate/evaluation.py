"""Recipes x the questions of a benchmark -> JSON lines, as :mod:`kvferry.evaluate.sweep` does for the testbed.

A question is prefilled once per protocol; every recipe compresses that same cache to real bytes, decodes them and
answers. Beside the benchmark's score, each answer is held against what the full cache makes the model say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvferry.data import read_questions
from kvferry.errors import BudgetError, InputError, RecipeError
from kvferry.evaluate.data import source_of
from kvferry.evaluate.divergence import divergence
from kvferry.evaluate.forced import BATCH
from kvferry.evaluate.plan import ABSENT, BARE, CEILING, FIXED, Evaluation, planned_task
from kvferry.evaluate.pool import begin, in_processes, written
from kvferry.evaluate.records import Protocol, read_records
from kvferry.evaluate.sweep import carry, pictures_sent, prefills, provenance, with_room
from kvferry.evaluate.tasks import Example, Row
from kvferry.evaluate.tasks.own import OWN, key_of
from kvferry.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from kvferry.cache import KVCache
    from kvferry.evaluate.tasks import Task
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM

LOGITS = 1 << 28
"""Numbers that scoring in one pass may hold."""


class Reply(NamedTuple):
    """How one row answered one question.

    ``score`` is the metric's, None where only all answers together have one. ``kl`` (nats a token) and ``agree`` (the
    share of tokens with the same first choice) hold its next-token distributions against the full cache's, along the
    answer that the full cache gives, and its end. ``scored`` is as in :class:`~kvferry.evaluate.records.Outcome`.
    """

    score: float | None
    bytes: int
    kl: float
    agree: float
    said: str
    scored: float | None = None


@dataclass(frozen=True)
class Asked:
    """One question under one protocol; ``outcomes`` maps a row (as in a sweep, or ``prompt``) to its :class:`Reply`.

    ``refused`` says why it could not be asked, and then there are no outcomes. ``key`` is a digest of the question.
    """

    index: int
    protocol: Protocol
    kind: str = ""
    group: str = ""
    bf16_bytes: int = 0
    tokens: int = 0
    references: tuple[str, ...] = ()
    outcomes: dict[str, Reply] = field(default_factory=dict)
    refused: str = ""
    length: int = 0
    key: str = ""


def read(path: Path) -> tuple[dict[str, Any], list[Asked]]:
    """Provenance and lines of an evaluation's results; a half-written last line is dropped."""
    head, records = read_records(path, "evaluation")
    return head, [_asked(x) for x in records]


def _asked(record: dict[str, Any]) -> Asked:
    record.pop("old", None)
    outcomes = {row: Reply(*reply) for row, reply in record["outcomes"].items()}
    return Asked(**record | {"outcomes": outcomes, "references": tuple(record["references"])})


def run(plan: Evaluation, out: Path, processes: int = 1, command: str = "") -> Iterator[Asked]:
    """Run what ``out`` does not hold yet, append it line by line, yield each line as it comes.

    Raises
    ------
    InputError
        ``out`` holds the results of another evaluation or of another model, or there is no data.
    DependencyError
        The task's metric or data needs a package that is not here.
    """
    task = planned_task(vars(plan))
    metric, vlm = task.metric.name, _load(plan)
    if task.visual and not vlm.has_vision:
        what = plan.data or plan.task
        raise InputError(f"{plan.model} reads text only and {what} has pictures; choose a vision-language model")
    rows = _rows(plan, task, vlm)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{plan.task} has no row {plan.start}; choose a smaller --start, or check --data")
    plans = {"evaluation": json.loads(json.dumps(asdict(plan)))}
    head = {**plans, "metric": metric, "hub": task.hub, "command": command, **provenance(vlm)}
    done = begin(out, head, FIXED, ABSENT)
    rows = chain([first], rows)
    if plan.task == OWN and done:
        rows = _unchanged(rows, plan, out)
    jobs = (
        (row, index, protocol)
        for index, row in enumerate(rows, plan.start)
        for protocol in plan.protocols
        if (index, protocol) not in done
    )
    start = partial(_start, plan, vlm if processes <= 1 else None)
    yield from written(out, in_processes(start, _job, jobs, processes))


def _rows(plan: Evaluation, task: Task, vlm: VLM) -> Iterator[Row]:
    """Those that are asked for."""
    if plan.task == OWN:
        folder = Path(plan.images) if plan.images else None
        found = read_questions(Path(plan.data), folder, plan.n, plan.start, plan.instruction)
        return ({"asked": asked} for asked in found.each())
    source = source_of(task, Path(plan.data) if plan.data else None, plan.split)
    return islice(task.rows(source, plan.split, vlm.tokenizer), plan.start, plan.start + plan.n)


def _unchanged(rows: Iterator[Row], plan: Evaluation, out: Path) -> Iterator[Row]:
    """The same rows, as long as they ask what ``out`` says they did."""
    keys = {line.index: line.key for line in read(out)[1]}
    for index, row in enumerate(rows, plan.start):
        if keys.get(index, key := key_of(row["asked"])) != key:
            raise InputError(
                f"{row['asked'].name} is no longer what {out} holds answers to; choose another --out or remove it"
            )
        yield row


def _load(plan: Evaluation) -> VLM:
    from kvferry.models import load

    return load(plan.model, device=plan.device or None, dtype=plan.dtype)


_state: dict[str, Any] = {}


def _start(plan: Evaluation, vlm: VLM | None) -> None:
    """Load the model once per process; one thread each, so that processes do not fight over cores."""
    import torch

    if vlm is None:
        torch.set_num_threads(1)
    _state.update(vlm=vlm or _load(plan), task=planned_task(vars(plan)), plan=plan)


def _job(job: tuple[Row, int, Protocol]) -> Asked:
    row, index, protocol = job
    task: Task = _state["task"]
    plan: Evaluation = _state["plan"]
    try:
        example = task.read(row)
    except InputError as error:
        raise InputError(f"row {index}: {error}") from None
    return ask(_state["vlm"], task, example, plan.recipes, protocol, index, plan.jpeg, plan.embeds)


def ask(
    vlm: VLM,
    task: Task,
    example: Example,
    recipes: Sequence[str],
    protocol: Protocol,
    index: int = 0,
    jpeg: Sequence[int] = (),
    embeds: Sequence[str] = (),
) -> Asked:
    """Prefill one question, then compress, decompress and answer once per recipe.

    ``recipes`` hold the ceiling; ``jpeg`` and ``embeds`` are those of :class:`Evaluation`. A question that the model
    cannot read (too long, template tokens in its text) is noted as refused.

    Raises
    ------
    RecipeError, BudgetError, EvidenceError
        A recipe does not fit this prompt.
    """
    line = Asked(index, protocol, example.kind, example.group, references=example.references, key=example.key)
    try:
        caches, sizes, chosen, full = _crossed(vlm, task, example, recipes, protocol)
        if protocol == "A" and example.images:
            for row, size, pictures in pictures_sent(vlm, example.images, jpeg, embeds):
                caches[row] = vlm.prefill(pictures, example.question, context=example.context).cache
                sizes[row] = size
    except (RecipeError, BudgetError):
        raise
    except InputError as error:
        return replace(line, refused=str(error))
    judge = _continued if example.continuation else _answered
    replies = judge(vlm, task, example, caches, None if protocol == "A" else example.question)
    outcomes = {row: reply._replace(bytes=sizes[row], scored=chosen.get(row)) for row, reply in replies.items()}
    cache = full.cache
    sized = replace(line, bf16_bytes=cache.full_bf16_bytes, tokens=len(cache.layout), length=cache.length)
    references = (outcomes[CEILING].said,) if task.agreement else example.references
    return replace(sized, outcomes=outcomes, references=references)


def _crossed(
    vlm: VLM, task: Task, example: Example, recipes: Sequence[str], protocol: Protocol
) -> tuple[dict[str, KVCache], dict[str, int], dict[str, float | None], Prefilled]:
    """What arrives of each row, in how many bytes, and what the scorer chose; and the first prefill."""
    caches, sizes, chosen = {}, {}, {}
    full: Prefilled | None = None
    for row, prefilled in _read(vlm, task, example, recipes, protocol):
        full = full or prefilled
        caches[row], sizes[row], chosen[row] = with_room(partial(carry, prefilled), Recipe.parse(row.split(" ")[0]))
    if full is None:
        raise InputError("an evaluation needs at least one recipe")
    if not task.visual:
        bare = vlm.prefill_tokens(example.prefix[-2:]) if example.continuation else vlm.prefill((), example.question)
        caches[BARE], sizes[BARE] = bare.cache, len(example.question.encode())
    return caches, sizes, chosen, full


def _read(
    vlm: VLM, task: Task, example: Example, recipes: Sequence[str], protocol: Protocol
) -> Iterator[tuple[str, Prefilled]]:
    if example.continuation:
        requests = tuple(dict.fromkeys(x for recipe in recipes for x in Recipe.parse(recipe).requests))
        prefilled = vlm.prefill_tokens(example.prefix, requests=requests)
        return iter([(recipe, prefilled) for recipe in recipes])
    scene = partial(vlm.prefill, example.images, context=example.context)
    return prefills(scene, example.question, recipes, protocol, task.proxy)


def _answered(
    vlm: VLM, task: Task, example: Example, caches: dict[str, KVCache], question: str | None
) -> dict[str, Reply]:
    """Answers, their scores, and their loyalty along the full cache's own answer."""
    from kvferry.models.resume import stop_ids

    most, metric = task.max_new_tokens, task.metric
    full = vlm.resume(caches[CEILING], question, max_new_tokens=most)
    along, ends = list(full.token_ids), stop_ids(vlm.model)
    steps = len(along) + (len(along) < most)
    accepted = (full.text,) if task.agreement else example.references
    replies = {}
    for row, logits, kl, agree in _held_against_full(vlm, caches, along, question, steps):
        first = logits.argmax(-1).tolist()
        same = first[: len(along)] == along and all(token in ends for token in first[len(along) :])
        asked = None if row == BARE else question
        said = full.text if same or row == CEILING else vlm.answer(caches[row], asked, max_new_tokens=most)
        replies[row] = Reply(metric.score(said, accepted), 0, kl, agree, said)
    return {row: replies[row] for row in caches}


def _continued(
    vlm: VLM, task: Task, example: Example, caches: dict[str, KVCache], question: str | None
) -> dict[str, Reply]:
    """How likely the continuation is."""
    import torch

    along = list(example.continuation)
    replies = {}
    for row, logits, kl, agree in _held_against_full(vlm, caches, along, None, len(along)):
        wanted = torch.tensor(along, device=logits.device)
        nats = torch.nn.functional.cross_entropy(logits.double(), wanted).item()
        replies[row] = Reply(nats, 0, kl, agree, "")
    return {row: replies[row] for row in caches}


def _held_against_full(
    vlm: VLM, caches: dict[str, KVCache], along: list[int], question: str | None, steps: int
) -> Iterator[tuple[str, torch.Tensor, float, float]]:
    """Of every row the logits of the first ``steps`` tokens ``along`` an answer, their KL and agreement to the full's.

    Caches of similar size are fed together, the ceiling first and alone, the bare question (another prompt) last.
    """
    size = max(1, min(BATCH, LOGITS // ((len(along) + 1) * vlm.model.get_input_embeddings().num_embeddings)))
    alike = sorted((row for row in caches if row not in (CEILING, BARE)), key=lambda row: caches[row].nbytes)
    batches = [[CEILING], *(alike[i : i + size] for i in range(0, len(alike), size))]
    batches += [[BARE]] if BARE in caches else []
    full: torch.Tensor | None = None
    for rows in batches:
        asked = None if rows == [BARE] else question
        scored = vlm.score_many([caches[row] for row in rows], along, asked)[:, :steps]
        full = scored[0] if full is None else full
        for row, logits in zip(rows, scored, strict=True):
            agree = (logits.argmax(-1) == full.argmax(-1)).double().mean().item()
            yield row, logits, round(divergence(full, logits), 6), round(agree, 6)
