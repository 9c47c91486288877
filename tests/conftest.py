# SPDX-License-Identifier: MIT
from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def no_tuning_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what was measured before, or leaves something with the user."""
    monkeypatch.setenv("REPVGG_CUDA_TUNING_CACHE", "")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device a test should run on."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("REPVGG_CUDA_DRY_RUN"):  # tests/test_cuda.py then has stand-ins
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
