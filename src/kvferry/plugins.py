"""Methods from outside: installed distributions by their entry points, and files by ``--import`` or an environment
variable.

A method is known by its name in one of the dictionaries (``SCORERS``, ``CODECS`` ...). Where a name is not in it, the
files of ``KVFERRY_IMPORT`` are imported, and then an entry point of that name is loaded from the group
``kvferry.scorers``, ``kvferry.budgets``, ``kvferry.policies`` (of modalities), ``kvferry.merges``, ``kvferry.codecs``,
``kvferry.modes``, ``kvferry.metrics`` or ``kvferry.tasks``. That happens in every process that meets the name: a worker
of a sweep, a cloud, a reader of a bitstream.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kvferry.errors import PluginError

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

T = TypeVar("T")
IMPORT = "KVFERRY_IMPORT"
"""Environment variable: files or modules to import, with the system's path separator between them."""

_imported: set[str] = set()


class Registry(dict[str, T]):
    """Methods by name: those of this project, those that are set from outside, and plug-ins as they are asked for.

    Parameters
    ----------
    group : str
        Of entry points, without ``kvferry.``.
    methods : mapping
        This project's own.
    """

    def __init__(self, group: str, methods: Mapping[str, T]) -> None:
        super().__init__(methods)
        self.group = group
        self._plugged: set[str] = set()

    def __setitem__(self, name: str, method: T) -> None:
        """Add a method. PluginError for a name that another one has; a class may be defined anew, as in a notebook."""
        if name in self and _origin(dict.__getitem__(self, name)) != _origin(method):
            raise PluginError(f"{self.group} has a {name!r} already; give yours another name")
        super().__setitem__(name, method)

    def __missing__(self, name: str) -> T:
        import_files()
        if name in self:
            return dict.__getitem__(self, name)
        if name not in (points := self._points()):
            raise KeyError(name)
        method: T = _load(points[name], self.group)
        super().__setitem__(name, method)
        self._plugged.add(name)
        return method

    def find(self, name: str) -> T:
        """The method of that name.

        Raises
        ------
        KeyError
            There is none.
        PluginError
            Several have that name, or the plug-in that has it cannot be loaded.
        """
        points = self._points()
        method = self[name]
        if name in points and name not in self._plugged and _origin(method)[0] != points[name].module:
            self._clash(name, points[name])
        return method

    def names(self) -> list[str]:
        """All names, of plug-ins too; none of these is loaded for it."""
        import_files()
        return list(dict.fromkeys([*self, *self._points()]))

    def _points(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for point in _installed(tuple(sys.path)):
            if point.group == f"kvferry.{self.group}":
                if point.name in found and found[point.name].value != point.value:
                    self._clash(point.name, point, found[point.name])
                found[point.name] = point
        return found

    def _clash(self, name: str, point: EntryPoint, other: EntryPoint | None = None) -> None:
        owner = _where(other) if other else "kvferry itself, or a file that was imported,"
        raise PluginError(
            f"two of {self.group} are called {name!r}: {owner} and {_where(point)}; uninstall one, or have it renamed"
        )


def known_names(table: Iterable[str]) -> list[str]:
    """The names in a dictionary of methods, with those of plug-ins."""
    return table.names() if isinstance(table, Registry) else list(table)


def import_files(files: Iterable[str] = ()) -> None:
    """Import the files (or modules) given here and in the environment, each once; processes to come import them too.

    Raises
    ------
    PluginError
        There is no such file, or it cannot be imported.
    """
    named = [_absolute(file) for file in files]
    before = [file for file in os.environ.get(IMPORT, "").split(os.pathsep) if file]
    wanted = list(dict.fromkeys([*before, *named]))
    for file in wanted:
        if file not in _imported:
            _imported.add(file)  # before it runs: it may ask for names itself
            try:
                _import(file)
            except BaseException:
                _imported.discard(file)
                raise
    if named:
        os.environ[IMPORT] = os.pathsep.join(wanted)


def _absolute(file: str) -> str:
    return str(Path(file).expanduser().resolve()) if file.endswith(".py") else file


def _import(file: str) -> None:
    try:
        if not file.endswith(".py"):
            importlib.import_module(file)
            return
        path = Path(file)
        if not path.is_file():
            raise PluginError(f"there is no file {file} to import; check --import and {IMPORT}")
        name = f"kvferry_import_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise PluginError(f"{file} cannot be imported; give a Python file")
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # for what lies beside it
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    except PluginError:
        raise
    except Exception as error:  # a stranger's code: whatever it stumbles over
        raise PluginError(f"{file} cannot be imported ({_reason(error)}); mend it, or leave --import out") from error


@lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Our entry points of all distributions on the path."""
    from importlib.metadata import distributions

    return tuple(point for dist in distributions(path=list(path)) for point in _of(dist))


def _of(dist: Distribution) -> list[EntryPoint]:
    """A distribution's entry points for us; none of one that is damaged, which is nobody's business here."""
    try:
        return [point for point in dist.entry_points if point.group.startswith("kvferry.")]
    except Exception:
        return []


def _load(point: EntryPoint, group: str) -> T:  # type: ignore[type-var]
    try:
        method = point.load()
    except Exception as error:  # as above
        what = f"{_where(point)}, which brings {point.name!r} of {group},"
        raise PluginError(f"{what} cannot be loaded ({_reason(error)}); mend or uninstall it") from error
    if group == "codecs":
        method = method() if isinstance(method, type) else method
        usable = hasattr(method, "encode") or hasattr(method, "encoder")
        if usable and getattr(method, "name", None) != point.name:
            raise PluginError(f"{_where(point)} calls its codec {method.name!r}, its entry point {point.name!r}")
    else:
        usable = isinstance(method, type)
    if not usable:
        raise PluginError(f"{_where(point)} brings no method of {group}, but {method!r}; see docs/plugins.md")
    return method  # type: ignore[no-any-return]


def _where(point: EntryPoint) -> str:
    dist = getattr(point, "dist", None)
    return f"the plug-in {point.value}" + (f" of {dist.name}" if dist is not None else "")


def _origin(method: object) -> tuple[str, ...]:
    kind = method if isinstance(method, type) else type(method)
    return kind.__module__, kind.__qualname__


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
