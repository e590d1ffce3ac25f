"""Our rewards called the way TRL calls them, TRL's functions called the way we do, and both examples."""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from reflectvlm.integrations.trl import as_trl_reward, from_trl
from reflectvlm.protocols import Reward
from reflectvlm.rewards import ReflectionBalance, per_rollout
from reflectvlm.types import Prompt, Rollout, Sample, Text

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install reflectvlm[trl]"
)
EXAMPLES = Path(__file__).parent.parent / "examples"


class Recorder:
    """A reward that keeps the groups it saw and gives 0, 1, 2, ... within each."""

    def __init__(self) -> None:
        self.groups: list[Sequence[Rollout]] = []

    def __call__(self, group: Sequence[Rollout]) -> list[float]:
        self.groups.append(group)
        return [float(i) for i in range(len(group))]


def is_right(group: Sequence[Rollout]) -> list[float]:
    return [float(rollout.text == rollout.prompt.sample.answer) for rollout in group]


def test_rows_become_rollouts_with_their_sample() -> None:
    """Bug: an answer paired with another row's completion, or a column lost on the way."""
    recorder = Recorder()
    rewards = as_trl_reward(recorder)(
        prompts=["1 + 1?", "1 + 1?", "2 + 2?"],
        completions=["2", "3", "4"],
        completion_ids=[[5, 1], [6], [7, 1]],
        solution=["2", "2", "4"],
        kind=["add", "add", "sum"],
        trainer_state=object(),
        log_metric=print,
    )
    assert rewards == [0.0, 1.0, 0.0]
    assert [len(group) for group in recorder.groups] == [2, 1]
    rollout = recorder.groups[0][1]
    assert (rollout.text, rollout.sampled_ids, rollout.stop) == ("3", (6,), "eos")
    sample = rollout.prompt.sample
    assert (sample.question, sample.answer, sample.columns) == ("1 + 1?", "2", {"kind": "add"})
    assert sample.id == "row 0"


def test_groups_are_adjacent_rows_of_one_sample() -> None:
    """Bug: two samples with the same wording ("What is shown?") scored as one group, or one sample's
    group cut in two because its images were decoded twice."""
    recorder = Recorder()
    rewards = as_trl_reward(recorder)(
        prompts=["what?"] * 5,
        completions=["a"] * 5,
        completion_ids=[[1]] * 5,
        answer=["x", "x", "y", "y", "y"],
    )
    assert rewards == [0.0, 1.0, 0.0, 1.0, 2.0]
    recorder = Recorder()
    by_id = as_trl_reward(recorder)(
        prompts=["what?"] * 4, completions=["a"] * 4, answer=["x"] * 4, id=[0, 0, 1, 1]
    )
    assert by_id == [0.0, 1.0, 0.0, 1.0]
    assert [group[0].prompt.sample.id for group in recorder.groups] == ["0", "1"]


def test_conversations_with_image_parts() -> None:
    """Bug: the system turn in the question, or a crash on a content list."""
    recorder = Recorder()
    picture = object()
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
    ]
    completion = [{"role": "assistant", "content": "<back>two</back>"}]
    as_trl_reward(recorder)(
        prompts=[prompt], completions=[completion], completion_ids=[[3]], answer=["2"], image=[picture]
    )
    rollout = recorder.groups[0][0]
    assert rollout.text == "<back>two</back>"
    assert rollout.prompt.sample.question == "How many?"
    assert rollout.prompt.sample.images == (picture,)


def test_special_tags_and_cut_answers_come_from_the_ids() -> None:
    """Bug: a reward that never sees <REFLECTION>, because TRL decodes without special tokens."""
    recorder = Recorder()
    words = {4: "<REFLECTION>", 5: "yes", 1: ""}
    reward = as_trl_reward(recorder, decode=lambda ids: "".join(words[i] for i in ids), end_ids={1})
    reward(
        prompts=["?"] * 2, completions=["yes", "yes"], completion_ids=[[4, 5, 1], [4, 5]], answer=["a"] * 2
    )
    assert [r.text for r in recorder.groups[0]] == ["<REFLECTION>yes"] * 2
    assert [r.stop for r in recorder.groups[0]] == ["eos", "length"]


def test_a_reward_that_counts_tokens_gets_its_offsets() -> None:
    """Bug: BRPO's balance failing in TRL for want of offsets, or the end-of-turn token in the text, which
    no layout allows behind its last block."""
    recorder = Recorder()
    words = {4: "<REFLECTION>", 5: "yes", 6: "</REFLECTION>", 1: "<|im_end|>"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids)

    def offsets(ids: Sequence[int]) -> list[int]:
        return [len(decode(ids[:place])) for place in range(len(ids))]

    completions = [[4, 5, 5, 6, 1], [4, 5, 6]]
    given = {
        "prompts": ["?"] * 2,
        "completions": [""] * 2,
        "completion_ids": completions,
        "answer": ["a"] * 2,
    }
    as_trl_reward(recorder, decode=decode, offsets=offsets, end_ids={1})(**given)
    ended, cut = recorder.groups[0]
    assert (ended.text, ended.stop) == ("<REFLECTION>yesyes</REFLECTION>", "eos")
    assert ended.sampled_ids == (4, 5, 5, 6, 1)
    assert ended.offsets == (0, 12, 15, 18)
    assert (cut.text, cut.stop, cut.offsets) == ("<REFLECTION>yes</REFLECTION>", "length", (0, 12, 15))
    # Two tokens against one where one is wished for: 1 - |2 - 1| / 1 and 1 - 0.
    balance = as_trl_reward(ReflectionBalance(target_tokens=1), decode=decode, offsets=offsets, end_ids={1})
    assert balance(**given) == [0.0, 1.0]


