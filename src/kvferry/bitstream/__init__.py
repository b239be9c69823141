"""How kept tokens lie in bytes: a versioned, checked stream that decodes while it arrives."""

from kvferry.bitstream.header import Header
from kvferry.bitstream.reader import FrameSize, Reader, decompress_stream
from kvferry.bitstream.report import Report, inspect
from kvferry.bitstream.writer import Writer

__all__ = ["FrameSize", "Header", "Reader", "Report", "Writer", "decompress_stream", "inspect"]
