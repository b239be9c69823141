"""SmolLM2 is unpacked once on a machine, not once a run."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _home() -> None:
    """The user's own folder, other than in the rest of the tests."""
