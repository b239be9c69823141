"""CIDEr, for captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import numpy as np

from kvferry.errors import DependencyError
from kvferry.evaluate.metrics.base import Answers, Floats, Metric


def words_of(caption: str) -> str:
    """A caption's words in lower case, without punctuation.

    The COCO evaluation does this with Stanford's tokenizer, which needs Java; its figures differ a little, mostly by
    how it splits contractions and numbers.
    """
    return " ".join(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", caption.lower()))


@dataclass(frozen=True)
class CIDEr(Metric):
    """CIDEr-D by the COCO evaluation's own package, ``pycocoevalcap``.

    R. Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (arXiv 1411.5726). Words are weighed by
    how many of the questions' references hold them, so that a score belongs to the questions it was taken over.
    """

    name: ClassVar[str] = "CIDEr"

    def __post_init__(self) -> None:
        if find_spec("pycocoevalcap") is None:
            raise DependencyError("captions are scored by pycocoevalcap; install it: pip install 'kvferry[captions]'")

    def score(self, said: str, references: Sequence[str]) -> None:
        """None: see :meth:`scores`."""

    def scores(self, answers: Answers) -> Floats:
        """Of every caption, given all of them."""
        from pycocoevalcap.cider.cider import Cider

        wanted = {i: [words_of(x) for x in references] for i, references in enumerate(answers.references)}
        given = {i: [words_of(said)] for i, said in enumerate(answers.said)}
        return np.asarray(Cider().compute_score(wanted, given)[1], np.float64)
