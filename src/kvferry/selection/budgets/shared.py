"""The same tokens in every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvferry.selection.budgets.uniform import Uniform


@dataclass(frozen=True)
class Shared(Uniform):
    """Every layer and head keeps the fraction's tokens with the highest sum of scores over all layers and heads.

    Positions then cross the wire once, and a codec can code a token's vectors of all layers together
    (``transform``). Scores are added as they are: a scorer whose scores have no common unit is led by the layers where
    they are large.
    """

    ranks_jointly: ClassVar[bool] = True
