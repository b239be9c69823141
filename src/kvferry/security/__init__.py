"""Who speaks to whom: certificates and TLS, bearer tokens, and what each of them may ask."""

from kvferry.security.tls import Credentials, ServerKeys, is_loopback
from kvferry.security.tokens import ANYBODY, Caller, Tokens

__all__ = ["ANYBODY", "Caller", "Credentials", "ServerKeys", "Tokens", "is_loopback"]
