"""Train the model grown on SmolLM2: `python -m kvferry.testbed.smol.train --out RUN [--resume] [--device cuda]`.

Stages: `tower` (dense heads on photographs; attention is never guided), `match` (it says what is there in the language
model's own word vectors), `symbol` (a low-rank update of the language model learns to answer from such vectors, without
any tower), `answer` (update and tower learn from pictures), `export` (RUN/model). The last two learn by the
language-modelling loss, and now and then from a text on which the unchanged model is the teacher. A run that was
stopped goes on with `--resume`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
from functools import partial
from pathlib import Path

import torch

from kvferry.testbed.together import Together

from .answers import train_answers, validate
from .build import LANGUAGE, TOWER, write_folder
from .data import SIDES, Task
from .pupil import Plan, Pupil, load_run
from .seeing import match, train_tower
from .text import Texts

STAGES = ("tower", "match", "symbol", "answer", "export")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Of glibc's ``mallopt``."""


def keep_memory() -> None:
    """Let the process keep what it has freed: on virtual machines pages that are touched anew are dear.

    Measured on one of two cores: 5 to 8 s of a step of 12 s were page faults. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(option, value)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--language", default=LANGUAGE, help="a Llama: folder, GGUF or name")
    parser.add_argument("--tower", default=TOWER, help="the Qwen2-VL whose tower to begin with")
    parser.add_argument("--text", type=Path, help="JSON lines, context and questions: what is said of them stays")
    parser.add_argument("--only", choices=STAGES, action="append", help="run this stage alone (may be repeated)")
    parser.add_argument("--validate", type=int, metavar="STEPS", help="only measure, on this many batches")
    parser.add_argument("--layers", type=int, help="only the first layers of the language model, for an edge")
    parser.add_argument("--rank", type=int, default=Plan.rank, help="of the update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=Task.pictures, help="a step")
    parser.add_argument("--sides", type=int, nargs="+", choices=SIDES, default=list(SIDES), help="of pictures, pixels")
    parser.add_argument("--slots", type=int, default=Task.slots, help="questions behind each picture")
    parser.add_argument("--steps", type=int, default=Plan.answer_steps, help="of the stage answer")
    parser.add_argument("--symbol-steps", type=int, default=Plan.symbol_steps)
    parser.add_argument("--tower-steps", type=int, default=Plan.tower_steps)
    parser.add_argument("--rate", type=float, default=Plan.answer_rate, help="of learning to answer")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for the stage answer; its schedule fits in")
    parser.add_argument("--match-steps", type=int, default=Plan.match_steps)
    parser.add_argument("--match-minutes", type=float, default=math.inf)
    parser.add_argument("--symbol-minutes", type=float, default=math.inf)
    parser.add_argument("--tower-minutes", type=float, default=math.inf)
    parser.add_argument("--tower-pictures", type=int, default=16, help="a step, if they were small")
    parser.add_argument("--align-steps", type=int, default=Plan.align_steps)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on where a stopped run was")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = Task(pictures=arguments.pictures, slots=arguments.slots, sides=tuple(arguments.sides))
    plan = Plan(
        tower_steps=arguments.tower_steps,
        tower_seconds=60 * arguments.tower_minutes,
        tower_pixels=arguments.tower_pictures * 128 * 128,
        align_steps=arguments.align_steps,
        match_steps=arguments.match_steps,
        match_seconds=60 * arguments.match_minutes,
        symbol_steps=arguments.symbol_steps,
        symbol_seconds=60 * arguments.symbol_minutes,
        answer_steps=arguments.steps,
        answer_rate=arguments.rate,
        answer_seconds=60 * arguments.minutes,
        rank=arguments.rank,
        layers=arguments.layers,
        task=task,
    )
    pupil = Pupil(arguments.language, arguments.tower, plan, seed=arguments.seed, device=arguments.device)
    run, stages, seed = arguments.out, tuple(arguments.only or STAGES), arguments.seed
    load_run(pupil, run)
    if arguments.validate:
        print(json.dumps(validate(pupil, task, steps=arguments.validate), indent=1))
        return
    rows = max(1, task.pictures // 8)
    texts = Texts(arguments.text, pupil.tokenizer, rows=rows, seed=seed) if arguments.text else None
    if "tower" in stages:
        train_tower(pupil, run, plan, seed=seed, resume=arguments.resume, workers=arguments.workers)
    if "match" in stages:
        match(pupil, run, plan, seed=seed, resume=arguments.resume, workers=arguments.workers)
    learn = partial(
        train_answers, pupil, run, plan, texts, seed=seed, resume=arguments.resume, workers=arguments.workers
    )  # fmt: skip
    if "symbol" in stages:
        learn(symbolic=True)
    if "answer" in stages:
        learn()
    if "export" in stages and Together().first:
        write_folder(pupil.model, pupil.tokenizer, pupil.update, pupil.language, run / "model")


if __name__ == "__main__":  # what follows holds for the whole process, so that no caller of main() gets it
    torch.set_flush_denormal(True)
    keep_memory()
    main()
