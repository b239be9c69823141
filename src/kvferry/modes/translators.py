"""Where a cloud finds the translators into its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codecs.profile_store import files
from kvferry.errors import FingerprintError, InputError
from kvferry.translator import SUFFIX, Translator, read

if TYPE_CHECKING:
    from kvferry.models import VLM

_known: dict[tuple[str, str], Translator] = {}
_seen: dict[Path, float] = {}


def add(path: Path, vlm: VLM) -> Translator:
    """Read a translator into ``vlm`` and keep it for whoever asks in this process; the last one of a pair is taken.

    Raises
    ------
    FingerprintError
        It leads to another model, or was made for another tokenizer or patch grid.
    InputError
        The file holds none.
    """
    found = read(path)
    if found.target != vlm.fingerprint:
        raise FingerprintError(
            f"{path} translates into model {found.target[:12]}, and the one here is {vlm.name} "
            f"({vlm.fingerprint[:12]}); make one for it by `kvferry fit translator EDGE CLOUD --out FILE`"
        )
    if found.prompts != vlm.prompt_fingerprint:
        raise FingerprintError(
            f"{path} was made when {vlm.name} had another tokenizer, template or patch grid; make it anew by "
            "`kvferry fit translator EDGE CLOUD --out FILE`"
        )
    _known[found.source, found.target] = found
    return found


def find(source: str, target: str, name: str = "the cloud's model") -> Translator:
    """The translator of a pair of models: added, or in a shipped model's folder, or in those of ``KVFERRY_PROFILES``.
    No file that a stream names is ever opened.

    Raises
    ------
    FingerprintError
        There is none.
    """
    if (source, target) not in _known:
        _look_around()
    found = _known.get((source, target))
    if found is None:
        raise FingerprintError(
            f"there is no translator from model {source[:12] or '(none named)'} to {name} ({target[:12]}); make one by "
            "`kvferry fit translator EDGE CLOUD --out FILE` and serve with --translator FILE, or use mode kv (same "
            "model on both ends) or image"
        )
    return found


def has_translator(source: str, target: str) -> bool:
    """Whether :func:`find` would find one."""
    _look_around()
    return (source, target) in _known


def _look_around() -> None:
    for path in files(SUFFIX):
        try:
            changed = path.stat().st_mtime
            found = read(path) if _seen.get(path) != changed else None
        except (OSError, InputError):
            continue  # not one; whoever needs it is told that there is none
        _seen[path] = changed
        if found is not None:
            _known.setdefault((found.source, found.target), found)
