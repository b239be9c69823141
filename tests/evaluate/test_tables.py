"""Tables and pictures from small made-up raw results, and files that are not results."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kvferry.errors import InputError
from kvferry.evaluate.records import Line, Protocol, read
from kvferry.evaluate.sweep import Sweep, grid
from kvferry.evaluate.tables import by_kind, markdown_table, summarise
from kvferry.overlay import draw_crossing, jpeg_bytes, kept_share
from kvferry.selection import Selection, evict
from study.page import Places
from study.sweep_tables import render
from tests.helpers import cache as random_cache

ROWS = ("full|bf16", "none|bf16", "q2c@0.25|bf16", "random@0.25|bf16")


def lines(protocol: Protocol = "A", n: int = 40) -> list[Line]:
    """Full always right, floor never, q2c wrong on every tenth question, random on every second."""
    right = {"full|bf16": 1, "none|bf16": 0}
    sizes = dict(zip(ROWS, (1000, 100, 250, 250), strict=True))
    return [
        Line(
            index=i,
            kind="digit" if i % 2 else "colour",
            protocol=protocol,
            bf16_bytes=2000,
            image_bytes=500,
            tokens=100,
            outcomes={
                **{r: (right[r], sizes[r]) for r in ROWS[:2]},
                ROWS[2]: (int(i % 10 != 0), sizes[ROWS[2]]),
                ROWS[3]: (i % 2, sizes[ROWS[3]]),
            },
        )
        for i in range(n)
    ]


def write(path: Path, records: list[Line]) -> Path:
    head = {
        "sweep": asdict(Sweep("testbed/cloud", ROWS, n=len(records))),
        "command": "kvferry sweep --model testbed/cloud --n 40",
        "commit": "0" * 40,
        "torch": "2",
        "transformers": "5",
        "machine": "a machine",
        "dtype": "bfloat16",
        "fingerprint": "f" * 64,
    }
    path.write_text("\n".join(json.dumps(r) for r in [head, *map(asdict, records)]) + "\n")
    return path


def test_grid_has_every_combination_once_with_both_ends() -> None:
    recipes = grid(["q2c", "random"], [1.0, 0.5, 0.25], ["bf16", "int4"])
    assert len(recipes) == len(set(recipes)) == 2 * (2 + 2 * 2)
    assert "full|int4|zstd" in recipes
    assert "none|bf16|zstd" in recipes
    assert "q2c@0.25|int4|zstd" in recipes


def test_summary_is_paired_and_ordered_from_ceiling_to_floor() -> None:
    rows = {r.name: r for r in summarise(lines(), "A")}
    assert rows["full|bf16"].accuracy.mean == 1
    assert rows["q2c@0.25|bf16"].accuracy.mean == pytest.approx(0.9)
    assert rows["q2c@0.25|bf16"].of_full.n == 40
    assert rows["q2c@0.25|bf16"].ratio == pytest.approx(8)
    table = markdown_table(list(rows.values())).splitlines()
    assert "ceiling" in table[2]
    assert "floor" in table[-1]
    kinds = by_kind(lines(), "A", ["random@0.25|bf16"])
    assert kinds == [("colour", 20, [0.0]), ("digit", 20, [1.0])]


def test_a_table_without_its_ceiling_is_refused() -> None:
    records = [Line(0, "k", "A", 1, 1, 1, {"q2c@0.5|int8": (1, 1)})]
    with pytest.raises(InputError, match="ceiling"):
        summarise(records, "A")
    with pytest.raises(InputError, match="protocol B"):
        summarise(records, "B")


def test_render_is_repeatable_and_names_protocol_and_command(tmp_path: Path) -> None:
    raw = write(tmp_path / "x.jsonl", lines("A") + lines("B"))
    places = Places(tmp_path / "RESULTS.md", tmp_path / "docs" / "figures", tmp_path / "docs" / "results")
    first = render(raw, places, "Title")
    picture, page = places.figure(raw).read_bytes(), places.detail(raw).read_text()
    assert render(raw, places, "Title") == first
    assert (places.figure(raw).read_bytes(), places.detail(raw).read_text()) == (picture, page)
    assert "(docs/figures/x.png)" in first
    assert "(docs/results/x.md)" in first
    assert "| colour | 20 |" in page
    assert "Protocol A" in first
    assert "Protocol B" in first
    assert "kvferry sweep --model testbed/cloud" in first


def test_reading_drops_a_half_written_line_and_refuses_other_files(tmp_path: Path) -> None:
    raw = write(tmp_path / "x.jsonl", lines(n=3))
    raw.write_text(raw.read_text() + '{"index": 3, "ki')
    assert len(read(raw)[1]) == 3
    with pytest.raises(InputError, match="no results"):
        read(tmp_path / "missing.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text("")
    with pytest.raises(InputError, match="not a results file"):
        read(other)


def test_kept_share_counts_layers_and_heads() -> None:
    cache = random_cache()
    first = torch.arange(4).expand(2, -1).contiguous()
    second = torch.stack([torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 4])])
    small = evict(cache, Selection((first, second, first), (first.float(),) * 3))
    share = kept_share(small)
    assert share.shape == (4, 5)
    assert share[0, 0] == pytest.approx(5 / 6)
    assert share[0, 1] == pytest.approx(1 / 6)
    assert share.sum() == pytest.approx(1)
    ragged = Selection((torch.tensor([[0, 1, 2, 3, 3, 4]]),) * 3, (torch.zeros(1, 6),) * 3, ((4, 2),) * 3)
    share = kept_share(evict(cache, ragged))
    assert share[0, :3].tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(InputError, match="no number 1"):
        kept_share(small, 1)


def test_the_demo_picture_is_drawn(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), np.uint8))
    assert jpeg_bytes(image)[:2] == b"\xff\xd8"
    out = tmp_path / "demo.png"
    bars = [("image", 9e3, 1.0), ("q2c", 1e3, 0.5)]
    draw_crossing(out, image, "which?", [("q2c", kept_share(random_cache()))], bars, 4)
    with Image.open(out) as drawn:
        pixels = np.asarray(drawn.convert("L"))
    assert pixels.std() > 10
