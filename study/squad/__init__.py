"""The text half on real weights: SmolLM2 reads SQuAD paragraphs, and answers from what is left of its cache."""

from pathlib import Path

DATA = Path("../shared/data/squad")
"""Where SQuAD's paragraphs lie; not part of the repository."""
FOLDER = Path("study/results/smollm2")
"""Of the raw results."""
PROFILES = Path("out/squad")
"""Of the profiles of `kvtc` and `transform`, which are too large for git; made anew where they are not there."""
