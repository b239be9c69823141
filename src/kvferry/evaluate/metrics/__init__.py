"""How answers are judged, one metric per file."""

from kvferry.evaluate.metrics.anls import ANLS
from kvferry.evaluate.metrics.base import Answers, Figure, Metric
from kvferry.evaluate.metrics.cider import CIDEr
from kvferry.evaluate.metrics.exact import ExactMatch
from kvferry.evaluate.metrics.perplexity import Perplexity
from kvferry.evaluate.metrics.relaxed import RelaxedAccuracy
from kvferry.evaluate.metrics.soft import SoftAccuracy
from kvferry.evaluate.metrics.words import WordF1
from kvferry.evaluate.metrics.yes_no import PairedYesNo, YesNo

__all__ = [
    "ANLS",
    "Answers",
    "CIDEr",
    "ExactMatch",
    "Figure",
    "Metric",
    "PairedYesNo",
    "Perplexity",
    "RelaxedAccuracy",
    "SoftAccuracy",
    "WordF1",
    "YesNo",
]
