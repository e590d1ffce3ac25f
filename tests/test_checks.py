"""The checks at the start: each must pass a sound run and name what is wrong in a broken one."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.normalizers import Lowercase

from fixtures import make_prompt
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.data.instructions import instruction
from reflectvlm.data.rows import BadRow
from reflectvlm.models.qwen_vl import load_policy
from reflectvlm.models.tiny import random_tiny
from reflectvlm.reattention import VisualCopy, VisualRoute
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.back import BackReward, look_back_rubric
from reflectvlm.rewards.layout import TagFormat
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.reflection import brpo_rubric
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.tags import Block, Layout, grpo, look_back, parse
from reflectvlm.train.checks import CheckFailed, Result, check_start, lines, run_checks
from reflectvlm.train.checks_gold import _hopeless, _Marks
from reflectvlm.train.checks_parts import Part, answer_text
from reflectvlm.train.checks_signal import NoSignal, NothingKept
from reflectvlm.train.checks_subject import Subject
from reflectvlm.train.distill import Distiller
from reflectvlm.train.row_rules import RowRules
from reflectvlm.types import Instruction, Rollout, Sample, SamplingParams, Text, Visual
from training import rubric, small_rl, small_sft

BACK = look_back_rubric(look_back())
ASKED = instruction("brief_back")
HOT = SamplingParams(max_tokens=96, temperature=0.7)


def found(trainer: Any) -> dict[str, Result]:
    return {result.name: result for result in run_checks(trainer)}


def states(trainer: Any) -> dict[str, str]:
    return {name: result.status for name, result in found(trainer).items()}


def sound_rl(tmp_path: Path, **changes: Any) -> Any:
    return small_rl(tmp_path, **{"rubric": BACK, "instruction": ASKED, "sampling": HOT} | changes)


def small_distiller(tmp_path: Path, **changes: Any) -> Distiller:
    del tmp_path
    given = {"policy": random_tiny(), "data": DigitTraces(data=Digits(size=9)), "rubric": BACK}
    return Distiller(**given | {"instruction": ASKED, "sampling": HOT} | changes)


@dataclass(frozen=True)
class Changed:
    """An engine whose sampling or rollouts are changed on the way."""

    policy: Any
    sampling: Callable[[SamplingParams], SamplingParams] = lambda given: given
    rollout: Callable[[Rollout], Rollout] = lambda given: given

    def generate(self, prompts: Any, n: int, sampling: Any, reattention: Any, *, seed: int) -> Any:
        engine = InProcessEngine(policy=self.policy)
        groups = engine.generate(prompts, n, self.sampling(sampling), reattention, seed=seed)
        return [tuple(map(self.rollout, group)) for group in groups]


@dataclass(frozen=True)
class Rows(Sequence[Sample]):
    """`Digits` with some answers, columns or whole rows other than they should be."""

    change: Callable[[int, Sample], Sample]
    size: int = 12

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.change(index, DigitTraces(data=Digits(size=self.size))[index])


def answering(text: str) -> Rows:
    return Rows(lambda _, sample: dataclasses.replace(sample, answer=text))


# -- sound runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sound_rl, small_distiller])
def test_a_sound_run_passes(make: Any, tmp_path: Path) -> None:
    """Bug: a check that is wrong stops every run."""
    assert set(states(make(tmp_path)).values()) == {"ok"}


def test_a_sound_cold_start_passes(tmp_path: Path) -> None:
    """Bug: gold answers written out are held against the wrong layout. The evaluation's budget of 4
    tokens in `small_sft` is indeed too small for them."""
    trainer = small_sft(tmp_path, rubric=BACK, instruction=ASKED)
    assert states(trainer) == {
        "rows": "ok",
        "weights": "ok",
        "sight": "ok",
        "engine": "ok",
        "tags": "ok",
        "answer end": "warning",
        "gold answers": "ok",
    }
    assert "evaluation.max_tokens=4" in found(trainer)["answer end"].found


def test_a_trainer_of_ones_own_is_looked_at_as_far_as_it_is_known() -> None:
    """Bug: the checks know three classes and stop a run of any other."""
    policy = random_tiny()
    own = SimpleNamespace(policy=policy, canary_prompts=lambda: [make_prompt(policy)])
    assert states(own) == {
        "rows": "ok",
        "weights": "ok",
        "sight": "ok",
        "engine": "not applicable",
        "tags": "not applicable",
        "answer end": "not applicable",
        "gold answers": "not applicable",
    }


@pytest.mark.parametrize("make", [small_rl, small_sft])
def test_looking_changes_nothing_that_is_learned(make: Any, tmp_path: Path) -> None:
    """Bug: checks draw random numbers, take rows, count failures or leave a gradient behind, and a run with
    them is another one than without."""
    changes = {"rubric": rubric()} if make is small_sft else {}
    plain, looked = (make(tmp_path, **changes) for _ in range(2))
    looked.policy.module.train()
    looked.policy.model.model.visual.eval()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    state = looked.state()
    run_checks(looked)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert looked.state() == state
    assert looked.policy.module.training
    assert not looked.policy.model.model.visual.training
    assert all(parameter.grad is None for parameter in looked.policy.module.parameters())
    for number in range(2):
        one, other = (
            {key: value for key, value in trainer.step(number).metrics.items() if not key.startswith("time/")}
            for trainer in (plain, looked)
        )
        assert one == other


# -- weights and sight ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named(value: float, tmp_path: Path) -> None:
    """Bug: a damaged checkpoint trains, and its NaN shows up in the loss days later."""
    trainer = sound_rl(tmp_path)
    with torch.no_grad():
        trainer.policy.model.model.language_model.layers[2].mlp.up_proj.weight[0, 1:3] = value
    results = found(trainer)
    assert results["weights"].status == "failed"
    assert "first model.language_model.layers.2.mlp.up_proj.weight (2 of 49,152" in results["weights"].found
    assert results["sight"].status == results["engine"].status == "not applicable"


def test_a_buffer_may_hold_infinities(tmp_path: Path) -> None:
    """Bug: a mask of attention, kept as a buffer of minus infinities, is taken for damaged weights. A buffer
    that spoils the log-probs, as rotary frequencies can, shows in those."""
    trainer = sound_rl(tmp_path)
    mask = torch.full((4, 4), -math.inf).triu(1)
    trainer.policy.model.register_buffer("mask", mask, persistent=False)
    assert set(states(trainer).values()) == {"ok"}
    trainer.policy.model.model.language_model.rotary_emb.inv_freq[0] = math.inf
    assert states(trainer)["sight"] == "failed"


def test_a_blind_policy_fails(tmp_path: Path) -> None:
    """Bug: the canary is not among the checks."""
    trainer = sound_rl(tmp_path)
    with torch.no_grad():
        trainer.policy.model.model.visual.patch_embed.proj.weight.zero_()
    result = found(trainer)["sight"]
    assert result.status == "failed"
    assert "does not see its images" in result.found


def test_blank_images_prove_no_blindness() -> None:
    """Bug: an ablation with blank images is stopped, because other blank ones change nothing."""
    policy = random_tiny()
    prompt = make_prompt(policy)
    blank = tuple(
        dataclasses.replace(image, pixels=torch.zeros_like(image.pixels)) for image in prompt.patches
    )
    own = SimpleNamespace(policy=policy, canary_prompts=lambda: [dataclasses.replace(prompt, patches=blank)])
    assert states(own)["sight"] == "not applicable"


# -- engine and trainer ---------------------------------------------------------------------------


def test_an_engine_that_forgets_the_temperature_fails(tmp_path: Path) -> None:
    """Bug: samples at temperature 1 are trained on as if drawn at 0.7, and every ratio is biased."""
    hot = {"sampling": lambda given: dataclasses.replace(given, temperature=1.0)}
    trainer = sound_rl(tmp_path, engine=lambda policy: Changed(policy, **hot))
    result = found(trainer)["engine"]
    assert result.status == "failed"
    assert "worst token" in result.found
    assert "digits-train-" in result.found
    assert states(sound_rl(tmp_path))["engine"] == "ok"


def test_an_engine_that_knows_no_temperature_fails_also_where_it_is_1(tmp_path: Path) -> None:
    """Bug: parity at the run's own temperature alone proves nothing about an engine that ignores it, whose
    greedy evaluations are then samples."""

    def forgets(given: SamplingParams) -> SamplingParams:
        return dataclasses.replace(given, temperature=1.0)

    changes = {"sampling": SamplingParams(max_tokens=96, temperature=1.0)}
    trainer = sound_rl(tmp_path, **changes, engine=lambda policy: Changed(policy, forgets))
    assert found(trainer)["engine"].status == "failed"
    assert found(sound_rl(tmp_path, **changes))["engine"].status == "ok"


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_rounding_of_half_precision_is_allowed(compute: Any, tmp_path: Path) -> None:
    """Bug: bounds of float32 stop every run in half precision."""
    policy = dataclasses.replace(load_policy("tiny"), compute=compute)
    result = found(sound_rl(tmp_path, policy=policy))["engine"]
    assert result.status == "ok"
    assert f"allowed in {compute}" in result.found


def test_7_parity_stops_training_by_rewards_alone(tmp_path: Path) -> None:
    """Bug: a distillation or a cold start, which never use the engine's log-probs, is stopped for them."""
    hot = {"sampling": lambda given: dataclasses.replace(given, temperature=1.0)}
    for make in (small_distiller, small_sft):
        result = found(make(tmp_path, engine=lambda policy: Changed(policy, **hot)))["engine"]
        assert result.status == "warning"
        assert "worst token" in result.found


