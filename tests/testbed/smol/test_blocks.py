"""Attention in blocks is attention under the whole mask, forwards and backwards."""

from __future__ import annotations

import pytest
import torch

from kvferry.testbed.smol.blocks import Blocks, block_attention

SEGMENTS = [[0] * 7 + [1] * 5 + [2] * 1 + [3] * 9 + [4] * 4, [0] * 3 + [1] * 12]


@pytest.mark.parametrize("rows", [1, 6, 10, 500])
def test_blocks_are_the_mask(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    length = max(len(segments) for segments in SEGMENTS) + 2
    query = torch.randn(2, 6, length, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(2, 3, length, 8, generator=generator, requires_grad=True) for _ in range(2))
    seen, _ = block_attention(None, query, key, value, tuple(Blocks.of(s, rows) for s in SEGMENTS), 0.3)
    of = torch.full((2, length), -1)
    for row, segments in zip(of, SEGMENTS, strict=True):
        row[: len(segments)] = torch.tensor(segments)
    allowed = torch.ones(length, length).tril().bool()
    allowed = allowed & ((of[:, :, None] == of[:, None, :]) | (of[:, None, :] == 0))
    scores = (query * 0.3) @ key.repeat_interleave(2, 1).transpose(2, 3)
    weights = scores.masked_fill(~allowed[:, None], -1e9).softmax(-1)
    wanted = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    there = (of >= 0)[..., None, None]
    torch.testing.assert_close(torch.where(there, seen, 0.0), torch.where(there, wanted, 0.0))
    given = torch.randn(seen.shape, generator=generator) * there
    mine = torch.autograd.grad((seen * given).sum(), (query, key, value))
    theirs = torch.autograd.grad((wanted * given).sum(), (query, key, value))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_no_question_is_in_two_spans() -> None:
    for rows in (1, 6, 10, 500):
        blocks = Blocks.of(SEGMENTS[0], rows)
        assert blocks.spans[0] == (0, 7)
        assert [start for start, _ in blocks.spans[1:]] == [end for _, end in blocks.spans[:-1]]
        assert blocks.spans[-1][1] == len(SEGMENTS[0])
        assert {start for start, _ in blocks.spans} <= {0, 7, 12, 13, 22}
