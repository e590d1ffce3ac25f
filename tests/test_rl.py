"""The RL step: which groups it trains on, and what it survives."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reflectvlm.advantages import GroupMean
from reflectvlm.data.digits import Digits
from reflectvlm.data.rows import BadRow
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.objectives import ClippedSurrogate
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.rl import DynamicSampling, RLTrainer
from reflectvlm.train.update import NonFinite
from reflectvlm.types import Rollout, Sample, SamplingParams
from training import remainder, small_rl, small_sft


def trainer_with(tmp_path: Path, reward: Any, **changes: Any) -> RLTrainer:
    rubric = Rubric(rewards={"reward": reward}, weights={"reward": 1.0})
    return small_rl(tmp_path, **{"rubric": rubric, "updates_per_step": 1, "epochs_per_step": 1} | changes)


def weights(trainer: RLTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.module.parameters()]


def moved(trainer: RLTrainer, before: Sequence[torch.Tensor]) -> bool:
    return any(not bool((a == b).all()) for a, b in zip(before, weights(trainer), strict=True))


def test_equal_rewards_move_nothing(tmp_path: Path) -> None:
    """Bug: a group that teaches nothing becomes NaN, or moves weights by decay alone."""
    trainer = trainer_with(tmp_path, per_rollout(lambda _: 1.0))
    before = weights(trainer)
    metrics = trainer.step(0).metrics
    assert metrics["useful_groups"] == 0
    assert "loss" not in metrics
    assert metrics["lr"] == pytest.approx(1e-3)  # of step 0, although no weight moved by it
    assert not moved(trainer, before)


def test_a_reward_that_raises_is_named_and_survived(tmp_path: Path, caplog: Any) -> None:
    """Bug: one bad row ends a run of days, or its rollouts count as wrong answers."""

    @per_rollout
    def fragile(rollout: Rollout) -> float:
        if rollout.prompt.sample.id == "digits-train-1":
            raise ZeroDivisionError("no denominator")
        return remainder(rollout)

    trainer = trainer_with(tmp_path, fragile, data=Digits(), prompts_per_step=3)
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        result = trainer.step(0)
    assert "digits-train-1" in caplog.text
    assert "no denominator" in caplog.text
    assert [any(group.scored) for group in result.groups].count(False) == 1
    assert result.metrics["unscored"] == pytest.approx(1 / 3)
    assert torch.isfinite(torch.tensor(result.metrics["loss"]))


def test_a_run_in_which_nothing_is_scored_stops(tmp_path: Path) -> None:
    """Bug: a reward that fails on every rollout trains nothing, and the run ends well."""

    @per_rollout
    def broken(_: Rollout) -> float:
        raise AttributeError("no such thing")

    trainer = trainer_with(tmp_path, broken, steps=9, evaluation=None, test=None, output={"checks": False})
    with pytest.raises(
        RuntimeError, match=r"All rollouts of 3 steps in a row are unscored.*Repair the reward"
    ):
        trainer.run()
    # A run shorter than that must not end well either.
    short = trainer_with(tmp_path, broken, steps=1, evaluation=None, test=None, output={"checks": False})
    with pytest.raises(RuntimeError, match=r"All rollouts of 1 step in a row"):
        short.run()


def test_steps_without_a_score_are_counted_in_a_row(tmp_path: Path) -> None:
    """Bug: three steps without a score, spread over days, end a run."""
    answers = iter([math.nan, math.nan, 1.0, math.nan, math.nan, 1.0])

    def sometimes(group: Sequence[Rollout]) -> list[float | None]:
        value = next(answers)
        return [value] * len(group)

    trainer = trainer_with(tmp_path, sometimes, steps=9, prompts_per_step=1)
    metrics = [trainer.step(step).metrics for step in range(6)]
    assert [one["unscored"] for one in metrics] == [1, 1, 0, 1, 1, 0]
    # NaN, which is shown as a dash, and not 0, which is a value.
    assert [math.isnan(one["reward/reward"]) for one in metrics] == [True, True, False, True, True, False]


def test_f1_a_reward_that_seldom_applies_is_no_failure(tmp_path: Path, caplog: Any) -> None:
    """Bug: an honest sparse reward, None on most rows, ends a run as one that always fails."""
    given = iter([None] * 14 + [1.0] + [None] * 14)
    trainer = trainer_with(tmp_path, lambda rows: [next(given)] * len(rows), steps=29, prompts_per_step=1)
    metrics = [trainer.step(step).metrics["unscored"] for step in range(29)]
    assert sum(metrics) == 28
    (told,) = [text for text in caplog.messages if "No reward applied" in text]
    assert "of 10 steps in a row" in told
    assert "a reward that always applies" in told


def test_f1_steps_to_which_nothing_applies_do_not_hide_a_broken_reward(tmp_path: Path) -> None:
    """Bug: a reward that fails wherever it applies trains nothing, and the run ends well."""
    given = iter([math.nan, None, None, math.nan, None, math.nan])
    trainer = trainer_with(tmp_path, lambda rows: [next(given)] * len(rows), steps=29, prompts_per_step=1)
    for step in range(5):
        trainer.step(step)
    with pytest.raises(RuntimeError, match="All rollouts of 3 steps"):
        trainer.step(5)


def test_f1_a_measure_that_fails_is_not_why_a_step_is_unscored(tmp_path: Path) -> None:
    """Bug: a reward of weight 0, which is only measured, ends the run."""
    rewards: dict[str, Any] = {
        "sparse": lambda rows: [None] * len(rows),
        "measure": lambda rows: [math.nan] * len(rows),
    }
    rubric = Rubric(rewards=rewards, weights={"sparse": 1.0, "measure": 0.0})
    trainer = small_rl(tmp_path, rubric=rubric, steps=9)
    for step in range(5):
        assert trainer.step(step).metrics["unscored"] == 1


def test_f5_a_run_whose_answers_are_all_cut_stops(tmp_path: Path) -> None:
    """Bug: with drop_truncated and too few tokens every answer is left out, for days."""
    trainer = trainer_with(tmp_path, per_rollout(remainder), drop_truncated=True, steps=9)
    whole = trainer.rollouts
    trainer.rollouts = lambda *asked: [  # type: ignore[method-assign]
        tuple(dataclasses.replace(one, stop="length") for one in rows) for rows in whole(*asked)
    ]
    for step in range(2):
        trainer.step(step)
    with pytest.raises(RuntimeError, match=r"drop_truncated left all answers out.*raise sampling.max_tokens"):
        trainer.step(2)


class Breaking(list[Sample]):
    """Rows of which some cannot be read."""

    broken: Sequence[int] = ()

    def __getitem__(self, index: Any) -> Any:
        if index in self.broken:
            raise BadRow(f"rows.jsonl:{index}", "images", "the file is gone", "Put it back.")
        return super().__getitem__(index)


def test_e2_a_bad_row_of_an_evaluation_is_wrong_and_told(tmp_path: Path, caplog: Any) -> None:
    """Bug: an image of the test rows that has gone since ends a run, days in; or raises its accuracy."""
    data = Breaking(Digits(split="validation", size=4))
    trainer = trainer_with(tmp_path, per_rollout(remainder))
    evaluation = Evaluation(data=data, max_tokens=4)
    assert "missing" not in trainer.evaluate(evaluation)[0]
    data.broken = (2,)
    for _ in range(2):
        values, groups = trainer.evaluate(evaluation)
        assert (values["missing"], len(groups)) == (1.0, 3)
    assert caplog.text.count("row of an evaluation that counts as wrong: rows.jsonl:2") == 1
    assert evaluation.notes(values)[-1].startswith("not asked, and wrong: rows.jsonl:2: the file is gone")
    strict = {"accuracy": 0.5, "strict/unscored": 0.25}
    assert "all 4 rows, of which 25.0% could not be graded and are left out" in evaluation.notes(strict)[0]
    assert "official" not in " ".join(evaluation.notes(values))
    told = evaluation.notes({"official/f1": 0.5, "official/unscored": 0.5, "strict/f1": 0.4})[0]
    assert told.startswith("official/…: by the benchmark's own rule, without the language model")
    assert "so 50.0% of the rows could not be graded" in told
    assert told.endswith("strict/f1: the same figure by the strict scorer")
    data.broken = range(4)
    with pytest.raises(ValueError, match=r"None of the 4 rows of an evaluation.*rows.jsonl:3.*Repair"):
        trainer.evaluate(evaluation)
    # One that the image processor refuses: 300 pixels by 1.
    odd = dataclasses.replace(Digits()[0], id="odd", images=(Image.new("RGB", (300, 1)),))
    values, _ = trainer.evaluate(Evaluation(data=[Digits()[0], odd], max_tokens=4))
    assert values["missing"] == 1.0
    assert "It cannot be shown to the policy" in caplog.text

    class Gone(list[Sample]):
        """A reader of the user's own that knows nothing of BadRow."""

        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise FileNotFoundError("page-1.png")
            return super().__getitem__(index)

    values, _ = trainer.evaluate(Evaluation(data=Gone(Digits(size=3)), max_tokens=4))
    assert values["missing"] == 1.0
    assert "row 1 of the data: It cannot be read: FileNotFoundError: page-1.png" in caplog.text


