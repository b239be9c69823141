"""Fixtures for everything that crosses: one model folder, one server, one picture per test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvferry
from kvferry import VLM, Edge
from tests.crossing.process import CloudProcess, write_model, write_picture


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "cloud")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Same shape, other weights."""
    return write_model(tmp_path_factory.mktemp("model") / "other", seed=1)


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture(tmp_path_factory.mktemp("picture") / "scene.png")


@pytest.fixture(scope="session")
def cloud(model_folder: Path) -> Iterator[CloudProcess]:
    """The server that must outlive every test. It starts while this process loads its own model."""
    with CloudProcess(model_folder) as process:
        yield process
        assert process.ready
        assert process.stop() == 0


@pytest.fixture(scope="session")
def vlm(model_folder: Path) -> VLM:
    return kvferry.load(str(model_folder))


@pytest.fixture
def edge(cloud: CloudProcess, vlm: VLM) -> Iterator[Edge]:
    with Edge(vlm, cloud.address, deadline=100) as edge:
        yield edge
