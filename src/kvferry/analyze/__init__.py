"""Look inside a model: ranks, sparsity, attention and kept tokens by layer and modality, over any questions."""

from kvferry.analyze.run import Analysis, analyze
from kvferry.analyze.source import Asked, Questions, drawn_questions
from kvferry.analyze.verdicts import Answer, paragraph

__all__ = ["Analysis", "Answer", "Asked", "Questions", "analyze", "drawn_questions", "paragraph"]
