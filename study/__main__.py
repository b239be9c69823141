"""``python -m study COMMAND``, from the repository's root."""

from __future__ import annotations

import sys

import typer

from kvferry.errors import KVFerryError
from study.commands.capsule import capsule
from study.commands.long_runs import long_runs
from study.commands.perplexity import perplexity
from study.commands.prune import prune
from study.commands.results import results
from study.commands.scout_overlap import scout_overlap
from study.commands.squad_diagnose import squad_diagnose
from study.commands.squad_prompt import squad_prompt
from study.commands.squad_sweep import squad_sweep
from study.commands.text_codecs import text_codecs
from study.commands.translate import translate

app = typer.Typer(
    help="What makes RESULTS.md.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
for command in (
    results, scout_overlap, long_runs, prune, squad_prompt, squad_diagnose, squad_sweep, text_codecs, perplexity,
    capsule, translate,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Errors of ours are one sentence on stderr and exit code 2."""
    try:
        app()
    except KVFerryError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
