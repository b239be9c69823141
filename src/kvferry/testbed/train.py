"""Train a testbed model: `python -m kvferry.testbed.train --model cloud --seed 0 --out runs/cloud-s0 [--resume]`.

Stages: the tower alone with dense heads, one block guided for a while; the language model alone on symbolic pictures,
with its attention guided at first; both joined and trained on pictures with the language-modelling loss only. The first
two do not need each other and may run at the same time (`--only tower`, `--only symbolic`); a tower may be shared
(`--tower RUN`).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .build import SIZES, build_model, write_folder
from .joint import fold_in, train_joint, train_match
from .language import SymbolicPicture, Task, train_symbolic
from .state import load_state
from .tower import DenseHeads, train_tower

STAGES = ("tower", "symbolic", "joint", "export")


@dataclass(frozen=True)
class Plan:
    """How long and how fast each stage of a model's training runs."""

    tower_steps: int = 5000
    symbolic_steps: int = 2000
    match_steps: int = 200
    joint_steps: int = 500
    tower_rate: float = 1.2e-3
    symbolic_rate: float = 1.5e-3
    match_rate: float = 6e-4
    joint_rate: float = 4e-4
    guided: bool = True
    task: Task = field(default_factory=Task)


PLANS: dict[str, Plan] = {
    "cloud": Plan(joint_steps=2000),
    "edge": Plan(symbolic_steps=700, symbolic_rate=2e-3, match_steps=100, joint_steps=900),
    "control": Plan(
        guided=False,
        tower_steps=1500,
        symbolic_steps=1500,
        symbolic_rate=2e-3,
        match_steps=100,
        joint_steps=500,
        task=Task(kinds=("colour", "shape", "glyph", "word", "exist", "compare"), pairs=0.0),
    ),
}


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run the stage that writes it first, or leave --only away")
    state: dict[str, Any] = load_state(path)["modules"]
    return state


def load_parts(model: Any, run: Path, tower_run: Path) -> tuple[SymbolicPicture, DenseHeads]:
    """Put a trained tower and a trained language model into one model; returns symbolic vectors and dense heads."""
    seen = _stored(tower_run / "tower.state")
    tower = model.model.visual
    kept = {name: weight for name, weight in seen["tower"].items() if not name.startswith("merger.mlp.2")}
    tower.load_state_dict(kept, strict=False)
    heads = DenseHeads(tower.merger.hidden_size)
    heads.load_state_dict(seen["heads"])
    parts = _stored(run / "symbolic.state")
    model.model.language_model.load_state_dict(parts["language"])
    model.lm_head.load_state_dict(parts["head"])
    symbols = SymbolicPicture(model.config.text_config.hidden_size)
    symbols.load_state_dict(parts["symbols"])
    return symbols, heads


def export(name: str, run: Path, folder: Path) -> None:
    """Write the run's latest joint checkpoint as a model folder."""
    model = build_model(SIZES[name])
    model.load_state_dict(_stored(run / "joint.state")["model"])
    write_folder(model, folder)


def train(name: str, run: Path, *, seed: int, only: tuple[str, ...], tower_run: Path, resume: bool) -> None:
    """Run the chosen stages of one model's training."""
    plan, model = PLANS[name], build_model(SIZES[name], seed)
    if "tower" in only:
        train_tower(
            model, tower_run, seed=seed, steps=plan.tower_steps, rate=plan.tower_rate,
            neighbours="relation" in plan.task.kinds, guided=plan.guided, resume=resume,
        )  # fmt: skip
    if "symbolic" in only:
        train_symbolic(
            model, run, plan.task, seed=seed, steps=plan.symbolic_steps, rate=plan.symbolic_rate,
            guided=plan.guided, resume=resume,
        )  # fmt: skip
    if "joint" in only:
        symbols, heads = load_parts(model, run, tower_run)
        if not (resume and (run / "match.state").is_file()):
            print(f"folded in: {fold_in(model, symbols, seed=seed):.3f} of the variance explained", flush=True)
        train_match(model, symbols, run, seed=seed, steps=plan.match_steps, rate=plan.match_rate, resume=resume)
        train_joint(
            model, heads, run, plan.task, seed=seed, steps=plan.joint_steps, rate=plan.joint_rate,
            resume=resume,
        )  # fmt: skip
    if "export" in only:
        export(name, run, run / "model")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(PLANS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--tower", type=Path, help="a run whose tower to use (by default this one)")
    parser.add_argument("--only", choices=STAGES, action="append", help="run this stage alone (may be repeated)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stages = tuple(arguments.only or STAGES)
    if arguments.tower and "tower" in stages:
        stages = tuple(stage for stage in stages if stage != "tower")
    train(
        arguments.model, arguments.out, seed=arguments.seed, only=stages,
        tower_run=arguments.tower or arguments.out, resume=arguments.resume,
    )  # fmt: skip


if __name__ == "__main__":
    main()
