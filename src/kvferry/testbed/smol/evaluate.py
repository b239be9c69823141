"""Ask a grown model questions of a split, with plain Transformers: `python -m kvferry.testbed.smol.evaluate FOLDER`.

An answer counts only if every word is right and the end-of-turn token follows; so does a caption.
"""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console

from kvferry.models.load import find_folder
from kvferry.testbed.data import SPLITS
from kvferry.testbed.evaluate import evaluate, table

from .data import samples
from .english import KINDS

LONGEST = 64
"""Tokens of the longest caption, and some."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what training exported, or a complete model folder")
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", type=int, default=14)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the arithmetic")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = evaluate(
        find_folder(arguments.folder), arguments.split, arguments.n, batch=arguments.batch,
        kinds=tuple(arguments.kinds), progress=not arguments.json, draw=samples, max_new_tokens=LONGEST,
        dtype=arguments.dtype,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(table(report))


if __name__ == "__main__":
    main()
