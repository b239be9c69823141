"""No picture for questions that the text alone answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvferry.cache import KVCache
from kvferry.errors import FingerprintError, InputError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.lazy import torch
from kvferry.selection.modality.text_preserving import TextPreserving

QUESTION = EvidenceRequest("question")
_PACKAGE = Path(__file__).parents[2]
SHIPPED = (_PACKAGE.parent.parent / "testbed", _PACKAGE / "shipped" / "testbed")
"""Where the models that come with kvferry lie: in a checkout, and in a wheel."""


def visual_mass(cache: KVCache, evidence: Evidence) -> float:
    """Share of the question's attention that falls on visual tokens: the mean over layers and heads, 0 to 1."""
    visual = torch.from_numpy(cache.layout.visual[: cache.length])
    shares = []
    for layer in range(len(cache.layers)):
        columns = evidence.of(QUESTION, layer).double()
        shares.append(columns[:, visual.to(columns.device)].sum(1) / columns.sum(1))
    return float(torch.stack(shares).mean())


@dataclass(frozen=True)
class SkipVisual(TextPreserving):
    """All visual tokens go where the question hardly looks at them; otherwise as ``text_preserving``.

    The sources' skipping of visual tokens for text-only questions (research note "topic 13"). The threshold depends on
    the model: ``kvferry calibrate-skip`` measures it and writes a profile. Without a threshold and without a profile
    the one that ships with the model is taken (``testbed/cloud``: 0.75); other models have none to fall back on.

    Parameters
    ----------
    threshold : float, optional
        Skip where the question's :func:`visual_mass` is below this.
    profile : str
        A file by ``kvferry calibrate-skip``, whose threshold is taken. It is read when a prompt is selected: who only
        decodes does not need it.
    """

    threshold: float | None = None
    profile: str = ""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"modality=skip_visual:{self.threshold:g}: a share of attention lies in [0, 1]")
        if self.profile and self.threshold is not None:
            raise InputError("modality=skip_visual takes a threshold or a profile, not both")
        if set(self.profile) & set(",|") or self.profile != self.profile.strip():
            raise InputError(f"the profile {self.profile!r} cannot stand in a recipe; give it a name without , and |")

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """The question's rows in every layer."""
        return (QUESTION,)

    def skips(self, cache: KVCache, evidence: Evidence) -> bool:
        """Whether the question's visual mass is below the threshold.

        Raises
        ------
        InputError
            The profile cannot be read, or there is none for this model and no threshold either.
        FingerprintError
            It was measured on another model.
        """
        threshold = self.threshold
        if threshold is None:
            of_model = cache.fingerprint
            threshold = read_threshold(self.profile, of_model) if self.profile else shipped_threshold(of_model)
        return visual_mass(cache, evidence) < threshold


def read_threshold(path: str, fingerprint: str) -> float:
    """The threshold in a profile of the model with this fingerprint."""
    try:
        profile = json.loads(Path(path).read_text())
        threshold, measured_on = float(profile["threshold"]), str(profile["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path} is no profile; make one by `kvferry calibrate-skip MODEL --out {path}`") from None
    if not fingerprint:
        raise InputError(
            f"nothing says which model made this cache, so {path} cannot be checked; "
            f"write its threshold instead: modality=skip_visual:{threshold:g}"
        )
    if measured_on != fingerprint:
        raise FingerprintError(
            f"{path} was measured on another model than the one that made this cache; "
            f"run `kvferry calibrate-skip MODEL --out {path}` for this one"
        )
    return threshold


def shipped_threshold(fingerprint: str) -> float:
    """That of the shipped model with this fingerprint."""
    for path in (path for folder in SHIPPED for path in sorted(folder.glob("*/skip_visual.json"))):
        profile = json.loads(path.read_text())
        if fingerprint and profile["fingerprint"] == fingerprint:
            return float(profile["threshold"])
    raise InputError(
        "modality=skip_visual depends on the model, and no profile ships with the one that made this cache; measure it "
        "by `kvferry calibrate-skip MODEL --out FILE` and write modality=skip_visual@FILE, or give a threshold, for "
        "instance modality=skip_visual:0.5"
    )
