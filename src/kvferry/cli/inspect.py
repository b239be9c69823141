"""``kvferry inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvferry.cli.console import print_json
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.bitstream import Report


def inspect(
    path: Annotated[Path, typer.Argument(help="A bitstream, as `kvferry ask --save` writes it.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what is in a bitstream and where its bytes went, frame by frame."""
    from kvferry.bitstream import inspect as read_report

    try:
        blob = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a file with a bitstream in it") from None
    report = read_report(blob)
    if json:
        print_json(report.as_dict())
        return
    console = Console(highlight=False)
    console.print(_summary(report))
    console.print(_frames(report))


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


def _frames(report: Report) -> Table:
    table = Table(title="where the bytes went", title_justify="left", show_footer=True)
    total = report.total_bytes
    columns = {
        "part": "all",
        "kept": "",
        "positions": f"{report.position_bytes:,}",
        "as": "",
        "payload": f"{report.payload_bytes:,}",
        "before zstd": "",
        "overhead": f"{report.overhead_bytes - report.position_bytes:,}",
        "bytes": f"{total:,}",
        "share": "100.0 %",
    }
    for name, footer in columns.items():
        table.add_column(name, footer, justify="left" if name in ("part", "as") else "right")
    _add(table, "header", report.header_bytes, total)
    for frame in report.frames:
        form = {"frame": "as before"}.get(frame.form, frame.form) + (" per head" if frame.rows > 1 else "")
        unpacked = f"{frame.unpacked_bytes:,}" if frame.unpacked_bytes != frame.payload_bytes else ""
        table.add_row(
            f"layer {frame.layer}",
            f"{min(frame.counts)} to {max(frame.counts)}" if frame.counts else str(frame.kept),
            f"{frame.position_bytes:,}",
            form,
            f"{frame.payload_bytes:,}",
            unpacked,
            f"{frame.overhead_bytes:,}",
            f"{frame.total:,}",
            f"{100 * frame.total / total:.1f} %",
        )
    _add(table, "trailer", report.trailer_bytes, total)
    return table


def _add(table: Table, name: str, size: int, total: int) -> None:
    table.add_row(name, "", "", "", "", "", f"{size:,}", f"{size:,}", f"{100 * size / total:.1f} %")
