from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_KV: _ClassVar[Mode]
    MODE_IMAGE: _ClassVar[Mode]
    MODE_EMBEDS: _ClassVar[Mode]
    MODE_SCOUT: _ClassVar[Mode]
    MODE_PROMPT: _ClassVar[Mode]
    MODE_TRANSLATE: _ClassVar[Mode]

class ErrorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_KIND_UNSPECIFIED: _ClassVar[ErrorKind]
    ERROR_KIND_INTERNAL: _ClassVar[ErrorKind]
    ERROR_KIND_PROTOCOL: _ClassVar[ErrorKind]
    ERROR_KIND_BUSY: _ClassVar[ErrorKind]
    ERROR_KIND_DEADLINE: _ClassVar[ErrorKind]
    ERROR_KIND_INPUT: _ClassVar[ErrorKind]
    ERROR_KIND_RECIPE: _ClassVar[ErrorKind]
    ERROR_KIND_MODEL: _ClassVar[ErrorKind]
    ERROR_KIND_UNSUPPORTED_MODEL: _ClassVar[ErrorKind]
    ERROR_KIND_FINGERPRINT: _ClassVar[ErrorKind]
    ERROR_KIND_BITSTREAM: _ClassVar[ErrorKind]
    ERROR_KIND_TRUNCATED: _ClassVar[ErrorKind]
    ERROR_KIND_CORRUPT: _ClassVar[ErrorKind]
    ERROR_KIND_VERSION: _ClassVar[ErrorKind]
    ERROR_KIND_QUOTA: _ClassVar[ErrorKind]
    ERROR_KIND_ENDING: _ClassVar[ErrorKind]
    ERROR_KIND_LOST: _ClassVar[ErrorKind]
    ERROR_KIND_NOT_HELD: _ClassVar[ErrorKind]
MODE_UNSPECIFIED: Mode
MODE_KV: Mode
MODE_IMAGE: Mode
MODE_EMBEDS: Mode
MODE_SCOUT: Mode
MODE_PROMPT: Mode
MODE_TRANSLATE: Mode
ERROR_KIND_UNSPECIFIED: ErrorKind
ERROR_KIND_INTERNAL: ErrorKind
ERROR_KIND_PROTOCOL: ErrorKind
ERROR_KIND_BUSY: ErrorKind
ERROR_KIND_DEADLINE: ErrorKind
ERROR_KIND_INPUT: ErrorKind
ERROR_KIND_RECIPE: ErrorKind
ERROR_KIND_MODEL: ErrorKind
ERROR_KIND_UNSUPPORTED_MODEL: ErrorKind
ERROR_KIND_FINGERPRINT: ErrorKind
ERROR_KIND_BITSTREAM: ErrorKind
ERROR_KIND_TRUNCATED: ErrorKind
ERROR_KIND_CORRUPT: ErrorKind
ERROR_KIND_VERSION: ErrorKind
ERROR_KIND_QUOTA: ErrorKind
ERROR_KIND_ENDING: ErrorKind
ERROR_KIND_LOST: ErrorKind
ERROR_KIND_NOT_HELD: ErrorKind