def test_7_sft_without_evaluations_makes_no_engine(tmp_path: Path) -> None:
    """Bug: an engine is started and asked for samples by a run that never uses it; here it cannot be made."""

    def none(policy: Any) -> Any:
        raise ImportError("this engine is not installed", policy)

    trainer = small_sft(tmp_path, engine=none, evaluation=None, test=None)
    assert states(trainer)["engine"] == "not applicable"
    assert "rollout_engine" not in vars(trainer)
    with pytest.raises(ImportError, match="not installed"):
        run_checks(small_sft(tmp_path, engine=none, test=None))


def lowered(by: float) -> Callable[[Rollout], Rollout]:
    """Log-probs that are this far below the right ones."""

    def change(rollout: Rollout) -> Rollout:
        spans = tuple(
            dataclasses.replace(span, logprobs=tuple(value - by for value in span.logprobs))
            if isinstance(span, Text)
            else span
            for span in rollout.spans
        )
        return dataclasses.replace(rollout, spans=spans)

    return change


@pytest.mark.parametrize(("by", "status"), [(0.0, "ok"), (0.02, "warning"), (0.2, "failed")])
def test_an_engine_in_another_dtype_is_told(by: float, status: str, tmp_path: Path) -> None:
    """Bug: a trainer in float32 beside a fast engine in bfloat16, as honest runs have it, is stopped."""
    trainer = sound_rl(tmp_path, engine=lambda policy: Changed(policy, rollout=lowered(by)))
    assert states(trainer)["engine"] == status


