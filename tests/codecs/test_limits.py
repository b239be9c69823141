"""Options beyond what a cache or a profile holds: the right thing, a warning that names the range, or an error."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvferry.cli.app import _say
from kvferry.codecs import KVTC, Transform
from kvferry.codecs.mixed import PARTS
from kvferry.errors import BudgetError, InputError, KVFerryWarning, RecipeError
from kvferry.recipe import Recipe, compress, decompress
from tests.codecs import test_kvtc as plain
from tests.codecs import test_transform as joint
from tests.helpers import cache as random_cache
from tests.helpers import layout


@pytest.mark.parametrize("rank", [4, 40])
def test_ratios_below_what_a_rank_reaches_are_one_stream_and_said_to_be(rank: int, tmp_path: Path) -> None:
    """Issue 13: transform:8 to :64 gave the same stream where the profile's rank was the limit."""
    profile = joint.make(rank=rank)
    path = tmp_path / "p.profile"
    path.write_bytes(profile.to_bytes())
    cache = joint.drawn(profile, 40)
    least, most = Transform.reachable(profile)
    width = len(profile.visual.mean)
    assert 16 * width / (rank * 9) < least < 16 * width / (rank * 4), "4 to 9 bits an axis"
    assert most > 20 * least

    def decoded(ratio: float) -> list[torch.Tensor]:
        return [x.keys for x in decompress(compress(cache, f"full|transform:{ratio:g}@{path}"))]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coarser = decoded(1.3 * least)
    below = []
    for ratio in (least / 1.01, max(1.0, least / 1.5), max(1.0, least / 3)):
        with pytest.warns(KVFerryWarning, match=rf"transform:.* beyond .*\({least:.4g} to {most:.4g}\): .* --rank"):
            below.append(decoded(ratio))
    assert all(torch.equal(a, b) for other in below[1:] for a, b in zip(below[0], other, strict=True))
    assert not all(map(torch.equal, coarser, below[0]))
    with pytest.warns(KVFerryWarning, match="only means are left"):
        decoded(min(2 * most, 1e5))


def test_kvtc_says_what_its_rank_reaches(tmp_path: Path) -> None:
    profile = plain.plain()
    path = tmp_path / "p.profile"
    path.write_bytes(profile.to_bytes())
    cache = plain.drawn(profile, 60)
    least, most = KVTC.reachable(profile)
    assert (least, most) == (2 * plain.SIDE / plain.RANK, 8 * plain.SIDE)
    found = []
    for ratio in (least / 1.1, least / 2):
        with pytest.warns(KVFerryWarning, match=r"kvtc:.* beyond .*\(2\.4 to 384\)"):
            found.append([x.values for x in decompress(compress(cache, f"full|kvtc:{ratio:g}@{path}"))])
    assert all(map(torch.equal, *found))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        coarser = [x.values for x in decompress(compress(cache, f"full|kvtc:{2 * least:g}@{path}"))]
    assert not all(map(torch.equal, found[0], coarser))
    with pytest.warns(KVFerryWarning, match="only means are left"):
        compress(cache, f"full|kvtc:1000@{path}")


@pytest.mark.parametrize(
    ("beyond", "within"),
    [("svd:60000", "svd:8"), ("svd:60000,bits=4", "svd:8,bits=4"), ("svd,energy=1", "svd:8")],
)
def test_a_rank_beyond_a_matrix_is_its_own(beyond: str, within: str) -> None:
    source = random_cache(layout(rows=3, columns=3), dim=4)  # no matrix has more than 8 columns
    for a, b in zip(
        decompress(compress(source, f"full|{beyond}")), decompress(compress(source, f"full|{within}")), strict=True
    ):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@pytest.mark.parametrize(
    "codec", ["kivi:2,group=4096,residual=0", "kivi:4,residual=4096", "delta:4096", "delta:4096,layers=1"]
)
@pytest.mark.parametrize("fraction", [0.001, 0.2, 1.0])
def test_groups_and_windows_beyond_a_cache(codec: str, fraction: float) -> None:
    source = random_cache()
    kept = Recipe.parse(f"knorm@{fraction}").keep(source)
    decoded = decompress(compress(source, f"knorm@{fraction}|{codec}"))
    for a, b in zip(kept, decoded, strict=True):
        assert torch.equal(a.positions, b.positions)
        error = (a.keys.float() - b.keys.float()).abs().max()
        assert float(error) <= (0.0 if "residual=4096" in codec else 3.0)


def test_a_mixed_profile_of_other_layers_is_refused(tmp_path: Path) -> None:
    source = random_cache(layers=3)
    for layers, problem in ((2, "knows 2 layers, but the cache has 3"), (4, "knows 4 layers, but the cache has 3")):
        path = tmp_path / f"{layers}.json"
        bits = {part: [4] * layers for part in PARTS}
        path.write_text(json.dumps({"bits": bits, "fingerprint": source.fingerprint}))
        with pytest.raises(InputError, match=problem):
            compress(source, f"full|mixed@{path}")
        with pytest.raises(InputError, match=problem):
            Recipe.parse(f"full|mixed@{path}").apply(source)


def test_budgets_of_nothing_and_of_one_token() -> None:
    source = random_cache()
    for wrong in ("knorm@0", "knorm@-1", "knorm,bytes=0", "knorm,bytes=-5", "knorm@nan"):
        with pytest.raises(RecipeError):
            Recipe.parse(f"{wrong}|int4")
    one = decompress(compress(source, "knorm@0.0001|int4"))
    assert one.kept == (1, 1, 1)
    for tight in (1, 20, 100):  # of one digit to three: the recipe itself is in the stream
        with pytest.raises(BudgetError, match=r"takes \d+ bytes for this prompt, 1 tokens per layer") as error:
            compress(source, f"knorm,bytes={tight}|int4")
        needed = int(str(error.value).split(" takes ")[1].split()[0])
        assert len(compress(source, f"knorm,bytes={needed}|int4")) <= needed
        assert abs(needed - len(compress(source, "knorm@0.0001|int4"))) < 16
    assert decompress(compress(source, "knorm,bytes=10000000|int4")).kept == (source.length,) * 3
    broken = replace(source, layers=tuple(replace(x, keys=x.keys * torch.nan) for x in source))
    with pytest.raises(InputError, match="NaN"):
        compress(broken, "full|int4")


def test_the_command_line_prints_a_warning_of_ours_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    _say("transform:8 is beyond", KVFerryWarning, "a.py", 7)
    _say("something else", UserWarning, "a.py", 7)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "kvferry: transform:8 is beyond",
        "a.py:7: UserWarning: something else",
    ]
