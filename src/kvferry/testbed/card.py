"""Write a model folder's card from what was measured: `python -m kvferry.testbed.card FOLDER --run RUN --name cloud`.

The figures come from `FOLDER/evaluation.json` (written by `evaluate --json`) and the run's `log.jsonl`; none is typed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from .build import SIZES
from .questions import KINDS
from .scenes import LATTICE
from .tower import GUIDED, SMALL
from .train import PLANS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STAGE_TITLES = {
    "tower": "tower alone (accuracy on tokens that show something)",
    "symbolic": "language model alone, symbolic pictures",
    "match": "tower's features brought near the symbolic ones",
    "joint": "both, on pictures",
    "symbol": "language model's update alone, symbols",
    "answer": "update and projector, on pictures",
}
_NOT_ACCURACY = {"stage", "step", "seconds", "loss", "astray", "stays"}
_SHOWN = {"tower": ("colour", "shape", "first", "word", "left shape")}


def read_log(paths: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Log lines by stage, in the order written."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            stages.setdefault(entry["stage"], []).append(entry)
    return {name: stages[name] for name in STAGE_TITLES if name in stages}


def _smooth(values: list[float], width: int = 5) -> list[float]:
    windows = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curve(stages: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy on fresh training scenes against steps, one panel per stage."""
    stages = {name: lines for name, lines in stages.items() if name != "match"}
    figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.6), sharey=True, squeeze=False)
    for axis, (name, lines) in zip(axes[0], stages.items(), strict=True):
        names = _SHOWN.get(name) or sorted({key for line in lines for key in line} - _NOT_ACCURACY)
        for index, key in enumerate(names):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(
                [step for step, _ in points], _smooth([value for _, value in points]), label=key,
                linestyle="-" if index < 10 else "--", linewidth=1.1,
            )  # fmt: skip
        axis.set_title(STAGE_TITLES[name], fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, ncol=2, loc="lower right")
    axes[0][0].set_ylabel("accuracy on fresh scenes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def accuracy_table(reports: dict[str, dict[str, Any]]) -> str:
    """Kinds x evaluations, with intervals and the blind guess."""
    titles = list(reports)
    lines = ["| kind | blind guess | " + " | ".join(f"{title} (n)" for title in titles) + " |"]
    lines.append("|---|---:|" + "---:|" * len(titles))
    first = reports[titles[0]]
    for kind in [*first["kinds"], "all"]:
        rows = [report["overall"] if kind == "all" else report["kinds"].get(kind) for report in reports.values()]
        cells = [
            f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}] ({row['n']})" if row else "-" for row in rows
        ]
        blind = rows[0]["blind"] if rows[0] else 0
        lines.append(f"| {kind} | {blind:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card(
    folder: Path, name: str, seed: int, run: Path, tower: Path, others: dict[str, Path], notes: list[str]
) -> None:
    """Write `README.md` and `curve.png` into a model folder."""
    command = f"python -m kvferry.testbed.train --model {name} --seed {seed} --out {run}"
    if tower != run:
        command += f" --tower {tower}"
    report_path = folder / "evaluation.json"
    if not report_path.is_file():
        raise SystemExit(f"{report_path} is missing: write it with `evaluate {folder} --json`")
    logs = [run / "log.jsonl"] if tower == run else [tower / "log.jsonl", run / "log.jsonl"]
    stages = read_log(logs)
    draw_curve(stages, folder / "curve.png")
    size, plan = SIZES[name], PLANS[name]
    reports = {f"seed {seed}, shipped: accuracy [95 % interval]": json.loads(report_path.read_text())}
    reports |= {title: json.loads(path.read_text()) for title, path in others.items()}
    first = next(iter(reports.values()))
    rows = "\n".join(
        f"| {stage} | {lines[-1]['step']} | {lines[-1]['seconds'] / 60:.0f} min |" for stage, lines in stages.items()
    )
    guidance = (
        "Attention is guided as a warm start only (an auxiliary -log attention on what decides the answer): in the "
        f"tower alone from {SMALL:.0%} to {GUIDED:.0%} of its steps, one block towards neighbouring things; in the "
        "symbolic stage until three quarters of its steps. Never when both are joined: there the tower is held to its "
        "own lessons for the first half, and the language-modelling loss is alone after that."
        if plan.guided
        else "No attention guidance at any time: the control for conclusions about attention."
    )
    extra = "".join(f"\n* {note}" for note in notes)
    kinds = tuple(dict.fromkeys((*plan.task.kinds, *(("pair",) if plan.task.pairs else ()))))
    asked = "" if set(first["kinds"]) == set(KINDS) else f" --kinds {' '.join(first['kinds'])}"
    measured = f"--split {first['split']} -n {first['overall']['n']}{asked} --json"
    tidy = "Early guidance and dense supervision make" if plan.guided else "Dense supervision makes"
    doubt = "the\n  control model and against real models" if plan.guided else "real models"
    text = f"""# kvferry testbed: {name}

A genuine `Qwen2VLForConditionalGeneration`, small: {size.layers} layers, hidden {size.hidden}, {size.heads} query and
{size.kv_heads} key/value heads of 32 channels, a vision tower of {size.tower_depth} blocks and width
{size.tower_width}, 16 pixels per visual token. Weights in bfloat16. It answers questions about pictures that kvferry
draws itself.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("testbed/{name}")
processor = AutoProcessor.from_pretrained("testbed/{name}")
```

## Accuracy

{first["split"].capitalize()} split (its scenes are in no other split), full cache, {first["dtype"]}, plain
Transformers, greedy; right means the exact answer followed by the end token. "Blind guess" always says the commonest
answer of the kind.

{accuracy_table(reports)}

Written by `python -m kvferry.testbed.evaluate testbed/{name} {measured} > testbed/{name}/evaluation.json` and
`python -m kvferry.testbed.card`.

## Training

`{command}`, on a CPU, one core per process.

| stage | steps | wall time |
|---|---:|---:|
{rows}

{guidance} Kinds taught: {", ".join(kinds)}.

![accuracy while training](curve.png)

## Take care

* It is small, and trained on drawn scenes only: it knows {len(kinds)} kinds of question, about 140 words, and nothing
  else.
* Centres of things lie on a lattice of {LATTICE} pixels (a visual token has 16), in three sizes; glyphs have one
  size, 18 pixels, and one face.
* {tidy} its features tidier than a large model's: check conclusions against {doubt}.{extra}
"""
    (folder / "README.md").write_text(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", choices=sorted(SIZES), required=True)
    parser.add_argument("--seed", type=int, default=0, help="the run's")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tower", type=Path, help="the run whose tower was used, if another")
    parser.add_argument("--other", nargs=2, action="append", default=[], metavar=("TITLE", "JSON"))
    parser.add_argument("--note", action="append", default=[], help="one more line under 'Take care'")
    arguments = parser.parse_args()
    others = {title: Path(path) for title, path in arguments.other}
    tower = arguments.tower or arguments.run
    write_card(arguments.folder, arguments.name, arguments.seed, arguments.run, tower, others, arguments.note)


if __name__ == "__main__":
    main()
