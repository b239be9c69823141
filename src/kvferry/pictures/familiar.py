"""What pictures a model was trained on, where its folder says so, and a word when it is shown others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvferry.errors import UnfamiliarPictureWarning

FILE = "training_pictures.json"
"""In a model's folder, beside its weights."""
_said: set[str] = set()


@dataclass(frozen=True)
class TrainingPictures:
    """All that a model has ever seen.

    Parameters
    ----------
    shows : str
        What, in words.
    sides : tuple of int
        Widths and heights in pixels, each of which met each.
    """

    shows: str
    sides: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> TrainingPictures | None:
        """What a model's folder says; None where it says nothing, as those of models for photographs do."""
        file = folder / FILE
        if not file.is_file():
            return None
        said = json.loads(file.read_text(encoding="utf-8"))
        return cls(str(said["shows"]), tuple(int(side) for side in said["sides"]))


class Trained(Protocol):
    """A model that may know what it was trained on."""

    name: str
    training: TrainingPictures | None


def note_on(model: Trained, sizes: Iterable[tuple[int, int]]) -> str:
    """A sentence where pictures of these widths and heights cannot be those that a model was trained on; else nothing.

    A photograph that was cut to a size of the training passes.
    """
    if (training := model.training) is None:
        return ""
    for width, height in sizes:
        if not {width, height} <= {*training.sides}:
            return (
                f"{model.name} was trained on {training.shows} alone, and a picture of {width} x {height} "
                f"pixels is none of them: its answer means nothing; load a model for photographs"
            )
    return ""


def tell(note: str) -> None:
    """Warn, once for all in this process; an empty note says nothing."""
    if note and not _said:
        _said.add(note)
        warnings.warn(note, UnfamiliarPictureWarning, stacklevel=2)
