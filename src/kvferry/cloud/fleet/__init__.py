"""Several replicas of a model behind one address: a gateway that edges speak to, and replicas that Ray places and
restarts. What edges send goes from gateway to replica over gRPC; Ray carries none of it."""

from kvferry.cloud.fleet.relay import Relay
from kvferry.cloud.fleet.replicas import Replicas

__all__ = ["Relay", "Replicas"]
