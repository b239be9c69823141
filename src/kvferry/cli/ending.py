"""How a command ends: an exit code, and one sentence or one JSON object where something was wrong; no traceback for
what a user can cause."""

from __future__ import annotations

import errno
import json as jsonlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from kvferry.errors import InputError, KVFerryError

ERROR, INTERRUPTED, PIPE = 2, 130, 1
"""Exit codes: what a user can mend; Ctrl-C; nobody reads what is printed (as typer has it)."""
USERS = (
    errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
)  # fmt: skip
"""What the system says about files that a person named."""

_CLICK: type[Exception] = next(x for x in typer.BadParameter.__mro__ if x.__name__ == "ClickException")
"""Typer's own in newer versions, else click's."""


def run(command: Callable[..., Any]) -> None:
    """Run a typer app to its end, which is always ``SystemExit``.

    Errors of ours, of usage, and of the files that were named are one sentence on stderr, or with ``--json`` one object
    ``{"error": {"type", "message"}}`` on stdout, and exit code 2. Others keep their traceback.
    """
    as_json = "--json" in sys.argv[1:]
    try:
        code = _quietly(command, as_json)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except OSError as error:
        code = _system(error, as_json)
    sys.exit(code)


def _quietly(command: Callable[..., Any], as_json: bool) -> int:
    try:
        code = command(standalone_mode=False, prog_name="kvferry")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return INTERRUPTED
    except KVFerryError as error:
        return say(error, as_json)
    except _CLICK as error:
        if as_json:
            say(InputError(_sentence(error)), as_json)
        else:
            _show(error)
        return int(getattr(error, "exit_code", ERROR))


def say(error: KVFerryError, as_json: bool) -> int:
    """Print an error, and return its exit code."""
    if as_json:
        print(jsonlib.dumps(as_object(error)), flush=True)
    else:
        print(f"kvferry: {error}", file=sys.stderr)
    return ERROR


def as_object(error: KVFerryError) -> dict[str, Any]:
    """An error as JSON has it."""
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _system(error: OSError, as_json: bool) -> int:
    if error.errno == errno.EPIPE:
        _no_more(sys.stdout)
        return PIPE
    if error.errno not in USERS:
        raise error
    if error.filename is None:  # of all that is written without a name, this is the one that a person can redirect
        _no_more(sys.stdout)
        as_json = False
    what = error.filename if error.filename is not None else "the output (stdout)"
    return say(InputError(f"{what}: {error.strerror}; name another file or folder, or make room"), as_json)


def _no_more(stream: Any) -> None:
    """Let nothing that is still in a buffer fail again when the interpreter ends."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):  # no real file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _show(error: Any) -> None:
    """As typer itself would."""
    try:
        from typer.rich_utils import rich_format_error
    except ImportError:
        error.show()
    else:
        rich_format_error(error)


def _sentence(error: Any) -> str:
    context = getattr(error, "ctx", None)
    where = f"; `{context.command_path} --help` says what there is" if context is not None else ""
    return f"{error.format_message().strip().rstrip('.')}{where}"
