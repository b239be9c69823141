"""What a modality policy is: how much of a layer's count is promised to text and how much to visual tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvferry.cache import KVCache
from kvferry.evidence import Evidence, EvidenceRequest


@dataclass(frozen=True)
class Quota:
    """How many tokens of each modality a head keeps at least; what is left goes to the highest scores.

    ``visual_first`` gives what is left to visual tokens alone.
    """

    text: int = 0
    visual: int = 0
    visual_first: bool = False


class Policy(ABC):
    """Splits a layer's count among modalities; the total stays what the budget says.

    Images and video frames are both visual, wherever and however often they stand in the prompt. A prompt without any
    has nothing to split: there, every policy is ``uniform``. Sinks stay under every policy.
    """

    @property
    def requests(self) -> tuple[EvidenceRequest, ...]:
        """What prefill must observe for this policy."""
        return ()

    @abstractmethod
    def quota(self, keep: int, text: int, visual: int) -> Quota:
        """For a head that keeps ``keep`` of ``text`` text and ``visual`` (at least one) visual tokens."""

    def skips(self, cache: KVCache, evidence: Evidence) -> bool:
        """Whether a prompt with pictures can do without any visual token, even if the budget would hold some."""
        return False
