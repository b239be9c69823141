"""The edge's end: asks a cloud a question about pictures, over a link that may be slow."""

from kvferry.edge.answer import Answer, CloudSeconds, Seconds
from kvferry.edge.call import OnSent
from kvferry.edge.client import Edge
from kvferry.edge.conversation import Conversation
from kvferry.edge.stream import AsyncEdge, Cancel, Stream
from kvferry.modes import DEFAULT_RECIPE

__all__ = [
    "DEFAULT_RECIPE", "Answer", "AsyncEdge", "Cancel", "CloudSeconds", "Conversation", "Edge", "OnSent", "Seconds",
    "Stream",
]  # fmt: skip