def test_an_evaluation_can_be_given_up_while_it_reads(tmp_path: Path) -> None:
    """Bug: a stop waits until the images of all test rows have been read."""
    trainer = trainer_with(tmp_path, per_rollout(remainder))
    read: list[int] = []

    class Slow(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            read.append(index)
            return super().__getitem__(index)

    slow = Evaluation(data=Slow(Digits(size=9)), max_tokens=4)
    with pytest.raises(Abandoned), abandonable(lambda: len(read) >= 3):
        trainer.evaluate(slow)
    assert read == [0, 1, 2]


def test_unscored_rollouts_enter_no_batch(tmp_path: Path) -> None:
    """Bug: a rollout without a reward is trained on with advantage 0, and dilutes the token mean."""
    trainer = trainer_with(tmp_path, per_rollout(remainder))
    group = trainer.sample_groups(0)[0]
    cut = dataclasses.replace(group, scored=(True, False, True))
    assert len(trainer.batch([cut])) == 2
    assert len(trainer.batch([group])) == 3


def test_dynamic_sampling_fills_up_with_groups_that_differ(tmp_path: Path) -> None:
    """Bug: DAPO's filter is a setting that does nothing."""

    @per_rollout
    def every_third_prompt(rollout: Rollout) -> float:
        number = int(rollout.prompt.sample.id.rsplit("-", 1)[1])
        return remainder(rollout) if number % 3 == 2 else 0.0

    plain = trainer_with(tmp_path, every_third_prompt, data=Digits(), prompts_per_step=2)
    assert plain.step(0).metrics["useful_groups"] <= 0.5
    filled = trainer_with(
        tmp_path,
        every_third_prompt,
        data=Digits(),
        prompts_per_step=2,
        dynamic_sampling=DynamicSampling(max_rounds=6),
    )
    assert filled.step(0).metrics["useful_groups"] == 1.0
    assert filled.position >= 6
    assert len(filled.row_ids) == filled.position  # a saved batch names the rows of every round


def test_overlong_filtering_leaves_out_what_was_cut(tmp_path: Path) -> None:
    """Bug: with every rollout truncated the filter divides by nothing, or trains all the same."""
    trainer = trainer_with(
        tmp_path, per_rollout(remainder), drop_truncated=True, sampling=SamplingParams(max_tokens=1)
    )
    before = weights(trainer)
    result = trainer.step(0)
    assert result.metrics["truncated"] > 0.5
    assert result.metrics["unscored"] == pytest.approx(result.metrics["truncated"])
    assert result.metrics["truncated"] < 1 or not moved(trainer, before)


def test_over_long_prompts_are_named_and_passed_over(tmp_path: Path, caplog: Any) -> None:
    """Bug: a prompt is cut inside its image, or dropped without a word."""
    long = dataclasses.replace(Digits()[0], id="long-row", question="why " * 300)
    trainer = trainer_with(
        tmp_path, per_rollout(remainder), data=[long, *Digits(size=3)], max_prompt_tokens=200
    )
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        ids = [prompt.sample.id for _ in range(2) for prompt in trainer.next_prompts(2)]
    assert "long-row" not in ids
    assert "long-row left out: its prompt has" in caplog.text
    nothing = trainer_with(tmp_path, per_rollout(remainder), data=[long], max_prompt_tokens=200)
    with pytest.raises(ValueError, match=r"2 rows in a row could not be used.*max_prompt_tokens=200"):
        nothing.next_prompts(1)


def test_several_updates_take_equal_shares(tmp_path: Path) -> None:
    """Bug: mini-batches of one rollout phase differ in size, or later ones reuse new log-probs."""
    trainer = small_rl(tmp_path, prompts_per_step=4, updates_per_step=2, epochs_per_step=3)
    seen = []
    take = trainer.updater.__class__.__call__

    def spy(self: Any, batch: Any, lr: float) -> dict[str, float]:
        seen.append((len(batch), batch.old_logprobs.clone()))
        return take(self, batch, lr)

    trainer.updater.__class__.__call__ = spy  # type: ignore[method-assign]
    try:
        trainer.step(0)
    finally:
        trainer.updater.__class__.__call__ = take  # type: ignore[method-assign]
    assert trainer.updates == 6
    assert [rows for rows, _ in seen] == [6] * 6
    assert torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[1][1], seen[5][1])


