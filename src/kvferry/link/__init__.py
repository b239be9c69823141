"""What the wire is like: rates, shapers and a relay that slows a real connection down to them."""

from kvferry.link.address import parse_address
from kvferry.link.rate import Rate
from kvferry.link.relay import ShapedLink
from kvferry.link.shaper import Shaper, TokenBucket, Unlimited

__all__ = ["Rate", "ShapedLink", "Shaper", "TokenBucket", "Unlimited", "parse_address"]
