# SPDX-License-Identifier: MIT
"""Models of timm: every sum of branches is found and folded, none where there is none. The whole list: benchmarks/."""

from __future__ import annotations

from typing import Any

import pytest
import timm_models
import torch

from repvgg_cuda import deploy, testing
from repvgg_cuda.networks import randomise_
from repvgg_cuda.verification import NETWORK_FACTOR


@pytest.fixture(scope="module")
def coverage() -> Any:
    return timm_models.coverage()


@pytest.fixture(scope="module")
def timm() -> Any:
    return timm_models.import_timm()


@pytest.mark.parametrize(
    "name",
    [
        "repvgg_a0",
        pytest.param("mobileone_s0", marks=pytest.mark.slow),
        "repvit_m0_9",
        "fastvit_t8",
        "repghostnet_050",
    ],
)
def test_every_sum_is_folded(name: str, timm: Any, coverage: Any) -> None:
    row = coverage.row_of(timm, name, seconds=600)
    assert "failure" not in row
    assert row["expected"] == row["found"] == row["fused"] > 0
    assert not row["left"]
    assert row["fused_chains"] == row["chains"]
    assert row["parameters_after"] < row["parameters"]
    allowed = NETWORK_FACTOR * max(row["trained_error"], testing.unit_roundoff(torch.float32))
    assert row["error"] <= allowed


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "densenet121", "tf_efficientnet_b0"]
)
def test_nothing_is_found_where_nothing_is(name: str, timm: Any, coverage: Any) -> None:
    row = coverage.structure(timm, name)
    assert (row["expected"], row["found"]) == (0, 0)
    assert row["chains"] > 0 or name == "convnext_atto"


def test_state_dicts_have_the_keys_of_timm(timm: Any) -> None:
    """Where its classes know a deployed form: a checkpoint goes either way."""
    torch.manual_seed(0)
    trained = randomise_(timm.create_model("repvgg_a0", num_classes=3)).eval()
    x = torch.randn(2, 3, 64, 64)
    deployed, report = deploy(trained, x, strict=True)
    assert "all 23 rows within their bounds" in report.verification
    assert type(deployed.stages[0][0]) is type(trained.stages[0][0])
    theirs = timm.utils.reparameterize_model(trained)
    assert list(theirs.state_dict()) == list(deployed.state_dict())
    theirs.load_state_dict(deployed.state_dict())
    torch.testing.assert_close(theirs(x), deployed(x), rtol=1e-4, atol=1e-4)
