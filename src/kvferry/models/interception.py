"""What stands in place of a model's own methods while :func:`kvferry.models.compressing.compressing` is open on it.

Instead of hooks, ``forward`` and what leads to it are replaced on the model object itself: a wrapper around the model
(PEFT, ``torch.compile``) may call them without ever reaching a hook, and every thread meets them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models.attention import attach, current_session, detach
from kvferry.models.passes import Passes, is_kept
from kvferry.models.ways import check_options

_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@dataclass(eq=False)
class Block:
    """One ``with compressing(...)`` that is open."""

    model: PreTrainedModel
    passes: Passes
    running: int = 0
    """Calls of ``generate()`` that have not returned yet."""
    shadowed: bool = False
    """Whether another block served a pass in its place."""
    error: BaseException | None = None
    """What the last pass or ``generate()`` that failed raised, in whatever thread."""

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Remember what goes wrong meanwhile."""
        try:
            yield
        except BaseException as error:
            self.error = error
            raise


@dataclass(eq=False)
class _Call:
    """One call of ``generate()``."""

    block: Block
    passes: int = 0
    """Forward passes of this very model that were seen."""


@dataclass
class _Taken:
    """A model that some blocks are open on, or whose ``generate()`` still runs in one that was left."""

    blocks: list[Block] = field(default_factory=list)
    users: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    """What stood on the model object itself under the names that were replaced."""


_lock = Lock()
_taken: WeakKeyDictionary[PreTrainedModel, _Taken] = WeakKeyDictionary()
_entered: ContextVar[tuple[Block, ...]] = ContextVar("kvferry_entered", default=())
_call: ContextVar[_Call | None] = ContextVar("kvferry_call", default=None)
_eager: list[Any] = []
"""The stance of torch.compile while any model is taken, and how many are."""


def enter(block: Block) -> None:
    """From now on ``block`` serves the passes of its model: of this context, and of threads that have no block."""
    with _lock:
        _take(block.model).blocks.append(block)
    _entered.set((*_entered.get(), block))


def leave(block: Block) -> None:
    """Undo :func:`enter`. What the model's ``generate()`` is about, in other threads, goes on to its end."""
    _entered.set(tuple(x for x in _entered.get() if x is not block))
    with _lock:
        _taken[block.model].blocks.remove(block)
        _release(block.model)


def _take(model: PreTrainedModel) -> _Taken:
    taken = _taken.get(model)
    if taken is None:
        attach(model)
        taken = _taken[model] = _Taken()
        if not _eager:
            _eager.append(torch.compiler.set_stance("force_eager"))
        _eager.append(model)
        _replace(model, taken.before)
    taken.users += 1
    return taken


def _release(model: PreTrainedModel) -> None:
    taken = _taken[model]
    taken.users -= 1
    if taken.users:
        return
    del _taken[model]
    for name, method in taken.before.items():
        if method is None:
            delattr(model, name)
        else:
            setattr(model, name, method)
    detach(model)
    _eager.pop()
    if len(_eager) == 1:
        _eager.pop().__exit__(None, None, None)


def _replace(model: PreTrainedModel, before: dict[str, Any]) -> None:
    replacements: dict[str, Callable[..., Any]] = {"forward": _forward, "generate": _generate, "_prefill": _prefill}
    replacements |= dict.fromkeys(_CONTINUOUS, _refuse)
    for name, instead in replacements.items():
        own = getattr(model, name, None)
        if own is not None:
            before[name] = vars(model).get(name)
            setattr(model, name, wraps(own)(partial(instead, model, own)))


def _serving(model: PreTrainedModel) -> Block | None:
    """The block whose recipe holds for this thread's passes; None outside all that are open.

    Raises
    ------
    InputError
        It could be several.
    """
    call = _call.get()
    if call is not None and call.block.model is model:
        return call.block
    with _lock:
        taken = _taken.get(model)
        blocks = list(taken.blocks) if taken is not None else []
    own = [x for x in _entered.get() if x in blocks]
    for block in own[:-1]:
        block.shadowed = True
    if own:
        return own[-1]
    if len(blocks) > 1:
        raise InputError(
            f"{len(blocks)} compressing() blocks are open on this {type(model).__name__}, none of them in this thread; "
            "open the block in the thread that calls the model"
        )
    return blocks[0] if blocks else None


def _forward(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    block = None if current_session() is not None else _serving(model)
    if block is None:
        return original(*args, **kwargs)
    inputs, call = _by_name(original, args, kwargs), _call.get()
    if call is None and _began_before(block, inputs.get("past_key_values")):
        return original(*args, **kwargs)
    if call is not None and call.block is block:
        call.passes += 1
        if call.passes > 1 and inputs.get("past_key_values") is None and inputs.get("use_cache") is not False:
            raise UnsupportedModelError(
                f"{model.config.model_type} begins anew at this length, as its family does beyond its original "
                "context, but a compressed cache cannot be read again; ask for fewer new tokens, or shorten the prompt"
            )
    with block.noting():
        return block.passes.run(original, inputs)


def _began_before(block: Block, past: Any) -> bool:
    """Whether a cache belongs to a ``generate()`` that another thread had called when the block was opened."""
    elsewhere = block not in _entered.get()
    return elsewhere and past is not None and not is_kept(past) and bool(past.get_seq_length())


def _by_name(method: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(method).parameters, args, strict=False)), **kwargs}


def _generate(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    block = None if current_session() is not None else _serving(model)
    if block is None:
        return original(*args, **kwargs)
    with block.noting(), _calling(block) as call:
        check_options(model, _by_name(original, args, kwargs))
        output = original(*args, **kwargs)
    if not call.passes:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate() ran its language model without the model's own forward pass, so "
            "nothing was compressed; this way of generating cannot be served"
        )
    return output


@contextmanager
def _calling(block: Block) -> Iterator[_Call]:
    call = _Call(block)
    with _lock:
        _take(block.model)
        block.running += 1
    token = _call.set(call)
    try:
        yield call
    finally:
        _call.reset(token)
        with _lock:
            block.running -= 1
            _release(block.model)


def _prefill(
    model: PreTrainedModel,
    original: Callable[..., Any],
    input_ids: torch.Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Where ``prefill_chunk_size`` has a prompt read in several passes, only all of them are the prompt."""
    block, past, step = _serving(model), model_kwargs.get("past_key_values"), generation_config.prefill_chunk_size
    if block is None or step is None or is_kept(past) or _began_before(block, past):
        return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
    with block.passes.reading(past, {**model_kwargs, "input_ids": input_ids}, step):
        return original(input_ids, generation_config, model_kwargs, *args, **kwargs)


def _refuse(model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _serving(model) is None:
        return original(*args, **kwargs)
    raise UnsupportedModelError(
        f"{getattr(original, '__name__', 'this')} keeps a paged cache of its own, which cannot be compressed; call "
        "generate() in the block"
    )
