"""The cloud's end: a gRPC server that turns caches (or pictures) and questions into answers."""

from kvferry.cloud.limits import Limits
from kvferry.cloud.server import serve

__all__ = ["Limits", "serve"]
