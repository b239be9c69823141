"""What the queries to come will look like, as far as the prompt's own queries tell."""

from __future__ import annotations

import torch

from kvferry.cache import PromptLayout
from kvferry.rope import Rotary

OUTLIERS = 4
"""The first tokens' queries are unlike all others (massive activations); they are left out where there are more."""


def coming_queries(
    query: torch.Tensor, rows: torch.Tensor, layout: PromptLayout, rotary: Rotary, horizon: int, scaling: float
) -> torch.Tensor:
    """A Gaussian model of future queries (Expected Attention, arXiv 2510.00636, section 3.1).

    Mean and covariance of un-rotated queries, per query head, turned by the rotation matrix averaged over the
    ``horizon`` positions that follow the prompt. The paper takes the statistics of hidden states and projects them;
    here they are those of the queries themselves, so that models which normalise queries are right too.

    Parameters
    ----------
    query : ``[query_heads, r, d]``, post-rotary
        Those to learn from.
    rows : int64 ``[r]``, ascending, on the CPU
        Where in the prompt they stand.
    scaling : float
        Of the logits; folded into mean and covariance.

    Returns
    -------
    float32 ``[query_heads, 1 + d, d]``: the mean, then the covariance.
    """
    if bool((rows >= OUTLIERS).any()):
        rows = rows[rows >= OUTLIERS]
        query = query[:, -len(rows) :]
    where = torch.from_numpy(layout.positions).long()[:, rows]
    straight = rotary.unrotate(query.float(), where.to(query.device)) * scaling
    mean = straight.mean(1, keepdim=True)
    centred = straight - mean
    covariance = centred.transpose(1, 2) @ centred / len(rows)
    turned = _mean_turn(covariance, layout.next_position, rotary, horizon)
    turned = _mean_turn(turned.transpose(1, 2), layout.next_position, rotary, horizon)
    return torch.cat([_mean_turn(mean, layout.next_position, rotary, horizon), turned], dim=1)


def _mean_turn(x: torch.Tensor, start: int, rotary: Rotary, horizon: int) -> torch.Tensor:
    """The mean of ``x`` ``[heads, rows, d]`` rotated to each of ``horizon`` positions from ``start`` on."""
    angle = rotary.angles(torch.arange(start, start + horizon, device=x.device)[None])
    return rotary.turn_by(x, angle.cos().mean(0) * rotary.scaling, angle.sin().mean(0) * rotary.scaling)
