"""Learning rates worked out by hand, and an optimiser that holds only what trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reflectvlm.train.optim import AdamW


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({}, 3, [1.0, 1.0, 1.0]),
        # Half of 4 steps warm up: 1/2, 2/2; then constant.
        ({"warmup": 0.5}, 4, [0.5, 1.0, 1.0, 1.0]),
        # 0.3 of 4 rounds up to 2 warm steps, so that the first step is never at 0.
        ({"warmup": 0.3}, 4, [0.5, 1.0, 1.0, 1.0]),
        # 1 - k / 4
        ({"schedule": "linear"}, 4, [1.0, 0.75, 0.5, 0.25]),
        # 1 - 0.8 k / 4
        ({"schedule": "linear", "final": 0.2}, 4, [1.0, 0.8, 0.6, 0.4]),
        # (1 + cos(pi k / 4)) / 2
        ({"schedule": "cosine"}, 4, [1.0, 0.853553, 0.5, 0.146447]),
        # 0.1 + 0.9 (1 + cos(pi k / 4)) / 2
        ({"schedule": "cosine", "final": 0.1}, 4, [1.0, 0.868198, 0.55, 0.231802]),
        # 2 of 6 warm up, then the 4 steps of the cosine above.
        ({"schedule": "cosine", "warmup": 1 / 3}, 6, [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        # Everything is warm-up.
        ({"warmup": 1.0, "schedule": "linear"}, 4, [0.25, 0.5, 0.75, 1.0]),
        ({"schedule": "cosine"}, 1, [1.0]),
    ],
)
def test_rates_by_hand(settings: dict[str, Any], total: int, expected: list[float]) -> None:
    """A schedule that is off by one step, or ends elsewhere than it says."""
    adamw = AdamW(lr=2e-5, **settings)
    rates = [adamw.rate(step, total) for step in range(total)]
    assert rates == pytest.approx([2e-5 * rate for rate in expected], rel=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_stays_where_the_schedule_ends(schedule: Any) -> None:
    """Bug: one step too many, by hand, climbs the gradient (linear) or learns anew (cosine)."""
    adamw = AdamW(lr=1.0, schedule=schedule, final=0.1)
    assert [adamw.rate(step, 3) for step in (3, 4, 6, 100)] == pytest.approx([0.1] * 4)


def test_frozen_parameters_are_not_in_the_optimiser() -> None:
    """Weight decay would move them."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = AdamW(lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1).build(model.parameters())
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model[1].parameters()}
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1e-3,
        (0.8, 0.95),
        1e-6,
        0.1,
    )


def test_betas_from_a_recipe_are_a_list() -> None:
    """YAML knows no tuples."""
    optimizer = AdamW(betas=[0.9, 0.98]).build([nn.Parameter(torch.ones(1))])  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step'. It must be constant, linear or cosine"),
        ({"lr": 0.0}, "lr is 0.0. It must be positive"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"warmup": 10}, "warmup is 10. It is a share"),
        ({"final": -0.1}, "final is -0.1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(**settings)
