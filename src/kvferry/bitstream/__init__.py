"""How kept tokens lie in bytes: a versioned, checked stream that decodes while it arrives."""

from kvferry.bitstream.frame_size import FrameSize
from kvferry.bitstream.header import MAX_TIERS, Header
from kvferry.bitstream.reader import Partial, Reader
from kvferry.bitstream.report import Report, Share, inspect
from kvferry.bitstream.whole import decompress_layers, decompress_stream
from kvferry.bitstream.writer import Writer

__all__ = [
    "MAX_TIERS",
    "FrameSize",
    "Header",
    "Partial",
    "Reader",
    "Report",
    "Share",
    "Writer",
    "decompress_layers",
    "decompress_stream",
    "inspect",
]
