"""The vLLM engine's logic, against doubles: the in-process rollouts, what it asks, checks and refuses.

Greedy answers of a policy in float64 stand for vLLM's, so that two right ways give the same ids. vLLM itself
is never run here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fixtures import ShowAgain, favour, make_policy, make_prompt
from reflectvlm.config import compose
from reflectvlm.integrations.vllm_engine import VLLMEngine
from reflectvlm.integrations.vllm_requests import Completion, Request, collapse
from reflectvlm.models.freezing import freeze
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.recipe_check import RecipeError, check_recipe
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.sampling import NonFiniteLogits
from reflectvlm.spans import count_tokens, flatten
from reflectvlm.types import Prompt, Rollout, SamplingParams, Text, Visual
from vllm_doubles import PolicyBackend, ScriptedBackend, changed

SPECIAL = "<|box_start|>"
GREEDY = SamplingParams(max_tokens=14, temperature=0)


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


@pytest.fixture(scope="module")
def prompts(policy: QwenVL) -> list[Prompt]:
    """Numbers and sizes of images differ; the last has none."""
    return [
        make_prompt(policy, 0),
        make_prompt(policy, 1, "<image> is above <image> or not?", ((64, 48), (32, 80))),
        make_prompt(policy, 3, "What is one plus one?", ()),
    ]


def scripted(policy: QwenVL, *script: Sequence[int], **settings: Any) -> VLLMEngine:
    return VLLMEngine(policy=policy, backend=ScriptedBackend(script=list(script), **settings))


def rollouts(
    engine: Any, prompts: Sequence[Prompt], sampling: SamplingParams, reattention: Reattention, n: int = 1
) -> list[Rollout]:
    return [one for group in engine.generate(prompts, n, sampling, reattention, seed=5) for one in group]


def same(one: Rollout, other: Rollout) -> None:
    """Everything but rounding of log-probs."""
    assert one.text == other.text
    assert (one.stop, one.offsets) == (other.stop, other.offsets)
    assert [type(span) for span in one.spans] == [type(span) for span in other.spans]
    for a, b in zip(one.spans, other.spans, strict=True):
        if isinstance(a, Text) and isinstance(b, Text):
            assert (a.ids, a.trained) == (b.ids, b.trained)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        else:
            assert a == b


# -- the same rollouts as in process --------------------------------------------------------------

REATTENTIONS = [
    Implicit(),
    ShowAgain(SPECIAL),
    VisualCopy(trigger=SPECIAL, limit=1),
    VisualCopy(trigger=SPECIAL, close=" done"),
    VisualCopy(trigger=SPECIAL, place="after", budget=40),
    VisualCopy(trigger="e", limit=3),
    VisualCopy(trigger="artate"),  # two tokens
    VisualCopy(trigger="artate", place="before"),
    VisualCopy(trigger="e", place="before", limit=2),
    VisualRoute(m=100, trigger=SPECIAL, limit=2),  # COPY by another name: it asks for no attention
]
SAMPLINGS = [
    GREEDY,
    SamplingParams(max_tokens=14, temperature=0, stop=["r", "ame"]),
    SamplingParams(max_tokens=14, temperature=0, stop=["artate"]),
    SamplingParams(max_tokens=3, temperature=0),
]


@pytest.mark.parametrize("deaf", [False, True], ids=["stops", "runs on"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "stop", "stop in two tokens", "short"])
@pytest.mark.parametrize("reattention", REATTENTIONS, ids=str)
def test_greedy_rollouts_are_those_of_the_in_process_engine(
    policy: QwenVL, prompts: list[Prompt], sampling: SamplingParams, reattention: Reattention, deaf: bool
) -> None:
    """Bug: a block one token late, its predictor lost, a tag not found, or an answer that goes on behind a
    stop: other rollouts than those the rest of the library was tested on. Also where vLLM overlooks stops."""
    theirs = VLLMEngine(policy=policy, backend=PolicyBackend(policy=policy, deaf=deaf))
    ours = InProcessEngine(policy=policy)
    pairs = zip(
        rollouts(theirs, prompts, sampling, reattention),
        rollouts(ours, prompts, sampling, reattention),
        strict=True,
    )
    for one, other in pairs:
        same(one, other)


def test_what_was_compared_inserts_and_stops(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: the comparison above compares answers in which nothing happens."""
    for reattention in REATTENTIONS[1:]:
        made = rollouts(InProcessEngine(policy=policy), prompts, GREEDY, reattention)
        assert sum(len(one.insertions) for one in made) > 0, reattention
    for sampling in SAMPLINGS[1:3]:
        made = rollouts(InProcessEngine(policy=policy), prompts, sampling, Implicit())
        assert any(one.stop == "stop" for one in made), sampling


