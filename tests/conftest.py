"""For all tests: property tests are not timed, as machines are shared and noisy; the user's folder is not touched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("kvferry", deadline=None)
settings.load_profile("kvferry")


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFERRY_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _own_environment(_home: None) -> Iterator[None]:
    """What a command sets for its child processes (``--import``) is gone after the test that ran it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("KVFERRY_")}
    yield
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """What a command sets for its own process (``--threads``) is undone: sums in another order round otherwise."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    yield
    torch = sys.modules.get("torch")
    if torch and before and torch.get_num_threads() != before:
        torch.set_num_threads(before)
