"""Engines against each other and against the stock model's own generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fixtures import ShowAgain, favour, make_policy, make_prompt, score_batch, sequences_of
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.reattention import Implicit
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.spans import flatten
from reflectvlm.train.update import score_without_grad
from reflectvlm.types import Prompt, SamplingParams, Text, Visual

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def prompts(exact_policy: QwenVL) -> list[Prompt]:
    return [
        make_prompt(exact_policy, 0),
        make_prompt(exact_policy, 1, "Is <image> above <image>?", ((64, 48), (32, 80))),
        make_prompt(exact_policy, 2, "One and one?", ()),
    ]


def test_greedy_rollouts_are_stock_generation(exact_policy: QwenVL, prompts: list[Prompt]) -> None:
    """An oracle that shares nothing with the engine: the stock model's cache, positions and loop."""
    engine = InProcessEngine(policy=exact_policy)
    groups = engine.generate(prompts, 2, SamplingParams(max_tokens=12, temperature=0), Implicit(), seed=0)
    for prompt, group in zip(prompts, groups, strict=True):
        ids = torch.from_numpy(flatten(prompt.spans, prompt.grids, exact_policy.vision).ids)[None]
        pictures = {}
        if prompt.patches:
            grids = [(g.frames, 2 * g.rows, 2 * g.columns) for g in prompt.grids]
            pixels = torch.cat([patches.pixels for patches in prompt.patches])
            pictures = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
        exact_policy.model.model.rope_deltas = None
        made = exact_policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == exact_policy.vision.pad).int(),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=list(exact_policy.reserved_ids),
            **pictures,
        )
        stock = tuple(made[0, ids.shape[1] :].tolist())
        assert [rollout.sampled_ids for rollout in group] == [stock, stock]


