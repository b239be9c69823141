"""``image``: the picture is sent, and the cloud does all the work. What everything else is held against."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvferry.codecs.grammar import number_text, with_options
from kvferry.errors import InputError
from kvferry.modes.base import Question, SessionStore
from kvferry.modes.checks import check_question, cut
from kvferry.modes.files import FilesIn, FilesOut
from kvferry.modes.holdings import Holdings
from kvferry.modes.masked import flatten
from kvferry.modes.ranking import DEFAULT_SCORER, kept_visual
from kvferry.modes.receiver import NeedsAll
from kvferry.pictures import file_of, jpeg_of, open_picture
from kvferry.pictures.familiar import note_on
from kvferry.recipe import Recipe
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM
    from kvferry.models.steps import Pace, Steps
    from kvferry.summary import Summary


@dataclass(frozen=True)
class ImageMode:
    """``image``, ``image:60``, ``image:60,mask=0.25``.

    Parameters
    ----------
    quality : int
        JPEG quality to encode pictures to, 1 to 95. With 0 a JPEG, PNG or WebP file travels with the pixels it has,
        anything else as JPEG of quality 90; see :func:`kvferry.pictures.files.file_of` for what is left out.
    mask : float
        Keep the patches of this fraction of the visual tokens, which the edge's own model finds most important to the
        question; the others are flattened to the picture's mean colour before it is encoded. The edge's model may be
        any that says where its visual tokens stand.
    """

    NAME: ClassVar[str] = "image"
    LEAVES: ClassVar[tuple[str, ...]] = ("pixels",)
    quality: int = 0
    mask: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 95:
            raise InputError(f"a JPEG quality is 1 to 95, not {self.quality}; 0 sends files as they are")
        if not 0.0 < self.mask <= 1.0:
            raise InputError(f"mask is the fraction of visual tokens to keep, in (0, 1], not {self.mask:g}")

    @classmethod
    def parse(cls, options: str) -> ImageMode:
        """The mode of ``image:options``."""
        first, *others = options.split(",")
        given = [f"quality={first}" if first and "=" not in first else first, *others]
        return with_options(cls(), "image", [x for x in given if x])

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return self.mask < 1

    def __str__(self) -> str:
        options = [str(self.quality)] if self.quality else []
        options += [f"mask={number_text(self.mask)}"] if self.mask < 1 else []
        return ":".join(filter(None, ["image", ",".join(options)]))

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> ImageSender | MaskedSender:
        """The edge's half."""
        if self.mask == 1:
            return ImageSender(self, question, holdings)
        if vlm is None:
            raise InputError("a mask needs a model on this side to find what matters; load one, or use mode image")
        return MaskedSender(self, vlm, question)


class ImageSender:
    """The edge's half."""

    bf16_bytes: int | None = None
    kept: Summary | None = None
    prefill_seconds = 0.0

    def __init__(self, mode: ImageMode, question: Question, holdings: Holdings) -> None:
        began = time.perf_counter()
        files = [file_of(x, mode.quality, keep_metadata=question.keep_metadata) for x in question.images]
        self._files = FilesOut(files, holdings)
        self._question = question
        self._holdings = holdings
        self.encode_seconds = time.perf_counter() - began

    def start(self) -> pb.AskRequest.Start:
        check_question(self._question.text)
        return pb.AskRequest.Start(
            mode=pb.MODE_IMAGE,
            question=self._question.text,
            items=self._files.items(),
            session=self._holdings.session,
            hold=self._holdings.hold,
        )

    def prepare(self) -> None:
        """Nothing is left to do."""

    def chunks(self) -> Iterator[bytes]:
        return cut(self._files)


class MaskedSender:
    """The edge's half where patches are flattened. Such a picture is of use for one question, so none is held."""

    bf16_bytes: int | None = None
    kept: Summary | None = None

    def __init__(self, mode: ImageMode, vlm: VLM, question: Question) -> None:
        self.prefill_seconds = self.encode_seconds = 0.0
        self._mode = mode
        self._vlm = vlm
        self._question = question
        self._files: FilesOut | None = None

    def start(self) -> pb.AskRequest.Start:
        """Announces the files' sizes, so all the work is done here."""
        check_question(self._question.text)
        if self._files is None:
            self._files = FilesOut(self._masked(), Holdings(hold=False))
        return pb.AskRequest.Start(mode=pb.MODE_IMAGE, question=self._question.text, items=self._files.items())

    def prepare(self) -> None:
        """Nothing is left to do."""

    def chunks(self) -> Iterator[bytes]:
        return cut(self._files or ())

    def _masked(self) -> list[bytes]:
        if not self._question.images:
            return []
        began = time.perf_counter()
        recipe = Recipe(DEFAULT_SCORER, self._mode.mask)
        pictures = [open_picture(image) for image in self._question.images]
        prefilled = self._vlm.prefill(pictures, self._question.text, recipe=recipe)
        ranked = time.perf_counter()
        mask = kept_visual(prefilled, recipe)
        flat = flatten(pictures, mask, prefilled.cache.layout.grids)
        files = [jpeg_of(picture, self._mode.quality) for picture in flat]
        self.prefill_seconds, self.encode_seconds = ranked - began, time.perf_counter() - ranked
        return files


class ImageReceiver(NeedsAll):
    """The cloud's half."""

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> None:
        check_question(start.question, vlm.bounds.longest)
        if start.items and not vlm.has_vision:
            raise InputError(f"{vlm.name} reads text only; ask without a picture")
        self.prefill_seconds = 0.0
        self._vlm = vlm
        self._question = start.question
        self._files = FilesIn(start.items, store, max_bytes, vlm.visual_tokens, vlm.reduced)

    @property
    def reads(self) -> int:
        return self._files.tokens

    def feed(self, data: bytes) -> None:
        self._files.feed(data)

    def finish(self) -> None:
        pictures = self._files.open()
        self.note = note_on(self._vlm, self._files.sizes)
        began = time.perf_counter()
        self._prompt = self._vlm.prompt_of(pictures, self._question)  # not in the model's own thread
        self.prefill_seconds = time.perf_counter() - began

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        from kvferry.models.steps import read

        began = time.perf_counter()
        prompt, layout, _ = self._prompt
        cache = yield from read(self._vlm.model, prompt.inputs, layout, self._vlm.fingerprint, pace)
        self.prefill_seconds += time.perf_counter() - began
        return cache, None
