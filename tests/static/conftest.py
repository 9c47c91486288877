# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compiles kernels for minutes runs once, in `make cuda-build`."""
    if os.environ.get("REPVGG_CUDA_GATE"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: `make cuda-build` runs it (REPVGG_CUDA_GATE is not set)"))
