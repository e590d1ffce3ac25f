"""Gradients are added in one order, so that two runs on several threads are the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures import make_policy
from reflectvlm.models.tiny import TinyFamily
from test_prefix import gradients, rows


class Added(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What adds gradients with all threads at once: how often each of its places is named."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "index_put" in str(func) and len(args) > 3 and args[3]:
            named = [place for place in args[1] if place is not None]
            if named[0].dtype == torch.bool:  # a mask names each place once
                named = list(named[0].nonzero(as_tuple=True))
            places = torch.stack([place.flatten() for place in torch.broadcast_tensors(*named)])
            self.most.append(int(places.unique(dim=1, return_counts=True)[1].max()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("share", [True, False])
def test_no_place_is_added_to_twice_at_once(share: bool, family: TinyFamily) -> None:
    """Bug: two runs on two threads are the same for some steps and then go different ways: answers share the
    state of a prompt's last token, or show a visual token again, and `x[places]` adds their gradients in
    the order in which threads come (`index_put_` with accumulate on a CPU)."""
    policy = make_policy(family=family, share_prefix=share)
    batch = policy.batch(rows(policy))
    with Added() as added:
        gradients(policy, batch)
    assert added.most, "the stock model itself has x[places]: windows in order, deepstack"
    assert max(added.most) == 1


def test_the_watch_sees_places_named_twice() -> None:
    """Bug: the test above passes because nothing is watched."""
    x = torch.zeros(3, 2, requires_grad=True)
    with Added() as added:
        x[torch.tensor([0, 2, 0])].sum().backward()
    assert added.most == [2]