def test_an_engine_that_refuses_what_the_run_never_asks_for_is_told(tmp_path: Path) -> None:
    """Bug: an engine with a fixed temperature is stopped because the check asks for another one; or an SFT
    because its engine does not sample as the check does."""

    def fixed(given: SamplingParams) -> SamplingParams:
        if given.temperature != HOT.temperature:
            raise NotImplementedError("temperature 0.7 only")
        return given

    def only(policy: Any) -> Changed:
        return Changed(policy, fixed)

    result = found(sound_rl(tmp_path, engine=only))["engine"]
    assert result.status == "warning"
    assert "raised NotImplementedError: temperature 0.7 only" in result.found
    result = found(small_sft(tmp_path, engine=only))["engine"]
    assert result.status == "warning"
    assert "this check could not be made: temperature 0.7 only" in result.found


def test_too_little_memory_for_a_check_is_told(tmp_path: Path) -> None:
    """Bug: the check holds more rows at once than a run that just fits, and stops it."""

    class Full:
        def generate(self, *_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

    result = found(sound_rl(tmp_path, engine=lambda policy: Full()))["engine"]  # noqa: ARG005
    assert result.status == "warning"


def test_dropout_is_off_while_checking(tmp_path: Path) -> None:
    """Bug: an engine of one's own leaves the policy in training mode, and LoRA's dropout looks as if it
    sampled from another distribution; a blind policy looks as if it saw."""

    class Training(Changed):
        def generate(self, *arguments: Any, **named: Any) -> Any:
            was = self.policy.module.training
            made = super().generate(*arguments, **named)
            self.policy.module.train(was)
            return made

    trainer = sound_rl(tmp_path, engine=Training)
    inner = trainer.policy.model.model.language_model.layers[0]
    inner.mlp = torch.nn.Sequential(torch.nn.Dropout(0.5), inner.mlp)
    trainer.policy.module.train()
    assert states(trainer)["engine"] == "ok"
    assert trainer.policy.module.training


@pytest.mark.parametrize(("ids", "logprobs"), [((2431,), (-1.0,)), ((100,), (math.nan,))])
def test_log_probs_that_are_no_numbers_fail(ids: Any, logprobs: Any, tmp_path: Path) -> None:
    """Bug: a sampled id that training bans, whose log-prob is minus infinity there, or a NaN of the engine's,
    is taken for no difference."""

    def spoilt(rollout: Rollout) -> Rollout:
        (span,) = rollout.spans
        assert isinstance(span, Text)
        changed = Text(ids=(*ids, *span.ids[1:]), logprobs=(*logprobs, *span.logprobs[1:]), trained=True)
        return dataclasses.replace(rollout, spans=(changed,))

    trainer = sound_rl(tmp_path, engine=lambda policy: Changed(policy, rollout=spoilt))
    result = found(trainer)["engine"]
    assert result.status == "failed"
    assert "by up to inf" in result.found


def test_an_engine_without_log_probs(tmp_path: Path) -> None:
    """Bug: log-probs that are not there are read as 0, certainty."""

    def silent(rollout: Rollout) -> Rollout:
        spans = tuple(
            dataclasses.replace(span, logprobs=()) if isinstance(span, Text) else span
            for span in rollout.spans
        )
        return dataclasses.replace(rollout, spans=spans)

    changes = {"engine": lambda policy: Changed(policy, rollout=silent)}
    assert "states no log-probs" in found(sound_rl(tmp_path, **changes))["engine"].found
    assert states(sound_rl(tmp_path, **changes))["engine"] == "failed"
    assert states(small_distiller(tmp_path, **changes))["engine"] == "not applicable"


def test_an_engine_that_breaks_is_a_finding(tmp_path: Path) -> None:
    """Bug: the first broken part hides all others behind a traceback."""

    class Broken:
        def generate(self, *_: Any, **__: Any) -> Any:
            raise KeyError("cache")

    class Short:
        def generate(self, *_: Any, **__: Any) -> Any:
            return [()]

    results = found(sound_rl(tmp_path, engine=lambda policy: Broken()))  # noqa: ARG005
    assert results["engine"] == Result("engine", "failed", "KeyError: 'cache'")
    assert results["gold answers"].status == "ok"
    result = found(sound_rl(tmp_path, engine=lambda policy: Short()))["engine"]  # noqa: ARG005
    assert "asked for 2 groups of 2 answers and gave groups of [0]" in result.found


@pytest.mark.parametrize("trigger", ["<|box_start|>", "<back>"])
@pytest.mark.parametrize("make", [VisualCopy, VisualRoute])
def test_inserted_blocks_are_compared_too(make: Any, trigger: str, tmp_path: Path) -> None:
    """Bug: a policy that does not yet write its trigger is checked without any block."""
    result = found(sound_rl(tmp_path, reattention=make(trigger=trigger)))["engine"]
    assert result.status == "ok"
    assert int(result.found.split()[-3]) >= 1


def test_a_block_at_the_wrong_side_of_a_token_fails(tmp_path: Path) -> None:
    """Bug: a token in front of which a block is put is scored with the block, though drawn without."""

    def behind(rollout: Rollout) -> Rollout:
        spans = tuple(
            dataclasses.replace(span, before_sampled=False) if isinstance(span, Visual) else span
            for span in rollout.spans
        )
        return dataclasses.replace(rollout, spans=spans)

    reattention = VisualCopy(trigger="<|box_start|>")
    trainer = sound_rl(
        tmp_path, reattention=reattention, engine=lambda policy: Changed(policy, rollout=behind)
    )
    assert states(trainer)["engine"] == "failed"


# -- tags -----------------------------------------------------------------------------------------


def test_a_tag_that_the_tokenizer_changes(tmp_path: Path) -> None:
    """Bug: an added token that eats the white space around it is not told, or stops the run though rewards
    see it; a tokenizer that writes all in small letters, in which no tag comes back, does not stop it. SFT
    goes on all the same: its evaluations alone read the tag."""
    trainer = sound_rl(tmp_path)
    trainer.policy.tokenizer.add_tokens([AddedToken("<back>", rstrip=True, special=True)])
    result = found(trainer)["tags"]
    assert result.status == "warning"
    assert "'<back> ' comes back from the tokenizer as '<back>'" in result.found
    for make, status in ((sound_rl, "failed"), (small_sft, "warning")):
        trainer = make(tmp_path, rubric=brpo_rubric())
        trainer.policy.tokenizer.backend_tokenizer.normalizer = Lowercase()
        result = found(trainer)["tags"]
        assert result.status == status
        assert "'<SUMMARY>' comes back from the tokenizer as '<summary>'" in result.found


def test_a_stop_that_is_never_sampled_is_told(tmp_path: Path) -> None:
    """Bug: a text that would end an answer, and never comes, stops the run, which it does not harm."""
    sampling = dataclasses.replace(HOT, stop=("<|image_pad|>",))
    result = found(sound_rl(tmp_path, sampling=sampling))["tags"]
    assert result.status == "warning"
    assert "stands for pixels" in result.found


@pytest.mark.parametrize(
    ("trigger", "says"),
    [("<|image_pad|>", "stands for pixels"), ("<|im_end|>", "ends the answer, so nothing can follow")],
)
def test_a_trigger_that_can_never_work_fails(trigger: str, says: str, tmp_path: Path) -> None:
    """Bug: a run with re-attention that never inserts anything, and does not say so."""
    result = found(sound_rl(tmp_path, reattention=VisualCopy(trigger=trigger)))["tags"]
    assert result.status == "failed"
    assert says in result.found


@pytest.mark.parametrize("make", [sound_rl, small_sft, small_distiller])
def test_a_trigger_that_nothing_asks_for_is_told(make: Any, tmp_path: Path) -> None:
    """Bug: `<REFLECTION>` is waited for by a policy that was only ever told of `<back>`."""
    result = found(make(tmp_path, reattention=VisualCopy(trigger="<look>")))["tags"]
    assert result.status == "warning"
    assert "the trigger '<look>' of reattention" in result.found
    assert found(make(tmp_path, reattention=VisualCopy(trigger="<back>")))["tags"].status == "ok"


def test_a_layout_that_nothing_asks_for_is_told(tmp_path: Path) -> None:
    """Bug: a reward for tags that the policy has never heard of is 0 for ever."""
    result = found(sound_rl(tmp_path, instruction=Instruction(text="Think in <think>.")))["tags"]
    assert result.status == "warning"
    assert "does not name <back>, \\boxed, which the rewards demand" in result.found


def test_tags_say_how_they_are_spelled(tmp_path: Path) -> None:
    """Bug: a tag meant to be one special token is three pieces, and nobody sees it."""
    special = VisualCopy(trigger="<|box_start|>")
    asked = Instruction(text=f"{ASKED.text} <|box_start|>")
    result = found(sound_rl(tmp_path, reattention=special, instruction=asked))["tags"]
    assert "one special token each: <|box_start|>; in pieces: <think> 4" in result.found


# -- the end of answers ---------------------------------------------------------------------------


def test_a_budget_that_no_right_answer_fits_in_fails(tmp_path: Path) -> None:
    """Bug: every answer is cut off, every reward 0, and the run looks as if it trained."""
    result = found(sound_rl(tmp_path, sampling=SamplingParams(max_tokens=5)))["answer end"]
    assert result.status == "failed"
    assert "8 of 8 short right answers are longer than sampling.max_tokens=5" in result.found


def test_an_end_that_cannot_be_sampled_fails(tmp_path: Path) -> None:
    """Bug: tokenizer and model of two families: no answer ever ends."""
    trainer = sound_rl(tmp_path)
    trainer.policy.__dict__["end_ids"] = (trainer.policy.vision.pad,)
    assert "can never be sampled" in found(trainer)["answer end"].found


def test_a_budget_that_a_bare_answer_fits_in_is_told(tmp_path: Path) -> None:
    r"""Bug: a budget for the box, not for the layout, stops the run, though accuracy can be earned; or a run
    that learns from a reward of its own too. `\boxed{7}` has 6 tokens, and one more is the end."""
    own = look_back_rubric(look_back(), extra={"own": per_rollout(lambda _: 0.3)}, extra_weights={"own": 1.0})
    for budget, judged, status in ((6, BACK, "warning"), (5, BACK, "failed"), (5, own, "warning")):
        trainer = sound_rl(tmp_path, sampling=SamplingParams(max_tokens=budget), rubric=judged)
        assert states(trainer)["answer end"] == status


# -- gold answers ---------------------------------------------------------------------------------


def test_a_reward_that_reads_elsewhere_is_told(tmp_path: Path) -> None:
    """Bug: the layout has the answer in a box, accuracy looks for it in a block. That is told and no more:
    of the texts that a layout allows one of ours is tried."""
    judged = Rubric(
        rewards={"accuracy": Accuracy(answer_from="CONCLUSION"), "format": TagFormat(layout=grpo())},
        weights={"accuracy": 1.0, "format": 1.0},
    )
    result = found(sound_rl(tmp_path, rubric=judged))["gold answers"]
    assert result.status == "warning"
    assert "reward 'format' gives 0, not 1, on 8 of 8 gold answers" in result.found


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("{1, 2", "reward 'accuracy' gives 0, not 1, on 8 of 8 gold answers, first row 'digits-train-4'"),
        (" ", "reward 'accuracy' fails on 8 of 8 gold answers, first on row 'digits-train-4': ValueError"),
    ],
)
def test_gold_answers_that_their_grader_cannot_read_fail(answer: str, says: str, tmp_path: Path) -> None:
    """Bug: a brace that is never closed ends no box: RL with reward 0 whatever is answered."""
    trainer = sound_rl(tmp_path, data=answering(answer))
    result = found(trainer)["gold answers"]
    assert result.status == "failed"
    assert says in result.found
    assert (
        trainer.rubric.state() == look_back_rubric(look_back()).state()
    )  # no failure of the run's is counted


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ("three", "number", "is no number, which Accuracy.kind says it is"),
        ("We add them up.\n#### 7", "auto", "has 22 characters: only the same words are right"),
    ],
)
def test_gold_answers_that_must_be_repeated_word_for_word_are_told(
    answer: str, kind: Any, says: str, tmp_path: Path
) -> None:
    """Bug: whole solutions in the answer's column: nobody ever writes the same."""
    judged = look_back_rubric(look_back(), accuracy=Accuracy(kind=kind))
    result = found(sound_rl(tmp_path, rubric=judged, data=answering(answer)))["gold answers"]
    assert result.status == "warning"
    assert says in result.found