def test_a_copied_block_is_marked_as_put_in_front_of_a_sampled_tag(
    policy: QwenVL, prompts: list[Prompt]
) -> None:
    """Bug: the tag's log-prob would be taken from the block's end, by which the policy never chose it."""
    engine = VLLMEngine(policy=policy, backend=PolicyBackend(policy=policy))
    (one,) = rollouts(engine, prompts[:1], GREEDY, VisualCopy(trigger=SPECIAL, limit=1))
    before, block, after = one.spans
    assert block == Visual(image=0, before_sampled=True)
    assert isinstance(after, Text)
    assert after.ids[0] == policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert isinstance(before, Text)
    assert len(before.ids + after.ids) == 14


def test_a_rollout_depends_on_neither_neighbours_nor_group_size(
    policy: QwenVL, prompts: list[Prompt]
) -> None:
    """Bug: evaluation with another batch size, or a resumed run, would see other rollouts."""
    sampling = SamplingParams(max_tokens=10)

    def made(prompts: Sequence[Prompt], n: int) -> list[tuple[Rollout, ...]]:
        engine = VLLMEngine(policy=policy, backend=PolicyBackend(policy=policy))
        return engine.generate(prompts, n, sampling, VisualCopy(trigger=SPECIAL, limit=1), seed=5)

    alone, among = made(prompts[:1], 2), made(prompts, 3)
    assert [one.spans for one in alone[0]] == [one.spans for one in among[0][:2]]
    assert len({one.sampled_ids for one in among[0]}) == 3
    assert [len(group) for group in among] == [3, 3, 3]
    assert all(one.prompt is prompt for group, prompt in zip(among, prompts, strict=True) for one in group)


# -- what is asked --------------------------------------------------------------------------------


