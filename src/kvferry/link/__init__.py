"""What the wire is like: rates, traces, shapers, a relay that slows connections down, and forecasts."""

from kvferry.link.address import parse_address
from kvferry.link.channels import GilbertElliott, Markov
from kvferry.link.estimate import Estimator, Ewma, Forecast, HarmonicMean, Quantile, forecast
from kvferry.link.rate import Rate
from kvferry.link.relay import ShapedLink
from kvferry.link.shaper import Replay, Shaper, TokenBucket, Unlimited
from kvferry.link.trace import PacketTrace, RateTrace, Trace, read_trace, shipped_traces, write_trace

__all__ = [
    "Estimator",
    "Ewma",
    "Forecast",
    "GilbertElliott",
    "HarmonicMean",
    "Markov",
    "PacketTrace",
    "Quantile",
    "Rate",
    "RateTrace",
    "Replay",
    "ShapedLink",
    "Shaper",
    "TokenBucket",
    "Trace",
    "Unlimited",
    "forecast",
    "parse_address",
    "read_trace",
    "shipped_traces",
    "write_trace",
]
