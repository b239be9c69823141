"""The small vision-language models that ship with kvferry: their task, their data and their training."""

from .data import Sample, exact_match, sample, samples
from .questions import KINDS

__all__ = ["KINDS", "Sample", "exact_match", "sample", "samples"]
