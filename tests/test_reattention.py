"""COPY and ROUTE as objects: what they decide, given what they may look at. What the engine makes of it
is in test_copy_route.py and test_insertions.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fixtures import make_policy, make_prompt
from reflectvlm.reattention import VisualCopy, VisualRoute, check_reattention, top_percent
from reflectvlm.types import AttentionProbe, Insertion, Prompt, Text, Visual


@dataclasses.dataclass(frozen=True)
class State:
    """A `DecodeState` by hand."""

    prompt: Prompt
    insertions: Sequence[Insertion] = ()
    special: bool = True
    sampled: Sequence[int] = (1, 2)
    weights: Sequence[Tensor] = ()

    def text(self) -> str:
        return "text"

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def attention(self, image: int) -> Tensor:
        return self.weights[image]


def two_images() -> Prompt:
    return make_prompt(
        make_policy(), 1, "Is <image> above <image>?", ((64, 48), (32, 80))
    )  # 12 and 10 tokens


def test_copy_shows_what_it_is_told() -> None:
    """Bug: a block on the wrong side of its tag, or the wrong images."""
    prompt = two_images()
    both = (Visual(image=0), Visual(image=1))
    assert VisualCopy()(State(prompt)) == Insertion(before=both)
    assert VisualCopy()(State(prompt, special=False)) == Insertion(after=both)
    assert VisualCopy(place="before")(State(prompt, special=False)) == Insertion(before=both)
    assert VisualCopy(place="after")(State(prompt)) == Insertion(after=both)
    assert VisualCopy(images=[1])(State(prompt)) == Insertion(before=both[1:])
    closed = VisualCopy(close="</")(State(prompt))
    assert closed == Insertion(before=both, after=(Text(ids=(60, 47)),))
    assert VisualCopy()(State(make_prompt(make_policy(), 3, "One?", ()))) is None


def test_limit_and_budget_count_what_is_there() -> None:
    """Bug: a block too many. 12 + 2 and 10 + 2 tokens an insertion: 26; two need 52."""
    prompt = two_images()
    made = Insertion(before=(Visual(image=0), Visual(image=1)))
    for once, twice in (
        (VisualCopy(limit=1), VisualCopy(limit=2)),
        (VisualCopy(budget=51), VisualCopy(budget=52)),
    ):
        assert once(State(prompt)) == made
        assert once(State(prompt, insertions=(made,))) is None
        assert twice(State(prompt, insertions=(made,))) == made
    assert VisualCopy(limit=0)(State(prompt)) is None
    assert VisualCopy(budget=25)(State(prompt)) is None


def test_route_takes_the_most_attended_of_all_images() -> None:
    """Bug: m percent of each image. Of 12 + 10 tokens 25 % are 6 of 22, rounded up."""
    prompt = two_images()
    first, second = torch.zeros(12), torch.zeros(10)
    first[[1, 7]] = torch.tensor([0.3, 0.2])
    second[[0, 9]] = torch.tensor([0.5, 0.1])
    state = State(prompt, weights=(first, second))
    assert VisualRoute(m=10)(state) == Insertion(
        before=(Visual(image=0, keep=(1, 7)), Visual(image=1, keep=(0,)))
    )
    chosen = VisualRoute(m=25)(state)
    assert chosen is not None
    assert sum(len(span.keep or ()) for span in chosen.before if isinstance(span, Visual)) == 6
    assert VisualRoute(m=4, images=[1])(state) == Insertion(before=(Visual(image=1, keep=(0,)),))
    assert VisualRoute(m=0)(state) is None
    everything = Insertion(before=(Visual(image=0), Visual(image=1)))
    assert VisualRoute(m=100)(state) == everything
    nothing_yet = State(prompt, weights=(torch.zeros(12), torch.zeros(10)))
    assert VisualRoute(m=25)(nothing_yet) == everything
    assert VisualRoute(m=50).probe == AttentionProbe()
    assert (VisualRoute(m=0).probe, VisualRoute(m=100).probe) == (None, None)


def test_top_percent_breaks_ties_by_place() -> None:
    """Bug: a choice among equals that differs between two runs would not be reproducible."""
    assert top_percent([torch.tensor([0.1, 0.2, 0.2, 0.2])], 50) == [(1, 2)]
    assert top_percent([torch.tensor([0.1, 0.3]), torch.tensor([0.2])], 34) == [(1,), (0,)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"m": 101}, r"m is 101\. It is a percentage"),
        ({"trigger": ""}, r"VisualRoute\.trigger is empty"),
        ({"place": "behind"}, r"place is 'behind'\. It must be 'auto', 'before' or 'after'"),
        ({"images": "first"}, r"images is 'first'\. Write 'all' or numbers"),
        ({"images": 1}, r"images is 1\. Write 'all' or numbers"),
        ({"images": ["0"]}, r"images is \['0'\]\. Write 'all' or numbers"),
        ({"images": [True]}, r"images is \[True\]\. Write 'all' or numbers"),
        ({"images": []}, r"images is \[\]\. Write 'all' or numbers"),
        ({"limit": -1}, r"limit is -1\. It must be 0 or more"),
        ({"close": "<REFLECTION>x"}, "would ask for the image without end"),
        ({"heads": "sum"}, "heads is 'sum'"),
        ({"layers": []}, "Name at least one layer"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str) -> None:
    """Bug: a setting that cannot be meant shows other images, or none, without a word."""
    with pytest.raises(ValueError, match=message):
        VisualRoute(**settings)  # type: ignore[arg-type]


def test_what_is_no_reattention_is_refused() -> None:
    """Bug: a class or a name in a recipe is found out in the middle of a rollout."""
    for wrong, message in (
        ("copy", "has no trigger, probe"),
        (VisualCopy, "is a class"),
        (len, "has no trigger"),
    ):
        with pytest.raises(ValueError, match=message):
            check_reattention(wrong)
