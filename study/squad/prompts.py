"""Ways of asking SmolLM2 about a text: completions and chats, with and without worked examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvferry.errors import InputError
from study.squad.texts import SEED, Paragraph, sentence_of

MARK = "\x00"
BRIEF = "Answer with as few words from the text as possible."


@dataclass(frozen=True)
class Example:
    """A sentence, a question on it, and the answer in its words."""

    text: str
    question: str
    answer: str


@dataclass(frozen=True)
class Prompt:
    """How a text and a question become tokens, in two pieces: what comes before the question, and the question.

    Parameters
    ----------
    form : {"completion", "chat"}
        Lines that end with ``Answer:``, or the model's own chat template.
    examples : tuple of Example
        Stand first; of a chat they are turns.
    brief : bool
        :data:`BRIEF` behind a chat's questions.
    """

    form: str
    examples: tuple[Example, ...] = ()
    brief: bool = True

    @property
    def name(self) -> str:
        """Form and number of examples."""
        return f"{self.form}-{len(self.examples)}" + ("" if self.brief or self.form == "completion" else "-plain")

    def before(self, tokenizer: Any, text: str) -> list[int]:
        """Token ids of examples and text."""
        return _ids(tokenizer, self._split(tokenizer, text, "")[0])

    def asked(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids from the question to where the answer begins."""
        return _ids(tokenizer, self._split(tokenizer, "", question)[1])

    def answer(self, tokenizer: Any, text: str) -> list[int]:
        """Token ids of a given answer, without what ends it."""
        return _ids(tokenizer, text if self.form == "chat" else f" {text}")

    def _split(self, tokenizer: Any, text: str, question: str) -> tuple[str, str]:
        if self.form == "completion":
            shown = [f"{x.text}\nQuestion: {x.question}\nAnswer: {x.answer}\n\n" for x in self.examples]
            return "".join(shown) + text + "\n", f"Question: {question}\nAnswer:"
        messages = []
        for x in self.examples:
            messages += [("user", f"{x.text}\n{self._line(x.question)}"), ("assistant", x.answer)]
        messages.append(("user", f"{text}\n{MARK}{self._line(question)}"))
        said = [{"role": role, "content": content} for role, content in messages]
        whole: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        first, second = whole.split(MARK)
        return first, second

    def _line(self, question: str) -> str:
        return f"Question: {question} {BRIEF}" if self.brief else question


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def worked(paragraphs: Sequence[Paragraph], many: int) -> tuple[Example, ...]:
    """Examples with short answers and short sentences, each from another paragraph.

    Raises
    ------
    InputError
        There are not so many.
    """
    found: list[Example] = []
    for i in np.random.default_rng(SEED + 1).permutation(len(paragraphs)):
        for question in paragraphs[i].questions:
            sentence = sentence_of(paragraphs[i], question)
            if (
                40 < len(sentence) < 160
                and len(question.answers[0].split()) <= 3
                and 20 < len(question.text) < 80
                and question.text[-1] == "?"
            ):
                found.append(Example(sentence, question.text, question.answers[0]))
                break
        if len(found) == many:
            return tuple(found)
    raise InputError(f"these paragraphs hold {len(found)} worked examples, not {many}; give more of them")


def candidates(paragraphs: Sequence[Paragraph]) -> list[Prompt]:
    """What ``python -m study squad-prompt`` chooses from; examples come from :func:`shown`."""
    eight = worked(shown(paragraphs), 8)
    completions = [Prompt("completion", eight[:k]) for k in (0, 1, 4, 8)]
    chats = [Prompt("chat", eight[:k]) for k in (0, 1, 4)]
    return [*completions, *chats, Prompt("chat", brief=False)]


def prompt_of(name: str, paragraphs: Sequence[Paragraph]) -> Prompt:
    """One of the candidates, its examples from the calibration ``paragraphs``."""
    found = {x.name: x for x in candidates(paragraphs)}
    if name not in found:
        raise InputError(f"there is no prompt {name!r}; there are {', '.join(found)}")
    return found[name]


def shown(paragraphs: Sequence[Paragraph]) -> list[Paragraph]:
    """Of calibration paragraphs those that examples come from: half of the articles."""
    titles = sorted({x.title for x in paragraphs})
    return [x for x in paragraphs if x.title in titles[: (len(titles) + 1) // 2]]


def asked_about(paragraphs: Sequence[Paragraph]) -> list[Paragraph]:
    """The other half, on which a prompt is chosen."""
    mine = {id(x) for x in shown(paragraphs)}
    return [x for x in paragraphs if id(x) not in mine]
