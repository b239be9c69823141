"""Whether a family of models can be served, found out on a small random model of it.

Four ways to the same answer are compared: a full cache with the model's own forward pass, evicted tokens with masked
ones, the attention that scorers see with eager attention, and a resumed cache with the model's own ``generate()``.
"""

from kvferry.models.check.memory import verdict_of, verdict_on
from kvferry.models.check.trial import small_models
from kvferry.models.check.verdict import TOLERANCE, WHAT, Difference, Verdict

__all__ = ["TOLERANCE", "WHAT", "Difference", "Verdict", "small_models", "verdict_of", "verdict_on"]
