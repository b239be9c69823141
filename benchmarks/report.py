"""``python -m benchmarks.report``: the sections of BENCHMARKS.md that come from ``benchmarks/results``, written anew.

Between ``<!-- made: NAME -->`` and ``<!-- end -->`` stands what is made of ``benchmarks/results/NAME.json``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "BENCHMARKS.md"
_SECTION = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def where(commit: str) -> dict[str, Any]:
    """What a result was measured on."""
    return {"commit": commit, "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def written(path: Path, result: dict[str, Any]) -> None:
    """One result as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def page(text: str, results: Path = RESULTS) -> str:
    """The page with its sections as the results say."""

    def made(found: re.Match[str]) -> str:
        result = json.loads((results / f"{found[2]}.json").read_text(encoding="utf-8"))
        return f"{found[1]}\n{MADE[found[2]](result)}\n\n{found[3]}"

    return _SECTION.sub(made, text)


def hostile(result: dict[str, Any]) -> str:
    """Kind by kind."""
    rows = [
        (
            each["kind"],
            f"{each['bytes']:,}",
            f"{each['ratio']:.2f}",
            f"{each['longest_s']:.2f}",
            f"{each['peak_mib']:,}",
            f"{each['kept_mib']:,}",
            each["refused"],
            ", ".join(f"{name} {n}" for name, n in each["told"].items()),
        )
        for each in result["rows"]
    ]
    heads = "what two clients send", "bytes", "a good client's mean time, x its usual", "longest, s"
    heads += "peak MiB", "kept MiB", "good ones refused", "told"
    worst = max(result["rows"], key=lambda each: each["ratio"])
    refused = sum(each["refused"] for each in result["rows"])
    return "\n\n".join(
        [
            _origin(result),
            _table(heads, rows),
            f"Of the good client's requests {refused} were refused. Its mean was at most {worst['ratio']:.2f}x its "
            f"usual time ({worst['kind']}).",
        ]
    )


def faults(result: dict[str, Any]) -> str:
    """Fault by phase, and what came beside it."""
    cells: dict[str, dict[str, dict[str, int]]] = {}
    for name, ends in result["cells"].items():
        fault, phase = name.split(" / ")
        cells.setdefault(fault, {})[phase] = ends
    wire = {fault: phases for fault, phases in cells.items() if len(phases) > 1}
    single = {fault: next(iter(phases.values())) for fault, phases in cells.items() if len(phases) == 1}
    phases = list(next(iter(wire.values())))
    parts = [_origin(result)]
    rows = [(fault, *(_ends(found.get(phase, {})) for phase in phases)) for fault, found in wire.items()]
    parts += ["Answered rightly / ended by a named error, by fault and phase:", _table(("fault", *phases), rows)]
    if single:
        rows = [(fault, sum(ends.values()), _ends(ends)) for fault, ends in single.items()]
        parts += ["Faults of processes and of what is asked:", _table(("fault", "n", "right / error"), rows)]
    ends = Counter(result["ends"])
    bad = ", ".join(f"{ends[end]} {end}" for end in ("wrong", "hang", "crash"))
    good = result["good"]
    parts.append(
        f"**{sum(ends.values()):,} faults: {ends['right']:,} right answers, {ends['error']:,} named errors, {bad}.** "
        f"The good client had {good['asked']:,} answers beside them, {good['wrong']} of them wrong; its median was "
        f"{good['median_ratio']:.2f}x and its 99th percentile {good['p99_ratio']:.2f}x of what they are beside as many "
        "edges without faults."
    )
    return "\n\n".join(parts)


def serving(result: dict[str, Any]) -> str:
    """Answers a second, together against one at a time, pair by pair."""
    rows = []
    for each in result["rows"]:
        ratios = [new / old for old, new in zip(each["old"], each["new"], strict=True)]
        rows.append(
            (
                each["clients"],
                each["tokens"],
                each["mode"],
                f"{statistics.median(each['old']):.1f}",
                f"{statistics.median(each['new']):.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                len(ratios),
            )
        )
    heads = "clients", "tokens", "mode", "alone, answers/s", "together, answers/s", "ratio (median)", "range", "pairs"
    return "\n\n".join([_origin(result), _table(heads, rows)])


MADE: dict[str, Callable[[dict[str, Any]], str]] = {"hostile": hostile, "faults": faults, "serving": serving}


def _origin(result: dict[str, Any]) -> str:
    return (
        f"`{result['command']}` at commit `{result['commit'][:12]}`, {result['cores']} shared cores "
        f"({result['machine']}), whose load was {result['load']:.1f}."
    )


def _ends(ends: dict[str, int]) -> str:
    return f"{ends.get('right', 0)} / {ends.get('error', 0)}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
