"""``kvferry fit KIND MODEL ... --out FILE``: what is learned or chosen beforehand for a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import typer

from kvferry.cli.calibrate import calibrate, calibrate_skip
from kvferry.cli.capsule import capsule
from kvferry.cli.checks import checked
from kvferry.cli.diagnose import diagnose
from kvferry.cli.translator import translator
from kvferry.cli.tune import tune


def fixed(command: Callable[..., None], text: str, **given: Any) -> Callable[..., None]:
    """The command with some of its parameters given, and no longer asked for; ``text`` is its help."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**others: Any) -> None:
        command(**given, **others)

    run.__doc__ = text
    left = [x for name, x in signature.parameters.items() if name not in given]
    run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return run


KINDS: dict[str, Callable[..., None]] = {
    "transform": fixed(calibrate, "Bases of a token's keys and values, for transform@FILE.", kind="transform"),
    "kvtc": fixed(calibrate, "Plain principal axes, for kvtc@FILE.", kind="kvtc", structure="auto", probes=1),
    "capsule": capsule,
    "diagnose": diagnose,
    "skip-visual": calibrate_skip,
    "translator": translator,
    "tune": tune,
}
"""One line for everything that can be learned; each has MODEL, --out, --device, --dtype and --json."""

fit = typer.Typer(help="Learn or choose something beforehand for a model.", no_args_is_help=True)
for kind, command in KINDS.items():
    fit.command(kind)(checked(command))
