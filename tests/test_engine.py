"""The in-process engine: its log-probs are the trainer's, whatever is inserted, awaited or cut.

Parity runs in float64 on weights times 4, where a mistake of one position is 1e-2 and more, and what
remains between two right ways is the float32 of the log-probs themselves (about 1e-6).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures import ShowAgain, favour, make_policy, make_prompt, score_batch, sequences_of
from reflectvlm.batch import Batch
from reflectvlm.interrupt import Abandoned, abandonable
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import DecodeState, Reattention
from reflectvlm.reattention import Implicit, VisualRoute
from reflectvlm.rollout.continuing import BegunGroup
from reflectvlm.rollout.decoding import closing
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.rows import Rows
from reflectvlm.types import Insertion, Prompt, Rollout, SamplingParams, Text, Visual

TOLERANCE = 1e-5
SPECIAL = "<|box_start|>"
"""A trigger that is one special token; `favour` makes the model sample it."""


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


@pytest.fixture(scope="module")
def prompts(policy: QwenVL) -> list[Prompt]:
    """Lengths, sizes and numbers of images all differ; the last has none."""
    return [
        make_prompt(policy, 0),
        make_prompt(policy, 1, "<image> is above <image> or not?", ((64, 48), (32, 80))),
        make_prompt(policy, 2, "Which page?", ((48, 48),), "Put the final answer in a box, please."),
        make_prompt(policy, 3, "What is one plus one?", ()),
    ]


def generate(
    policy: QwenVL,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    reattention: Reattention | None = None,
    *,
    n: int = 3,
    max_rows: int = 64,
    seed: int = 1,
) -> list[tuple[Rollout, ...]]:
    engine = InProcessEngine(policy=policy, max_rows=max_rows)
    return engine.generate(prompts, n, sampling, reattention or Implicit(), seed=seed)


def gap(policy: QwenVL, batch: Batch, temperature: float = 1.0) -> float:
    """Largest difference between behaviour log-probs and the trainer's, anywhere in the batch."""
    return float((score_batch(policy, batch, temperature).logprobs - batch.old_logprobs).abs().max())


