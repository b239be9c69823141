"""How a running kvferry tells what it does: log lines and traces. It never tells what anybody asks or is answered."""

from kvferry.telemetry.logs import FORMATS, JsonLines, printable_id, set_up_logs

__all__ = ["FORMATS", "JsonLines", "printable_id", "set_up_logs"]
