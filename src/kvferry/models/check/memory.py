"""Verdicts that were found before, in this process or on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from kvferry.models.check.trial import try_out
from kvferry.models.check.verdict import Verdict
from kvferry.models.unpacked import home

_lock = threading.RLock()
_by_model: WeakKeyDictionary[PreTrainedModel, Verdict] = WeakKeyDictionary()
_by_key: dict[tuple[type, str], Verdict] = {}


def verdict_of(model: PreTrainedModel) -> Verdict:
    """What a check of ``model``'s family says, for its configuration; tried out only where nobody did before."""
    with _lock:
        if model not in _by_model:
            _by_model[model] = verdict_on(type(model), model.config)
        return _by_model[model]


def verdict_on(kind: type[PreTrainedModel], config: PreTrainedConfig, *, anew: bool = False) -> Verdict:
    """The same for a class and a configuration; ``anew`` tries it out again.

    A verdict is kept in this process, and in ``$KVFERRY_HOME`` where the class is one of Transformers' own: under a
    digest of the small configuration, the versions of torch and Transformers, and this package's code for models.
    """
    with _lock:
        key = (kind, _digest(kind, config))
        stored = home() / "checks" / f"{key[1]}.json"
        ours = kind.__module__.startswith("transformers.")
        found = None if anew else _by_key.get(key) or (_read(stored) if ours else None)
        if found is None:
            found = try_out(kind, config)
            if ours:
                _write(stored, found)
        _by_key[key] = found
        return found


def _digest(kind: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    from kvferry.models.check.tiny import tiny_config

    try:
        small = tiny_config(config)
    except Exception:  # as it says when it is tried out
        small = config
    facts = [kind.__module__, kind.__qualname__, small.to_json_string(use_diff=False), *_versions()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@cache
def _versions() -> tuple[str, ...]:
    """What a verdict depends on besides the model."""
    code = hashlib.sha256()
    package = Path(__file__).parents[2]
    for path in sorted([*package.glob("models/**/*.py"), package / "selection" / "eviction.py", package / "cache.py"]):
        code.update(path.read_bytes())
    return torch.__version__, transformers.__version__, code.hexdigest()


def _read(path: Path) -> Verdict | None:
    """None where there is no file, or where it is damaged."""
    try:
        return Verdict.of_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, verdict: Verdict) -> None:
    """By rename, so that nobody reads half a file. A folder that cannot be written costs time only."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(verdict.as_dict(), file)
        try:
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
