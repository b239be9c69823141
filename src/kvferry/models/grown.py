"""A vision-language model grown on a language model: kept as what was learned, put together where it is loaded.

Its folder holds a Qwen2-VL's configuration, ``grown.json`` and ``grown.safetensors``: the whole vision tower under its
own names, and for some matrices of the language model ``NAME.down`` ``[rank, in]`` and ``NAME.up`` ``[out, rank]``,
whose product is to be added. The language model itself, a Llama, is loaded by its name, and so is its vocabulary, in
which some tokens are given new names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvferry.errors import ModelError
from kvferry.models.unpacked import made_once

ABOUT, WEIGHTS = "grown.json", "grown.safetensors"
_LAYOUT = 2
_TEXT = "model.language_model."
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def is_grown(folder: Path) -> bool:
    """Whether a folder holds only what was learned."""
    return (folder / ABOUT).is_file()


def write_grown(
    folder: Path, language: str, weights: dict[str, torch.Tensor], renamed: Mapping[int, str] | None = None
) -> None:
    """What was learned, in bfloat16, the name of the language model below it, and its tokens' new names by id."""
    save_file({name: x.detach().cpu().bfloat16().contiguous() for name, x in weights.items()}, folder / WEIGHTS)
    about = {"language": language, "renamed": {str(token): name for token, name in (renamed or {}).items()}}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def rename_tokens(parts: dict[str, Any], renamed: Mapping[int, str]) -> dict[str, Any]:
    """A ``tokenizer.json`` in which some tokens have other names and are special; the numbers of all stay.

    Raises
    ------
    ModelError
        A name is another token's already, or there is no token of that number.
    """
    names = {token: name for name, token in parts["model"]["vocab"].items()}
    for token, name in renamed.items():
        if token not in names or parts["model"]["vocab"].get(name, token) != token:
            raise ModelError(f"token {token} cannot be called {name!r} in this vocabulary: it was grown on another one")
    vocabulary = {renamed.get(token, name): token for name, token in parts["model"]["vocab"].items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = [added for added in parts["added_tokens"] if added["id"] not in renamed]
    known += [{"id": token, "content": name, **plain} for token, name in renamed.items()]
    known.sort(key=lambda added: int(added["id"]))
    return {**parts, "added_tokens": known, "model": {**parts["model"], "vocab": vocabulary}}


def folder_of_grown(folder: Path, language: Path) -> Path:
    """The complete model folder; written first where it is not there yet.

    Parameters
    ----------
    folder : Path
        What was learned.
    language : Path
        The folder of the language model.

    Raises
    ------
    ModelError
        The two do not fit.
    """
    files = [folder / name for name in ("config.json", ABOUT, WEIGHTS)] + sorted(language.glob("*.safetensors"))
    return made_once(folder.resolve().name, files, _LAYOUT, partial(_join, folder, language))


def language_of(folder: Path) -> str:
    """The name of the language model below."""
    return str(json.loads((folder / ABOUT).read_text())["language"])


def without_layers(weights: dict[str, torch.Tensor], first: int) -> dict[str, torch.Tensor]:
    """The weights of a language model, of its decoder layers only the first so many."""
    layers = {name: _LAYER.search(name) for name in weights}
    return {name: x for name, x in weights.items() if not (found := layers[name]) or int(found[1]) < first}


def _join(folder: Path, language: Path, out: Path) -> None:
    learned = load_file(folder / WEIGHTS)
    base: dict[str, torch.Tensor] = {}
    for part in sorted(language.glob("*.safetensors")):
        base |= load_file(part)
    whole = {name: x for name, x in learned.items() if not name.endswith((".down", ".up"))}
    layers = json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"]
    for name, weight in without_layers(base, layers).items():
        whole[_TEXT + name.removeprefix("model.") if name.startswith("model.") else name] = weight
    for name in [name.removesuffix(".down") for name in learned if name.endswith(".down")]:
        up, down = learned[f"{name}.up"].float(), learned[f"{name}.down"].float()
        if name not in whole or whole[name].shape != (len(up), down.shape[1]):
            raise ModelError(f"{folder} was grown on another language model than {language}: {name} does not fit")
        whole[name] = (whole[name].float() + up @ down).to(whole[name].dtype)
    for name in [name for name in whole if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        if name.startswith(_TEXT):
            whole[name.removesuffix("weight") + "bias"] = torch.zeros(len(whole[name]), dtype=whole[name].dtype)
    renamed = {int(token): name for token, name in json.loads((folder / ABOUT).read_text())["renamed"].items()}
    vocabulary = rename_tokens(json.loads((language / "tokenizer.json").read_text(encoding="utf-8")), renamed)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(ABOUT, "*.safetensors", "*.md", "*.png", "*.profile"))
    (out / "tokenizer.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