def test_prompts_go_out_collapsed_with_the_images_they_name(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: expanded ids are expanded again by vLLM; nonsense rollouts, and training "works" (trap 2)."""
    backend = PolicyBackend(policy=policy)
    rollouts(VLLMEngine(policy=policy, backend=backend), prompts, GREEDY, ShowAgain(SPECIAL, image=0))
    for prompt, request in zip(prompts, backend.rounds[0], strict=True):
        assert request.ids.count(policy.vision.pad) == len(prompt.patches) == len(request.images)
        assert all(a is b for a, b in zip(request.images, prompt.sample.images, strict=True))
        assert request.expanded == tuple(flatten(prompt.spans, prompt.grids, policy.vision).ids.tolist())
    # The second prompt's next request: its two images, and the first of them once more at its place.
    again = next(request for request in backend.rounds[1] if len(request.images) == 3)
    first, second = prompts[1].sample.images
    assert [id(image) for image in again.images] == [id(first), id(second), id(first)]
    assert (
        again.ids[: len(backend.rounds[0][1].ids)] == backend.rounds[0][1].ids
    )  # what vLLM has in its cache
    assert again.ids[-1] == policy.tokenizer.convert_tokens_to_ids(SPECIAL)


def test_rows_are_asked_for_together_round_by_round(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a call of vLLM for each row, which decodes one row at a time."""
    backend = PolicyBackend(policy=policy)
    made = rollouts(VLLMEngine(policy=policy, backend=backend), prompts[:2], GREEDY, ShowAgain(SPECIAL), n=2)
    assert [len(requests) for requests in backend.rounds[:2]] == [4, 4]
    assert sum(map(len, backend.rounds[2:])) >= sum(len(one.insertions) > 1 for one in made) > 0
    assert backend.calls.count("generate") == len(backend.rounds) < 6


def test_a_request_says_how_to_sample(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: the policy samples an image token within minutes (trap 1), or answers run on behind their end."""
    backend = PolicyBackend(policy=policy)
    sampling = SamplingParams(max_tokens=9, temperature=0.7, stop=["stop here"], stop_ids=[17])
    rollouts(VLLMEngine(policy=policy, backend=backend), prompts, sampling, VisualCopy(trigger="<back>"), n=2)
    requests = backend.rounds[0]
    assert {request.banned for request in requests} == {policy.reserved_ids}
    assert {request.stop_ids for request in requests} == {tuple(sorted({17, *policy.end_ids}))}
    assert {request.stop for request in requests} == {("stop here", "<back>")}
    assert {(request.temperature, request.max_tokens) for request in requests} == {(0.7, 9)}
    assert len({request.seed for request in requests}) == 6
    special = PolicyBackend(policy=policy)
    rollouts(VLLMEngine(policy=policy, backend=special), prompts, GREEDY, VisualCopy(trigger=SPECIAL))
    number = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert all(number in request.stop_ids and request.stop == () for request in special.rounds[0])


def test_a_row_that_goes_on_has_its_rest_of_the_budget_and_a_new_seed(
    policy: QwenVL, prompts: list[Prompt]
) -> None:
    """Bug: every block would give a row its whole budget again, or make it draw the same numbers again."""
    tag = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    engine = scripted(policy, [40, 41, tag], [42, tag], [43])
    (one,) = rollouts(engine, prompts[:1], SamplingParams(max_tokens=6), VisualCopy(trigger=SPECIAL, limit=2))
    assert isinstance(engine.backend, ScriptedBackend)
    asked = [requests[0] for requests in engine.backend.rounds]
    assert [request.max_tokens for request in asked] == [6, 3, 1]
    assert len({request.seed for request in asked}) == 3
    assert one.sampled_ids == (40, 41, tag, 42, tag, 43)
    assert one.stop == "length"
    assert len(one.insertions) == 2


def test_a_stop_of_vllm_that_is_none_of_ours_is_gone_over(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: vLLM's own end ids, or a text it saw where we see none, would cut answers short as if they had
    ended."""
    eos = policy.end_ids[0]
    engine = scripted(policy, [40, 41], [42, eos])
    (one,) = rollouts(engine, prompts[:1], SamplingParams(max_tokens=8), Implicit())
    assert one.sampled_ids == (40, 41, 42, eos)
    assert one.stop == "eos"


def test_a_row_ends_where_the_context_does(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: vLLM refuses a request that is longer than its context, and the run ends with it."""
    prompt = prompts[0]
    length = count_tokens(prompt.spans, prompt.grids)
    tag = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    engine = dataclasses.replace(scripted(policy, [40, tag]), max_model_len=length + 5)
    (one,) = rollouts(engine, [prompt], GREEDY, VisualCopy(trigger=SPECIAL))
    assert isinstance(engine.backend, ScriptedBackend)
    assert engine.backend.rounds[0][0].max_tokens == 5
    assert len(engine.backend.rounds) == 1  # the block has filled it
    assert (one.stop, one.sampled_ids) == ("length", (40, tag))
    full = dataclasses.replace(engine, max_model_len=length)
    with pytest.raises(ValueError, match=r"leaves no room for an answer in a context of \d+ tokens\. Raise"):
        rollouts(full, [prompt], GREEDY, Implicit())


def test_collapsed_ids_hold_one_image_token_a_block(policy: QwenVL) -> None:
    """Bug: a block without its two ends, which vLLM's positions depend on."""
    spans = (Text(ids=(7,)), Visual(image=1), Text(ids=(8, 9)), Visual(image=0))
    start, pad, end = policy.vision
    assert collapse(spans, policy.vision) == ((7, start, pad, end, 8, 9, start, pad, end), (1, 0))


# -- what is checked ------------------------------------------------------------------------------


def test_other_image_limits_are_refused(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: vLLM resizes by its own limits, rolls out on other visual tokens than are trained on (trap 7)."""
    coarse = dataclasses.replace(policy, image_processor=_coarser(policy))
    engine = VLLMEngine(policy=policy, backend=PolicyBackend(policy=coarse))
    with pytest.raises(
        ValueError, match=r"cut its images into \[16\] visual tokens, vLLM into \[4\].*max_pixels"
    ):
        rollouts(engine, prompts[:1], GREEDY, Implicit())


def _coarser(policy: QwenVL) -> Any:
    from reflectvlm.models.tiny import tiny_image_processor

    processor = tiny_image_processor()
    processor.size = {"shortest_edge": 256, "longest_edge": 32 * 32}
    del policy
    return processor


def test_another_prompt_than_ours_is_refused(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a tokenizer or template of vLLM's own changes the prompt; what it samples is an answer to another
    question (trap 2)."""
    ours = tuple(flatten(prompts[0].spans, prompts[0].grids, policy.vision).ids.tolist())
    engine = scripted(policy, [40], change=changed(prompt_ids=(*ours[:3], 11, *ours[4:])))
    with pytest.raises(ValueError, match=r"they part at token 3\. The two must have the same tokenizer"):
        rollouts(engine, prompts[:1], GREEDY, Implicit())


def test_a_sampled_image_token_is_refused(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a version that ignores logit_bias ends the run in a forward pass with a mismatch of features."""
    engine = scripted(policy, [40, policy.vision.pad])
    with pytest.raises(RuntimeError, match=r"sampled '<\|image_pad\|>', ids .* were banned by logit_bias"):
        rollouts(engine, prompts[:1], GREEDY, Implicit())


def test_a_logprob_that_is_no_number_names_its_row(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a NaN of the engine becomes a NaN of the loss, of which nobody knows where it came from."""
    engine = scripted(policy, [40, 41], change=changed(logprobs=(-1.0, math.nan)))
    with pytest.raises(NonFiniteLogits, match="Row 'sample-0', rollout 0 of its group, token 2"):
        rollouts(engine, prompts[:1], GREEDY, Implicit())


@pytest.mark.parametrize(
    "wrong",
    [{"ids": (), "logprobs": ()}, {"logprobs": (-1.0,)}, {"ids": (40,) * 15, "logprobs": (0.0,) * 15}],
)
def test_an_answer_that_is_none_ends_the_run(
    policy: QwenVL, prompts: list[Prompt], wrong: dict[str, Any]
) -> None:
    """Bug: a request that vLLM aborted is asked for again for ever, or loses its log-probs."""
    engine = scripted(policy, [40, 41], change=changed(**wrong))
    with pytest.raises(RuntimeError, match=r"asked for 1 to 14 tokens and gave .* its own log says why"):
        rollouts(engine, prompts[:1], GREEDY, Implicit())


# -- what is refused ------------------------------------------------------------------------------


def test_route_is_refused_with_the_remedy(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: ROUTE without attention would choose by chance, or show everything."""
    with pytest.raises(ValueError, match=r"VisualRoute asks what .* attends to.*engine=InProcessEngine"):
        rollouts(scripted(policy), prompts, GREEDY, VisualRoute(m=50))


def test_a_part_of_an_image_is_refused(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: vLLM shows the whole image where the trainer's sequence holds three of its tokens."""
    tag = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    with pytest.raises(ValueError, match=r"shows 3 of the visual tokens of image 0.*engine=InProcessEngine"):
        rollouts(scripted(policy, [tag]), prompts[:1], GREEDY, ShowAgain(SPECIAL, keep=(0, 3, 5)))


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_cut_distribution_is_refused(policy: QwenVL, prompts: list[Prompt], cut: dict[str, Any]) -> None:
    """Bug: vLLM's log-probs are those of the cut distribution, and every ratio of training is biased."""
    with pytest.raises(ValueError, match=rf"sampling\.{next(iter(cut))}=.*top_p=1, top_k=0, min_p=0"):
        rollouts(scripted(policy), prompts, SamplingParams(**cut), Implicit())
    engine = scripted(policy, [policy.end_ids[0]])
    rollouts(engine, prompts[:1], SamplingParams(temperature=0, **cut), Implicit())  # greedy looks at no cut


def test_a_missing_vllm_is_one_line_with_the_extra(policy: QwenVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the run dies in an import of a library's depths, after the policy was loaded and checked."""
    found = lambda name: None if name == "vllm" else object()  # noqa: E731
    monkeypatch.setattr("reflectvlm.integrations.vllm_backends.find_spec", found)
    with pytest.raises(ValueError, match=r"needs vllm, not installed: pip install reflectvlm\[vllm\]"):
        VLLMEngine(policy=policy)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "beside"}, "engine.mode is 'beside'. It must be 'colocate' or 'server'"),
        ({"max_rows": 0}, "engine.max_rows is 0. It must be at least 1"),
        ({"max_model_len": 0}, "engine.max_model_len is 0. It must be at least 1, or null"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5. It is a share"),
    ],
)
def test_wrong_settings_are_said(policy: QwenVL, wrong: dict[str, Any], message: str) -> None:
    """Bug: vLLM says it minutes later, in its own words."""
    with pytest.raises(ValueError, match=message):
        VLLMEngine(policy=policy, backend=ScriptedBackend(script=[]), **wrong)
    with pytest.raises(ValueError, match="n=0 rollouts"):
        scripted(policy).generate([], 0, GREEDY, Implicit(), seed=0)


def test_a_trigger_that_stands_for_pixels_is_refused(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a banned tag is never sampled, and COPY silently never happens."""
    with pytest.raises(ValueError, match="stands for pixels or ends a turn"):
        rollouts(scripted(policy), prompts, GREEDY, VisualCopy(trigger="<|image_pad|>"))


# -- weights --------------------------------------------------------------------------------------

ANSWER = [40] * 14


def calls(engine: VLLMEngine, prompts: Sequence[Prompt]) -> list[Any]:
    """What one call of the engine asked of its backend."""
    backend = engine.backend
    assert isinstance(backend, ScriptedBackend)
    backend.calls.clear()
    backend.script += [ANSWER] * len(prompts)
    rollouts(engine, prompts, GREEDY, Implicit())
    return backend.calls


def test_weights_are_sent_when_they_have_changed_and_caches_forget_the_old_ones(
    policy: QwenVL, prompts: list[Prompt]
) -> None:
    """Bug: rollouts of an older policy, or features of an older tower from vLLM's cache (trap 3)."""
    engine, one = scripted(policy), prompts[:1]
    told = ["load", "wake", "reset all", "generate", "sleep"]
    engine.sync(0)
    assert calls(engine, one) == told
    engine.sync(0)
    assert calls(engine, one) == ["wake", "generate", "sleep"]
    engine.sync(1)
    assert calls(engine, one) == told
    assert calls(engine, []) == ["wake", "sleep"]
    engine.sync(2)
    assert calls(engine, []) == ["load", "wake", "reset all", "sleep"]  # ranks send together, work or not


def test_weights_are_always_sent_where_nobody_tells(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a trainer that does not know `sync` evaluates the weights of its first step for ever."""
    engine = scripted(policy)
    for _ in range(2):
        assert calls(engine, prompts[:1])[0] == "load"


def test_weights_lost_in_sleep_are_sent_again(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: vLLM wakes up with empty weights and samples noise."""
    engine = scripted(policy, forgets=True)
    engine.sync(0)
    for _ in range(2):
        assert calls(engine, prompts[:1])[0] == "load"


def test_features_of_a_frozen_tower_stay(prompts: list[Prompt]) -> None:
    """Bug: every image is encoded again after every step although nothing about it has changed."""
    frozen = make_policy()
    freeze(frozen.model, ["vision", "projector"])
    assert "reset but encoder" in calls(scripted(frozen), prompts[:1])
    freeze(frozen.model, ["vision"])  # the projector trains
    assert "reset all" in calls(scripted(frozen), prompts[:1])


def test_vllm_sleeps_also_after_an_error(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: a run that goes on after a failed evaluation has no memory left for its update."""
    engine = scripted(policy, [policy.vision.pad])
    with pytest.raises(RuntimeError, match="banned"):
        rollouts(engine, prompts[:1], GREEDY, Implicit())
    assert isinstance(engine.backend, ScriptedBackend)
    assert engine.backend.calls[-1] == "sleep"


# -- recipes --------------------------------------------------------------------------------------


def test_a_recipe_names_the_engine() -> None:
    """Bug: an engine that no recipe can choose."""
    target = "engine._target_=reflectvlm.integrations.vllm_engine.VLLMEngine"
    more = ("+engine.mode=server", "+engine.url=http://gpu-7:8000", "+engine.max_model_len=8192")
    engine = _engine_of("qwen_la_rl_copy", target, *more)
    check_recipe(engine)
    assert engine["_partial_"] is True
    wrong = "+engine.max_model_length=8192"
    with pytest.raises(RecipeError, match=r"Did you mean 'engine.max_model_len'"):
        check_recipe({"_target_": "builtins.dict", "engine": _engine_of("grpo", target, wrong)})


def _engine_of(recipe: str, *overrides: str) -> Any:
    return compose(recipe, overrides).values["engine"]


def test_expanded_ids_are_the_trainers(policy: QwenVL, prompts: list[Prompt]) -> None:
    """Bug: two ways to expand that part would refuse every prompt, or none."""
    spans = (*prompts[1].spans, Text(ids=(40, 41)), Visual(image=1), Text(ids=(42,)))
    ids, shown = collapse(spans, policy.vision)
    tokens = tuple(prompts[1].grids[image].tokens for image in shown)
    blank = Request(
        ids=ids, images=(), image_tokens=tokens, image_id=policy.vision.pad, max_tokens=1, temperature=1.0,
        seed=0, stop_ids=(), stop=(), banned=(),
    )  # fmt: skip
    assert blank.expanded == tuple(flatten(spans, prompts[1].grids, policy.vision).ids.tolist())
    assert Completion(ids=(1,), logprobs=(0.0,), prompt_ids=blank.expanded).prompt_ids == blank.expanded
