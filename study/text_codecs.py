"""Codecs on text with real weights: how far SmolLM2's answer moves, and how many bytes cross the wire.

Profiles are made on calibration paragraphs and kept in a folder, where a second run finds them. Each of the test
split's prompts is one record of all recipes, so that all are paired; the raw file can be continued.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvferry.codecs.profile import OCTAVE
from kvferry.codecs.tree import SINKS
from kvferry.errors import InputError
from kvferry.statistics import mean_interval
from study.profiles import files as profile_files

if TYPE_CHECKING:
    from kvferry.evidence import Prefilled
    from kvferry.models import VLM
    from study.page import Places

Record = dict[str, Any]
SHORTEST, LONGEST = 230, 470
"""Tokens of the context; the template and the question add about 45."""
ANSWER = 16
NEAR = 0.1
"""Nats a token within which a row counts as near to the full cache."""
PROFILES = "profiles.json"
"""What is told of the profiles, which are too large for git."""
RAW, PAGE, TITLE = "paragraphs.jsonl", "smollm2-codecs.md", "Whole caches of SmolLM2-135M: bytes and KL of every codec"
CODECS = (
    "int8|zstd", "int4|zstd", "turbo:3.5", "turbo:2.5", "kivi:2",
    *(f"kvtc:{ratio}@{{kvtc}}|zstd" for ratio in (8, 16, 32)),
    *(f"transform:{ratio}@{{tree}}" for ratio in (4, 8, 16, 32, 64)),
)  # fmt: skip
EVICTED = ("bf16", "int4|zstd", "transform:16@{tree}", "transform:32@{tree}")
EVICTION = "expected_attention@0.5,budget=shared"


def recipes(folder: Path) -> dict[str, str]:
    """What a row is called -> its recipe, with profiles in ``folder``."""
    files = profile_files(folder)
    rows = [f"full|{codec}" for codec in CODECS] + [f"{EVICTION}|{codec}" for codec in EVICTED]
    return {row.format(**{name: name for name in files}): row.format(**files) for row in rows}


def paragraphs(data: Path, split: str) -> list[Record]:
    """The paragraphs of a split."""
    path = data / f"{split}.jsonl"
    if not path.is_file():
        raise InputError(f"there is no {path}; give the folder with SQuAD's paragraphs by --data")
    return [json.loads(line) for line in path.read_text().splitlines()]


def calibration(vlm: VLM, rows: list[Record]) -> Iterator[Prefilled]:
    """A question on every paragraph of the calibration split, read."""
    for i, row in enumerate(rows):
        question = row["questions"][i % len(row["questions"])]["question"]
        yield vlm.prefill([], question, context=row["context"])


def prompts(vlm: VLM, rows: list[Record], n: int) -> Iterator[tuple[str, str]]:
    """Contexts of :data:`SHORTEST` to :data:`LONGEST` tokens, paragraphs of one article joined, and a question on the
    first."""
    found = 0
    for i, row in enumerate(rows):
        context = row["context"]
        for other in rows[i + 1 :]:
            if len(vlm.tokenizer(context)["input_ids"]) >= SHORTEST or other["title"] != row["title"]:
                break
            context += "\n" + other["context"]
        if found < n and SHORTEST <= len(vlm.tokenizer(context)["input_ids"]) <= LONGEST:
            found += 1
            yield context, row["questions"][0]["question"]


def measure(vlm: VLM, context: str, question: str, rows: dict[str, str]) -> Record:
    """Bytes on the wire, KL along the full cache's own answer in nats, and how often its token stays the likeliest."""
    from kvferry.evaluate.divergence import divergence
    from kvferry.recipe import Recipe, compress, decompress

    requests = [request for recipe in rows.values() for request in Recipe.parse(recipe).requests]
    prefilled = vlm.prefill([], question, context=context, requests=tuple(dict.fromkeys(requests)))
    full = prefilled.cache
    answer = vlm.resume(full, max_new_tokens=ANSWER).token_ids
    reference = vlm.score(full, answer)
    found: Record = {"tokens": full.length, "bf16": full.full_bf16_bytes, "answer": len(answer), "rows": {}}
    blobs = {name: compress(prefilled, recipe) for name, recipe in rows.items()}
    scored = vlm.score_many([decompress(blob) for blob in blobs.values()], answer)
    for (name, blob), logits in zip(blobs.items(), scored, strict=True):
        same = float((reference.argmax(-1) == logits.argmax(-1)).float().mean())
        found["rows"][name] = [len(blob), divergence(reference, logits), same]
    return found