def test_offsets_without_decode_are_refused() -> None:
    """Bug: offsets into a text from which TRL has left the special tokens out."""
    with pytest.raises(ValueError, match="'Recorder' has offsets= without decode="):
        as_trl_reward(Recorder(), offsets=list)


def test_a_reward_without_a_value_is_none_to_trl() -> None:
    """Bug: a NaN in TRL's rewards, which it would take for a number given by another function."""
    for none in (math.nan, None):
        reward = as_trl_reward(lambda group, none=none: [none] * len(group), answer_columns=())
        assert reward(prompts=["?"], completions=["a"], completion_ids=[[1]]) == [None]


def test_names_and_pickling() -> None:
    """Bug: a metric called "rewards/<lambda>", or a reward that cannot go to another process."""
    assert as_trl_reward(is_right).__name__ == "is_right"
    assert as_trl_reward(Recorder()).__name__ == "Recorder"
    assert as_trl_reward(per_rollout(len)).__name__ == "len"
    assert as_trl_reward(from_trl(math.fsum)).__name__ == "fsum"
    reward = pickle.loads(pickle.dumps(as_trl_reward(is_right, name="accuracy")))
    assert reward.__name__ == "accuracy"
    assert reward(prompts=["?"] * 2, completions=["a", "b"], answer=["b", "b"]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "columns", "message"),
    [
        (
            {},
            {"gold": ["a"]},
            r"found none of the columns \['answer', 'solution'\] among \['gold'\].*answer_columns",
        ),
        ({"decode": str}, {"answer": ["a"]}, "has decode=, but was called without completion_ids"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(
    settings: dict[str, Any], columns: dict[str, Any], message: str
) -> None:
    """Bug: every answer scored against an empty one, silently 0."""
    with pytest.raises(ValueError, match=message):
        as_trl_reward(is_right, **settings)(prompts=["?"], completions=["a"], **columns)


def test_a_reward_with_the_wrong_number_of_values_is_refused() -> None:
    """Bug: values shifted into the next group."""
    reward = as_trl_reward(lambda _: [1.0], name="one", answer_columns=())
    with pytest.raises(ValueError, match="'one' gave 1 values for 2 rollouts of one prompt"):
        reward(prompts=["?"] * 2, completions=["a"] * 2)


def two_rollouts() -> list[Rollout]:
    sample = Sample(id="s", question="1 + 1?", answer="2", columns={"kind": "add"})
    prompt = Prompt(sample=sample, spans=())
    return [
        Rollout(prompt=prompt, spans=(Text(ids=(7,), trained=True),), text=text, stop="eos")
        for text in ("2", "3")
    ]


def test_a_trl_function_as_our_reward() -> None:
    """Bug: a missing keyword that TRL would have given, or None taken for a score of 0."""
    seen: dict[str, Any] = {}

    def partly(
        completions: list[str], solution: list[str], log_metric: Any, **columns: Any
    ) -> list[float | None]:
        seen.update(columns, solution=solution)
        log_metric("seen", 1.0)
        return [1.0 if text == gold else None for text, gold in zip(completions, solution, strict=True)]

    reward = from_trl(partly, timeout=None)
    assert isinstance(reward, Reward)
    assert reward(two_rollouts()) == [1.0, None]
    assert seen["prompts"] == ["1 + 1?"] * 2
    assert seen["completion_ids"] == [[7], [7]]
    assert seen["kind"] == ["add", "add"]
    assert seen["images"] == [[], []]
    assert seen["trainer_state"] is None
    assert reward.label == "partly"


def test_a_trl_function_that_wants_messages() -> None:
    """Bug: completion[0]["content"], which most published functions do, on a plain string."""

    def of_messages(prompts: Any, completions: Any, **_: Any) -> list[float]:
        assert prompts[0] == [{"role": "user", "content": "1 + 1?"}]
        return [float(completion[0]["content"]) for completion in completions]

    assert from_trl(of_messages, conversational=True)(two_rollouts()) == [2.0, 3.0]


def test_there_and_back() -> None:
    """Bug: anything that one bridge drops and the other needs."""
    rewards = from_trl(as_trl_reward(is_right), answer_column="answer")(two_rollouts())
    assert rewards == is_right(two_rollouts())


def test_an_async_function_is_waited_for() -> None:
    """Bug: a coroutine taken for a list of rewards."""

    async def later(completions: list[str], **_: Any) -> list[float]:
        return [float(text) for text in completions]

    assert from_trl(later)(two_rollouts()) == [2.0, 3.0]


def run_example(name: str) -> str:
    """The example in a process of its own, as a reader would start it; it must not need a network."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(EXAMPLES.parent / "src"),
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_trl
def test_example_our_reward_trains_in_a_stock_trl_trainer() -> None:
    """Bug: a reward that TRL accepts but that teaches nothing: order, length or names mixed up."""
    line = run_example("trl_grpo.py").strip().splitlines()[-1]
    shares = [float(word) for word in line.split(":")[1].split()]
    assert len(shares) == 20
    assert sum(shares[:2]) / 2 < 0.7
    assert sum(shares[-5:]) / 5 > 0.9


def test_example_a_trl_function_in_a_rubric() -> None:
    """Bug: a documented example that no longer runs."""
    # 0.9 * boxed + 0.1 * back, for each of the three answers
    lines = run_example("trl_reward_here.py").splitlines()
    assert [line.split()[0] for line in lines] == ["0.9", "1.0", "0.1"]
