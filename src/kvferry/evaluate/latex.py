"""Tables of results in LaTeX, with the package ``booktabs``."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.evaluate.report.front import Row, Sheet

_SIGNS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}",
    ">": r"\textgreater{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}",
}  # fmt: skip
NEW_LINE = r"\\"


def escape(text: str) -> str:
    """A text as LaTeX prints it; line feeds become spaces."""
    plain = "".join(_SIGNS.get(sign, sign) for sign in text)
    return " ".join(plain.replace("--", "-{}-").split())  # two hyphens would be a dash


def latex_tables(found: Sequence[Sheet]) -> str:
    """One ``table`` for each protocol, the ceiling first and the floor last."""
    needs = r"% \usepackage[T1]{fontenc} \usepackage{booktabs} \usepackage{textcomp}"
    return "\n\n".join([needs, *map(_table, found)]) + "\n"


def _table(sheet: Sheet) -> str:
    ends = {"ceiling": 0, "floor": 2}
    rows = sorted(sheet.rows, key=lambda row: ends.get(row.role, 1))
    origin = sheet.origin
    made = f" Made by {origin['command']}" if origin.get("command") else ""
    commit = f" at commit {origin['commit'][:12]}" if made and origin.get("commit") else ""
    caption = (
        f"Protocol {sheet.protocol} ({sheet.meaning}). {sheet.model}; n = {sheet.n} questions ({sheet.asked}), the "
        f"same for every row; 95 % intervals; bytes are means of whole bitstreams.{made}{commit}."
    )
    share = all(row.of_full is not None for row in rows)
    heads = ["row", f"{sheet.score} [95 %]", *(["% of full"] if share else []), "bytes", "smaller than BF16"]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        f"{' & '.join(map(escape, heads))} {NEW_LINE}",
        r"\midrule",
        *(f"{' & '.join(_cells(row, share))} {NEW_LINE}" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _cells(row: Row, share: bool) -> list[str]:
    name = f"{row.name} ({row.role})" if row.role else row.name
    return [
        escape(name),
        f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]",
        *([f"{100 * (row.of_full or 0):.1f}"] if share else []),
        f"{row.bytes:,.0f}",
        "" if row.smaller is None else rf"{row.smaller:.1f}$\times$",
    ]
