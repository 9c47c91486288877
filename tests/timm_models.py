# SPDX-License-Identifier: MIT
"""timm, imported so that a torchvision built for another torch does not stop it: no model here needs its operators."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


def import_timm() -> Any:
    """The package; skips the test where it is not installed."""
    try:
        return pytest.importorskip("timm")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]  # half imported
    # The module registers shape rules for operators that did not load.
    sys.modules["torchvision._meta_registrations"] = ModuleType("torchvision._meta_registrations")
    return pytest.importorskip("timm")