def read(folder: Path) -> list[Record]:
    """The raw results in a folder; none where there are none."""
    file = folder / RAW
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def fact(folder: Path, places: Places) -> Iterator[str]:
    """How many times smaller each family of codecs makes a whole cache at :data:`NEAR` nats from the full one."""
    records = read(folder)
    if not records:
        return
    ranked = sorted(((near(rows), family) for family, rows in families(records).items()), reverse=True)
    words = ", ".join(f"`{family}` {ratio:.1f}x" for ratio, family in ranked if ratio)
    page = places.link(places.details / PAGE)
    yield (
        f"* **How small a whole cache of those weights gets** at {NEAR:g} nats a token from the full one "
        f"(SmolLM2-135M, SQuAD's test paragraphs, n = {len(records)}, between the rows on either side; both ends "
        f"hold a calibrated profile for `kvtc` and `transform`): {words}. [All rows]({page})."
    )


def families(records: list[Record]) -> dict[str, list[tuple[float, float]]]:
    """Whole caches by codec: how many times smaller than BF16, and the mean KL, by rising ratio."""
    bf16, found = sum(record["bf16"] for record in records), dict[str, list[tuple[float, float]]]()
    for name in records[0]["rows"]:
        selection, codec = name.split("|")[:2]
        if selection == "full":
            size, kl, _ = np.array([record["rows"][name] for record in records]).T
            family = codec.partition(":")[0].rstrip("0123456789")
            found.setdefault(family, []).append((float(bf16 / size.sum()), float(kl.mean())))
    return {family: sorted(rows) for family, rows in found.items()}


def near(rows: list[tuple[float, float]], nats: float = NEAR) -> float:
    """The ratio at ``nats``, on a line between two rows in logarithms of both; at most the last row's, 0 beyond all."""
    within = [row for row in rows if row[1] <= nats]
    beyond = [row for row in rows if row[1] > nats]
    if not within or not beyond:
        return max((ratio for ratio, _ in within), default=0.0)
    (low, least), (high, most) = max(within), min(beyond)
    share = np.log(nats / max(least, 1e-9)) / np.log(most / max(least, 1e-9))
    return float(low * (high / low) ** share)


def write_page(folder: Path, places: Places) -> list[tuple[str, str]]:
    """The page of the raw results in a folder: its title and name."""
    records = read(folder)
    if not records:
        return []
    lengths = [record["tokens"] for record in records]
    made = sorted({f"`{record['commit'][:12]}`" for record in records if "commit" in record})
    where = f"; commits {', '.join(made)}" if made else ""
    text = [
        f"# {TITLE}", "",
        f"{len(records)} prompts of {min(lengths)} to {max(lengths)} tokens from SQuAD's test paragraphs, paired; "
        f"whole bitstreams; KL and likeliest token along the full cache's own answer of {ANSWER} tokens; 95 % "
        "bootstrap intervals. Profiles of calibration paragraphs, not counted in the bytes. Protocol A. Made by "
        f"`python -m study text-codecs`, which goes on where it stopped{where}.", "",
        table(records), "", *told(folder),
    ]  # fmt: skip
    places.details.mkdir(parents=True, exist_ok=True)
    (places.details / PAGE).write_text("\n".join(text))
    return [(TITLE, PAGE.removesuffix(".md"))]


def told(folder: Path) -> list[str]:
    """What the tree's calibration says of the model: what an answer hangs on, and what a word tells."""
    file = folder / PROFILES
    if not file.is_file():
        return []
    each = json.loads(file.read_text())
    rows = [
        f"| {name} | {of['energy']:.1%} | {2 ** (of['octaves'] / OCTAVE):.2f}x |"
        for name, of in each["tree"]["classes"].items()
    ]
    sizes = ", ".join(f"`{name}` {of['bytes'] / 1e6:.1f} MB" for name, of in each.items())
    return [
        "## What the calibration found", "",
        f"Profiles of {each['tree']['n']} paragraphs: {sizes}. Means of words take "
        f"{each['tree']['words']['energy']:.0%} of text's energy. "
        "Which tokens the answer hangs on, by the energy of its logits' gradients (the sinks are the "
        f"first {SINKS} tokens), and how much finer the step of a class is, so that all cost the same:", "",
        "| class of token | share of the energy | step, finer than the context's |", "|---|---:|---:|", *rows, "",
    ]  # fmt: skip


def table(records: list[Record]) -> str:
    """Markdown: every recipe with 95 % bootstrap intervals over prompts."""
    lines = ["| recipe | smaller than BF16 | KL (nats) | median | same token |", "|---|---:|---:|---:|---:|"]
    bf16 = sum(record["bf16"] for record in records)
    for name in records[0]["rows"]:
        size, kl, same = np.array([record["rows"][name] for record in records]).T
        spread, agree = mean_interval(kl), mean_interval(same)
        lines.append(
            f"| `{name.replace('|', chr(92) + '|')}` | {bf16 / size.sum():.1f}x "
            f"| {spread.mean:.4f} [{spread.low:.4f}, {spread.high:.4f}] | {np.median(kl):.4f} "
            f"| {agree.mean:.1%} [{agree.low:.1%}, {agree.high:.1%}] |"
        )
    return "\n".join(lines)
