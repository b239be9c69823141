"""What crosses the wire. Each mode is one file with the edge's half and the cloud's half of it."""

from kvferry.modes.base import CHUNK_BYTES, OnToken, Receiver, Sender
from kvferry.modes.faults import BusyError, ProtocolError
from kvferry.modes.image import ImageReceiver, ImageSender
from kvferry.modes.kv import KVReceiver, KVSender
from kvferry.wire import service_pb2 as pb

RECEIVERS: dict[pb.Mode, type[KVReceiver] | type[ImageReceiver]] = {
    pb.MODE_KV: KVReceiver,
    pb.MODE_IMAGE: ImageReceiver,
}

__all__ = [
    "CHUNK_BYTES",
    "RECEIVERS",
    "BusyError",
    "ImageReceiver",
    "ImageSender",
    "KVReceiver",
    "KVSender",
    "OnToken",
    "ProtocolError",
    "Receiver",
    "Sender",
]
