"""Every family that the installed Transformers has, and the table of docs/models.md."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from kvferry.errors import ModelError, UnsupportedModelError
from kvferry.models.check.memory import verdict_on
from kvferry.models.check.trial import describe, try_out
from kvferry.models.check.verdict import Verdict
from kvferry.models.support import visual_token_ids

SECONDS = 60
MEMORY = 12 << 30
"""Address space of a process that tries out one family, in bytes; most of it is code that was loaded before."""

_MAPPINGS = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_name(name: str, *, anew: bool = False) -> Verdict:
    """The verdict on a model by name: a shipped name, a folder or a Hub id. Only its configuration is read.

    Raises
    ------
    ModelError
        There is no such configuration, or no generating model for it.
    """
    from kvferry.models.load import config_folder

    folder = config_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the configuration of {name} cannot be read ({describe(error)}); check the name") from error
    return verdict_on(class_for(config), config, anew=anew)


def class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that :func:`kvferry.load` makes of a configuration."""
    mappings = _MAPPINGS if visual_token_ids(config) else _MAPPINGS[::-1]
    for mapping in mappings:
        if config.model_type in mapping:
            return _class(mapping[config.model_type])
    raise UnsupportedModelError(
        f"{config.model_type} models cannot be served: Transformers {transformers.__version__} has no class for them "
        "that generates text"
    )


def _class(name: str | tuple[str, ...]) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def families() -> Iterator[tuple[str, str]]:
    """``model_type`` and class name of all that read text, or pictures and text, and generate text."""
    seen = set()
    for mapping in _MAPPINGS:
        for family, name in mapping.items():
            pair = family, name if isinstance(name, str) else name[0]
            if pair not in seen:
                seen.add(pair)
                yield pair


def check_all(rows: Path | None = None) -> Iterator[Verdict]:
    """Try out all families from their default configurations, each in a process of its own.

    Parameters
    ----------
    rows : Path, optional
        A file of JSON lines. Families that it has, made by these versions of Transformers and torch, are not tried
        again; the others are appended.
    """
    done = dict(_stored(rows)) if rows is not None else {}
    for family, name in families():
        verdict = done.get((family, name))
        if verdict is None:
            verdict = check_apart(family, name)
            if rows is not None:
                rows.parent.mkdir(parents=True, exist_ok=True)
                with rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**verdict.as_dict(), **versions()}) + "\n")
        yield verdict


def versions() -> dict[str, str]:
    """What verdicts depend on."""
    return {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}


def _stored(rows: Path) -> Iterator[tuple[tuple[str, str], Verdict]]:
    with suppress(OSError):
        for line in rows.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line of a run that was killed
                record = json.loads(line)
                if record.items() >= versions().items():
                    verdict = Verdict.of_dict(record)
                    yield (verdict.family, verdict.model), verdict


def check_apart(family: str, name: str, *, seconds: float = SECONDS) -> Verdict:
    """One family in a process of its own, so that it takes neither the time nor the memory of the others."""
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return Verdict(family, name, unchecked=f"no result within {seconds:g} seconds")
        return Verdict.of_dict(receiver.recv())
    except EOFError:
        process.join()
        return Verdict(family, name, unchecked=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(family: str, name: str, sender: Any) -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        torch.set_num_threads(1)
        sender.send(check_default(family, name).as_dict())


def check_default(family: str, name: str) -> Verdict:
    """One family from its default configuration, here and now."""
    try:
        config = CONFIG_MAPPING[family]()
        kind = _class(name)
        if kind.config_class is not type(config) and isinstance(config.get_text_config(), kind.config_class):
            config = config.get_text_config()
        found = try_out(kind, config)
    except (Exception, SystemExit) as error:  # the code of any family may fail in any way
        return Verdict(family, name, unchecked=describe(error))
    return replace(found, family=family)
