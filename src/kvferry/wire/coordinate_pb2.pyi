from kvferry.wire import service_pb2 as _service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentMessage(_message.Message):
    __slots__ = ("join", "report")
    class Join(_message.Message):
        __slots__ = ("name", "points", "deadline")
        NAME_FIELD_NUMBER: _ClassVar[int]
        POINTS_FIELD_NUMBER: _ClassVar[int]
        DEADLINE_FIELD_NUMBER: _ClassVar[int]
        name: str
        points: _containers.RepeatedCompositeFieldContainer[AgentMessage.Point]
        deadline: float
        def __init__(self, name: _Optional[str] = ..., points: _Optional[_Iterable[_Union[AgentMessage.Point, _Mapping]]] = ..., deadline: _Optional[float] = ...) -> None: ...
    class Point(_message.Message):
        __slots__ = ("mode", "quality", "bytes", "seconds")
        MODE_FIELD_NUMBER: _ClassVar[int]
        QUALITY_FIELD_NUMBER: _ClassVar[int]
        BYTES_FIELD_NUMBER: _ClassVar[int]
        SECONDS_FIELD_NUMBER: _ClassVar[int]
        mode: str
        quality: float
        bytes: int
        seconds: float
        def __init__(self, mode: _Optional[str] = ..., quality: _Optional[float] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...
    class Report(_message.Message):
        __slots__ = ("bytes", "seconds", "slow", "asking")
        BYTES_FIELD_NUMBER: _ClassVar[int]
        SECONDS_FIELD_NUMBER: _ClassVar[int]
        SLOW_FIELD_NUMBER: _ClassVar[int]
        ASKING_FIELD_NUMBER: _ClassVar[int]
        bytes: int
        seconds: float
        slow: bool
        asking: bool
        def __init__(self, bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., slow: _Optional[bool] = ..., asking: _Optional[bool] = ...) -> None: ...
    JOIN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    join: AgentMessage.Join
    report: AgentMessage.Report
    def __init__(self, join: _Optional[_Union[AgentMessage.Join, _Mapping]] = ..., report: _Optional[_Union[AgentMessage.Report, _Mapping]] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("share", "error")
    class Share(_message.Message):
        __slots__ = ("version", "bits_per_second", "mode", "lease_seconds", "members", "resting")
        VERSION_FIELD_NUMBER: _ClassVar[int]
        BITS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
        MODE_FIELD_NUMBER: _ClassVar[int]
        LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
        MEMBERS_FIELD_NUMBER: _ClassVar[int]
        RESTING_FIELD_NUMBER: _ClassVar[int]
        version: int
        bits_per_second: float
        mode: str
        lease_seconds: float
        members: int
        resting: bool
        def __init__(self, version: _Optional[int] = ..., bits_per_second: _Optional[float] = ..., mode: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., members: _Optional[int] = ..., resting: _Optional[bool] = ...) -> None: ...
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    share: CoordinatorMessage.Share
    error: _service_pb2.AskReply.Error
    def __init__(self, share: _Optional[_Union[CoordinatorMessage.Share, _Mapping]] = ..., error: _Optional[_Union[_service_pb2.AskReply.Error, _Mapping]] = ...) -> None: ...
