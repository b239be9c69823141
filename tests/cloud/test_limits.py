"""Limits as a command line gives them, and the page that lists them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from kvferry import InputError
from kvferry.cloud import Limits

OPTIONS = {"request_bytes": "max-bytes", "request_seconds": "max-seconds", "waiting": "max-waiting",
           "together": "together", "held_bytes": "max-held-bytes", "session_bytes": "max-session-bytes",
           "session_seconds": "session-seconds"}  # fmt: skip


def test_by_name() -> None:
    changed = Limits().but(["calls=200", "stuck-seconds=2.5", "memory_bytes=1_000_000"])
    assert asdict(changed) == asdict(Limits()) | {"calls": 200, "stuck_seconds": 2.5, "memory_bytes": 1_000_000}
    assert Limits().but([]) == Limits()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("cals=3", "did you mean calls"),
        ("nothing", "NAME=VALUE"),
        ("calls=2.5", "whole number above 0"),
        ("calls=0", "above 0"),
        ("idle_seconds=soon", "number of seconds above 0"),
        ("idle_seconds=inf", "above 0"),
        ("idle_seconds=nan", "above 0"),
    ],
)
def test_what_is_no_limit(given: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Limits().but([given])


def test_the_page_lists_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    for name, value in asdict(Limits()).items():
        shown = "4 GiB" if name == "memory_bytes" else f"{value:,g}"
        row = f"| `--{OPTIONS[name]}` |" if name in OPTIONS else f"| `{name}` | {shown} |"
        assert row in page, name
