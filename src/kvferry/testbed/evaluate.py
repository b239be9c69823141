"""Ask a model folder questions of a split, with plain Transformers: `python -m kvferry.testbed.evaluate FOLDER`.

An answer counts only if every token is right and the end-of-turn token follows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from .data import SPLITS, Sample, exact_match, samples
from .questions import KINDS, majority
from .words import IM_END, IMAGE_PAD


@dataclass(frozen=True)
class Testbed:
    """A model with what turns prompts into tensors."""

    model: Any
    tokenizer: Any
    images: Any

    @classmethod
    def load(cls, folder: str | Path, dtype: str = "bfloat16") -> Testbed:
        """Load a model folder; a clear error where it is none."""
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
        return cls(
            AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype)).eval(),
            AutoTokenizer.from_pretrained(folder, padding_side="left"),
            AutoImageProcessor.from_pretrained(folder),
        )

    def prompt(self, sample: Sample, grid: torch.Tensor) -> str:
        """The chat prompt with one placeholder per visual token; `grid` is `[pictures, 3]`."""
        content: list[dict[str, str]] = [{"type": "image"} for _ in sample.images]
        content.append({"type": "text", "text": sample.question})
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        head, *rest = text.split(IMAGE_PAD)
        merge = self.images.merge_size**2
        pads = [IMAGE_PAD * (int(row.prod()) // merge) for row in grid]
        return head + "".join(pad + part for pad, part in zip(pads, rest, strict=True))

    def inputs(self, batch: list[Sample]) -> dict[str, torch.Tensor]:
        """Left-padded tensors of several prompts."""
        images = [image for sample in batch for image in sample.images]
        pictures = self.images(images, return_tensors="pt") if images else {}
        every = pictures["image_grid_thw"] if images else torch.zeros(0, 3)
        grids = every.split([len(sample.images) for sample in batch])
        prompts = [self.prompt(sample, grid) for sample, grid in zip(batch, grids, strict=True)]
        text = self.tokenizer(prompts, return_tensors="pt", padding=True)
        is_picture = (text["input_ids"] == self.model.config.image_token_id).int()
        return {
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "mm_token_type_ids": is_picture,
            **pictures,
        }

    @torch.no_grad()
    def answers(self, batch: list[Sample], max_new_tokens: int = 8) -> list[str]:
        """Greedy answers; one that does not end carries a trailing "..."."""
        inputs = self.inputs(batch)
        tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        end, found = self.tokenizer.convert_tokens_to_ids(IM_END), []
        for row in tokens[:, inputs["input_ids"].shape[1] :].tolist():
            ended = end in row
            said = row[: row.index(end)] if ended else row
            found.append(self.tokenizer.decode(said) + ("" if ended else " ..."))
        return found


def _batches(drawn: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Samples in groups of like length, to pad little."""
    drawn = iter(drawn)
    while pool := list(islice(drawn, size * 8)):
        pool.sort(key=lambda sample: sum(image.width * image.height for image in sample.images))
        for begin in range(0, len(pool), size):
            yield pool[begin : begin + size]


def interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _summary(results: list[tuple[str, str, bool]]) -> dict[str, Any]:
    right, n = sum(ok for _, _, ok in results), len(results)
    low, high = interval(right, n)
    return {
        "n": n, "right": right, "accuracy": round(right / max(n, 1), 4), "low": round(low, 4),
        "high": round(high, 4), "blind": round(majority([answer for _, answer, _ in results]), 4),
    }  # fmt: skip


def evaluate(
    folder: str | Path, split: str = "test", n: int = 1000, *, batch: int = 20, kinds: tuple[str, ...] = KINDS,
    progress: bool = True, draw: Callable[..., Iterable[Sample]] = samples, max_new_tokens: int = 8,
    dtype: str = "bfloat16",
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of a model folder, overall and by kind, with intervals and the blind baseline.

    ``draw(split, n, kinds=kinds)`` gives the samples, by default the testbed's.
    """
    testbed = Testbed.load(folder, dtype)
    results: list[tuple[str, str, bool]] = []
    groups = _batches(draw(split, n, kinds=kinds), batch)
    for group in track(groups, "asking", total=-(-n // batch), disable=not progress):
        for sample, said in zip(group, testbed.answers(group, max_new_tokens), strict=True):
            results.append((sample.kind, sample.answer, exact_match(said, sample.answer)))
    by_kind = {kind: _summary([result for result in results if result[0] == kind]) for kind in kinds}
    blind = sum(row["blind"] * row["n"] for row in by_kind.values()) / max(n, 1)
    overall = _summary(results) | {"blind": round(blind, 4)}
    return {"split": split, "dtype": dtype, "overall": overall, "kinds": by_kind}


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    shown = Table("kind", "n", "accuracy", "95 % interval", "blind guess", title=f"{report['split']} split")
    for kind, row in [*report["kinds"].items(), ("all", report["overall"])]:
        spread = f"{row['low']:.1%} .. {row['high']:.1%}"
        shown.add_row(kind, str(row["n"]), f"{row['accuracy']:.1%}", spread, f"{row['blind']:.0%}")
    return shown


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=sorted(SPLITS), default="test")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        report = evaluate(
            arguments.folder, arguments.split, arguments.n, batch=arguments.batch, kinds=tuple(arguments.kinds),
            progress=not arguments.json,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        Console().print(table(report))


if __name__ == "__main__":
    main()