def test_gold_answers_written_out_are_scored_as_they_are(tmp_path: Path) -> None:
    """Bug: a cold start on traces that its own evaluation gives no point, without a word; or one that is
    stopped for it, though training does not use the rubric."""

    def spoilt(number: int, sample: Sample) -> Sample:
        if number not in wrong:
            return sample
        return dataclasses.replace(sample, columns={**sample.columns, "trace": "It is \\boxed{none}"})

    wrong: Sequence[int] = range(12)
    result = found(small_sft(tmp_path, rubric=BACK, data=Rows(spoilt)))["gold answers"]
    assert result.status == "warning"
    assert "reward 'accuracy' gives 0, not 1, on 8 of 8 gold answers" in result.found
    wrong = range(6)
    assert found(small_sft(tmp_path, rubric=BACK, data=Rows(spoilt)))["gold answers"].status == "warning"
    repaired = small_distiller(tmp_path, data=Rows(spoilt), wrong="repair")
    assert found(repaired)["gold answers"].status == "warning"
    assert states(small_distiller(tmp_path, data=Rows(spoilt)))["gold answers"] == "ok"
    unused = small_sft(tmp_path, rubric=BACK, data=Rows(spoilt), evaluation=None, test=None)
    assert found(unused)["gold answers"].status == "not applicable"


