"""What a replica believes its gateway: who asks. Nobody else may ask a replica anything."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any

import grpc

from kvferry.errors import AccessError
from kvferry.security.access import Access
from kvferry.security.tokens import Caller

OWNER = "kvferry-owner-bin"


@dataclass(frozen=True)
class Pass:
    """Goes with every call from a gateway to its replicas.

    Parameters
    ----------
    secret : str
        Known to them alone; made anew whenever a gateway starts.
    owner : str
        Whose the question is.
    """

    secret: str
    owner: str

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """For gRPC."""
        return (("authorization", f"Bearer {self.secret}"), (OWNER, self.owner.encode()))


class GatewayOnly(Access):
    """Lets the gateway in, and believes what it says of who asks."""

    def __init__(self, secret: str) -> None:
        super().__init__(None)
        self._secret = secret

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        told = dict(context.invocation_metadata() or ())
        shown = str(told.get("authorization", ""))
        if not hmac.compare_digest(shown.encode(), f"Bearer {self._secret}".encode()):
            raise AccessError("this is a replica, which only its gateway may ask; ask the gateway")
        owner = told.get(OWNER, b"")
        return Caller(name=(owner if isinstance(owner, bytes) else owner.encode()).decode())
