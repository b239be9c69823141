"""``name:argument,key=value`` <-> dataclass: the syntax that all parts of a recipe share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from kvferry.errors import InputError, RecipeError
from kvferry.plugins import Registry, known_names

T = TypeVar("T")
_PART = re.compile(r"([^:@]*)(?:([:@])(.*))?", re.DOTALL)


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """``table[name]``, or a :class:`RecipeError` that says what exists and suggests the nearest."""
    try:
        return table.find(name) if isinstance(table, Registry) else table[name]
    except KeyError:
        raise RecipeError(f"there is no {what} {name!r}; {_suggest(name, known_names(table))}") from None


def name_of(table: Mapping[str, type], value: object) -> str:
    """What a recipe calls ``value``, an instance of a class in ``table``."""
    for name, kind in table.items():
        if type(value) is kind:
            return name
    raise RecipeError(
        f"a recipe cannot name {type(value).__name__}, only {', '.join(sorted(table))}; register it where those are "
        "(SCORERS, BUDGETS, POLICIES or MERGES of kvferry.selection)"
    )


def parse_part(table: Mapping[str, type[T]], text: str, what: str) -> T:
    """The instance that ``name``, ``name:argument`` or ``name@profile`` stands for.

    The argument sets the first field of the dataclass, what follows an ``@`` the field ``profile``.
    """
    name, mark, argument = _PART.fullmatch(text).groups()  # type: ignore[union-attr]
    part = lookup(table, name.strip(), what)()
    if not mark:
        return part
    names = [f.name for f in fields(part)]  # type: ignore[arg-type]
    if not names or (mark == "@" and "profile" not in names):
        raise RecipeError(f"{what}={name.strip()} takes no {mark}{argument}; leave it out")
    return with_options(part, f"{what}={name.strip()}", [f"{'profile' if mark == '@' else names[0]}={argument}"])


def part_text(table: Mapping[str, type[T]], part: T) -> str:
    """The canonical text that :func:`parse_part` reads back."""
    name = name_of(table, part)
    changed = [x.split("=", 1) for x in option_text(part, table[name]()).split(",")[1:]]
    return name + "".join(("@" if key == "profile" else ":") + value for key, value in changed)


def parse_named(table: Mapping[str, T], text: str) -> T:
    """The codec of ``table`` that ``text`` names; see :func:`kvferry.codecs.parse_codec`."""
    head, *options = text.split(",")
    head, at, profile = (part.strip() for part in head.partition("@"))
    name, colon, argument = (part.strip() for part in head.partition(":"))
    default = lookup(table, name, "codec")
    marked = {}
    for mark, what, key, value in (
        (colon, "argument", getattr(default, "argument", ""), argument),
        (at, "profile", "profile", profile),
    ):
        if mark and not hasattr(default, key):
            raise RecipeError(f"the codec {name!r} takes no {what}, but {value!r} was given")
        if mark:
            marked[key] = f"{key}={value}"
    return with_options(default, name, [*marked.values(), *options])


def named_text(table: Mapping[str, Any], codec: Any) -> str:
    """The canonical text that :func:`parse_named` reads back."""
    default = table[codec.name]
    text: str = codec.name
    argument = getattr(codec, "argument", "")
    changed = dict(x.split("=", 1) for x in option_text(codec, default).split(",")[1:])
    if argument:
        changed.pop(argument, None)
        text += f":{number_text(getattr(codec, argument))}"
    if "profile" in changed:
        text += f"@{changed.pop('profile')}"
    return text + "".join(f",{key}={value}" for key, value in changed.items())


def without_files(recipe: str) -> str:
    """A recipe's canonical text without the names of profiles: where a file lies on this machine is nobody else's.

    Whoever decodes looks for no file: a stream tells the digest of the profile that it takes, or all that was in it.
    """
    selection, *stages = recipe.split("|")
    head, *options = selection.split(",")
    return "|".join([",".join([head, *map(_bare, options)]), *(",".join(map(_bare, x.split(","))) for x in stages)])


def _bare(part: str) -> str:
    return part.partition("@")[0]


@cache
def _hints(part: type) -> Mapping[str, Any]:
    """Types of a dataclass' fields."""
    return get_type_hints(part)


def with_options(default: T, name: str, options: Iterable[str], also: Iterable[str] = ()) -> T:
    """``default`` (a dataclass) with ``key=value`` options applied, converted to the types of its fields.

    ``also`` names options that exist elsewhere, so that a misspelt one is suggested too.
    """
    hints = _hints(type(default))  # type: ignore[arg-type]
    known = {f.name: hints[f.name] for f in fields(default) if f.default is not MISSING}  # type: ignore[arg-type]
    changed: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals:
            raise RecipeError(f"{name}: an option is written key=value, not {option.strip()!r}")
        if key not in known:
            names = [*known, *also]
            suggestion = _suggest(key, names) if names else f"{name} has no options"
            raise RecipeError(f"{name} has no option {key!r}; {suggestion}")
        if key in changed:
            raise RecipeError(f"{name}: the option {key!r} is given twice")
        changed[key] = _convert(f"{name},{key}", known[key], value)
    if not changed:
        return default
    try:
        return replace(default, **changed)  # type: ignore[type-var]
    except InputError as error:
        raise RecipeError(str(error)) from None


def option_text(value: object, default: object) -> str:
    """``,key=value`` for every field in which two dataclasses of one type differ, in the order of the fields."""
    parts = []
    for f in fields(value):  # type: ignore[arg-type]
        mine = getattr(value, f.name)
        if mine != getattr(default, f.name):
            parts.append(f",{f.name}={number_text(mine) if isinstance(mine, int | float) else mine}")
    return "".join(parts)


def number_text(number: float) -> str:
    """The shortest text that reads back as the same number: ``0.5``, ``1``, ``true``."""
    if isinstance(number, bool):
        return str(number).lower()
    return str(int(number)) if float(number).is_integer() else repr(number)


def _convert(where: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text not in choices:
            raise RecipeError(f"{where}={text!r} is not possible; {_suggest(text, choices)}")
        return choices[text]
    if get_origin(kind) is UnionType:  # an optional number
        (kind,) = (x for x in get_args(kind) if x is not NoneType)
    if kind is bool:
        if text not in ("true", "false"):
            raise RecipeError(f"{where} is true or false, not {text!r}")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise RecipeError(f"{where} needs a value of type {kind.__name__}, not {text!r}") from None


def _suggest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    listed = "choose from " + ", ".join(sorted(names))
    return f"did you mean {near[0]!r}? ({listed})" if near else listed