def test_rewards_of_ones_own_are_not_judged_but_must_not_fail(tmp_path: Path) -> None:
    """Bug: a guess at what an unknown reward should give stops a sound run; or a reward that raises on every
    answer is found out after hours of rollouts."""

    def broken(rollout: Rollout) -> float:
        return float(rollout.prompt.sample.columns["level"])

    assert states(small_rl(tmp_path))["gold answers"] == "not applicable"
    both = Rubric(
        rewards={"own": per_rollout(lambda _: 0.3), "accuracy": Accuracy()},
        weights={"own": 1.0, "accuracy": 1.0},
    )
    result = found(sound_rl(tmp_path, rubric=both))["gold answers"]
    assert result.status == "ok"
    assert "what earns full marks from own is not known" in result.found
    for weight, status in ((1.0, "warning"), (0.0, "ok")):
        failing = Rubric(
            rewards={"own": per_rollout(broken), "accuracy": Accuracy()},
            weights={"own": weight, "accuracy": 1.0},
        )
        result = found(sound_rl(tmp_path, rubric=failing))["gold answers"]
        assert result.status == status
    assert states(sound_rl(tmp_path, rubric=lambda group: group))["gold answers"] == "not applicable"


def test_6_a_reward_that_compares_its_group_is_asked_about_one(tmp_path: Path) -> None:
    """Bug: a reward that normalises over its group is asked about one answer alone, fails, and the run is
    stopped. It gets a group as large as the run's, but of at most 8."""
    sizes: list[int] = []

    def own(group: Sequence[Rollout]) -> list[float]:
        sizes.append(len(group))
        spread = statistics.stdev(len(rollout.text) for rollout in group)
        return [1 / (1 + spread) for _ in group]

    judged = Rubric(rewards={"own": own, "accuracy": Accuracy()}, weights={"own": 1.0, "accuracy": 1.0})
    for make, name in ((sound_rl, "group_size"), (small_distiller, "samples_per_row")):
        for size in (3, 20):
            given = {"rubric": judged, name: size} | (
                {"accept": {"accuracy": 1.0}} if make is small_distiller else {}
            )
            assert states(make(tmp_path, **given))["gold answers"] == "ok"
    assert sizes == [3, 3, 8, 8] * 2
    result = found(small_sft(tmp_path, rubric=judged))["gold answers"]  # its evaluations have groups of one
    assert result.status == "warning"
    assert "StatisticsError" in result.found


