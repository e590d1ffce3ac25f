"""Checks at the start: weights, sight, and whether engine and trainer agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checking import HOT, Changed, found, small_distiller, sound_rl, states
from fixtures import make_prompt
from reflectvlm.models.qwen_vl import load_policy
from reflectvlm.models.tiny import random_tiny
from reflectvlm.reattention import VisualCopy, VisualRoute
from reflectvlm.train.checks import Result, run_checks
from reflectvlm.types import Rollout, SamplingParams, Text, Visual
from training import small_sft

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


def test_parity_stops_training_by_rewards_alone(tmp_path: Path) -> None:
    """Bug: a distillation or a cold start, which never use the engine's log-probs, is stopped for them."""
    hot = {"sampling": lambda given: dataclasses.replace(given, temperature=1.0)}
    for make in (small_distiller, small_sft):
        result = found(make(tmp_path, engine=lambda policy: Changed(policy, **hot)))["engine"]
        assert result.status == "warning"
        assert "worst token" in result.found


def test_sft_without_evaluations_makes_no_engine(tmp_path: Path) -> None:
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
