"""What a check found out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

TOLERANCE = 3e-3
"""Above, two ways to the same thing differ. docs/models.md prints how far right and wrong families lie from it."""
VISIBLE = 0.05
"""Dropping tokens must move the logits by so many standard deviations, or the check would see nothing."""

WHAT = {
    "full": "a full cache differs from the model's own forward pass",
    "evict": "evicting tokens differs from masking them",
    "heads": "evicting other tokens in each head differs from masking them",
    "evidence": "the attention that scorers see differs from eager attention",
    "resume": "a resumed cache differs from the model's own generate()",
}
"""Comparison -> what is wrong where it fails."""


@dataclass(frozen=True)
class Difference:
    """How far two ways to the same thing lie apart.

    Parameters
    ----------
    size : float
        The largest difference: of logits in units of their standard deviation, of attention as it is. Infinite where
        one of the ways does not get to its end.
    where : str
        The layer or the token it was seen at.
    error : str
        Why one of the ways does not get to its end.
    """

    size: float
    where: str = ""
    error: str = ""

    @property
    def right(self) -> bool:
        """Whether the two ways agree."""
        return self.size <= TOLERANCE

    def __str__(self) -> str:
        return self.error or f"{self.size:.1e}"


@dataclass(frozen=True)
class Verdict:
    """Whether a family can be served, and how that was found out.

    Parameters
    ----------
    family, model : str
        The configuration's ``model_type`` and the name of the model's class.
    pictures : bool
        Whether the prompt that was tried showed pictures.
    differences : dict of str to Difference
        By the names in :data:`WHAT`; empty where nothing could be tried.
    moved : float
        By how much dropping the tokens moved the logits: what the comparison of evicting with masking can see.
    unchecked : str
        Why nothing could be tried.
    refused : str
        Why the family cannot be served, where that is known whatever the check says.
    hint : str
        What is most likely to blame where a comparison fails.
    seconds : float
        What the check took.
    """

    family: str
    model: str
    pictures: bool = False
    differences: dict[str, Difference] = field(default_factory=dict)
    moved: float = 0.0
    unchecked: str = ""
    refused: str = ""
    hint: str = ""
    seconds: float = 0.0

    @property
    def supported(self) -> bool:
        """Whether the model can be served, if need be with the same tokens in all heads of a layer."""
        return not self.reason

    @property
    def tied_heads(self) -> bool:
        """Whether all heads of a layer must keep the same tokens, since the model mixes them."""
        return "heads" in self.differences and not self.differences["heads"].right

    @property
    def reason(self) -> str:
        """Why the model cannot be served; empty where it can."""
        return self.refused or self.failure

    @property
    def failure(self) -> str:
        """What the check found wrong; empty where nothing."""
        if self.unchecked:
            return f"it could not be tried out ({self.unchecked})"
        wrong = [name for name, x in self.differences.items() if not x.right and name != "heads"]
        if wrong:
            return ": ".join(filter(None, [self.hint, self.found(wrong[0])]))
        if self.moved < VISIBLE:
            return f"dropping tokens moves its answers by {self.moved:.1e} only, so that nothing can be said"
        return ""

    def found(self, name: str) -> str:
        """One failed comparison in words, with its number and its place."""
        difference = self.differences[name]
        if difference.error:
            return f"{WHAT[name]} ({difference.error})"
        return f"{WHAT[name]} by {difference.size:.2g} at {difference.where}, where {TOLERANCE:g} is allowed"

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the conclusions; infinite differences become None."""
        record = asdict(self)
        for one in record["differences"].values():
            one["size"] = one["size"] if math.isfinite(one["size"]) else None
        return {**record, "supported": self.supported, "tied_heads": self.tied_heads, "reason": self.reason}

    @classmethod
    def of_dict(cls, record: dict[str, Any]) -> Verdict:
        """Undo :meth:`as_dict`. A KeyError, TypeError or ValueError where the record is none."""
        known = {name: record[name] for name in cls.__dataclass_fields__}
        differences = {
            str(name): Difference(math.inf if x["size"] is None else float(x["size"]), str(x["where"]), str(x["error"]))
            for name, x in known.pop("differences").items()
        }
        if differences and set(differences) != set(WHAT):
            raise ValueError("not all comparisons are there")
        return cls(**known, differences=differences)