def test_6_a_class_made_from_one_of_ours_is_the_users(tmp_path: Path) -> None:
    """Bug: a subclass that gives half a point is held to full marks."""

    class Half(Accuracy):
        def __call__(self, group: Sequence[Rollout], /) -> list[float]:
            return [0.5 for _ in group]

        def many(self, groups: Sequence[Sequence[Rollout]], /) -> list[Any]:
            return [self(group) for group in groups]

    judged = Rubric(rewards={"half": Half()}, weights={"half": 1.0})
    assert states(sound_rl(tmp_path, rubric=judged))["gold answers"] == "not applicable"


def test_8_sft_on_plain_gold_answers_goes_on(tmp_path: Path) -> None:
    """Bug: answers without a box are refused though training does not use the rubric; or rows of SFT that
    state no answer apart from the one written out are."""
    judged = Rubric(rewards={"accuracy": Accuracy()}, weights={"accuracy": 1.0})

    def plain(_: int, sample: Sample) -> Sample:
        return dataclasses.replace(
            sample, columns={**sample.columns, "trace": f"The answer is {sample.answer}."}
        )

    result = found(small_sft(tmp_path, rubric=judged, data=Rows(plain)))["gold answers"]
    assert result.status == "warning"
    assert "reward 'accuracy' gives 0, not 1, on 8 of 8 gold answers" in result.found
    assert states(small_sft(tmp_path, rubric=judged, data=answering("")))["gold answers"] == "not applicable"