def ids_of(groups: Sequence[Sequence[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[rollout.sampled_ids for rollout in group] for group in groups]


REATTENTIONS = [
    Implicit(),
    ShowAgain(SPECIAL),
    ShowAgain(SPECIAL, keep=(0, 3, 5)),
    ShowAgain("a"),
    ShowAgain("e", keep=(1, 2)),
    ShowAgain("a", keep=()),
]
SAMPLINGS = [
    SamplingParams(max_tokens=14),
    SamplingParams(max_tokens=14, temperature=0),
    SamplingParams(max_tokens=14, temperature=0.7, top_p=0.9),
    SamplingParams(max_tokens=14, temperature=0.7, top_k=50, min_p=0.001),
]


@pytest.mark.parametrize("reattention", REATTENTIONS, ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "top-p", "top-k, min-p"])
def test_logprobs_are_the_trainers(
    policy: QwenVL, prompts: list[Prompt], sampling: SamplingParams, reattention: Reattention
) -> None:
    """A ratio that is not 1 at the first update clips and weights tokens for no reason."""
    groups = generate(policy, prompts, sampling, reattention, max_rows=6)
    batch = policy.batch(sequences_of(groups))
    assert gap(policy, batch, sampling.logprob_temperature) < TOLERANCE
    assert batch.num_tokens == sum(len(ids) for group in ids_of(groups) for ids in group)
    inserted = [rollout.insertions for group in groups for rollout in group]
    if sampling.temperature and reattention.trigger:
        assert any(inserted), "nothing was inserted, so this proved nothing"
        assert not any(inserted[-3:]), "a prompt without images"
    elif not reattention.trigger:
        assert not any(inserted)


def test_logprobs_are_the_trainers_in_float32() -> None:
    """The same at the usual precision; small weights keep rounding below the tolerance."""
    policy = make_policy(gain=1.0)
    prompts = [make_prompt(policy, seed, sizes=((64, 48),) * seed) for seed in range(3)]
    groups = generate(policy, prompts, SamplingParams(max_tokens=14), ShowAgain("a"), max_rows=3)
    assert any(rollout.insertions for group in groups for rollout in group)
    assert gap(policy, policy.batch(sequences_of(groups))) < TOLERANCE


def late_image(batch: Batch) -> Batch:
    """Text behind an inserted block one position too far."""
    block = (batch.visual >= 0) & (batch.trained.long().cumsum(1) > 0)
    return dataclasses.replace(batch, positions=batch.positions + (block.long().cumsum(1) > 0))


def unmoved_text(batch: Batch) -> Batch:
    """Positions "last + 1, last + 2, ..." as if nothing had been inserted."""
    plain = (batch.attention.long().cumsum(1) - 1).clamp(min=0)
    return dataclasses.replace(batch, positions=plain.expand(3, -1, -1))


def neighbour_predictor(batch: Batch) -> Batch:
    """Every token predicted from its left neighbour, also one with a block put in front of it."""
    left = (torch.arange(batch.ids.shape[1]) - 1).clamp(min=0).expand_as(batch.ids)
    return dataclasses.replace(batch, predictor=left)


def other_image(batch: Batch) -> Batch:
    """The features of all images one image further."""
    sizes = [image.grid.tokens for image in batch.images]
    total = sum(sizes)
    return dataclasses.replace(
        batch, visual=torch.where(batch.visual >= 0, (batch.visual + sizes[0]) % total, -1)
    )


def blind_block(batch: Batch) -> Batch:
    """Inserted blocks without features: the pad token's own embedding."""
    inserted = batch.trained.long().cumsum(1) > 0
    return dataclasses.replace(batch, visual=torch.where(inserted, -1, batch.visual))


def long_mask(batch: Batch) -> Batch:
    """The trained tokens of each row begin one column too early."""
    wider = batch.trained.clone()
    wider[:, :-1] |= batch.trained[:, 1:]
    return dataclasses.replace(batch, trained=wider)


@pytest.mark.parametrize(
    "mistake", [late_image, unmoved_text, neighbour_predictor, other_image, blind_block, long_mask]
)
def test_parity_sees_mistakes(
    policy: QwenVL, prompts: list[Prompt], mistake: Callable[[Batch], Batch]
) -> None:
    """Each mistake must fail the comparison by far."""
    groups = generate(policy, prompts, SamplingParams(max_tokens=14), ShowAgain(SPECIAL))
    batch = policy.batch(sequences_of(groups))
    assert gap(policy, batch) < TOLERANCE < 1000 * TOLERANCE < gap(policy, mistake(batch))


def test_parity_sees_a_forgotten_temperature_and_open_spare_ids(
    policy: QwenVL, prompts: list[Prompt]
) -> None:
    """Log-probs at temperature 1 of tokens drawn at 0.7; a softmax over ids that no token owns."""
    groups = generate(policy, prompts, SamplingParams(max_tokens=14, temperature=0.7))
    batch = policy.batch(sequences_of(groups))
    assert gap(policy, batch, 0.7) < TOLERANCE
    assert gap(policy, batch, 1.0) > 1000 * TOLERANCE
    open_policy = dataclasses.replace(policy)
    vars(open_policy)["reserved_ids"] = ()
    assert gap(open_policy, batch, 0.7) > 100 * TOLERANCE


@pytest.mark.parametrize("reattention", [Implicit(), ShowAgain(SPECIAL), ShowAgain("a")], ids=str)
def test_waiting_rows_give_the_same_rollouts(
    policy: QwenVL, prompts: list[Prompt], reattention: Reattention
) -> None:
    """Random numbers belong to a rollout, not to the row it happens to be decoded in."""
    sampling = SamplingParams(max_tokens=16, stop=("s",))
    at_once = generate(policy, prompts * 2, sampling, reattention, max_rows=64)
    for max_rows in (1, 3, 7):
        waited = generate(policy, prompts * 2, sampling, reattention, max_rows=max_rows)
        assert ids_of(waited) == ids_of(at_once)
        for a, b in zip(sequences_of(waited), sequences_of(at_once), strict=True):
            assert [type(span) for span in a[1]] == [type(span) for span in b[1]]
    lengths = {len(ids) for group in ids_of(at_once) for ids in group}
    assert len(lengths) > 2, "all rows ended together, so none was replaced"


@dataclasses.dataclass(frozen=True)
class OnlyFor:
    """Inserts in the rollouts of one prompt only."""

    prompt: Prompt
    inner: ShowAgain

    probe: None = None

    @property
    def trigger(self) -> str | None:
        return self.inner.trigger

    def __call__(self, state: DecodeState, /) -> Insertion | None:
        return self.inner(state) if state.prompt is self.prompt else None


@pytest.mark.parametrize("trigger", [SPECIAL, "a"])
def test_neighbours_do_not_notice_an_insertion(policy: QwenVL, prompts: list[Prompt], trigger: str) -> None:
    """A block in one row must not shift, delay or re-draw anything in another."""
    sampling = SamplingParams(max_tokens=16)
    plain = generate(policy, prompts, sampling)
    one = generate(policy, prompts, sampling, OnlyFor(prompts[1], ShowAgain(trigger)))
    assert ids_of(one)[0] == ids_of(plain)[0]
    assert ids_of(one)[2:] == ids_of(plain)[2:]
    assert ids_of(one)[1] != ids_of(plain)[1]
    # Rows insert at different steps.
    steps = {len(r.spans[0].ids) for r in one[1] if r.insertions and isinstance(r.spans[0], Text)}
    assert len(steps) > 1


def test_blocks_stand_before_a_special_and_behind_a_plain_trigger(
    policy: QwenVL, prompts: list[Prompt]
) -> None:
    """The layout that re-attention asks for, and the mark that tells the trainer which it was."""
    decode = policy.decode
    for trigger in (SPECIAL, "a"):
        groups = generate(policy, prompts[:2], SamplingParams(max_tokens=20), ShowAgain(trigger, keep=(0, 2)))
        seen = 0
        for rollout in (rollout for group in groups for rollout in group):
            spans = list(rollout.spans)
            for i, span in enumerate(spans):
                if not isinstance(span, Visual):
                    continue
                seen += 1
                before = spans[i - 1] if i else Text(ids=())
                after = spans[i + 1]
                assert isinstance(before, Text)
                assert isinstance(after, Text)
                assert span.keep == (0, 2)
                assert span.before_sampled == (trigger == SPECIAL)
                if trigger == SPECIAL:
                    assert decode(after.ids[:1]) == SPECIAL
                else:
                    assert "a" in decode(before.ids[-1:])
            assert rollout.text == decode([i for i in rollout.sampled_ids if i not in policy.end_ids])
            assert rollout.sequence == rollout.prompt.spans + rollout.spans
        assert seen > 1


def test_what_a_reattention_is_shown(policy: QwenVL, prompts: list[Prompt]) -> None:
    """The state is the row's own: its prompt, its ids with the trigger last, its insertions."""
    seen: list[tuple[Prompt, tuple[int, ...], str, tuple[Insertion, ...]]] = []
    block = Insertion(before=(Visual(image=0),))

    @dataclasses.dataclass(frozen=True)
    class Spy:
        trigger: str = SPECIAL
        probe: None = None

        def __call__(self, state: DecodeState, /) -> Insertion | None:
            assert state.special
            seen.append((state.prompt, tuple(state.sampled), state.text(), tuple(state.insertions)))
            return block if state.prompt.patches and not state.insertions else None

    groups = generate(policy, prompts, SamplingParams(max_tokens=20), Spy())
    trigger = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert any(inserted for *_, inserted in seen)
    for prompt, sampled, text, inserted in seen:
        assert sampled[-1] == trigger
        assert text == policy.decode(sampled)
        assert inserted in ((), (block,))
        owner = groups[prompts.index(prompt)]
        assert any(rollout.sampled_ids[: len(sampled)] == sampled for rollout in owner)


def test_a_group_is_not_one_rollout_n_times(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Siblings on one random stream are equal; then every advantage is zero. With about 3,000 likely
    ids a chance that two of ten tokens agree throughout is below 10^-20."""
    groups = generate(policy, prompts, SamplingParams(max_tokens=10), n=4)
    assert [len(group) for group in groups] == [4] * 4
    for group, prompt in zip(groups, prompts, strict=True):
        assert len({rollout.sampled_ids for rollout in group}) == 4
        assert all(rollout.prompt is prompt for rollout in group)
    assert ids_of(generate(policy, prompts, SamplingParams(max_tokens=10), n=4)) == ids_of(groups)
    assert ids_of(generate(policy, prompts, SamplingParams(max_tokens=10), n=4, seed=2)) != ids_of(groups)


@pytest.mark.parametrize("max_rows", [2, 64])
def test_every_prompts_images_are_encoded_once(policy: QwenVL, prompts: list[Prompt], max_rows: int) -> None:
    """Vision features are shared by the group and by inserted blocks."""
    encoded: list[int] = []
    hook = policy.model.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])),
        with_kwargs=True,
    )
    try:
        groups = generate(
            policy, prompts, SamplingParams(max_tokens=12), ShowAgain("a"), n=2, max_rows=max_rows
        )
    finally:
        hook.remove()
    assert any(rollout.insertions for group in groups for rollout in group)
    assert sum(encoded) == 4


# -- how a rollout ends ---------------------------------------------------------------------------


def test_length_ends_a_rollout(policy: QwenVL, prompts: list[Prompt]) -> None:
    for rollout in (r for group in generate(policy, prompts, SamplingParams(max_tokens=5)) for r in group):
        assert rollout.stop == "length"
        assert len(rollout.sampled_ids) == 5


def test_a_stop_string_ends_a_rollout_and_stays(policy: QwenVL, prompts: list[Prompt]) -> None:
    """It ends where it is first complete, even in the middle of a token."""
    groups = generate(policy, prompts, SamplingParams(max_tokens=6, stop=("st", "in")), n=8)
    reasons = set()
    for rollout in (rollout for group in groups for rollout in group):
        reasons.add(rollout.stop)
        body = policy.decode(rollout.sampled_ids[:-1])
        assert "st" not in body
        assert "in" not in body
        assert (rollout.stop == "stop") == ("st" in rollout.text or "in" in rollout.text)
    assert {"stop", "length"} <= reasons <= {"stop", "length", "eos"}


def test_a_stop_string_inside_the_last_token_of_the_budget(policy: QwenVL, prompts: list[Prompt]) -> None:
    """A text that is complete must not count as cut: overlong filtering would drop it."""
    (free,) = generate(policy, prompts[:1], SamplingParams(max_tokens=1), n=16)
    long = next(rollout for rollout in free if len(rollout.text.strip()) > 2)
    sampling = SamplingParams(max_tokens=1, stop=(long.text.strip()[:-1],))
    (again,) = generate(policy, prompts[:1], sampling, n=16)
    assert again[free.index(long)].stop == "stop"


def test_a_stop_id_ends_a_rollout(policy: QwenVL, prompts: list[Prompt]) -> None:
    (free,) = generate(policy, prompts[:1], SamplingParams(max_tokens=10))
    wanted = free[0].sampled_ids[4]
    (again,) = generate(policy, prompts[:1], SamplingParams(max_tokens=10, stop_ids=(wanted,)))
    cut = free[0].sampled_ids.index(wanted) + 1
    assert again[0].sampled_ids == free[0].sampled_ids[:cut]
    assert again[0].stop == "stop"
    assert again[0].text == policy.decode(again[0].sampled_ids)


def test_an_end_of_turn_ends_a_rollout(prompts: list[Prompt]) -> None:
    """The end-of-turn token is trained but is no part of the text."""
    policy = favour(make_policy(dtype=torch.float64), ["<|im_end|>"], 6)
    groups = generate(policy, prompts, SamplingParams(max_tokens=30), ShowAgain("a"), n=6, max_rows=8)
    ended = [rollout for group in groups for rollout in group if rollout.stop == "eos"]
    assert ended
    for rollout in ended:
        assert rollout.sampled_ids[-1] == policy.end_ids[0]
        assert not set(rollout.sampled_ids[:-1]) & set(policy.end_ids)
        assert rollout.text == policy.decode(rollout.sampled_ids[:-1])
        assert "<|im_end|>" not in rollout.text
    assert gap(policy, policy.batch(sequences_of(groups))) < TOLERANCE


def test_a_trigger_that_ends_its_row_inserts_nothing(policy: QwenVL, prompts: list[Prompt]) -> None:
    """A block behind the last token would be paid for and never looked at."""
    groups = generate(policy, prompts[:2], SamplingParams(max_tokens=20, stop=("a",)), ShowAgain("a"), n=6)
    rollouts = [rollout for group in groups for rollout in group]
    assert any(rollout.stop == "stop" for rollout in rollouts)
    assert not any(rollout.insertions for rollout in rollouts)


@pytest.mark.parametrize(
    ("call", "message"), [({"n": 0}, "n=0 rollouts per prompt"), ({"max_rows": 0}, "max_rows is 0")]
)
def test_impossible_sizes_are_refused(
    policy: QwenVL, prompts: list[Prompt], call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(policy, prompts, SamplingParams(), **call)
    assert generate(policy, [], SamplingParams()) == []


# -- what a step costs ----------------------------------------------------------------------------


def calls_of(act: Callable[[], Any]) -> int:
    """Calls of functions, Python's and C's, that an act makes."""
    count = 0

    def counted(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


def test_a_step_does_no_work_in_python_for_each_row(prompts: list[Prompt], monkeypatch: Any) -> None:
    """Bug: a number of every row is read at every token, so twice the rows take twice the time."""
    policy = make_policy(dtype=torch.float64)  # float32 takes another kernel for many rows

    def calls(rows: int) -> int:
        engine = InProcessEngine(policy=policy, max_rows=rows)
        groups = [BegunGroup.fresh(prompts[0], rows, 1, 0)]
        decoding = engine._decoding(groups, SamplingParams(max_tokens=9), ShowAgain(SPECIAL), None)
        steps = decoding.steps(rows)
        for _ in range(3):
            next(steps)
        return calls_of(lambda: next(steps))

    calls(2)  # what is made once per process
    assert calls(2) == calls(24)

    # The same count sees a single number read per row.
    real = Rows.record

    def reading(self: Rows, ids: torch.Tensor, logprobs: torch.Tensor) -> None:
        real(self, ids, logprobs)
        for row in range(len(self)):
            self.count[row].item()

    monkeypatch.setattr(Rows, "record", reading)
    assert calls(2) + 22 <= calls(24)


@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_rows_that_stay_close_the_ranks(leaving: list[bool]) -> None:
    """Bug: a row that stays is dropped or doubled, or more rows move than leave."""
    holes, movers, left = closing(torch.tensor(leaving))
    rows = list(range(len(leaving)))
    for hole, mover in zip(holes.tolist(), movers.tolist(), strict=True):
        assert leaving[hole]
        rows[hole] = mover
    assert sorted(rows[:left]) == [row for row, leaves in enumerate(leaving) if not leaves]
    assert len(holes) <= sum(leaving)


# -- given up half-way ----------------------------------------------------------------------------


@pytest.mark.parametrize("reattention", [Implicit(), VisualRoute(trigger="a", m=40)], ids=["plain", "route"])
def test_a_call_given_up_leaves_nothing_behind(
    policy: QwenVL, prompts: list[Prompt], reattention: Reattention
) -> None:
    """Bug: rows, cache or attention function of a rollout that a stop has cut short are in the next one."""
    attention = policy.model.model.language_model.config._attn_implementation
    sampling = SamplingParams(max_tokens=6)
    wanted = generate(policy, prompts, sampling, reattention, max_rows=6)
    engine = InProcessEngine(policy=policy, max_rows=6)
    asked = 0

    def after(count: int) -> bool:
        nonlocal asked
        asked += 1
        return asked > count

    given_up = 0
    for count in range(1000):
        asked = 0
        with abandonable(lambda: after(count)):  # noqa: B023 - used before the next turn
            try:
                groups = engine.generate(prompts, 3, sampling, reattention, seed=1)
            except Abandoned:
                given_up += 1
                continue
        break
    # Two admissions of two prompts each, and 6 tokens of each: asked before each prefill and each token.
    assert given_up == 2 * (1 + 6)
    assert asked == given_up
    assert [[r.spans for r in group] for group in groups] == [[r.spans for r in group] for group in wanted]
    assert torch.is_grad_enabled()
    assert policy.model.model.language_model.config._attn_implementation == attention
