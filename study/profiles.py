"""Profiles of ``kvtc`` and ``transform`` for SmolLM2, made of a study's own calibration prompts and kept beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.files import write_whole

if TYPE_CHECKING:
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM

KVTC_ROWS = 4000
WEIGHED = 3
"""Gradients are taken of every third calibration prompt."""
PROBES = 4
NAMES = ("kvtc", "tree")


def files(folder: Path) -> dict[str, Path]:
    """Where the profiles lie, by name."""
    return {name: folder / f"{name}.profile" for name in NAMES}


def make_profiles(
    vlm: VLM, read: Callable[[], Iterable[Prefilled]], data: str, folder: Path, say: Callable[[str], None]
) -> None:
    """Both profiles, those that are not there yet.

    Parameters
    ----------
    read : callable
        Reads every calibration prompt once, lazily.
    data : str
        What they are, for the profiles' facts.
    """
    from kvferry.fit.kvtc import PlainCalibration
    from kvferry.fit.tree import TreeCalibration
    from kvferry.recipe import Recipe

    full, place = Recipe.parse("full"), files(folder)
    tree = None if place["tree"].exists() else TreeCalibration(vlm, full, probes=PROBES)
    plain = None if place["kvtc"].exists() else PlainCalibration(vlm, full, KVTC_ROWS, most=KVTC_ROWS)
    if tree is None and plain is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    n = 0
    for n, prefilled in enumerate(read(), 1):
        name = f"calibration {n - 1}"
        if tree is not None:
            tree.take(prefilled, name, weigh=(n - 1) % WEIGHED == 0)
        if plain is not None:
            plain.take(prefilled, name)
    facts = {"data": data, "n": n}
    if tree is not None:
        write_whole(place["tree"], tree.profile(facts).to_bytes())
        say(f"{place['tree']}")
    if plain is not None:
        write_whole(place["kvtc"], plain.profile(facts).to_bytes())
        say(f"{place['kvtc']}")


def about(folder: Path) -> dict[str, Any]:
    """Of each profile in a folder its bytes and what its calibration says of the model."""
    from kvferry.codecs import profile

    found: dict[str, Any] = {}
    for name, file in files(folder).items():
        made, digest = profile.read(file)
        told = {key: made.facts[key] for key in ("n", "words", "classes") if key in made.facts}
        found[name] = {"bytes": file.stat().st_size, "digest": digest.hex(), **told}
    return found