@pytest.mark.parametrize("odd", ["", "}"])
def test_9_one_odd_row_is_told(odd: str, tmp_path: Path) -> None:
    """Bug: one row of eight without an answer, or with one that its grader cannot read, stops the run. Seven
    such rows do not prove either that no answer can be right; eight do."""

    def change(number: int, sample: Sample) -> Sample:
        return dataclasses.replace(sample, answer=odd) if number in rows else sample

    rows: Sequence[int] = (4,)  # the first that is read
    result = found(sound_rl(tmp_path, data=Rows(change)))["gold answers"]
    assert result.status == "warning"
    assert "on 1 of 8 gold answers" in result.found
    assert "digits-train-4" in result.found
    rows = [number for number in range(12) if number != 4]
    assert states(sound_rl(tmp_path, data=Rows(change)))["gold answers"] == "warning"
    rows = range(12)
    assert states(sound_rl(tmp_path, data=Rows(change)))["gold answers"] == "failed"


def test_9_a_few_rows_of_many_prove_nothing(tmp_path: Path) -> None:
    """Bug: data of which most is left out is judged by the one row that is not; or a run is stopped because
    graders were killed on a busy machine."""

    def change(number: int, sample: Sample) -> Sample:
        if number != 4:
            raise BadRow(f"rows.jsonl:{number}", "images", "image missing", "Put it back.")
        return dataclasses.replace(sample, answer="{1, 2")

    result = found(sound_rl(tmp_path, data=Rows(change)))["gold answers"]
    assert result.status == "warning"
    assert "on 1 of 1 gold answers" in result.found
    subject, part = Subject.of(sound_rl(tmp_path)), Part(name="a", weight=1.0, reward=Accuracy())
    for killed, hopeless in ((8, False), (5, False), (4, True)):
        marks = _Marks(part, (), [math.nan] * killed + [0.0] * (8 - killed), {}, killed, 1)
        assert _hopeless(subject, marks) == hopeless


def test_a_box_in_a_layout_without_any_required_block(tmp_path: Path) -> None:
    """Bug: the text of ours stands beside the blocks, where nothing may stand, and the reward is blamed."""
    layout = Layout(name="free", blocks=(Block("think", min=0),))
    assert answer_text("7", layout, ("boxed",)) == "<think>\\boxed{7}</think>"
    assert states(sound_rl(tmp_path, rubric=look_back_rubric(layout)))["gold answers"] == "ok"


def test_every_rubric_of_the_library_is_known(tmp_path: Path) -> None:
    """Bug: a rubric whose gold answers nobody checks."""
    one = Rubric(rewards={"r": BackReward(layout=look_back())}, weights={"r": 1.0})
    for judged in (one, brpo_rubric(), look_back_rubric(grpo()), brpo_rubric(balance_weight=0.0)):
        assert found(sound_rl(tmp_path, rubric=judged))["gold answers"].status == "ok"


TAGS = st.sampled_from(["a", "think", "END"])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    def block(tag: str) -> Block:
        least = draw(st.integers(0, 2))
        return Block(tag, min=least, max=draw(st.sampled_from([None, max(least, 1)])), allow_empty=tag == "a")

    fixed = draw(st.lists(TAGS, min_size=1, max_size=3, unique=True))
    floating = draw(st.lists(st.sampled_from(["see", "look"]), max_size=2, unique=True))
    where = draw(st.sampled_from(["box", "tag", "none"]))
    blocks = tuple(map(block, fixed))
    if where == "tag":
        blocks = (*blocks, Block("answer"))
    return Layout(
        name="any",
        blocks=blocks,
        floating=tuple(map(block, floating)),
        boxed=where == "box",
        answer_tag="answer" if where == "tag" else None,
        free_text=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=150)
@given(layout=layouts(), boxed=st.booleans())
def test_the_text_made_for_a_layout_is_valid_in_it(layout: Layout, boxed: bool) -> None:
    """Bug: a text of ours that is not in the layout blames a sound run."""
    where = ("boxed",) if boxed and not layout.answer_tag else (layout.answer_tag,) * bool(layout.answer_tag)
    text = answer_text("7", layout, where)
    parsed = parse(layout, text)
    assert parsed.valid, (text, parsed.problem)
    if where:
        accuracy = Accuracy(answer_from=where[0])
        assert accuracy.is_right(text, "7")


