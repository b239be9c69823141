"""Log lines, for people or one JSON object each for machines."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

FORMATS = ("text", "json")
ACCESS = "kvferry.access"
"""The logger of one line for every request."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One object a line: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, what was given as ``extra``, and
    ``traceback`` where there is one. Nothing that a message holds can begin a new line."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _extra(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """A sentence a line, and what was given as ``extra`` behind it as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        extra = [f"{key}={value}" for key, value in _extra(record).items()]
        text = super().format(record)
        first, newline, rest = text.partition("\n")
        return " ".join([first, *extra]) + newline + rest


def set_up_logs(form: str = "text", verbose: bool = False, stream: TextIO | None = None) -> None:
    """Send this process's log to ``stream`` (stderr): warnings and faults always, the rest where it is ``verbose``.

    Parameters
    ----------
    form : str
        One of :data:`FORMATS`. With ``json`` requests have their access lines even where it is not ``verbose``.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines("%(asctime)s %(message)s"))
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger(ACCESS).setLevel(logging.INFO if verbose or form == "json" else logging.WARNING)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as ``extra``; what others (Ray) add to every record begins with an underscore."""
    return {key: value for key, value in record.__dict__.items() if key not in _OWN and not key.startswith("_")}


def printable_id(text: str) -> str:
    """A request's id as logs have it: what an edge chose is only repeated where it can be nothing but an id."""
    return text if _ID.fullmatch(text) else "unnamed" if not text else "unprintable"
