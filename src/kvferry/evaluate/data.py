"""Rows of a data set: from a file or folder here, or from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvferry.data.files import ENDINGS, rows_of
from kvferry.errors import DependencyError, InputError
from kvferry.evaluate.tasks import Hub, Row, Task

IMAGE = "image"
"""The column that holds a picture, in all tasks that have one."""


def source_of(task: Task, data: Path | None, split: str = "") -> Iterable[Row]:
    """The rows of a task's data set, in order.

    Parameters
    ----------
    data : path, optional
        A file of JSON lines, a JSON array, CSV or parquet, or a folder of such, with the columns that the data set has
        on the Hub; a picture is a path relative to the file, or bytes in parquet. In a folder, files whose names begin
        with the split count, and all files where none does.
    split : str
        By default the task's own.

    Raises
    ------
    InputError
        No such file, a column is missing, or the Hub cannot be reached.
    DependencyError
        The Hub needs the package ``datasets``, a parquet file ``pyarrow``.
    """
    if task.hub is None:
        if data is not None:
            raise InputError(f"{task.name} draws its own questions; leave --data out")
        return ()
    rows = _from_hub(task, task.hub, split or task.hub.split) if data is None else _from_files(task, data, split)
    return _checked(task, rows)


def _checked(task: Task, rows: Iterable[Row]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        missing = [column for column in task.columns if column not in row]
        if missing:
            raise InputError(
                f"row {number} has no column {missing[0]!r}, only {', '.join(row)}; {task.name} reads "
                f"{', '.join(task.columns)}, as {task.hub.id if task.hub else 'it'} names them"
            )
        yield row


def _from_files(task: Task, data: Path, split: str) -> Iterator[Row]:
    wanted = split or (task.hub.split if task.hub else "")
    for file in _files(data, wanted):
        for _, row in rows_of(file, task.columns):
            yield {**row, IMAGE: str(file.parent / row[IMAGE])} if isinstance(row.get(IMAGE), str) else row


def _files(data: Path, split: str) -> list[Path]:
    if data.is_file():
        return [data]
    files = sorted(file for file in data.rglob("*") if file.suffix in ENDINGS) if data.is_dir() else []
    if not files:
        raise InputError(f"there is no file of {' or '.join(ENDINGS)} at {data}; check --data")
    return [file for file in files if file.name.startswith(split)] or files


def _from_hub(task: Task, hub: Hub, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DependencyError(
            f"{hub.id} is read by the package datasets; install it: pip install 'kvferry[eval]', or give --data PATH"
        ) from None
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(hub.id, hub.config, split=split, streaming=True)
        rows = rows.select_columns([c for c in task.columns if rows.features is None or c in rows.features])
        yield from rows.decode(False) if IMAGE in task.columns else rows
    except Exception as error:  # `datasets` lets errors of half a dozen libraries through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{hub.id} ({hub.config or 'default'}, {split}) cannot be read from the Hugging Face Hub ({reason}); check "
            f"the network and the split, or pass --data FILE with the columns {', '.join(task.columns)} as JSON lines "
            "or parquet"
        ) from None