# -- rows -----------------------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Bug: the row that ends a run is the first to be read after the model was loaded and evaluated."""

    def holes(number: int, sample: Sample) -> Sample:
        if number in gone:
            raise BadRow(f"rows.jsonl:{number}", "images", "image missing", "Put it back.")
        return sample

    gone: Sequence[int] = (4,)
    result = found(sound_rl(tmp_path, data=Rows(holes)))["rows"]
    assert result.status == "warning"
    assert "1 of the first 8 rows cannot be used: rows.jsonl:4: image missing" in result.found
    strict = {"row_rules": RowRules(on_bad="error")}
    assert found(sound_rl(tmp_path, data=Rows(holes), **strict))["rows"].status == "failed"
    # Of much that is left out the first rows may all be: as long as one can be used, the run goes on.
    gone = [number for number in range(12) if number != 5]
    result = found(sound_rl(tmp_path, data=Rows(holes)))["rows"]
    assert result.status == "warning"
    assert found(sound_rl(tmp_path, data=Rows(holes), **strict))["rows"].status == "failed"
    gone = range(12)
    results = states(sound_rl(tmp_path, data=Rows(holes)))
    assert (results.pop("rows"), results.pop("weights")) == ("failed", "ok")
    assert set(results.values()) == {"not applicable"}


def test_long_rows_are_named(tmp_path: Path) -> None:
    """Bug: a limit below every prompt is found out when the data has been gone through."""
    result = found(sound_rl(tmp_path, max_prompt_tokens=20))["rows"]
    assert result.status == "failed"
    assert "12 of the first 12" in result.found
    assert "max_prompt_tokens is 20" in result.found


def test_data_that_breaks_is_a_finding(tmp_path: Path) -> None:
    """Bug: a reader of the user's own with a bug hides what else is wrong."""

    def broken(number: int, sample: Sample) -> Sample:
        raise KeyError(number, sample.id)

    assert "KeyError: (" in found(sound_rl(tmp_path, data=Rows(broken)))["rows"].found


# -- before a run ---------------------------------------------------------------------------------


def test_a_failed_check_stops_the_run_with_one_line(tmp_path: Path) -> None:
    """Bug: a failed check is printed, and the run goes on for days."""
    said: list[str] = []
    with pytest.raises(
        CheckFailed, match=r"A check at the start failed\. answer end: .*output\.checks=false"
    ):
        check_start(sound_rl(tmp_path, sampling=SamplingParams(max_tokens=5)), said.append)
    assert said == []


def test_warnings_are_said_and_the_run_goes_on(tmp_path: Path) -> None:
    """Bug: a warning that nobody sees, or one that stops the run."""
    said: list[str] = []
    check_start(sound_rl(tmp_path, reattention=VisualCopy(trigger="<look>")), said.append)
    assert said[0].startswith("warning  tags  ")
    assert "name it in the instruction" in said[1]
    assert said[2].startswith("checks: 6 ok, 1 warning in ")


def test_lines_stand_below_each_other() -> None:
    """Bug: a remedy that cannot be told from the next check."""
    results = [Result("rows", "ok", "8 rows"), Result("gold answers", "failed", "none", "Repair it.")]
    assert lines(results) == [
        "ok      rows          8 rows",
        "FAILED  gold answers  none",
        "                      Repair it.",
    ]


# -- nothing to learn from ------------------------------------------------------------------------


def test_steps_without_any_signal_are_told_once() -> None:
    """Bug: RL runs for days on groups whose rewards are all equal; or says so at every step."""
    counter = NoSignal(patience=3)
    told = [counter.after(step, 0.0) for step in range(1, 8)]
    assert [step for step, text in enumerate(told, 1) if text] == [3]
    assert "up to step 3" in str(told[2])
    late = NoSignal(patience=3)
    assert [late.after(step, 0.1 * (step == 2)) for step in range(1, 9)] == [None] * 8


def test_batches_without_a_good_answer_are_told_once() -> None:
    """Bug: a distillation that copies the gold answers and asks the model in vain. Batches whose rows were
    all left out say nothing about the model."""
    counter = NothingKept(patience=2)
    told = [counter.after(1, 0, 0, 0), counter.after(2, 4, 0, 4), counter.after(3, 0, 0, 0)]
    assert told == [None] * 3
    assert "all rows are gold answers" in str(counter.after(4, 4, 0, 4))
    assert counter.after(5, 4, 0, 4) is None
    assert "there are no rows" in str(NothingKept(patience=1).after(1, 4, 0, 0))
    kept = NothingKept(patience=2)
    assert [kept.after(batch, 4, int(batch == 1), 3) for batch in (1, 2, 3)] == [None] * 3
