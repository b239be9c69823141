"""SmolLM2 on the first page of results: a fact, a short section, and the pages behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvferry.evaluate.tables import interval, markdown
from study.codec_tables import percent, times
from study.page import Places
from study.squad.records import BARE, FULL
from study.squad.tables import Told, methods_of, page, prompt_page, title_of, told_in

LOYAL = 0.1
"""Nats a token up to which a codec is named as near to the full cache."""
SHORT = 512
PREFIX = "smollm2-"


def write_pages(folder: Path, places: Places) -> list[tuple[str, str]]:
    """A page for each raw file and one on prompts: titles and names of the pages."""
    written = []
    prompts = folder / "prompt.json"
    places.details.mkdir(parents=True, exist_ok=True)
    if prompts.is_file():
        (places.details / f"{PREFIX}prompt.md").write_text(prompt_page(json.loads(prompts.read_text())))
        written.append(("SmolLM2-135M on SQuAD: how it is asked", f"{PREFIX}prompt"))
    for told in told_in(folder):
        (places.details / f"{PREFIX}{told.file.stem}.md").write_text(page(told))
        written.append((title_of(told), f"{PREFIX}{told.file.stem}"))
    return written


def fact(folder: Path, places: Places) -> Iterator[str]:
    """What a reader should take away."""
    found = {(x.plan["name"], x.plan["tokens"]): x for x in told_in(folder)}
    known = found.get(("scorers", SHORT))
    if known is None:
        return
    ranked = [f"`{name}` {kl:.2f}" for name, kl in _ranking(known, 0.25)]
    codecs = found.get(("codecs", SHORT))
    coded = "" if codecs is None else f" Codecs (n = {codecs.n}): {_coded(codecs)}."
    yield (
        f"* **On weights that others trained** (SmolLM2-135M-Instruct, text only, SQuAD's paragraphs, prompts of "
        f"{SHORT} tokens, protocol A): a quarter of the tokens, chosen by {', '.join(ranked)} nats a token from the "
        f"full cache (without the text {known.kl(BARE).mean:.2f}; n = {known.n}).{coded} "
        f"[More](#{_anchor()})."
    )


def section(folder: Path, places: Places) -> list[str]:
    """Ceilings, floors and n of every raw file, and scorers and codecs in short."""
    told = told_in(folder)
    if not told:
        return []
    rows = [
        [
            f"[{x.plan['name']}]({_link(places, x)})", x.plan["protocol"], str(x.plan["tokens"]), str(x.n),
            *(interval(x.score(row, "F1")) for row in (FULL, BARE)), interval(x.kl(BARE), 2),
        ]
        for x in told
    ]  # fmt: skip
    head = ["page", "protocol", "tokens", "n", "ceiling: F1", "floor, no text: F1", "floor: KL"]
    text = [
        f"## {TITLE}", "",
        "Context and question as the sources had them, the first line of the answer judged by F1 of words; KL and "
        "first choice along the full cache's own answer, in nats a token; intervals drawn by texts. How it is asked: "
        f"[prompts]({places.link(places.details / f'{PREFIX}prompt.md')}).", "",
        markdown(head, rows, left=(1,)), "",
    ]  # fmt: skip
    return [*text, *_scorers(told), *_codecs(told)]


TITLE = "On weights that others trained: SmolLM2-135M on SQuAD"


def _anchor() -> str:
    return "".join(c for c in TITLE.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _ranking(told: Told, fraction: float, label: str = "") -> list[tuple[str, float]]:
    """Scorers by their KL at a fraction."""
    rows = {m: by[fraction].name for m, by in methods_of(told).items() if fraction in by}
    mine = {m.partition(" ")[0]: row for m, row in rows.items() if m.partition(" ")[2] == label}
    return sorted(((m, told.kl(row).mean) for m, row in mine.items()), key=lambda x: x[1])


def _coded(told: Told) -> str:
    """INT8 and INT4, and the fewest bytes that stay near."""
    words = [f"INT{b} {told.kl(f'full|int{b}').mean:.3f}" for b in (8, 4, 3) if f"full|int{b}" in told.rows]
    near = [row for row in told.rows if row not in (BARE, FULL) and told.kl(row).mean <= LOYAL]
    if near:
        best = min(near, key=lambda row: told.measured.bytes[row])
        words.append(f"the fewest bytes within {LOYAL}: `{best}`, {times(told.measured.shrink(best).mean)} smaller")
    return ", ".join(words)


def _scorers(told: Sequence[Told]) -> list[str]:
    """KL and F1 at 50 and 25 %, under both protocols."""
    columns: dict[str, dict[str, str]] = {}
    for x in told:
        if x.plan["name"] in ("scorers", "blind") and x.plan["tokens"] == SHORT:
            for fraction in (0.5, 0.25):
                head = f"{x.plan['protocol']}, {fraction:.0%}: KL (% of F1)"
                for method, by in methods_of(x).items():
                    if fraction in by:
                        row = by[fraction].name
                        cell = f"{interval(x.kl(row), 2)} ({100 * x.measured.of_full(row).mean:.0f})"
                        columns.setdefault(head, {})[method] = cell
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[f"`{name}`", *(column.get(name, "") for column in columns.values())] for name in names]
    return [markdown(["scorer", *columns], rows), ""] if rows else []


def _codecs(told: Sequence[Told]) -> list[str]:
    """Whole caches by codec, by falling bytes."""
    rows = []
    for x in told:
        if x.plan["name"] in ("codecs", "coders", "profiles") and x.plan["tokens"] == SHORT:
            whole = [p for p in x.measured.points.values() if p.whole and p.name != FULL]
            for point in x.measured.by_size(whole):
                row = point.name
                cells = [f"{x.measured.bytes[row]:,.0f}", times(x.measured.shrink(row).mean), interval(x.kl(row), 3)]
                rows.append([f"`{row}`", *cells, percent(x.agree(row)), percent(x.measured.of_full(row)), str(x.n)])
    head = ["whole cache", "bytes", "smaller than BF16", "KL", "same first choice, %", "F1, % of full", "n"]
    return [markdown(head, rows), ""] if rows else []


def _link(places: Places, told: Told) -> str:
    return places.link(places.details / f"{PREFIX}{told.file.stem}.md")
