"""Perplexity of SmolLM2 on SQuAD's paragraphs, of which the first part was compressed: as WikiText's is measured, with
a cache between. Protocol B: what comes later is not known when tokens are chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.errors import InputError
from kvferry.evaluate.tables import interval, markdown
from kvferry.statistics import Estimate, estimate_of, means_with_draws, ratio_interval
from study.squad.plans import BLIND
from study.squad.texts import SEED, Paragraph

if TYPE_CHECKING:
    from kvferry.models import VLM
    from study.page import Places

Record = dict[str, Any]
CONTEXT, THEN = 512, 129
"""Tokens that are compressed, and those that follow; the first of these is fed, the others are foretold."""
FULL, BARE = "full|bf16", "nothing"
"""Ceiling, and floor: what follows without what came before."""
ROWS = (
    FULL, *(f"full|int{bits}|zstd" for bits in (8, 6, 5, 4, 3, 2)), "full|kivi:4", "full|kivi:2", "full|turbo:3.5",
    "full|turbo:2.5", *(f"{scorer}@{fraction:g}|bf16" for scorer in BLIND for fraction in (0.75, 0.5, 0.25, 0.1)),
)  # fmt: skip
BATCH = 8
RAW, PAGE, TITLE = "windows.jsonl", "smollm2-perplexity.md", "Perplexity of SmolLM2-135M behind a compressed cache"


def windows(paragraphs: Sequence[Paragraph], tokens: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Pieces of running text, ``CONTEXT + THEN`` tokens each, that share nothing: articles one after another, in an
    order drawn once, a line for a paragraph."""
    titles = sorted({x.title for x in paragraphs})
    order = [titles[i] for i in np.random.default_rng(SEED).permutation(len(titles))]
    ids = tokens("\n".join(x.text for title in order for x in paragraphs if x.title == title))
    size = CONTEXT + THEN
    for start in range(0, len(ids) - size + 1, size):
        yield ids[start : start + size]


def measure(vlm: VLM, ids: list[int], rows: Sequence[str] = ROWS) -> Record:
    """Of every row its bytes, the nats a token of what follows, and how often its first choice is the full cache's."""
    import torch

    from kvferry.evaluate.sweep import carry
    from kvferry.models.resume import Decoder
    from kvferry.recipe import Recipe
    from study.squad.reading import Reader, requests_of

    before, fed, wanted = ids[:CONTEXT], ids[CONTEXT:-1], torch.tensor(ids[CONTEXT + 1 :])
    read = Reader(vlm, before, requests_of(rows)).read((), 0, len(before))
    carried = {row: carry(read, Recipe.parse(row)) for row in rows}
    order = sorted(rows, key=lambda row: carried[row].cache.nbytes)
    said: dict[str, torch.Tensor] = {}
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        logits = Decoder(vlm.model, *(carried[row].cache for row in some)).feed(fed, logits=len(fed))
        said |= {row: one.log_softmax(-1) for row, one in zip(some, logits, strict=True)}
    with torch.inference_mode():
        bare = vlm.model(input_ids=torch.tensor([fed]), use_cache=False).logits[0].float()
    first = said[FULL].argmax(-1)
    found: Record = {"tokens": len(before), "bf16": read.cache.full_bf16_bytes, "rows": {}}
    for row, one in [*said.items(), (BARE, bare.log_softmax(-1))]:
        nats = -float(one.gather(1, wanted[:, None]).double().mean())
        agree = float((one.argmax(-1) == first).double().mean())
        found["rows"][row] = [carried[row].bytes if row in carried else 0, round(nats, 6), round(agree, 4)]
    return found


def read(folder: Path) -> list[Record]:
    """The raw results in a folder; none where there are none."""
    file = folder / RAW
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def column(records: Sequence[Record], row: str, number: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One of a row's numbers, of every window."""
    return np.array([record["rows"][row][number] for record in records], np.float64)


def perplexity(records: Sequence[Record], row: str, against: str = "") -> Estimate:
    """That of all windows together, or how many times another row's; 95 % bootstrap interval over windows."""
    nats = column(records, row, 1) - (column(records, against, 1) if against else 0)
    return estimate_of(np.exp(means_with_draws(nats[None])[0]), len(records))


def table(records: Sequence[Record]) -> str:
    """Markdown: every row by rising perplexity, ceiling and floor among them."""
    names = sorted(records[0]["rows"], key=lambda row: (row == BARE, row != FULL, column(records, row, 1).mean()))
    bf16, lines = np.array([record["bf16"] for record in records], np.float64), []
    for row in names:
        end = {FULL: " (ceiling)", BARE: " (floor)"}.get(row, "")
        size = ratio_interval(bf16, column(records, row, 0)) if row != BARE else None
        agree = 100 * column(records, row, 2).mean()
        lines.append([
            f"`{row}`{end}", interval(perplexity(records, row), 2),
            interval(perplexity(records, row, FULL), 3) if row != FULL else "", f"{agree:.1f}",
            f"{size.mean:.1f}x" if size else "",
        ])  # fmt: skip
    head = ["row", "perplexity", "times the full cache's", "same first choice, %", "smaller than BF16"]
    return markdown(head, lines)


def write_page(folder: Path, places: Places) -> list[tuple[str, str]]:
    """The page of the raw results in a folder: its title and name."""
    records = read(folder)
    if not records:
        return []
    if any(set(record["rows"]) != set(records[0]["rows"]) for record in records):
        raise InputError(f"{folder / RAW} holds windows of different rows; remove it and run the command anew")
    made = ", ".join(sorted({f"`{record['commit'][:12]}`" for record in records}))
    text = [
        f"# {TITLE}", "",
        f"n = {len(records)} windows of SQuAD's test paragraphs, which share no token, paired: {CONTEXT} tokens are "
        f"read, compressed, written and read again; of the {THEN - 1} that follow each is foretold from the "
        "compressed cache and from those before it. Protocol B: scorers do not know what follows. Floor: what "
        "follows without the cache. 95 % bootstrap intervals over windows. Bytes are whole bitstreams. Model "
        f"`smollm2`, float32, {records[0]['machine']}. Made by `python -m study perplexity`, which goes on where it "
        f"stopped; commits {made}.", "",
        table(records), "",
    ]  # fmt: skip
    places.details.mkdir(parents=True, exist_ok=True)
    (places.details / PAGE).write_text("\n".join(text))
    return [(TITLE, PAGE.removesuffix(".md"))]
