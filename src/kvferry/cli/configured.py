"""Options from a TOML file: what is typed wins over the file, the file over defaults."""

from __future__ import annotations

import functools
import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from kvferry.errors import InputError

VARIABLE = "KVFERRY_CONFIG"
TABLES = ("serve", "ask")
"""Commands that have a table of their own in it."""
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
_WORDS = ((str,), "a text in quotes")


@dataclass(frozen=True)
class Option:
    """An option of a command: its parameter, the kind of its value, and whether it may be given several times."""

    parameter: str
    kind: type
    repeatable: bool


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with ``--config``; its table has the command's name, its keys are its options without dashes."""
    signature = inspect.signature(command, eval_str=True)
    known = _options(signature)

    def read(ctx: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not ctx.resilient_parsing:
            ctx.default_map = options_of(path, command.__name__, known)
        return path

    file = Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with these options; what is typed wins.", envvar=VARIABLE, callback=read, is_eager=True
        ),
    ]

    @functools.wraps(command)
    def run(*, config: Path | None, ctx: typer.Context, **given: Any) -> None:
        del config
        if given.get("model") and "named" in given and _of_file(ctx, "named"):
            given["named"] = ""
        command(**given)

    extra = [
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file),
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]
    return run


def options_of(path: Path, command: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """What a file says for a command, by the names of its parameters.

    Parameters
    ----------
    known : mapping
        The command's options by their names, without dashes before.

    Raises
    ------
    InputError
        The file cannot be read, or holds a table, a key or a value that there is not.
    """
    found = {}
    for key, value in _table(path, command).items():
        name = key.replace("_", "-")
        if name not in known:
            raise InputError(f"{path}: [{command}] has no option {key!r}; {_nearest(name, known)}")
        _check(f"{path}: [{command}] {key}", value, known[name])
        found[known[name].parameter] = value
    return found


def _options(signature: inspect.Signature) -> dict[str, Option]:
    """By their names, as Typer makes them of annotations."""
    found = {}
    for name, parameter in signature.parameters.items():
        kind, *rest = get_args(parameter.annotation)
        info = next((x for x in rest if isinstance(x, OptionInfo)), None)
        if info is None:
            continue
        if isinstance(kind, UnionType):
            (kind,) = (x for x in get_args(kind) if x is not type(None))
        names = [x for x in (info.default, *(info.param_decls or ())) if isinstance(x, str) and x.startswith("--")]
        flag = names[0] if names else f"--{name.replace('_', '-')}"
        repeatable = get_origin(kind) is list
        found[flag.removeprefix("--")] = Option(name, get_args(kind)[0] if repeatable else kind, repeatable)
    return found


def _table(path: Path, command: str) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            whole = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); name a file after --config, or none") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML ({error}); mend it") from None
    for name, table in whole.items():
        if name not in TABLES or not isinstance(table, dict):
            raise InputError(f"{path} holds the tables [{'], ['.join(TABLES)}], not {name!r}; {_nearest(name, TABLES)}")
    found: Mapping[str, Any] = whole.get(command, {})
    return found


def _check(where: str, value: Any, option: Option) -> None:
    """Refuse a value that is not of its option's kind: TOML knows kinds, so nothing is guessed."""
    kinds, what = _KINDS.get(option.kind, _WORDS)
    items = value if isinstance(value, list) else [value]
    if option.repeatable != isinstance(value, list) or any(type(item) not in kinds for item in items):
        raise InputError(f"{where} is {'a list of such: ' if option.repeatable else ''}{what}, not {value!r}; mend it")


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"


def _of_file(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"
