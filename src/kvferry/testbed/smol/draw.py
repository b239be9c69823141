"""Write questions of a split with their pictures as files: `python -m kvferry.testbed.smol.draw FOLDER --split test`.

Every command that has `--data` then asks them (`kvferry sweep`, `fit`, `analyze`, `profile`, ...).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.progress import track

from kvferry.files import write_whole
from kvferry.testbed.data import SPLITS

from .data import sample
from .english import KINDS

NAME = "questions.jsonl"


def write_questions(folder: Path, split: str, n: int, *, kinds: tuple[str, ...] = KINDS, start: int = 0) -> Path:
    """PNG files and one file of JSON lines, whose path is returned; kinds take turns.

    Fields are those of :func:`kvferry.data.read_questions`: ``images`` (none where the text alone answers),
    ``question``, ``answer``, ``kind``, ``id`` and ``needs_image``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in track(range(start, start + n), description=split):
        drawn = sample(split, index, kinds=kinds)
        names = [f"{split}-{index:05d}-{number}.png" for number in range(len(drawn.images))]
        for name, picture in zip(names, drawn.images, strict=True):
            picture.save(folder / name, compress_level=1)
        row = {"id": f"{split}-{index:05d}", "kind": drawn.kind, "question": drawn.question, "answer": drawn.answer}
        lines.append(json.dumps({**row, **({"images": names} if names else {}), "needs_image": bool(names)}))
    path = folder / NAME
    write_whole(path, "\n".join(lines) + "\n")
    return path


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds)
    print(write_questions(arguments.folder, arguments.split, arguments.n, kinds=kinds, start=arguments.start))


if __name__ == "__main__":
    main()
