"""Ways of sharing one uplink among agents. They take plain records, so that a coordinator can call them any time."""

from kvferry.policy.allocation.base import Agent, Allocator, Grant, Options
from kvferry.policy.allocation.equal import Equal
from kvferry.policy.allocation.grants import allocate, reserve
from kvferry.policy.allocation.marginal import Marginal
from kvferry.policy.allocation.max_min import MaxMin
from kvferry.policy.allocation.model_aware import ModelAware
from kvferry.policy.allocation.quality import Quality

ALLOCATORS: dict[str, Allocator] = {
    "equal": Equal(),
    "model_aware": ModelAware(),
    "max_min": MaxMin(),
    "quality": Quality(),
    "marginal": Marginal(),
}

__all__ = [
    "ALLOCATORS",
    "Agent",
    "Allocator",
    "Equal",
    "Grant",
    "Marginal",
    "MaxMin",
    "ModelAware",
    "Options",
    "Quality",
    "allocate",
    "reserve",
]