@pytest.mark.parametrize("trigger", ["<|box_start|>", "a"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_script_of_sampled_texts_gives_the_same_rollouts(
    prompts: list[Prompt], trigger: str, temperature: float
) -> None:
    """Where the two engines put blocks, and what log-probs they state, must be one rule."""
    policy = favour(make_policy(dtype=torch.float64), ["<|box_start|>", "<|im_end|>"], 5)
    reattention = ShowAgain(trigger, keep=(1, 2))
    sampling = SamplingParams(max_tokens=16, temperature=temperature, stop=("st",))
    sampled = InProcessEngine(policy=policy).generate(prompts, 16, sampling, reattention, seed=3)
    # A text read back may be cut into other tokens than were sampled; compare where it is not.
    compared = 0
    for prompt, group in zip(prompts, sampled, strict=True):
        for rollout in group:
            script = ScriptedEngine(policy=policy, texts=(policy.decode(rollout.sampled_ids),))
            ((again,),) = script.generate([prompt], 1, sampling, reattention, seed=0)
            if again.sampled_ids != rollout.sampled_ids:
                continue
            compared += 1
            assert (again.stop, again.text) == (rollout.stop, rollout.text)
            assert len(again.spans) == len(rollout.spans)
            for a, b in zip(again.spans, rollout.spans, strict=True):
                if isinstance(a, Visual):
                    assert a == b
                    continue
                assert isinstance(b, Text)
                assert a.ids == b.ids
                assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < TOLERANCE
    assert compared >= 2


def test_scripts_are_taken_in_turn(exact_policy: QwenVL, prompts: list[Prompt]) -> None:
    script = ScriptedEngine(policy=exact_policy, texts=("one", "two <back>again</back>", "three"))
    groups = script.generate(prompts[:2], 2, SamplingParams(), Implicit(), seed=0)
    assert [[r.text for r in group] for group in groups] == [
        ["one", "two <back>again</back>"],
        ["three", "one"],
    ]
    assert groups[0][1].count("<back>") == 1
    assert {r.stop for group in groups for r in group} == {"eos"}
    named = ScriptedEngine(policy=exact_policy, texts=lambda prompt, m: f"{prompt.sample.answer} {m}")
    ((first, second),) = named.generate(prompts[:1], 2, SamplingParams(), Implicit(), seed=0)
    assert (first.text, second.text) == ("7 0", "7 1")
    assert named.generate([], 2, SamplingParams(), Implicit(), seed=0) == []


def test_scripts_end_as_samples_would(exact_policy: QwenVL, prompts: list[Prompt]) -> None:
    script = ScriptedEngine(policy=exact_policy, texts=("alpha beta gamma",))

    def end(sampling: SamplingParams) -> tuple[str, str]:
        ((rollout,),) = script.generate(prompts[:1], 1, sampling, Implicit(), seed=0)
        return rollout.text, rollout.stop

    assert end(SamplingParams()) == ("alpha beta gamma", "eos")
    text, reason = end(SamplingParams(max_tokens=2))
    assert reason == "length"
    assert "alpha beta gamma".startswith(text)
    text, reason = end(SamplingParams(stop=("beta",)))
    assert (text, reason) == ("alpha beta", "stop")
    last = exact_policy.tokenizer.encode("alpha")[-1]
    assert end(SamplingParams(stop_ids=(last,))) == ("alpha", "stop")


@pytest.mark.parametrize("trigger", ["<|box_start|>", "<back>"])
def test_scripts_insert_as_samples_would(exact_policy: QwenVL, prompts: list[Prompt], trigger: str) -> None:
    """Before a special trigger, behind the last piece of a plain one; not where nothing follows."""
    script = ScriptedEngine(policy=exact_policy, texts=(f"one {trigger}two",))
    ((rollout,),) = script.generate(prompts[:1], 1, SamplingParams(), ShowAgain(trigger), seed=0)
    before, block, after = rollout.spans
    assert isinstance(before, Text)
    assert isinstance(after, Text)
    decode, special = exact_policy.decode, trigger.startswith("<|")
    assert block == Visual(image=0, before_sampled=special)
    halves = ("one ", f"{trigger}two<|im_end|>") if special else (f"one {trigger}", "two<|im_end|>")
    assert (decode(before.ids), decode(after.ids)) == halves
    batch = exact_policy.batch([(rollout.prompt, rollout.spans)])
    assert (score_batch(exact_policy, batch).logprobs - batch.old_logprobs).abs().max() < TOLERANCE
    ended = SamplingParams(stop=(trigger,))
    ((short,),) = script.generate(prompts[:1], 1, ended, ShowAgain(trigger), seed=0)
    assert (short.insertions, short.stop) == ((), "stop")


@pytest.mark.parametrize("texts", [(), "one text"])
def test_a_script_without_texts_is_refused(exact_policy: QwenVL, texts: object) -> None:
    """A plain string would be replayed letter by letter."""
    with pytest.raises(ValueError, match="Give a sequence of one or more texts"):
        ScriptedEngine(policy=exact_policy, texts=texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("micro_tokens", [1, 130, 400])
def test_old_and_reference_scores_are_those_of_the_whole_batch(
    exact_policy: QwenVL, prompts: list[Prompt], side: str, micro_tokens: int
) -> None:
    """Scores of a micro-batch written into the wrong columns of the batch."""
    policy = dataclasses.replace(exact_policy, padding_side=side)  # type: ignore[arg-type]
    engine = InProcessEngine(policy=policy)
    groups = engine.generate(prompts, 3, SamplingParams(max_tokens=9, stop=("s",)), ShowAgain("a"), seed=4)
    batch = policy.batch(sequences_of(groups))
    pieces = score_without_grad(policy, batch, micro_tokens, 0.7)
    assert (pieces - score_batch(policy, batch, 0.7).logprobs).abs().max() < TOLERANCE
    assert (pieces - batch.old_logprobs).abs().max() > 1000 * TOLERANCE  # those are at temperature 1
