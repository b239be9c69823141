"""What a command is given, looked at before it starts: whatever can be seen to be wrong without a model is refused
before PyTorch is imported."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.checkpoint import find_checkpoint
from kvferry.errors import InputError, ModelError
from kvferry.plugins import import_files

Check = Callable[[str], object]

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu", "mlu", "musa", "xla")
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

Files = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="A Python file (or module) with methods of your own; repeatable. $KVFERRY_IMPORT names more.",
        metavar="FILE.py",
    ),
]


def checked(command: Callable[..., None], others: Mapping[str, Check | None] | None = None) -> Callable[..., None]:
    """The command, with ``--import``, and with its arguments checked by their names (:data:`CHECKS`, but for
    ``others``)."""
    checks = {**CHECKS, **(others or {})}
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*, imported: list[str] | None, **given: Any) -> None:
        import_files(imported or ())
        for name, value in given.items():
            if check := checks.get(name):
                for each in value if isinstance(value, list | tuple) else [value]:
                    if each:
                        check(each)
        command(**given)

    option = inspect.Parameter("imported", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Files)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def check_model(name: str) -> None:
    """Refuse what is no model here and cannot be one on the Hub."""
    find_checkpoint(str(name))


def check_device(text: str) -> None:
    """Refuse what no machine has; whether this one has it, PyTorch must say."""
    kind, colon, index = text.partition(":")
    if kind not in _DEVICES or (colon and not re.fullmatch(r"\d+", index)):
        raise ModelError(f"there is no device {text!r}; use cpu, cuda, cuda:1, mps or xpu")


def check_dtype(text: str) -> None:
    """Refuse what models do not come in."""
    if text not in _DTYPES:
        raise ModelError(f"{text!r} is not a dtype for a model; use auto, float32, bfloat16 or float16")


def check_recipe(text: str) -> None:
    """Refuse what does not parse."""
    from kvferry.recipe import Recipe

    Recipe.parse(text)


def check_mode(text: str) -> None:
    """Refuse what is no mode."""
    from kvferry.modes import parse_mode

    if text != "auto":
        parse_mode(text)


def check_address(text: str) -> None:
    """Refuse what is not host:port."""
    from kvferry.link.address import parse_address

    parse_address(text)


def metrics_address(text: str) -> str:
    """``host:port``; a port alone is one of this machine that others cannot reach."""
    address = f"127.0.0.1:{text.removeprefix(':')}" if text.removeprefix(":").isdigit() else text
    check_address(address)
    return address


def check_traces(text: str) -> None:
    """Refuse what no place for spans is called."""
    from kvferry.telemetry.traces import EXPORTERS

    if text not in EXPORTERS:
        raise InputError(f"traces go to {' or '.join(EXPORTERS)}, not to {text!r}")


def check_rate(text: str) -> None:
    """Refuse what is neither a rate nor a trace."""
    from kvferry.link.shaper import shaper_for

    shaper_for(text)


def check_policy(text: str) -> None:
    """Refuse what no policy is called."""
    from kvferry.policy import Way

    Way.parse(text)


def check_file_to_write(path: str) -> None:
    """Refuse a folder, and a place in which nothing can be written; the folder itself may still have to be made."""
    where = Path(path)
    if where.is_dir():
        raise InputError(f"cannot write {where} (it is a folder); name a file")
    above = next(folder for folder in where.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"cannot write {where} ({above} is no folder that can be written in); name another file")


def check_saved(path: str) -> None:
    """Refuse a file in a folder that is not there."""
    check_file_to_write(path)
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"cannot write {path} (there is no folder {Path(path).parent}); make it first")


CHECKS: dict[str, Check] = {
    "model": check_model,
    "named": check_model,
    "against": check_model,
    "device": check_device,
    "dtype": check_dtype,
    "recipe": check_recipe,
    "mode": check_mode,
    "cloud": check_address,
    "listen": check_address,
    "metrics": metrics_address,
    "traces": check_traces,
    "coordinator": check_address,
    "uplink": check_rate,
    "downlink": check_rate,
    "policy": check_policy,
    "save": check_saved,
    "out": check_file_to_write,
    "html": check_file_to_write,
    "presets": check_file_to_write,
}
"""By the name of a parameter; of a list every item."""
