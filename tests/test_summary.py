"""What was kept where."""

from __future__ import annotations

import pytest
import torch

from kvferry.recipe import Recipe
from kvferry.selection import Selection
from kvferry.summary import Share, summarise_cache
from tests.helpers import cache, layout


def test_by_hand() -> None:
    full = cache(layout(text_before=2, rows=1, columns=4, question=2, tail=2), layers=2)
    selection = Selection(
        (torch.tensor([[0, 3, 0, 1, 2, 3, 8]]), torch.tensor([[0, 1], [7, 8]])),
        (torch.zeros(1, 7), torch.zeros(2, 2)),
        ((2, 5), ()),
    )
    summary = selection.summary(full)
    assert (summary.length, summary.layers, summary.fewest, summary.most) == (9, (3.5, 2.0), (2, 2), (5, 2))
    assert summary.modalities == {"text": Share(8 / 4, 5), "image": Share(3 / 4, 4)}
    words = "2.75 of 9 tokens per layer (2 to 3.5 by layer, 2 to 5 by head): 2 of 5 text, 0.75 of 4 image"
    assert str(summary) == words


@pytest.mark.parametrize(
    "text", ["full", "none", "knorm@0.4", "knorm@0.4,budget=head:0", "random@0.6,budget=pyramid:3"]
)
def test_a_selection_and_its_cache_agree(text: str) -> None:
    source = cache()
    recipe = Recipe.parse(text)
    summary = recipe.select(source).summary(source)
    kept = recipe.keep(source)
    assert summary == summarise_cache(kept)
    assert tuple(map(int, summary.layers)) == kept.kept
    assert sum(share.kept for share in summary.modalities.values()) == pytest.approx(sum(summary.layers) / 3)
    assert str(summary).count("by head") == (min(summary.fewest) < max(summary.most))
