"""``kvferry inspect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvferry.cli.console import print_json
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.bitstream import FrameSize, Report, Share


def inspect(
    path: Annotated[Path, typer.Argument(help="A bitstream, as `kvferry ask --save` writes it.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode keys and values too, so that what no reader could is refused.")
    ] = False,
) -> None:
    """Show what is in a bitstream and where its bytes went: header, frames, layers and tiers."""
    from kvferry.bitstream import inspect as read_report

    try:
        blob = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a file with a bitstream in it") from None
    report = read_report(blob, decode=decode)
    if json:
        print_json(report.as_dict())
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(_summary(report))
    console.print(_header(report))
    console.print(_frames(report))
    if report.tiers > 1:
        console.print(_shares("by tier", "tier", report.by_tier, report.total_bytes))
        console.print(_shares("by layer", "layer", report.by_layer, report.total_bytes))


def _summary(report: Report) -> Table:
    pictures = ", ".join(f"{frames} x {rows} x {columns}" for frames, rows, columns in report.grids)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in {
        "recipe": report.recipe,
        "model": f"{report.model_name or 'unnamed'}, {report.fingerprint or 'no fingerprint'}",
        "prompt": f"{report.tokens} tokens, {report.visual_tokens} of them visual, {report.length} in the cache",
        "kept": str(report.kept),
        "pictures": pictures or "none on a grid",
        "layers": f"{report.layers}, made in {report.dtype}",
        "size": f"{report.total_bytes:,} bytes, {report.ratio:.1f}x smaller than {report.full_bf16_bytes:,} in BF16",
    }.items():
        table.add_row(name, value)
    return table


def _header(report: Report) -> Table:
    table = Table("field", "bytes", title="the header", title_justify="left")
    table.columns[1].justify = "right"
    for name, size in report.header.items():
        table.add_row(name, f"{size:,}")
    return table


def _frames(report: Report) -> Table:
    total = report.total_bytes
    table = _table(
        "where the bytes went",
        {
            "part": "all",
            "kept": "",
            "visual": "",
            "positions": f"{report.position_bytes:,}",
            "as": "",
            "payload": f"{report.payload_bytes:,}",
            "before zstd": "",
            "overhead": f"{report.overhead_bytes - report.position_bytes:,}",
            "bytes": f"{total:,}",
            "share": "100.0 %",
        },
    )
    _add(table, "header", report.header_bytes, total)
    for frame in report.frames:
        form = {"frame": "as before"}.get(frame.form, frame.form) + (" per head" if frame.rows > 1 else "")
        table.add_row(
            f"layer {frame.layer}" + (f", tier {frame.tier}" if report.tiers > 1 else ""),
            f"{min(frame.counts)} to {max(frame.counts)}" if frame.counts else str(frame.kept),
            f"{100 * frame.visual / max(frame.entries, 1):.0f} %",
            f"{frame.position_bytes:,}",
            form,
            *_sizes(frame, total),
        )
    _add(table, "trailer", report.trailer_bytes, total)
    return table


def _shares(title: str, what: str, shares: dict[int, Share], total: int) -> Table:
    names = (what, "frames", "entries", "visual", "positions", "payload", "before zstd", "overhead", "bytes", "share")
    table = _table(title, dict.fromkeys(names, ""))
    table.show_footer = False
    for number, share in shares.items():
        visual = f"{100 * share.visual / max(share.entries, 1):.0f} %"
        table.add_row(
            str(number),
            str(share.frames),
            f"{share.entries:,}",
            visual,
            f"{share.position_bytes:,}",
            *_sizes(share, total),
        )
    return table


def _table(title: str, columns: dict[str, str]) -> Table:
    """A table of these columns, each with its footer."""
    table = Table(title=title, title_justify="left", show_footer=True)
    for name, footer in columns.items():
        table.add_column(name, footer, justify="left" if name in ("part", "as") else "right")
    return table


def _sizes(part: FrameSize | Share, total: int) -> tuple[str, str, str, str, str]:
    unpacked = f"{part.unpacked_bytes:,}" if part.unpacked_bytes != part.payload_bytes else ""
    share = f"{100 * part.total / total:.1f} %"
    return f"{part.payload_bytes:,}", unpacked, f"{part.overhead_bytes:,}", f"{part.total:,}", share


def _add(table: Table, name: str, size: int, total: int) -> None:
    table.add_row(name, "", "", "", "", "", "", f"{size:,}", f"{size:,}", f"{100 * size / total:.1f} %")
