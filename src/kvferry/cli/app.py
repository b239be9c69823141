"""Commands by name, and what an error looks like to a person. Heavy imports live inside the commands."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer

from kvferry import __version__
from kvferry.cli.analyze import analyze
from kvferry.cli.ask import ask
from kvferry.cli.break_even import break_even
from kvferry.cli.calibrate import calibrate, calibrate_skip
from kvferry.cli.check import check
from kvferry.cli.checks import check_model, check_saved, checked
from kvferry.cli.compare import compare
from kvferry.cli.configured import TABLES, configured
from kvferry.cli.coordinate import coordinate
from kvferry.cli.demo import demo
from kvferry.cli.diagnose import diagnose
from kvferry.cli.doctor import doctor
from kvferry.cli.edge import edge
from kvferry.cli.ending import run
from kvferry.cli.evaluate import evaluate
from kvferry.cli.export import export
from kvferry.cli.fit import fit
from kvferry.cli.inspect import inspect
from kvferry.cli.keys import keys
from kvferry.cli.link import link, trace
from kvferry.cli.profile import profile
from kvferry.cli.report import report
from kvferry.cli.serve import serve
from kvferry.cli.simulate import simulate
from kvferry.cli.studio import studio
from kvferry.cli.sweep import sweep
from kvferry.cli.tune import tune
from kvferry.errors import KVFerryWarning

app = typer.Typer(
    help="Compress a vision-language model's KV cache on the edge and carry it to the cloud.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
COMMANDS = (
    serve, ask, edge, inspect, demo, check, analyze, sweep, tune, calibrate, calibrate_skip, diagnose, link, trace,
    simulate, break_even, profile, report, export, compare, coordinate, studio, keys, doctor,
)  # fmt: skip
OTHERS: dict[Any, dict[str, Any]] = {
    profile: {"cloud": check_model, "edge": check_model},
    break_even: {"model": None},
    simulate: {"policy": None},
    trace: {"out": None},
    keys: {"out": check_saved},
    doctor: {"model": None},
}
"""Commands in which a parameter's name means something else than in the others."""
QUIET = {"GRPC_VERBOSITY": "NONE", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Other people's log lines and loading bars stay away, unless the environment says otherwise."""

for command in COMMANDS:
    whole = checked(command, OTHERS.get(command))
    app.command()(configured(whole) if command.__name__ in TABLES else whole)
app.command("eval")(checked(evaluate))
app.add_typer(fit, name="fit")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _say(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours in one sentence on stderr, any other as Python prints it."""
    ours = issubclass(category, KVFerryWarning)
    text = f"kvferry: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    print(text, end="", file=file or sys.stderr)


def main() -> None:
    """Run the command line; :func:`kvferry.cli.ending.run` says how it ends."""
    warnings.showwarning = _say
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    run(app)
