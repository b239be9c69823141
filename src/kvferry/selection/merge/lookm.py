"""LOOK-M: what is dropped of a picture lives on in its most similar neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvferry.cache import KVCache, LayerCache
from kvferry.lazy import torch


@dataclass(frozen=True)
class LookM:
    """Each evicted visual token is averaged into the kept token of its head whose key is most similar (cosine).

    Based on LOOK-M (arXiv 2406.18139), section on KV pairs merging: with ``N`` tokens merged into the kept token
    ``c``, ``k_c = (k_c + sum of what they contribute) / (N + 1)``, and ``v_c`` likewise with the assignment found by
    keys. Keys are compared and averaged after rotation, as in the paper's code. A prompt without pictures is left as
    it is.

    Parameters
    ----------
    kind : {"averaged", "pivotal", "weighted"}
        What an evicted ``k_e`` contributes: itself, the midpoint ``(k_e + k_c) / 2``, or ``k_e`` times the similarity.
    """

    kind: Literal["averaged", "pivotal", "weighted"] = "averaged"

    def merge(self, before: KVCache, after: KVCache) -> tuple[LayerCache, ...]:
        """The layers of ``after``, a selection from ``before``, with the rest of ``before`` merged in."""
        visual = torch.from_numpy(before.layout.visual)
        return tuple(
            LayerCache.join([self._merge_head(*pair, visual) for pair in zip(old.split(), new.split(), strict=True)])
            for old, new in zip(before, after, strict=True)
        )

    def _merge_head(self, old: LayerCache, new: LayerCache, visual: torch.Tensor) -> LayerCache:
        """One head: ``old`` ``[1, stored, d]``, ``new`` ``[1, kept, d]``."""
        gone = visual.to(old.positions.device)[old.positions[0]] & ~torch.isin(old.positions[0], new.positions[0])
        if not bool(gone.any()) or not new.kept:
            return new
        unit = [torch.nn.functional.normalize(x.float(), dim=-1) for x in (old.keys[0, gone], new.keys[0])]
        similarity, target = (unit[0] @ unit[1].T).max(dim=1)
        keys, values = (
            self._average(kept, evicted, similarity[:, None], target)
            for kept, evicted in ((new.keys[0], old.keys[0, gone]), (new.values[0], old.values[0, gone]))
        )
        return LayerCache(keys[None], values[None], new.positions)

    def _average(
        self, kept: torch.Tensor, evicted: torch.Tensor, similarity: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """``kept`` ``[k, d]`` with ``evicted`` ``[e, d]`` averaged into the rows ``target`` ``[e]``, in float32."""
        total, given = kept.float(), evicted.float()
        if self.kind == "pivotal":
            given = (given + total[target]) / 2
        elif self.kind == "weighted":
            given = given * similarity
        size = torch.ones_like(total[:, :1]).index_add_(0, target, torch.ones_like(similarity))
        return (total.index_add(0, target, given) / size).to(kept.dtype)
