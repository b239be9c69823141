"""Docstrings name other objects as Sphinx does; on the site such a name is a link where that object has an entry."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(~?)([\w.]+)`")


def _turned(match: re.Match[str]) -> str:
    short, path = match.groups()
    text = path.rpartition(".")[2] if short else path
    if not path.startswith("kvferry."):
        return f"`{text}`"
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'


class Roles(griffe.Extension):
    """Rewrites docstrings as they are loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Once per module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_turned, obj.docstring.value)
