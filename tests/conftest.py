# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from repvgg_cuda import ceilings


@pytest.fixture(autouse=True)
def no_tuning_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what was measured before, or leaves something with the user."""
    monkeypatch.setenv("REPVGG_CUDA_TUNING_CACHE", "")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device a test should run on."""
    return str(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds."""
    known = ceilings.Ceilings({"float32": 100.0}, "a guess", ((1e6, 10.0),))
    monkeypatch.setattr(ceilings, "measure", lambda device: known)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("REPVGG_CUDA_DRY_RUN"):  # tests/test_cuda.py then has stand-ins
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
