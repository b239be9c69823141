from __future__ import annotations

import pytest

import kvferry
from kvferry import VLM
from kvferry.studio.bench import Bench
from kvferry.studio.examples import examples


@pytest.fixture(scope="session")
def model() -> VLM:
    return kvferry.load("testbed/cloud")


@pytest.fixture(scope="session")
def bench(model: VLM) -> Bench:
    return Bench(model, examples()[0].pictures, examples()[0].question)
