"""A good client: ``python -m benchmarks.faults.good ADDRESS PICTURE TEXT`` asks again and again until it is ended.

One line a question: when it was answered (monotonic clock), how long it took, and whether the answer was ``TEXT``.
"""

from __future__ import annotations

import sys
import time

from benchmarks.faults.matrix import QUESTION, TOKENS
from kvferry import Edge

PAUSE_SECONDS = 0.02


def main() -> None:
    address, picture, text = sys.argv[1:]
    with Edge(None, address, deadline=60.0) as edge:
        while True:
            began = time.monotonic()
            answer = edge.ask([picture], QUESTION, mode="image", max_new_tokens=TOKENS)
            ended = time.monotonic()
            print(ended, ended - began, int(answer.text == text), flush=True)
            time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
