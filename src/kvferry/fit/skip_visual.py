"""When does a question need the picture? The threshold of ``modality=skip_visual``, measured on a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.selection.modality import SkipVisual, visual_mass

if TYPE_CHECKING:
    from kvferry.models import VLM

TEXT_ONLY = "lookup"
"""The testbed's kind of question that its own text answers."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Profile:
    """What ``skip_visual@FILE`` reads, and how sure it may be.

    Parameters
    ----------
    threshold : float
        Of the question's attention mass on visual tokens.
    fingerprint, model : str
        The model that it was measured on; it says nothing about any other.
    split, n
        Which questions.
    skipped_wrongly : float
        Share of the questions about the picture that fall below the threshold.
    kept_needlessly : float
        Share of the text-only questions that do not.
    visual_mass, text_only_mass : dict of str to float
        Quantiles of the mass, of the questions about the picture and of the text-only ones.
    """

    threshold: float
    fingerprint: str
    model: str
    split: str
    n: int
    skipped_wrongly: float
    kept_needlessly: float
    visual_mass: dict[str, float]
    text_only_mass: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def masses(vlm: VLM, split: str, n: int) -> Iterator[tuple[bool, float]]:
    """Of each question, whether its text alone answers it, and its attention mass on visual tokens."""
    from kvferry.testbed import samples

    for sample in samples(split, n):
        seen = vlm.prefill(sample.images, sample.question, requests=SkipVisual().requests)
        yield sample.kind == TEXT_ONLY, visual_mass(seen.cache, seen.evidence)


def best_threshold(text_only: npt.NDArray[np.float64], visual: npt.NDArray[np.float64]) -> float:
    """Where the two error rates have the least mean; of equals the lowest, which skips least.

    Thresholds lie halfway between neighbouring masses. Rates are averaged, not errors counted, because questions
    about the picture are far more frequent in the testbed than text-only ones.
    """
    seen = np.unique(np.concatenate([text_only, visual]))
    halfway = (seen[1:] + seen[:-1]) / 2
    halfway = np.where(halfway > seen[:-1], halfway, seen[1:])  # neighbours may have no number between them
    between = np.concatenate([[0.0], halfway, [min(1.0, float(seen[-1]) + 1e-6)]])
    errors = [np.mean(visual < t) + np.mean(text_only >= t) for t in between]
    return float(between[int(np.argmin(errors))])


def make_profile(vlm: VLM, split: str, measured: Sequence[tuple[bool, float]]) -> Profile:
    """The profile of what :func:`masses` gave."""
    text_only = np.array([mass for alone, mass in measured if alone])
    visual = np.array([mass for alone, mass in measured if not alone])
    if not len(text_only) or not len(visual):
        raise InputError("calibration needs questions of both sorts; ask for more of them (--n)")
    threshold = best_threshold(text_only, visual)
    return Profile(
        threshold=threshold,
        fingerprint=vlm.fingerprint,
        model=vlm.name,
        split=split,
        n=len(measured),
        skipped_wrongly=float(np.mean(visual < threshold)),
        kept_needlessly=float(np.mean(text_only >= threshold)),
        visual_mass=_quantiles(visual),
        text_only_mass=_quantiles(text_only),
    )


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {f"{share:g}": round(float(np.quantile(values, share)), 6) for share in QUANTILES}
