"""Long runs: what a compressed cache is worth later on, over several pictures, and for what is seldom seen.

Each study is one function from an index to one record of plain numbers; a record holds every recipe, so that all are
paired. Raw files are JSON lines, the first of which says what was run; a file can be continued.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.errors import InputError
from kvferry.evaluate.sweep import union, with_room
from kvferry.recipe import Recipe, compress, decompress

if TYPE_CHECKING:
    import torch

    from kvferry.cache import KVCache
    from kvferry.models import VLM

Record = dict[str, Any]
STUDIES = ("turns", "drift", "pictures", "rare", "prune")
"""What the names of raw files begin with; each is one module, ``long_*``, but for ``prune``, a command of its own."""
FULL, FLOOR = "full|bf16", "none|bf16"
RECIPES = (
    FULL,
    "full|transform:80",
    "leaveout@0.25|bf16",
    "leaveout@0.1|bf16",
    "leaveout@0.05|bf16",
    "vlcache@0.25|bf16",
    "vlcache@0.1|bf16",
    "leaveout@0.08,budget=shared|transform:80",
    FLOOR,
)
"""Ceiling, floor, two scorers at falling fractions, and the two recipes that ``kvferry tune`` chose on validation."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Parameters
    ----------
    study : str
        Of :data:`STUDIES`.
    model : str
        Anything ``kvferry.load`` takes.
    split : str
        Of the testbed's scenes.
    n : int
        How many scenes; what else that means is each study's own.
    """

    study: str
    model: str = "testbed/cloud"
    recipes: tuple[str, ...] = RECIPES
    split: str = "validation"
    n: int = 100

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise InputError(f"there is no study {self.study!r}; there are {', '.join(STUDIES)}")
        if self.n < 1:
            raise InputError("a study needs at least one scene (--n)")
        recipes = tuple(dict.fromkeys(str(Recipe.parse(recipe)) for recipe in (FULL, *self.recipes, FLOOR)))
        object.__setattr__(self, "recipes", recipes)


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Provenance and records of a raw file, by index; a half-written last line is dropped."""
    if not path.is_file():
        raise InputError(f"no results at {path}; `python -m study long-runs` makes them")
    head: dict[str, Any] = {}
    records = []
    for text in path.read_text().splitlines():
        try:
            record = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "plan" in record:
            head = record
        else:
            records.append(record)
    if not head:
        raise InputError(f"{path} is not a raw file of `python -m study long-runs`")
    return head, sorted(records, key=lambda record: int(record["index"]))


def carried(
    vlm: VLM, images: Sequence[Any], question: str, recipes: Sequence[str], *, scene: bool = False
) -> tuple[dict[str, KVCache], dict[str, int]]:
    """What the cloud holds of a prompt under each recipe, and the bytes that brought it there.

    With ``scene`` the question only guides the selection, as a proxy, and is not in the cache.
    """
    wanted = union(Recipe.parse(recipe).requests for recipe in recipes)
    if scene:
        prefilled = vlm.prefill(images, proxy_question=question, requests=wanted)
    else:
        prefilled = vlm.prefill(images, question, requests=wanted)
    blobs = {recipe: with_room(partial(compress, prefilled), Recipe.parse(recipe)) for recipe in recipes}
    return {recipe: decompress(blob) for recipe, blob in blobs.items()}, {x: len(blob) for x, blob in blobs.items()}


def forced(
    vlm: VLM, caches: dict[str, KVCache], token_ids: Sequence[int], question: str | None = None
) -> dict[str, torch.Tensor]:
    """Logits for every one of ``token_ids`` and for what follows, float32 ``[k + 1, vocabulary]``, of each cache."""
    by_size = sorted(caches, key=lambda name: caches[name].nbytes)
    return dict(zip(by_size, vlm.score_many([caches[x] for x in by_size], token_ids, question), strict=True))


def says(vlm: VLM, logits: torch.Tensor, token_ids: Sequence[int]) -> bool:
    """Whether greedy decoding would say exactly these tokens and end, given their :func:`forced` logits."""
    from kvferry.models.resume import stop_ids

    best = logits.argmax(-1).tolist()
    return best[:-1] == list(token_ids) and best[-1] in stop_ids(vlm.model)


def answer_ids(vlm: VLM, answer: str) -> list[int]:
    """The tokens of a true answer."""
    return list(vlm.tokenizer(answer, add_special_tokens=False)["input_ids"])
