"""Commands by name, and what an error looks like to a person. Heavy imports live inside the commands."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, TextIO

import typer

from kvferry import __version__
from kvferry.cli.analyze import analyze
from kvferry.cli.ask import ask
from kvferry.cli.break_even import break_even
from kvferry.cli.calibrate import calibrate, calibrate_skip
from kvferry.cli.coordinate import coordinate
from kvferry.cli.demo import demo
from kvferry.cli.diagnose import diagnose
from kvferry.cli.evaluate import evaluate
from kvferry.cli.export import export
from kvferry.cli.inspect import inspect
from kvferry.cli.link import link, trace
from kvferry.cli.profile import profile
from kvferry.cli.report import report
from kvferry.cli.serve import serve
from kvferry.cli.simulate import simulate
from kvferry.cli.studio import studio
from kvferry.cli.sweep import sweep
from kvferry.cli.tune import tune
from kvferry.errors import KVFerryError, KVFerryWarning

app = typer.Typer(
    help="Compress a vision-language model's KV cache on the edge and carry it to the cloud.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
COMMANDS = (
    serve, ask, inspect, demo, analyze, sweep, tune, calibrate, calibrate_skip, diagnose, link, trace,
    simulate, break_even, profile, report, export, coordinate, studio,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.command("eval")(evaluate)


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
    """Run the command line. Errors of ours are one sentence on stderr and exit code 2; others keep their traceback."""
    warnings.showwarning = _say
    try:
        app()
    except KVFerryError as error:
        print(f"kvferry: {error}", file=sys.stderr)
        sys.exit(2)