def test_ratio_is_one_before_the_first_update(tmp_path: Path) -> None:
    """Bug: engine and trainer disagree (temperature, banned ids, positions), so GRPO is biased."""
    for temperature in (0.6, 1.0, 1.4):
        trainer = trainer_with(
            tmp_path, per_rollout(remainder), sampling=SamplingParams(max_tokens=12, temperature=temperature)
        )
        assert trainer.step(0).metrics["ratio_gap"] < 1e-4


def test_nan_stops_with_the_batch_saved(tmp_path: Path) -> None:
    """Bug: training goes on with NaN weights, or stops with nothing to look at."""
    trainer = small_rl(tmp_path, output={"checks": False}, test=None, evaluation=None)
    taken = trainer.step

    def poisoned(step: int) -> Any:
        if step == 2:
            with torch.no_grad():
                trainer.policy.model.model.language_model.norm.weight.fill_(float("inf"))
            trainer.sample_groups = lambda _: healthy  # type: ignore[method-assign]
        return taken(step)

    healthy = trainer.sample_groups(0)
    trainer.step = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFinite, match=r"Step 3, batch saved in .*nonfinite-step-3"):
        trainer.run()
    about = json.loads((tmp_path / "rl" / "nonfinite-step-3" / "batch.json").read_text())
    assert "not finite" in about["reason"]
    assert (tmp_path / "rl" / "nonfinite-step-3" / "batch.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0. It must be at least 1"),
        ({"group_size": 0}, "group_size is 0"),
        ({"prompts_per_step": 3, "updates_per_step": 2}, "does not divide prompts_per_step=3"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    """Bug: a setting that makes no sense trains something else."""
    with pytest.raises(ValueError, match=message):
        small_rl(tmp_path, **changes)


def test_sft_names_a_row_it_cannot_train_on(tmp_path: Path) -> None:
    """Bug: a row without a gold answer trains on the text "None"."""
    bare = [Sample(id="row-9", question="q", answer="1", images=Digits()[0].images)]
    with pytest.raises(ValueError, match="'row-9' has no text in its column 'trace'"):
        small_sft(tmp_path, data=bare).step(0)
    spelled = [dataclasses.replace(bare[0], columns={"trace": "a <|image_pad|> b"})]
    with pytest.raises(ValueError, match="stands for pixels"):
        small_sft(tmp_path, data=spelled).step(0)
    with pytest.raises(ValueError, match="more than max_tokens=20"):
        small_sft(tmp_path, max_tokens=20).step(0)


def test_rl_learns_what_is_rewarded(tmp_path: Path) -> None:
    """Bug: a sign error anywhere between reward and update. A random policy learns to say more of
    one token within a few steps."""
    token = 300

    @per_rollout
    def share(rollout: Rollout) -> float:
        return rollout.sampled_ids.count(token) / len(rollout.sampled_ids)

    trainer = trainer_with(
        tmp_path,
        share,
        group_size=16,
        prompts_per_step=2,
        objective=ClippedSurrogate(),
        advantage=GroupMean(),
        sampling=SamplingParams(max_tokens=16),
        steps=60,
        optimizer=dataclasses.replace(small_rl(tmp_path).optimizer, lr=3e-3, schedule="constant"),
    )
    rewards = [trainer.step(step).metrics["reward"] for step in range(60)]
    assert sum(rewards[-5:]) / 5 > 0.1 + sum(rewards[:5]) / 5


def test_equal_groups_stay_in_the_mean_when_asked(tmp_path: Path) -> None:
    """Bug: GRPO's token mean and KL silently leave out the groups whose rewards are all equal."""

    @per_rollout
    def second_prompt_only(rollout: Rollout) -> float:
        return remainder(rollout) if rollout.prompt.sample.id.endswith("1") else 1.0

    rows = {}
    for keep in (False, True):
        trainer = trainer_with(tmp_path, second_prompt_only, data=Digits(), keep_equal_groups=keep)
        counted = trainer.sample_groups(0)
        trained = [g for g in counted if any(g.scored)] if keep else [g for g in counted if g.has_signal]
        rows[keep] = len(trainer.batch(trained))
        trainer.position = 0
        assert "loss" in trainer.step(0).metrics
    assert rows == {False: 3, True: 6}


def test_a_row_that_breaks_during_the_run_is_passed_over(tmp_path: Path, caplog: Any) -> None:
    """Bug: an image deleted after the first scan ends a run of days."""

    class Breaking(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            if index == 0:
                raise BadRow("rows.jsonl:1", "images", "the file is gone", "Put it back.")
            return super().__getitem__(index)

    trainer = trainer_with(tmp_path, per_rollout(remainder), data=Breaking(Digits(size=4)))
    with caplog.at_level(logging.WARNING, "reflectvlm"):
        ids = {prompt.sample.id for prompt in trainer.next_prompts(4)}
    assert "rows.jsonl:1" in caplog.text
    assert len(ids) == 3
