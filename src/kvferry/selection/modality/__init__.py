"""What each modality is owed. One policy, one file; a new one needs a line in ``POLICIES``."""

from kvferry.plugins import Registry
from kvferry.selection.modality.adaptive import Adaptive
from kvferry.selection.modality.base import Policy, Quota
from kvferry.selection.modality.skip_visual import SkipVisual, visual_mass
from kvferry.selection.modality.text_preserving import TextPreserving
from kvferry.selection.modality.uniform import Uniform
from kvferry.selection.modality.visual_heavy import VisualHeavy

POLICIES: dict[str, type[Policy]] = Registry(
    "policies",
    {
        "uniform": Uniform,
        "visual_heavy": VisualHeavy,
        "text_preserving": TextPreserving,
        "adaptive": Adaptive,
        "skip_visual": SkipVisual,
    },
)

__all__ = [
    "POLICIES", "Adaptive", "Policy", "Quota", "SkipVisual", "TextPreserving", "Uniform", "VisualHeavy", "visual_mass",
]  # fmt: skip