class AskRequest(_message.Message):
    __slots__ = ("start", "chunk", "end", "resume", "beat", "checksum")
    class Item(_message.Message):
        __slots__ = ("digest", "size", "handle", "width", "height")
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        SIZE_FIELD_NUMBER: _ClassVar[int]
        HANDLE_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        HEIGHT_FIELD_NUMBER: _ClassVar[int]
        digest: bytes
        size: int
        handle: int
        width: int
        height: int
        def __init__(self, digest: _Optional[bytes] = ..., size: _Optional[int] = ..., handle: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...
    class Turn(_message.Message):
        __slots__ = ("answer", "question", "text")
        ANSWER_FIELD_NUMBER: _ClassVar[int]
        QUESTION_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        answer: _containers.RepeatedScalarFieldContainer[int]
        question: str
        text: str
        def __init__(self, answer: _Optional[_Iterable[int]] = ..., question: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
    class Conversation(_message.Message):
        __slots__ = ("digest", "handle", "turns", "part")
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        HANDLE_FIELD_NUMBER: _ClassVar[int]
        TURNS_FIELD_NUMBER: _ClassVar[int]
        PART_FIELD_NUMBER: _ClassVar[int]
        digest: bytes
        handle: int
        turns: _containers.RepeatedCompositeFieldContainer[AskRequest.Turn]
        part: bool
        def __init__(self, digest: _Optional[bytes] = ..., handle: _Optional[int] = ..., turns: _Optional[_Iterable[_Union[AskRequest.Turn, _Mapping]]] = ..., part: _Optional[bool] = ...) -> None: ...
    class Start(_message.Message):
        __slots__ = ("request_id", "mode", "max_new_tokens", "question", "fingerprint", "recipe", "items", "session", "hold", "answer_by", "conversation", "passage", "expected_bits_per_second", "prompts")
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        MODE_FIELD_NUMBER: _ClassVar[int]
        MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
        QUESTION_FIELD_NUMBER: _ClassVar[int]
        FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        RECIPE_FIELD_NUMBER: _ClassVar[int]
        ITEMS_FIELD_NUMBER: _ClassVar[int]
        SESSION_FIELD_NUMBER: _ClassVar[int]
        HOLD_FIELD_NUMBER: _ClassVar[int]
        ANSWER_BY_FIELD_NUMBER: _ClassVar[int]
        CONVERSATION_FIELD_NUMBER: _ClassVar[int]
        PASSAGE_FIELD_NUMBER: _ClassVar[int]
        EXPECTED_BITS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
        PROMPTS_FIELD_NUMBER: _ClassVar[int]
        request_id: str
        mode: Mode
        max_new_tokens: int
        question: str
        fingerprint: str
        recipe: str
        items: _containers.RepeatedCompositeFieldContainer[AskRequest.Item]
        session: bytes
        hold: bool
        answer_by: float
        conversation: AskRequest.Conversation
        passage: bytes
        expected_bits_per_second: float
        prompts: str
        def __init__(self, request_id: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., max_new_tokens: _Optional[int] = ..., question: _Optional[str] = ..., fingerprint: _Optional[str] = ..., recipe: _Optional[str] = ..., items: _Optional[_Iterable[_Union[AskRequest.Item, _Mapping]]] = ..., session: _Optional[bytes] = ..., hold: _Optional[bool] = ..., answer_by: _Optional[float] = ..., conversation: _Optional[_Union[AskRequest.Conversation, _Mapping]] = ..., passage: _Optional[bytes] = ..., expected_bits_per_second: _Optional[float] = ..., prompts: _Optional[str] = ...) -> None: ...
    class Chunk(_message.Message):
        __slots__ = ("data", "offset")
        DATA_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        data: bytes
        offset: int
        def __init__(self, data: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...
    class End(_message.Message):
        __slots__ = ("bytes",)
        BYTES_FIELD_NUMBER: _ClassVar[int]
        bytes: int
        def __init__(self, bytes: _Optional[int] = ...) -> None: ...
    class Resume(_message.Message):
        __slots__ = ("passage", "replies")
        PASSAGE_FIELD_NUMBER: _ClassVar[int]
        REPLIES_FIELD_NUMBER: _ClassVar[int]
        passage: bytes
        replies: int
        def __init__(self, passage: _Optional[bytes] = ..., replies: _Optional[int] = ...) -> None: ...
    class Beat(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    start: AskRequest.Start
    chunk: AskRequest.Chunk
    end: AskRequest.End
    resume: AskRequest.Resume
    beat: AskRequest.Beat
    checksum: int
    def __init__(self, start: _Optional[_Union[AskRequest.Start, _Mapping]] = ..., chunk: _Optional[_Union[AskRequest.Chunk, _Mapping]] = ..., end: _Optional[_Union[AskRequest.End, _Mapping]] = ..., resume: _Optional[_Union[AskRequest.Resume, _Mapping]] = ..., beat: _Optional[_Union[AskRequest.Beat, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class AskReply(_message.Message):
    __slots__ = ("accepted", "received", "token", "done", "error", "enough", "resumed", "beat", "checksum")
    class Accepted(_message.Message):
        __slots__ = ("fingerprint", "model", "turns", "beat_seconds")
        FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
        MODEL_FIELD_NUMBER: _ClassVar[int]
        TURNS_FIELD_NUMBER: _ClassVar[int]
        BEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
        fingerprint: str
        model: str
        turns: int
        beat_seconds: float
        def __init__(self, fingerprint: _Optional[str] = ..., model: _Optional[str] = ..., turns: _Optional[int] = ..., beat_seconds: _Optional[float] = ...) -> None: ...
    class Received(_message.Message):
        __slots__ = ("bytes",)
        BYTES_FIELD_NUMBER: _ClassVar[int]
        bytes: int
        def __init__(self, bytes: _Optional[int] = ...) -> None: ...
    class Token(_message.Message):
        __slots__ = ("id", "text")
        ID_FIELD_NUMBER: _ClassVar[int]
        TEXT_FIELD_NUMBER: _ClassVar[int]
        id: int
        text: str
        def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...
    class Holding(_message.Message):
        __slots__ = ("digest", "handle")
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        HANDLE_FIELD_NUMBER: _ClassVar[int]
        digest: bytes
        handle: int
        def __init__(self, digest: _Optional[bytes] = ..., handle: _Optional[int] = ...) -> None: ...
    class Enough(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Done(_message.Message):
        __slots__ = ("text", "tokens", "bytes_received", "timings", "session", "holdings", "share", "note")
        TEXT_FIELD_NUMBER: _ClassVar[int]
        TOKENS_FIELD_NUMBER: _ClassVar[int]
        BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
        TIMINGS_FIELD_NUMBER: _ClassVar[int]
        SESSION_FIELD_NUMBER: _ClassVar[int]
        HOLDINGS_FIELD_NUMBER: _ClassVar[int]
        SHARE_FIELD_NUMBER: _ClassVar[int]
        NOTE_FIELD_NUMBER: _ClassVar[int]
        text: str
        tokens: int
        bytes_received: int
        timings: AskReply.Timings
        session: bytes
        holdings: _containers.RepeatedCompositeFieldContainer[AskReply.Holding]
        share: float
        note: str
        def __init__(self, text: _Optional[str] = ..., tokens: _Optional[int] = ..., bytes_received: _Optional[int] = ..., timings: _Optional[_Union[AskReply.Timings, _Mapping]] = ..., session: _Optional[bytes] = ..., holdings: _Optional[_Iterable[_Union[AskReply.Holding, _Mapping]]] = ..., share: _Optional[float] = ..., note: _Optional[str] = ...) -> None: ...
    class Timings(_message.Message):
        __slots__ = ("decode", "queue", "prefill", "first_token", "total")
        DECODE_FIELD_NUMBER: _ClassVar[int]
        QUEUE_FIELD_NUMBER: _ClassVar[int]
        PREFILL_FIELD_NUMBER: _ClassVar[int]
        FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
        TOTAL_FIELD_NUMBER: _ClassVar[int]
        decode: float
        queue: float
        prefill: float
        first_token: float
        total: float
        def __init__(self, decode: _Optional[float] = ..., queue: _Optional[float] = ..., prefill: _Optional[float] = ..., first_token: _Optional[float] = ..., total: _Optional[float] = ...) -> None: ...
    class Error(_message.Message):
        __slots__ = ("kind", "message", "retry_seconds")
        KIND_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        RETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
        kind: ErrorKind
        message: str
        retry_seconds: float
        def __init__(self, kind: _Optional[_Union[ErrorKind, str]] = ..., message: _Optional[str] = ..., retry_seconds: _Optional[float] = ...) -> None: ...
    class Resumed(_message.Message):
        __slots__ = ("bytes", "complete")
        BYTES_FIELD_NUMBER: _ClassVar[int]
        COMPLETE_FIELD_NUMBER: _ClassVar[int]
        bytes: int
        complete: bool
        def __init__(self, bytes: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...
    class Beat(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ENOUGH_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    accepted: AskReply.Accepted
    received: AskReply.Received
    token: AskReply.Token
    done: AskReply.Done
    error: AskReply.Error
    enough: AskReply.Enough
    resumed: AskReply.Resumed
    beat: AskReply.Beat
    checksum: int
    def __init__(self, accepted: _Optional[_Union[AskReply.Accepted, _Mapping]] = ..., received: _Optional[_Union[AskReply.Received, _Mapping]] = ..., token: _Optional[_Union[AskReply.Token, _Mapping]] = ..., done: _Optional[_Union[AskReply.Done, _Mapping]] = ..., error: _Optional[_Union[AskReply.Error, _Mapping]] = ..., enough: _Optional[_Union[AskReply.Enough, _Mapping]] = ..., resumed: _Optional[_Union[AskReply.Resumed, _Mapping]] = ..., beat: _Optional[_Union[AskReply.Beat, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("filler",)
    FILLER_FIELD_NUMBER: _ClassVar[int]
    filler: bytes
    def __init__(self, filler: _Optional[bytes] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("kvferry_version", "model", "fingerprint", "has_vision", "modes", "max_request_bytes", "max_request_seconds", "unix_seconds", "queue_seconds")
    KVFERRY_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HAS_VISION_FIELD_NUMBER: _ClassVar[int]
    MODES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    kvferry_version: str
    model: str
    fingerprint: str
    has_vision: bool
    modes: _containers.RepeatedScalarFieldContainer[Mode]
    max_request_bytes: int
    max_request_seconds: float
    unix_seconds: float
    queue_seconds: float
    def __init__(self, kvferry_version: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., has_vision: _Optional[bool] = ..., modes: _Optional[_Iterable[_Union[Mode, str]]] = ..., max_request_bytes: _Optional[int] = ..., max_request_seconds: _Optional[float] = ..., unix_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ...) -> None: ...

class AbandonRequest(_message.Message):
    __slots__ = ("passage",)
    PASSAGE_FIELD_NUMBER: _ClassVar[int]
    passage: bytes
    def __init__(self, passage: _Optional[bytes] = ...) -> None: ...

class AbandonReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
