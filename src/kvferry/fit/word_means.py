"""Means of the vectors of frequent words, in bounded memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

ENOUGH = 8
"""A word that was seen so often gets a mean of its own."""
MEMORY = 256 * 2**20
"""Bytes that sums take at most: 43,690 words of a testbed model (768 numbers a token), 1,170 of a 7B shape (28,672)."""


class WordMeans:
    """Sums of vectors by word, of as many words as there is memory for: the most frequent.

    What a mean of its own saves grows with how often the word occurs, so that the rarest held word gives way to one
    that was seen more often. All are counted; a word that came in late has a mean of what was seen of it since.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self._held: dict[int, tuple[int, torch.Tensor]] = {}
        self._rarest = 0

    def add(self, rows: torch.Tensor, words: torch.Tensor) -> None:
        """Vectors ``[k, p]`` and their words, int64 ``[k]``."""
        some, index, counts = np.unique(words.numpy(), return_inverse=True, return_counts=True)
        sums = torch.zeros(len(some), rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, torch.from_numpy(index.reshape(-1)), rows.double())
        room = max(1, MEMORY // (8 * rows.shape[1]))
        for word, count, total in zip(some.tolist(), counts.tolist(), sums, strict=True):
            self.counts[word] += count
            if word in self._held:
                before, old = self._held[word]
                self._held[word] = before + count, old + total
            elif len(self._held) < room or self._gives_way(word):
                self._held[word] = count, total.clone()

    def _gives_way(self, word: int) -> bool:
        """Whether a rarer word was let go for ``word``."""
        if self.counts[word] <= self._rarest:  # counts only grow: no scan could find a rarer one
            return False
        rarest = min(self._held, key=lambda held: (self.counts[held], held))
        self._rarest = self.counts[rarest]
        if self.counts[word] <= self._rarest:
            return False
        del self._held[rarest]
        return True

    def means(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Words seen :data:`ENOUGH` times, ascending, int64 ``[i]``, and their means, float32 ``[i, width]``."""
        known = sorted(word for word, (count, _) in self._held.items() if count >= ENOUGH)
        means = [(self._held[word][1] / self._held[word][0]).float() for word in known]
        return torch.tensor(known, dtype=torch.int64), torch.stack(means) if means else torch.zeros(0, width)

    def sums(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words seen twice, ascending, int64 ``[i]``, their sums, float64 ``[i, width]``, and how often each was
        seen, float64 ``[i]``."""
        known = sorted(word for word, (count, _) in self._held.items() if count > 1)
        sums = [self._held[word][1] for word in known]
        counts = torch.tensor([self._held[word][0] for word in known], dtype=torch.float64)
        together = torch.stack(sums) if sums else torch.zeros(0, width, dtype=torch.float64)
        return torch.tensor(known, dtype=torch.int64), together, counts
