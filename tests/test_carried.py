"""A model's config says how the model is used, and nothing in it can make code run."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.models.carried import Carried, carried, carry
from reflectvlm.models.qwen_vl import load_policy
from reflectvlm.protocols import DecodeState, Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.types import Instruction
from training import small_rl, small_sft

ASKED = Instruction(text="Look again, “twice”.", place="system", system="")
ROUTE = VisualRoute(m=25, layers=(0, -1), heads="max", trigger="<back>", images=(1, 0), limit=2, budget=64)

copies = st.builds(
    VisualCopy,
    trigger=st.sampled_from(["<REFLECTION>", "<back>"]),
    place=st.sampled_from(["auto", "before", "after"]),
    images=st.just("all") | st.lists(st.integers(0, 3), min_size=1).map(tuple),
    limit=st.none() | st.integers(0, 9),
    budget=st.none() | st.integers(0, 9),
    close=st.none() | st.just("</REFLECTION>"),
)
routes = st.builds(
    VisualRoute,
    m=st.floats(0, 100) | st.integers(0, 100),
    layers=st.none() | st.lists(st.integers(-4, 3), min_size=1, unique=True).map(tuple),
    heads=st.sampled_from(["mean", "max"]),
    trigger=st.sampled_from(["<REFLECTION>", "<back>"]),
)
instructions = st.builds(
    Instruction, text=st.text(), place=st.sampled_from(["user", "system"]), system=st.text()
)


@settings(max_examples=50, deadline=None)
@given(st.just(Implicit()) | copies | routes, st.none() | instructions)
def test_what_is_carried_comes_back(reattention: Reattention, instruction: Instruction | None) -> None:
    """A field that is lost or comes back as another type, e.g. a tuple as a list."""
    written, read = SimpleNamespace(), SimpleNamespace()
    carry(written, reattention, instruction)
    read.reflectvlm = json.loads(json.dumps(written.reflectvlm))
    assert carried(read) == Carried(reattention=reattention, instruction=instruction)


def test_settings_from_numpy_and_recipes() -> None:
    """A number that JSON cannot write would lose a finished run at its last line."""
    import numpy as np

    config = SimpleNamespace()
    carry(config, VisualRoute(m=np.float32(50), layers=list(np.arange(2)), images=[0]), None)  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.reflectvlm))["reattention"]["layers"] == [0, 1]
    assert carried(config) == Carried(reattention=VisualRoute(layers=(0, 1), images=(0,)))


def test_through_config_json(tmp_path: Path) -> None:
    """transformers drops or renames the key, or refuses to load a model that has it."""
    from transformers import AutoModelForImageTextToText

    policy = load_policy("tiny")
    assert carried(policy.model.config) is None
    carry(policy.model.config, ROUTE, ASKED)
    policy.save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["reflectvlm"]
    assert written["instruction"] == {"text": ASKED.text, "place": "system", "system": ""}
    assert written["reattention"] == {
        "kind": "VisualRoute", "m": 25, "layers": [0, -1], "heads": "max", "trigger": "<back>",
        "place": "auto", "images": [1, 0], "limit": 2, "budget": 64, "close": None,
    }  # fmt: skip
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert carried(stock.config) == Carried(reattention=ROUTE, instruction=ASKED)


@dataclass(frozen=True)
class OwnCopy(VisualCopy):
    """A user's own, with behaviour that its fields do not say."""

    def __call__(self, state: DecodeState, /) -> None:
        del state


def test_another_s_reattention_is_not_carried(caplog: pytest.LogCaptureFixture) -> None:
    """Code by name in a config runs at whoever loads it. What an earlier run wrote must go, too: the
    model was not trained with it any more."""
    config = SimpleNamespace()
    carry(config, ROUTE, ASKED)
    with caplog.at_level(logging.WARNING):
        carry(config, OwnCopy(), ASKED)
    assert carried(config) == Carried(reattention=None, instruction=ASKED)
    (record,) = caplog.records
    assert "uses OwnCopy: only Implicit, VisualCopy, VisualRoute" in record.message
    assert "with reattention=" in record.message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], r"config\.json: reflectvlm is \[1\]\. It must be an object\. Correct it, or delete"),
        ({"hook": "x"}, "reflectvlm.hook is 'x'. The keys here are reattention, instruction"),
        ({"reattention": "VisualCopy"}, "reflectvlm.reattention is 'VisualCopy'. It must be an object"),
        ({"reattention": {"m": 5}}, "reattention.kind is None. It must be one of Implicit, VisualCopy"),
        ({"reattention": {"kind": "os.system"}}, "reattention.kind is 'os.system'. It must be one of"),
        ({"reattention": {"kind": ["VisualCopy"]}}, r"reattention.kind is \['VisualCopy'\]"),
        ({"reattention": {"kind": "Implicit", "m": 5}}, "reattention.m is 5. The keys here are none"),
        ({"reattention": {"kind": "VisualCopy", "m": 5}}, "reattention.m is 5. The keys here are trigger"),
        ({"reattention": {"kind": "VisualRoute", "m": "5"}}, "reattention.m is '5'. That is no value of V"),
        ({"reattention": {"kind": "VisualRoute", "m": True}}, "reattention.m is True"),
        ({"reattention": {"kind": "VisualRoute", "m": 101}}, "VisualRoute.m is 101. It is a percentage"),
        ({"reattention": {"kind": "VisualRoute", "layers": [0.5]}}, r"reattention.layers is \[0.5\]"),
        ({"reattention": {"kind": "VisualRoute", "layers": [True]}}, r"reattention.layers is \[True\]"),
        ({"reattention": {"kind": "VisualCopy", "trigger": 7}}, "reattention.trigger is 7"),
        ({"reattention": {"kind": "VisualCopy", "images": "some"}}, "reattention.images is 'some'"),
        ({"reattention": {"kind": "VisualCopy", "place": "here"}}, "reattention.place is 'here'"),
        ({"reattention": {"kind": "VisualCopy", "limit": -1}}, "VisualCopy.limit is -1"),
        ({"instruction": {"text": ["a"]}}, r"instruction.text is \['a'\]. That is no value of Instruction"),
        ({"instruction": {"txt": "a"}}, "instruction.txt is 'a'. The keys here are text, place, system"),
        ({"instruction": "a" * 200}, "instruction is 'a{78}…. It must be an object"),
    ],
)
def test_a_config_that_is_wrong(values: Any, message: str) -> None:
    """A value that is taken as it is fails far away from its cause, or does something else."""
    with pytest.raises(ValueError, match=message):
        carried(SimpleNamespace(reflectvlm=values))


def test_finished_runs_carry(tmp_path: Path) -> None:
    """The model of a run that nobody can use as it was trained without its recipe."""
    rl = small_rl(tmp_path, steps=1, instruction=ASKED, reattention=VisualCopy(limit=1)).run()
    assert carried(load_policy(str(rl.model)).model.config) == Carried(
        reattention=VisualCopy(limit=1), instruction=ASKED
    )
    data = DigitTraces(data=Digits(size=10))
    sft = small_sft(tmp_path, steps=1, data=data, instruction=(ASKED, Instruction())).run()
    assert carried(load_policy(str(sft.model)).model.config) == Carried(
        reattention=Implicit(), instruction=ASKED
    )
