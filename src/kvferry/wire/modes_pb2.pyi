from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class PositionSet(_message.Message):
    __slots__ = ("base", "bitmap", "runs", "coded")
    BASE_FIELD_NUMBER: _ClassVar[int]
    BITMAP_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    base: int
    bitmap: bytes
    runs: bytes
    coded: bytes
    def __init__(self, base: _Optional[int] = ..., bitmap: _Optional[bytes] = ..., runs: _Optional[bytes] = ..., coded: _Optional[bytes] = ...) -> None: ...

class Embeddings(_message.Message):
    __slots__ = ("grid", "payload", "zstd")
    GRID_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ZSTD_FIELD_NUMBER: _ClassVar[int]
    grid: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    zstd: bool
    def __init__(self, grid: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ..., zstd: _Optional[bool] = ...) -> None: ...
