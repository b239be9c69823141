"""What to send: operating points, policies that choose among them, and how agents share a link."""

from kvferry.policy.crossover import Crossover, crossover
from kvferry.policy.decide import Decision, decide, explain
from kvferry.policy.greedy import Greedy
from kvferry.policy.oracle import Oracle
from kvferry.policy.points import OperatingPoint, PointTable, read_points, write_points
from kvferry.policy.risk_aware import RiskAware
from kvferry.policy.situation import Context, Situation
from kvferry.policy.static import Static
from kvferry.policy.ways import ESTIMATORS, POLICIES, Policy, Way

__all__ = [
    "ESTIMATORS",
    "POLICIES",
    "Context",
    "Crossover",
    "Decision",
    "Greedy",
    "OperatingPoint",
    "Oracle",
    "PointTable",
    "Policy",
    "RiskAware",
    "Situation",
    "Static",
    "Way",
    "crossover",
    "decide",
    "explain",
    "read_points",
    "write_points",
]
