"""Stock ``generate()`` on a smaller cache, for any Hugging Face model that kvferry can serve."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

from kvferry.errors import InputError
from kvferry.models.decoding import Decoding, check_decoding
from kvferry.models.interception import Block, enter, leave
from kvferry.models.passes import Passes
from kvferry.models.reports import Report, SequenceReport
from kvferry.models.support import check_supported, tied_heads
from kvferry.models.ways import underlying

__all__ = ["Compressing", "Report", "SequenceReport", "compressing"]


def compressing(
    model: Any, recipe: Any, *, question_tokens: int | None = None, decoding: Decoding | None = None
) -> Compressing:
    """Let ``model.generate(**inputs)`` decode on a compressed cache, for one prompt or a batch padded on the left.

    The prompts are read in full, in one pass or in parts (``prefill_chunk_size``); then the cache's layers are
    replaced by smaller ones and the rest is freed. Every sequence keeps what it would keep alone; per layer, the batch
    stores as many tokens as its longest sequence. A codec other than ``bf16`` is applied by a round trip, so that its
    loss is real; memory is what the model's dtype takes.

    For a further turn call ``generate()`` again with the longer ``input_ids`` and the ``past_key_values`` that the
    last turn returned, as with any Transformers cache: the new tokens are read on top of what was kept, and stay.

    All of the model's passes in the block are served, also those of other threads (``TextIteratorStreamer``), of a
    pipeline, or of a manual loop. Blocks may be nested, and several threads may each have one on the same model: the
    innermost block of a thread counts. A ``generate()`` that still runs when the block is left is served to its end.

    Meanwhile the language model's attention is PyTorch's SDPA, whatever it was loaded with (eager, FlashAttention),
    and what ``torch.compile`` compiled runs eagerly.

    Parameters
    ----------
    model : PreTrainedModel
        Or what wraps one: a PEFT model, a compiled model, a pipeline, a :class:`kvferry.VLM`.
    recipe : str or Recipe
    question_tokens : int, optional
        How many tokens at the end of each prompt are the question. By default the text after the last visual token
        up to the generation prompt, or the last 32 tokens of a prompt without pictures.
    decoding : Decoding, optional
        A bound on the tokens that each head holds while the answer grows, over all turns. By default everything that
        is said stays.

    Returns
    -------
    Compressing
        For a ``with`` statement, which gives a :class:`Report`; it is filled in when the prompts have been read.

    Raises
    ------
    UnsupportedModelError
        A family that cannot be served; an assistant model; a static or quantized cache; a further turn with pictures
        whose tokens see each other in both directions; with ``decoding``, a model that mixes heads, and padding behind
        a prompt.
    InputError
        No model of Transformers; padding anywhere but on the left; on leaving the block, if nothing was compressed.
    """
    from kvferry.recipe import Recipe

    if question_tokens is not None and question_tokens < 1:
        raise InputError(f"question_tokens must be at least 1, not {question_tokens}")
    served = underlying(model)
    check_supported(served)
    if decoding is not None:
        check_decoding(decoding, tied_heads(served))
    return Compressing(served, Recipe.parse(recipe), question_tokens, decoding)


class Compressing(ContextDecorator):
    """What :func:`compressing` returns; may be entered again once it was left."""

    def __init__(self, model: Any, recipe: Any, question_tokens: int | None, decoding: Decoding | None = None) -> None:
        self._settings = (model, recipe, question_tokens, decoding)
        self._block: Block | None = None

    def __enter__(self) -> Report:
        if self._block is not None:
            raise InputError("this block is open already; call compressing() anew for one inside it")
        block = Block(self._settings[0], Passes(*self._settings))
        enter(block)
        self._block = block
        return block.passes.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        block, self._block = self._block, None
        assert block is not None
        leave(block)
        if kind is None and not block.passes.served:
            raise InputError(f"compressing() was left before anything was compressed: {_why(block)}") from block.error


def _why(block: Block) -> str:
    name = type(block.model).__name__
    if block.error is not None:
        return f"{name} failed ({type(block.error).__name__}: {block.error})"
    if block.running:
        return f"{name}.generate() still reads the prompt in another thread; join that thread inside the block"
    if block.shadowed:
        return "another compressing() block inside it served every pass; leave one of the two out"
    return (
        f"no generate() and no forward pass of this {name} ran in the block itself; call them there, on this very "
        "model, not on a copy or an inner part of it"
    )
