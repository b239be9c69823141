"""``python -m tests.crossing.stuck MODEL SECONDS``: a cloud with two modes that do not come back: ``feeding`` in a
decoder's thread, ``answering`` in the model's. Its clock is so many seconds off."""

from __future__ import annotations

import sys
import time
from typing import Any, ClassVar

from kvferry.cloud import Limits, serve
from kvferry.models import load
from kvferry.modes import MODES
from kvferry.modes.prompt import PromptMode, PromptReceiver

FOREVER = 600.0
FEEDING, ANSWERING = 1001, 1002


class StuckFeeding(PromptReceiver):
    def feed(self, data: bytes) -> None:
        time.sleep(FOREVER)


class StuckAnswering(PromptReceiver):
    def grounding(self, pace: Any) -> Any:
        time.sleep(float(self._question.split()[0]))
        return super().grounding(pace)


class Feeding(PromptMode):
    NAME: ClassVar[str] = "feeding"
    WIRE: ClassVar[int] = FEEDING
    receiver = StuckFeeding


class Answering(PromptMode):
    NAME: ClassVar[str] = "answering"
    WIRE: ClassVar[int] = ANSWERING
    receiver = StuckAnswering


if __name__ == "__main__":
    real, skew = time.time, float(sys.argv[2])
    time.time = lambda: real() + skew
    MODES["feeding"], MODES["answering"] = Feeding, Answering
    limits = Limits(stuck_seconds=1.0)
    serve(load(sys.argv[1]), "127.0.0.1:0", limits=limits, on_ready=lambda address: print(address, flush=True))
