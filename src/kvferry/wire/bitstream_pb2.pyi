from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BFLOAT16: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
BFLOAT16: DType
FLOAT16: DType
FLOAT32: DType

class Header(_message.Message):
    __slots__ = ("digest", "fingerprint_text", "model_name", "recipe", "pending", "layout", "layers", "tiers", "entries")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_TEXT_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    fingerprint_text: str
    model_name: str
    recipe: str
    pending: int
    layout: Layout
    layers: _containers.RepeatedCompositeFieldContainer[LayerShape]
    tiers: int
    entries: int
    def __init__(self, digest: _Optional[bytes] = ..., fingerprint_text: _Optional[str] = ..., model_name: _Optional[str] = ..., recipe: _Optional[str] = ..., pending: _Optional[int] = ..., layout: _Optional[_Union[Layout, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerShape, _Mapping]]] = ..., tiers: _Optional[int] = ..., entries: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("token_ids", "segments", "grids", "axes", "positions", "rope_delta")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    GRIDS_FIELD_NUMBER: _ClassVar[int]
    AXES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ROPE_DELTA_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    segments: _containers.RepeatedScalarFieldContainer[int]
    grids: _containers.RepeatedScalarFieldContainer[int]
    axes: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    rope_delta: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., segments: _Optional[_Iterable[int]] = ..., grids: _Optional[_Iterable[int]] = ..., axes: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., rope_delta: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("layer", "last", "shared", "bitmap", "sparse", "runs", "coded", "frame", "stored", "payload")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    BITMAP_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CODED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    layer: int
    last: bool
    shared: bool
    bitmap: bytes
    sparse: bytes
    runs: bytes
    coded: bytes
    frame: int
    stored: bool
    payload: bytes
    def __init__(self, layer: _Optional[int] = ..., last: _Optional[bool] = ..., shared: _Optional[bool] = ..., bitmap: _Optional[bytes] = ..., sparse: _Optional[bytes] = ..., runs: _Optional[bytes] = ..., coded: _Optional[bytes] = ..., frame: _Optional[int] = ..., stored: _Optional[bool] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Trailer(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
