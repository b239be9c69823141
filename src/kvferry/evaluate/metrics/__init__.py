"""How answers are judged, one metric per file."""

from collections.abc import Callable
from functools import partial

from kvferry.errors import InputError
from kvferry.evaluate.metrics.anls import ANLS
from kvferry.evaluate.metrics.base import Answers, Figure, Metric
from kvferry.evaluate.metrics.cider import CIDEr
from kvferry.evaluate.metrics.exact import Contains, ExactMatch
from kvferry.evaluate.metrics.perplexity import Perplexity
from kvferry.evaluate.metrics.relaxed import RelaxedAccuracy
from kvferry.evaluate.metrics.soft import SoftAccuracy
from kvferry.evaluate.metrics.words import WordF1
from kvferry.evaluate.metrics.yes_no import PairedYesNo, YesNo
from kvferry.plugins import Registry

METRICS: Registry[Callable[[], Metric]] = Registry(
    "metrics",
    {
        "exact": ExactMatch,
        "contains": Contains,
        "vqa": SoftAccuracy,
        "textvqa": partial(SoftAccuracy, possessives=True),
        "anls": ANLS,
        "relaxed": RelaxedAccuracy,
        "f1": WordF1,
        "yes_no": YesNo,
        "yes_no_pairs": PairedYesNo,
        "cider": CIDEr,
    },
)
"""By name, for questions of one's own. (Perplexity judges a text, no answers: the task ``wikitext``.)"""


def metric_of(name: str) -> Metric:
    """The metric of this name.

    Raises
    ------
    InputError
        There is none.
    DependencyError
        It needs a package that is not here.
    """
    try:
        made = METRICS.find(name)
    except KeyError:
        raise InputError(f"there is no metric {name!r}; choose one of {', '.join(METRICS.names())}") from None
    return made()


__all__ = [
    "ANLS",
    "METRICS",
    "Answers",
    "CIDEr",
    "Contains",
    "ExactMatch",
    "Figure",
    "Metric",
    "PairedYesNo",
    "Perplexity",
    "RelaxedAccuracy",
    "SoftAccuracy",
    "WordF1",
    "YesNo",
    "metric_of",
]
