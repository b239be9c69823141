"""Prompts from pictures and words: the model's own template, and the span of the question in it.

A prompt is always tokenised in two pieces, what comes before the question and what follows from there, so that a
scene cached without its question continues exactly as if the question had been there from the start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from kvferry.cache import Modality, Role
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.messages import Messages
from kvferry.models.dialogue import Rendered, plain, render, roles_of
from kvferry.models.embeds import MAX_VISUAL_TOKENS, VisualEmbeds, check_total, embedded_inputs
from kvferry.models.support import visual_token_ids

Picture = Image.Image | VisualEmbeds
_CONTEXT, _QUESTION, _ANSWER, _NEXT = (f"KVFERRY{what}" for what in ("CONTEXT", "QUESTION", "ANSWER", "NEXT"))


@dataclass(frozen=True)
class Template:
    """The words around one question.

    ``before`` holds one placeholder per picture and ends where the question goes; the context stands at
    ``context_start`` in it. ``space`` is what separates the question from ``before``.
    """

    before: str
    space: str
    after: str
    context_start: int = -1


@dataclass(frozen=True)
class Prompt:
    """Inputs of a forward pass with the role of each token; the question starts at ``scene``."""

    inputs: dict[str, Any]
    roles: npt.NDArray[np.uint8]
    scene: int


class Prompter:
    """Builds prompts for one model from its tokenizer and its processor or image processor."""

    def __init__(self, config: Any, tokenizer: Any, processor: Any = None, image_processor: Any = None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._processor = processor
        self._image_processor = image_processor
        self._has_grid = hasattr(image_processor, "merge_size")
        self._visual = visual_token_ids(config)
        self._special = _special_strings(tokenizer, self._visual)
        unknown = getattr(tokenizer, "unk_token_id", None)
        read = {int(x) for x in tokenizer.convert_tokens_to_ids(list(self._special)) if x is not None}
        self._control = frozenset((read - {unknown}) | set(self._visual))

    def build(self, images: Sequence[Picture], context: str | None, question: str | None) -> Prompt:
        """Tokens, pixels and roles of a prompt; without a question it ends where the question would go.

        Raises
        ------
        InputError
            Special tokens in the caller's words, an empty text, or too many visual tokens.
        """
        self.check_text(context, "context")
        self._check_processor(images)
        template = self._template(len(images), context is not None)
        start = template.context_start
        before = template.before
        if context is not None:
            before = before[:start] + context + before[start:]
        inputs = self._read(before, images)
        scene = inputs["input_ids"].shape[1]
        roles = np.full(scene, Role.SPECIAL, dtype=np.uint8)
        roles[np.isin(inputs["input_ids"][0].numpy(), list(self._visual))] = Role.CONTEXT
        if context is not None:
            first, last = self._span_from_end(before, start, start + len(context))
            roles[scene - first : scene - last] = Role.CONTEXT
            self._check_ids(inputs["input_ids"][0, scene - first : scene - last].tolist(), "context")
        if question is not None:
            ids, asked = self._ask(template, question)
            roles = np.concatenate([roles, np.array(_roles(asked), dtype=np.uint8)])
            _append(inputs, ids)
        return Prompt(inputs, roles, scene)

    def converse(self, messages: Messages, images: Sequence[Picture]) -> Prompt:
        """The same of a conversation that ends with a question, as the model's own template writes it.

        Raises
        ------
        InputError
            Special tokens in the caller's words, or too many visual tokens.
        UnsupportedModelError
            The template takes no such messages, or loses something of them; it is named.
        """
        for number, turn in enumerate(messages.turns, start=1):
            for part in turn.parts:
                if isinstance(part, str):
                    self.check_text(part, f"text of message {number}")
        self._check_processor(images)
        text, spans = self._rendered(messages)
        bos = getattr(self._tokenizer, "bos_token", None)
        special = not (bos and text.startswith(bos)) and (bool(self._visual) or self._source is None)
        inputs = self._read(text, images, special)
        tokens = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        read = list(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))
        roles = roles_of(spans, read, inputs["input_ids"][0].numpy(), tuple(self._visual))
        words = (roles != Role.SPECIAL) & ~np.isin(inputs["input_ids"][0].numpy(), list(self._visual))
        self._check_ids(inputs["input_ids"][0].numpy()[words].tolist(), "text of a message")
        asked = np.flatnonzero(roles == Role.QUESTION)
        if not len(asked):
            raise UnsupportedModelError("the question cannot be found in this model's prompt; use prefill_inputs()")
        return Prompt(inputs, roles, int(asked[0]))

    def _rendered(self, messages: Messages) -> Rendered:
        if self._source is None:
            return plain(messages, self._placeholder)
        try:
            return render(self._source, messages, parts=bool(self._visual))
        except UnsupportedModelError:
            if not self._visual or not any(turn.plain for turn in messages.turns):
                raise
        lists = Messages(tuple(replace(turn, plain=False) for turn in messages.turns))  # a template for lists only
        return render(self._source, lists, parts=True)

    def question(self, question: str, *, images: bool, context: bool) -> tuple[list[int], list[Role]]:
        """The tokens of a question and of the template after it, to be fed on top of a scene, and their roles."""
        ids, asked = self._ask(self._template(int(images), context), question)
        return ids, _roles(asked)

    def turn(self, question: str) -> tuple[list[int], list[Role]]:
        """The same of a further question, to be fed on top of an answer: with the end of that turn before it."""
        between, after = self._turn()
        bare = between.rstrip(" ")
        ids, asked = self._ask(Template(bare, between[len(bare) :], after), question)
        ended = self._ids(bare, special=False)[0].tolist()
        return [*ended, *ids], _roles([False] * len(ended) + asked)

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer given in words; template tokens in it, which no caller wrote, are left out."""
        while found := [special for special in self._special if special in text]:
            text = text.replace(found[0], "")
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token not in self._control]

    @cached_property
    def structure(self) -> frozenset[int]:
        """Tokens by which the template tells turns and pictures apart; no answer holds one.

        Others that are special, such as those of boxes, a model may say.
        """
        try:
            text = self._render(int(bool(self._visual)), _QUESTION, _ANSWER, _NEXT)
        except UnsupportedModelError:
            return self._control
        written = set(self._tokenizer(text)["input_ids"]) & self._control
        ends = {getattr(self._tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
        return frozenset({*written, *self._visual, *(token for token in self._control if token in ends)})

    def check_text(self, text: str | None, name: str) -> None:
        """Refuse empty words and words that the tokenizer would read as template tokens."""
        if text is None:
            return
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"the {name} is empty; write at least one word")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(f"the {name} holds half a character (a lone surrogate); send whole ones")
        for special in self._special:
            if special in text:
                raise InputError(f"the {name} contains the template token {special!r}; remove it")
        self._check_ids(self._tokenizer(text, add_special_tokens=False)["input_ids"], name)

    def _check_ids(self, ids: Iterable[int], name: str) -> None:
        """Refuse the caller's words where the tokenizer, which may change case or width, read a template token."""
        for token in ids:
            if token in self._control:
                special = self._tokenizer.convert_ids_to_tokens(int(token))
                raise InputError(f"the {name} is read as the template token {special!r}; write it otherwise")

    def _template(self, images: int, context: bool) -> Template:
        text = self._render(images, (_CONTEXT + "\n" if context else "") + _QUESTION)
        before, found, after = text.partition(_QUESTION)
        if not found or _QUESTION in after or (context and before.count(_CONTEXT) != 1):
            raise UnsupportedModelError("this model's chat template drops or repeats the question; pass raw inputs")
        context_start = before.find(_CONTEXT)
        before = before.replace(_CONTEXT, "")
        bare = before.rstrip(" ")
        return Template(bare, before[len(bare) :], after, context_start)

    def _render(self, images: int, question: str, *later: str) -> str:
        """The model's own words around a question, or around a question, its answer and another question."""
        if self._source is not None:
            said = [{"role": "user", "content": self._content(question, images)}]
            for role, text in zip(("assistant", "user"), later, strict=False):
                said.append({"role": role, "content": self._content(text)})
            return str(self._source.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
        rest = " {}\n{}\nAnswer:".format(*later) if later else ""
        return f"{self._placeholder * images}{question}\nAnswer:{rest}"

    @property
    def _source(self) -> Any:
        """What has a chat template."""
        return next((x for x in (self._processor, self._tokenizer) if getattr(x, "chat_template", None)), None)

    @property
    def _placeholder(self) -> str:
        """What stands for a picture where there is no template."""
        return f"{self._tokenizer.convert_ids_to_tokens(next(iter(self._visual)))}\n" if self._visual else ""

    def _check_processor(self, images: Sequence[Picture]) -> None:
        if images and not self._has_grid and self._processor is None:
            raise UnsupportedModelError(
                "this model's processor could not be loaded here; install torchvision, or use prefill_inputs()"
            )

    def _content(self, text: str, images: int = 0) -> Any:
        return [{"type": "image"}] * images + [{"type": "text", "text": text}] if self._visual else text

    def _turn(self) -> tuple[str, str]:
        """What the template writes from an answer to the next question, and behind that question."""
        text = self._render(0, _QUESTION, _ANSWER, _NEXT)
        between, found, after = text.partition(_ANSWER)[2].partition(_NEXT)
        if not found:
            raise UnsupportedModelError("this model's chat template has no room for a second question; ask each alone")
        return between, after

    def _read(self, before: str, images: Sequence[Picture], special: bool | None = None) -> dict[str, Any]:
        if special is None:
            bos = getattr(self._tokenizer, "bos_token", None)
            special = not (bos and before.startswith(bos))
        if not images:
            return {"input_ids": self._ids(before, special)}
        try:
            inputs = self._read_pictures(before, images, special)
        except ValueError as error:
            raise InputError(f"the pictures cannot be used: {error}") from None
        count = int(np.isin(inputs["input_ids"].numpy(), list(self._visual)).sum())
        if count > MAX_VISUAL_TOKENS:
            raise InputError(
                f"the pictures make {count:,} visual tokens, more than {MAX_VISUAL_TOKENS:,}; scale them down"
            )
        return inputs

    def _read_pictures(self, before: str, images: Sequence[Picture], special: bool) -> dict[str, Any]:
        if self._has_grid:
            return self._expand(self._ids(before, special), images)
        return dict(
            self._processor(text=[before], images=list(images), return_tensors="pt", add_special_tokens=special)
        )

    def visual_tokens(self, sizes: Iterable[tuple[int, int]]) -> int:
        """How many tokens pictures of these widths and heights become; 0 where the processor does not say.

        Raises
        ------
        InputError
            More than one prompt takes.
        """
        patches = getattr(self._image_processor, "get_number_of_image_patches", None)
        if patches is None or not self._has_grid:
            return 0
        try:
            each = [int(patches(height, width, {})) for width, height in sizes]
        except ValueError as error:
            raise InputError(f"the pictures cannot be used: {error}") from None
        count = sum(each) // int(self._image_processor.merge_size) ** 2
        check_total(count)
        return count

    def _expand(self, ids: torch.Tensor, images: Sequence[Picture]) -> dict[str, Any]:
        """Families whose image processor returns a patch grid: one placeholder becomes one token per merged patch."""
        pixels = self._pixels(images)
        pictures = torch.tensor([token for token, kind in self._visual.items() if kind == Modality.IMAGE])
        counts = torch.ones_like(ids[0])
        counts[torch.isin(ids[0], pictures)] = pixels["image_grid_thw"].prod(-1) // self._image_processor.merge_size**2
        wide = ids[0].repeat_interleave(counts)[None]
        return {"input_ids": wide, "mm_token_type_ids": torch.isin(wide, pictures).long(), **pixels}

    def _pixels(self, images: Sequence[Picture]) -> dict[str, Any]:
        """``pixel_values`` or what stands for them, and the patch grid."""
        embedded = [image for image in images if isinstance(image, VisualEmbeds)]
        if not embedded:
            self.visual_tokens((image.width, image.height) for image in images if isinstance(image, Image.Image))
            pixels = self._image_processor(images=list(images), return_tensors="pt")
            return {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
        if len(embedded) < len(images):
            raise InputError("pictures and visual embeddings do not mix in one prompt; embed all pictures or none")
        hidden = int(self._config.get_text_config(decoder=True).hidden_size)
        return embedded_inputs(hidden, self._image_processor.merge_size, embedded)

    def _ids(self, text: str, special: bool) -> torch.Tensor:
        ids = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return torch.tensor([ids], dtype=torch.long)

    def _span_from_end(self, text: str, start: int, end: int) -> tuple[int, int]:
        """Tokens of ``text[start:end]``, counted from the end of ``text`` (pictures stand before it)."""
        spans = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
        return (len(spans) - inside[0], len(spans) - inside[-1] - 1) if inside else (0, 0)

    def _ask(self, template: Template, question: str) -> tuple[list[int], list[bool]]:
        """Token ids of the question and what follows, and which of them are the question's."""
        self.check_text(question, "question")
        bare = template.before.endswith(tuple(self._special)) or not template.before
        anchor = "" if bare else template.before[-1]
        ids, spans, straddles = self._after(anchor, template.space + question + template.after)
        if straddles:
            ids, spans, _ = self._after("", template.space + question + template.after)
            anchor = ""
        start = len(anchor) + len(template.space)
        end = start + len(question)
        self._check_ids((token for token, (a, _) in zip(ids, spans, strict=True) if start <= a < end), "question")
        return ids, [a < end for a, _ in spans]

    def _after(self, anchor: str, text: str) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Tokens of ``text`` as they come out behind one character; whether one token spans the seam."""
        tokens = self._tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        seam = len(anchor)
        both = list(zip(tokens["input_ids"], tokens["offset_mapping"], strict=True))
        behind = [(token, span) for token, span in both if span[0] >= seam and span != (0, 0)]
        straddles = any(a < seam < b for _, (a, b) in both)
        return [token for token, _ in behind], [span for _, span in behind], straddles


def _roles(asked: Iterable[bool]) -> list[Role]:
    return [Role.QUESTION if each else Role.SPECIAL for each in asked]


def _special_strings(tokenizer: Any, visual: dict[int, Any]) -> tuple[str, ...]:
    found = {str(x) for x in tokenizer.added_tokens_decoder.values() if x.special}
    found |= set(tokenizer.all_special_tokens)
    found |= {str(x) for x in tokenizer.convert_ids_to_tokens(list(visual)) if x}
    return tuple(sorted(x for x in found if x.strip()))


def _append(inputs: dict[str, Any], ids: list[int]) -> None:
    """Put text tokens behind the prompt, in every input that has one entry per token."""
    old = inputs["input_ids"].shape[1]
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        value = inputs.get(name)
        if value is not None and value.shape[-1] == old:
            inputs[name] = torch.nn.functional.pad(value, (0, len(ids)), value=fill)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], dim=1)
