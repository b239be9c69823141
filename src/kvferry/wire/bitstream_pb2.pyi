from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
DTYPE_UNSPECIFIED: DType
BFLOAT16: DType
FLOAT16: DType
FLOAT32: DType

class Header(_message.Message):
    __slots__ = ("digest", "fingerprint_text", "model_name", "recipe", "length", "layout", "layers")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    fingerprint_text: str
    model_name: str
    recipe: str
    length: int
    layout: Layout
    layers: _containers.RepeatedCompositeFieldContainer[LayerShape]
    def __init__(self, digest: _Optional[bytes] = ..., fingerprint_text: _Optional[str] = ..., model_name: _Optional[str] = ..., recipe: _Optional[str] = ..., length: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerShape, _Mapping]]] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("token_ids", "segments", "grids", "rope_delta", "axes", "positions")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    GRIDS_FIELD_NUMBER: _ClassVar[int]
    ROPE_DELTA_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    grids: _containers.RepeatedCompositeFieldContainer[Grid]
    rope_delta: int
    axes: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., grids: _Optional[_Iterable[_Union[Grid, _Mapping]]] = ..., rope_delta: _Optional[int] = ..., axes: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("count", "kind", "fill")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FILL_FIELD_NUMBER: _ClassVar[int]
    count: int
    kind: int
    fill: int
    def __init__(self, count: _Optional[int] = ..., kind: _Optional[int] = ..., fill: _Optional[int] = ...) -> None: ...

class Grid(_message.Message):
    __slots__ = ("frames", "rows", "columns")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    frames: int
    rows: int
    columns: int
    def __init__(self, frames: _Optional[int] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ...) -> None: ...

class LayerShape(_message.Message):
    __slots__ = ("repeat", "kv_heads", "key_dim", "value_dim", "dtype")
    REPEAT_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    VALUE_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    repeat: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: DType
    def __init__(self, repeat: _Optional[int] = ..., kv_heads: _Optional[int] = ..., key_dim: _Optional[int] = ..., value_dim: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("layer", "more", "positions", "payload", "zstd")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    ZSTD_FIELD_NUMBER: _ClassVar[int]
    layer: int
    more: bool
    positions: Positions
    payload: bytes
    zstd: bool
    def __init__(self, layer: _Optional[int] = ..., more: _Optional[bool] = ..., positions: _Optional[_Union[Positions, _Mapping]] = ..., payload: _Optional[bytes] = ..., zstd: _Optional[bool] = ...) -> None: ...

class Positions(_message.Message):
    __slots__ = ("kept", "rows", "bitmap", "gaps", "runs", "frame", "ragged")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BITMAP_FIELD_NUMBER: _ClassVar[int]
    GAPS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RAGGED_FIELD_NUMBER: _ClassVar[int]
    kept: int
    rows: int
    bitmap: bytes
    gaps: bytes
    runs: bytes
    frame: int
    ragged: bool
    def __init__(self, kept: _Optional[int] = ..., rows: _Optional[int] = ..., bitmap: _Optional[bytes] = ..., gaps: _Optional[bytes] = ..., runs: _Optional[bytes] = ..., frame: _Optional[int] = ..., ragged: _Optional[bool] = ...) -> None: ...

class Trailer(_message.Message):
    __slots__ = ("frames", "digest")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    frames: int
    digest: int
    def __init__(self, frames: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...
