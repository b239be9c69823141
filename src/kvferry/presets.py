"""Names that stand for a recipe: three for models nobody has tuned, or those that ``kvferry tune`` found for one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvferry.errors import RecipeError

PRESETS = {
    "tiny": "leaveout@0.1|int4|zstd",
    "balanced": "leaveout@0.25|int8|zstd",
    "lossless": "full|bf16|zstd",
}
"""Sensible without tuning; ``tiny@FILE`` takes the file's recipe of that name instead."""

_NAMED = re.compile(rf"\s*({'|'.join(PRESETS)})\s*(?:@(.+))?", re.DOTALL)


def recipe_text(text: str) -> str:
    """The recipe that a preset's name (``tiny``, ``tiny@presets.json``) stands for; any other text as it is.

    Raises
    ------
    RecipeError
        The file is not there, is none of presets, or has none of this name.
    """
    named = _NAMED.fullmatch(text)
    if named is None:
        return text
    name, file = named[1], named[2]
    return PRESETS[name] if file is None else read_presets(Path(file.strip()), name)


def read_presets(path: Path, name: str) -> str:
    """The recipe of that name in a file of ``kvferry tune --presets``."""
    try:
        presets = json.loads(path.read_text())["presets"]
        found = presets.get(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"no presets in {path}; `kvferry tune MODEL --presets {path}` writes them") from None
    if not isinstance(found, str):
        raise RecipeError(f"{path} has no preset {name!r}; it has: {', '.join(map(str, presets)) or 'none'}")
    if _NAMED.fullmatch(found):
        raise RecipeError(f"preset {name!r} of {path} is itself a preset's name; write the recipe")
    return found
