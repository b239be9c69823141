"""vLLM filled from kvferry's bitstreams and visual embeddings. Experimental; written against vLLM 0.33.

``KVFerryConnector`` is for ``--kv-transfer-config``, ``KVFerryECConnector`` for ``--ec-transfer-config``, both with
this package as the module path; see docs/vllm.md. They subclass vLLM's classes and are imported when they are asked
for; all else here needs no vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kvferry.errors import DependencyError
from kvferry.integrations.vllm.shelf import CacheShelf, EmbedsShelf

__all__ = ["VERSION", "CacheShelf", "EmbedsShelf", "KVFerryConnector", "KVFerryECConnector"]

VERSION = "0.33"
"""The minor version of vLLM whose classes the connectors were written against; vLLM calls both of them experimental."""
_HOMES = {"KVFerryConnector": "kv_connector", "KVFerryECConnector": "ec_connector"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_HOMES[name]}")
    except ImportError as error:
        if (error.name or "").split(".")[0] == "kvferry":
            raise
        raise DependencyError(
            f"{name} needs vLLM {VERSION}, which cannot be imported here ({error}); "
            "install it with: pip install 'kvferry[vllm]'"
        ) from error
    return getattr(module, name)
