"""One uplink, many edges: who may send how fast, worked out anew whenever somebody comes, goes or falls silent."""

from kvferry.coordinator.capacity import Capacity, bound_of
from kvferry.coordinator.roster import Member, Roster, Share
from kvferry.coordinator.service import coordinate

__all__ = ["Capacity", "Member", "Roster", "Share", "bound_of", "coordinate"]
