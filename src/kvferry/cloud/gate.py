"""The way in: who asks, and whether it may, before anything is done for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from kvferry.cloud.monitor import DENIED, Record
from kvferry.cloud.service import FerryService
from kvferry.modes import mode_name
from kvferry.security.access import CALLER, Access
from kvferry.wire import service_pb2 as pb
from kvferry.wire import service_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[pb.AskRequest, pb.AskReply]


class Gate(service_pb2_grpc.FerryServicer):  # type: ignore[misc]
    """Stands before the service."""

    def __init__(self, service: FerryService, access: Access) -> None:
        self._service = service
        self._access = access

    async def Describe(  # noqa: N802
        self, request: pb.DescribeRequest, context: Context
    ) -> pb.DescribeReply:
        await self._access.admit(context, "describe")
        return await self._service.Describe(request, context)

    async def Ask(  # noqa: N802
        self, requests: AsyncIterator[pb.AskRequest], context: Context
    ) -> None:
        """One question, if its caller may ask in its mode."""
        with self._service.monitor.request(context.time_remaining, context.invocation_metadata()) as record:
            try:
                await self._ask(requests, context, record)
            except grpc.aio.AbortError:
                record.ended(DENIED)
                raise

    async def _ask(self, requests: AsyncIterator[pb.AskRequest], context: Context, record: Record) -> None:
        caller = await self._access.admit(context)
        messages = aiter(requests)
        first = await anext(messages, None)
        if first is not None and first.HasField("start") and first.start.mode in pb.Mode.values():
            await self._access.check(context, caller, f"ask:{mode_name(first.start.mode)}")
        CALLER.set(caller)
        await self._service.answer(_from(first, messages), context, record)


async def _from(first: pb.AskRequest | None, others: AsyncIterator[pb.AskRequest]) -> AsyncIterator[pb.AskRequest]:
    if first is not None:
        yield first
        async for message in others:
            yield message
