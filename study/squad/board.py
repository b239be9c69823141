"""Many rows of tokens fed on top of one stored cache in one pass; each row sees what it is allowed to see of it.

A pruned cache answers as the full one does with the dropped tokens hidden, so that every selection of one cache is a
mask, and all of them are fed together: no copy of keys and values for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from kvferry.cache import LayerCache
from kvferry.errors import UnsupportedModelError
from kvferry.models import VLM
from kvferry.models.attention import Session, session
from kvferry.models.cache_layers import KeptLayer
from kvferry.models.support import layer_windows


@dataclass
class _Feed:
    """Tokens of one pass: the row of each, and the row and the position of all that were fed so far."""

    rows: torch.Tensor
    newest: torch.Tensor


class _Layer(KeptLayer):
    """One layer's keys and values, stored once for all rows."""

    def __init__(self, layer: LayerCache, like: torch.Tensor, allowed: Callable[[int], torch.Tensor]) -> None:
        super().__init__([layer], [0], layer.kept, None, like)
        self._rows = allowed

    def mask(self, query_length: int, query_heads: int, seen: torch.Tensor | None = None) -> torch.Tensor:
        """What the newest tokens see, bool ``[1, query_heads, query_length, stored]``."""
        return self._rows(query_heads)


class Board:
    """A cache of ``n`` tokens and ``r`` rows that look at it.

    Parameters
    ----------
    layers : sequence of LayerCache
        Keys and values of all tokens, ``[kv_heads, n, d]``.
    visible : bool ``[r, layers, kv_heads, n]``
        Which of them a row sees.
    """

    def __init__(self, vlm: VLM, layers: Sequence[LayerCache], visible: torch.Tensor) -> None:
        if any(window is not None for window in layer_windows(vlm.model)):
            raise UnsupportedModelError("rows as masks see every token: take a model without sliding windows")
        self._vlm, self._visible = vlm, visible
        like = torch.empty(0, dtype=vlm.model.dtype)
        self._kept = [_Layer(x, like, self._allowed(i)) for i, x in enumerate(layers)]
        self._past = Cache(layers=self._kept)
        self._row = torch.empty(0, dtype=torch.long)
        self._place = torch.empty(0, dtype=torch.long)
        self._now = _Feed(self._row, torch.empty(0, 0, dtype=torch.bool))

    def feed(
        self, rows: Sequence[int], token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> torch.Tensor:
        """Logits after some of the tokens, float32 ``[len(wanted), vocabulary]``.

        Parameters
        ----------
        rows, token_ids, positions : sequence of int, ``[t]``
            Row, id and rotary position of every token; a token sees earlier ones of its own row.
        wanted : sequence of int
            Indices into these.
        """
        row, place = torch.tensor(rows), torch.tensor(positions)
        self._row, self._place = torch.cat([self._row, row]), torch.cat([self._place, place])
        newest = (self._row == row[:, None]) & (self._place <= place[:, None])
        self._now = _Feed(row, newest)
        with torch.inference_mode(), session(Session(kept=self._kept)):
            output = self._vlm.model(
                input_ids=torch.tensor([list(token_ids)]),
                position_ids=place[None],
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=torch.tensor(wanted),
            )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def forget(self, row: int, position: int) -> None:
        """What the row was fed from this position on is seen by nobody any more."""
        self._row[(self._row == row) & (self._place >= position)] = -1

    def _allowed(self, layer: int) -> Callable[[int], torch.Tensor]:
        def allowed(query_heads: int) -> torch.Tensor:
            stored = self._visible[self._now.rows, layer].transpose(0, 1)
            newest = self._now.newest.expand(len(stored), -1, -1)
            return torch.cat([stored, newest], dim=-1).repeat_interleave(query_heads // len(stored), dim=0)[None]

        return allowed
