"""A family tried out on a small model of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from kvferry.models.check.verdict import Difference, Verdict
from kvferry.models.support import explanation, why_not

small_models: WeakSet[PreTrainedModel] = WeakSet()
"""Models that are being tried out: nobody asks whether they are supported."""


def try_out(kind: type[PreTrainedModel], config: PreTrainedConfig) -> Verdict:
    """Make a small model with the flags and kinds of layers of ``config`` and compare on it.

    The model is in float32 on the CPU; its weights come from a generator of its own. Nothing that it does stays:
    torch's random numbers, default dtype and grad mode, and all other models are as before.
    """
    began = time.perf_counter()
    blank = Verdict(str(config.model_type), kind.__name__, refused=why_not(kind, config))
    with _undisturbed():
        try:
            model, inputs = _built(kind, config)
        except Exception as error:  # the code of any family may fail in any way
            return replace(blank, unchecked=describe(error), seconds=time.perf_counter() - began)
        small_models.add(model)
        differences, moved = _compared(model, inputs)
    return replace(
        blank,
        pictures="pixel_values" in inputs,
        differences=differences,
        moved=moved,
        hint=explanation(kind, config),
        seconds=time.perf_counter() - began,
    )


def _built(kind: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    from kvferry.models.check.build import small_model, text_inputs
    from kvferry.models.check.pictures import picture_inputs
    from kvferry.models.check.tiny import tiny_config

    model = small_model(kind, tiny_config(config))
    inputs = picture_inputs(model) or text_inputs()
    with torch.no_grad():
        model(**inputs, use_cache=False)
    return model, inputs


def _compared(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, Difference], float]:
    from kvferry.models.check import compare

    moved = 0.0

    def evicted(per_head: bool) -> Difference:
        nonlocal moved
        difference, seen = compare.evicted_against_masked(model, inputs, per_head=per_head)
        moved = seen if not per_head else moved
        return difference

    ways: dict[str, Callable[[], Difference]] = {
        "full": lambda: compare.full_against_stock(model, inputs),
        "evict": lambda: evicted(False),
        "heads": lambda: evicted(True),
        "evidence": lambda: compare.evidence_against_eager(model, inputs),
        "resume": lambda: compare.resumed_against_continued(model, inputs),
    }
    return {name: _tried(way) for name, way in ways.items()}, moved


def _tried(way: Callable[[], Difference]) -> Difference:
    try:
        return way()
    except Exception as error:  # as above
        return Difference(float("inf"), error=describe(error))


def describe(error: BaseException) -> str:
    """The first line of an exception, with its kind."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip() if lines else ""
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever a caller has set, a check runs in float32 on the CPU and says nothing; and the other way round."""
    verbosity: Any = logging.get_verbosity()
    dtype, random = torch.get_default_dtype(), torch.random.get_rng_state()
    logging.set_verbosity_error()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        torch.random.set_rng_state(random)
        torch.set_default_dtype(dtype)
        logging.set_verbosity(verbosity)
