"""The prompt on which the full cache scores best, on calibration paragraphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvferry.errors import InputError
from kvferry.evidence import Prefilled
from kvferry.models import VLM
from study.squad.asking import in_cache
from study.squad.board import Board
from study.squad.prompts import Prompt, candidates
from study.squad.reading import TAIL, Reader
from study.squad.records import scores_of
from study.squad.saying import Asking, ends_of, full_answers
from study.squad.texts import Paragraph, Text, read_squad, texts

SCORES = ("F1", "EM", "contains")


@dataclass(frozen=True)
class Trial:
    """How the full cache did on one question: :data:`SCORES`, and the log-likelihood of the first accepted answer
    and its end, in nats a token."""

    said: str
    scores: dict[str, float]
    likelihood: float


def trial(vlm: VLM, prompt: Prompt, text: Text) -> list[Trial]:
    """Every question of a text, asked of the full cache."""
    ids = prompt.before(vlm.tokenizer, text.words)
    reader, ends, found = Reader(vlm, ids, ()), ends_of(vlm), []
    for question in text.questions:
        asked = prompt.asked(vlm.tokenizer, question.text)
        read = in_cache(reader.read(asked, len(asked), len(ids) + len(asked) - 1))
        visible = torch.ones(1, vlm.layers, vlm.kv_heads, read.cache.length, dtype=torch.bool)
        asking = Asking(read.cache.length, (asked[-1],))
        (full,) = full_answers(Board(vlm, read.cache.layers, visible), [asking], ends)
        said = str(vlm.tokenizer.decode(list(full.along), skip_special_tokens=True)).strip()
        true = prompt.answer(vlm.tokenizer, question.answers[0])
        fed = [asked[-1], *true]
        places = range(read.cache.length, read.cache.length + len(fed))
        board = Board(vlm, read.cache.layers, visible)
        logits = board.feed([0] * len(fed), fed, places, range(len(fed))).log_softmax(-1)
        ended = logits[-1, sorted(ends)].logsumexp(-1)
        known = logits[:-1].gather(1, torch.tensor(true)[:, None])[:, 0]
        nats = float((known.sum() + ended) / len(fed))
        found.append(Trial(said, scores_of(said, question.answers), round(nats, 4)))
    return found


def chosen_prompt(vlm: VLM, folder: Path, data: Path, tokens: int = 512) -> Prompt:
    """The one with the highest mean F1 among those whose examples leave the text half of ``tokens``.

    Raises
    ------
    InputError
        None was tried.
    """
    tried = folder / "prompt.json"
    if not tried.is_file():
        raise InputError(f"no prompt was tried yet ({tried}); run `python -m study squad-prompt`")
    scores = {name: x["F1"][0] for name, x in json.loads(tried.read_text())["candidates"].items()}
    fit = [x for x in candidates(read_squad(data / "calibration.jsonl")) if fits(vlm, x, tokens)]
    return max(fit, key=lambda x: float(scores.get(x.name, 0)))


def fits(vlm: VLM, prompt: Prompt, tokens: int) -> bool:
    """Whether examples leave the text half of a prompt."""
    return len(prompt.before(vlm.tokenizer, "")) <= tokens // 2


def counter(vlm: VLM) -> Callable[[str], int]:
    """How many tokens a string has."""
    return lambda text: len(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])


def room(vlm: VLM, prompt: Prompt, tokens: int) -> int:
    """Tokens of text that a prompt of ``tokens`` in all has room for, beside examples and question."""
    return tokens - TAIL - len(prompt.before(vlm.tokenizer, ""))


def calibration(vlm: VLM, prompt: Prompt, paragraphs: Sequence[Paragraph], tokens: int) -> Iterator[Prefilled]:
    """A question on every text of calibration paragraphs, read as the test's are."""
    for text in texts(paragraphs, counter(vlm), room(vlm, prompt, tokens), 1):
        ids = prompt.before(vlm.tokenizer, text.words)
        asked = prompt.asked(vlm.tokenizer, text.questions[0].text)
        yield Reader(vlm, ids, ()).read(asked, len(asked), len(ids) + len(asked) - 1)
