"""A function of a layer's weight, run as the layer's own forward.

Whoever shards weights (ZeRO-3) fetches them in hooks around a module's forward, and again before its
backward. A function that merely reads `layer.weight` would meet an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def called_as(
    layer: nn.Linear, function: Callable[..., Any], inputs: Tensor, *others: Any, **settings: Any
) -> Any:
    """`function(inputs, layer.weight, *others, **settings)` inside the hooks of `layer`."""

    def forward(inputs: Tensor) -> Any:
        return function(inputs, layer.weight, *others, **settings)

    # An attribute of the object hides the class's method for this one call.
    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        return layer(inputs)
    finally:
        del layer.forward
