"""The decode step written out by hand, and as a recorded graph, against the model library's forward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import ShowAgain, favour, make_policy, make_prompt
from reflectvlm import Implicit, InProcessEngine, SamplingParams
from reflectvlm.models.decoder import Decoder
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import VisualRoute
from reflectvlm.rollout import stepping
from reflectvlm.rollout.cache import Siblings, SlotCache
from reflectvlm.rollout.sampling import NonFiniteLogits
from reflectvlm.rollout.stepping import EagerStep, GraphStep, Steps, without_graph
from reflectvlm.types import Prompt, Rollout, Text

SPECIAL = "<|box_start|>"
SAMPLING = SamplingParams(max_tokens=16)
Groups = list[tuple[Rollout, ...]]


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    return favour(make_policy(dtype=torch.float64), [SPECIAL], 4)


@pytest.fixture(scope="module")
def prompts(policy: QwenVL) -> list[Prompt]:
    """Lengths differ, so rows of one step lie at different columns."""
    return [
        make_prompt(policy, 0),
        make_prompt(policy, 1, "<image>?", ((64, 48),)),
        make_prompt(policy, 2, sizes=()),
    ]


def decoded(
    policy: QwenVL, prompts: Sequence[Prompt], decode: Any, reattention: Reattention | None = None
) -> Groups:
    engine = InProcessEngine(policy=policy, max_rows=7, decode=decode)
    return engine.generate(prompts, 3, SAMPLING, reattention or Implicit(), seed=2)


def difference(found: Groups, wanted: Groups) -> float:
    """Largest difference of log-probs; infinite if another token was drawn or another block inserted."""
    pairs = [pair for a, b in zip(found, wanted, strict=True) for pair in zip(a, b, strict=True)]
    if any(a.sampled_ids != b.sampled_ids or a.insertions != b.insertions for a, b in pairs):
        return float("inf")
    return max(abs(x - y) for a, b in pairs for x, y in zip(logprobs(a), logprobs(b), strict=True))


def logprobs(rollout: Rollout) -> list[float]:
    return [value for span in rollout.spans if isinstance(span, Text) for value in span.logprobs]


@pytest.mark.parametrize(
    "reattention",
    [
        Implicit(),
        ShowAgain(SPECIAL),
        ShowAgain("a", keep=(0, 2)),
        VisualRoute(trigger=SPECIAL),
        VisualRoute(trigger="a"),
    ],
    ids=["implicit", "copy", "copy behind text", "route", "route behind text"],
)
def test_the_lean_step_equals_the_stock_forward(
    policy: QwenVL, prompts: list[Prompt], reattention: Reattention
) -> None:
    """Bug: another norm, rotation, product, mask or cache than the model's own, so that rollouts come from a
    slightly different policy than the one that is trained."""
    stock = decoded(policy, prompts, "stock", reattention)
    assert difference(decoded(policy, prompts, "lean", reattention), stock) < 1e-5
    if reattention.trigger:
        assert any(rollout.insertions for group in stock for rollout in group)


def _unsigned(self: Decoder, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = _ROTATION(self, x, positions)
    return cos, sin.abs()


def _one_further(self: Decoder, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return _ROTATION(self, x, positions + 1)


def _blind_to_itself(self: SlotCache, columns: Tensor, width: int) -> Tensor:
    return _BEGIN(self, columns, width) & (torch.arange(width) != columns[:, None])[:, None, None]


def _one_column_late(self: SlotCache, columns: Tensor, width: int) -> Tensor:
    return _BEGIN(self, columns + 1, width + 1)


def _other_heads(self: Decoder, *qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _HEADS(self, *qkv)
    return query.flip(1), key, value


def _strangers(origin: Sequence[int], common: Sequence[int], device: torch.device) -> Siblings:
    found = _OF(origin, common, device)
    return dataclasses.replace(found, first=found.first.roll(1))


def _too_much_in_common(origin: Sequence[int], common: Sequence[int], device: torch.device) -> Siblings:
    found = _OF(origin, common, device)
    return dataclasses.replace(found, cut=found.cut and found.cut + 1)


def _changed_places(origin: Sequence[int], common: Sequence[int], device: torch.device) -> Siblings:
    found = _OF(origin, common, device)
    return dataclasses.replace(found, place=found.place.flip(0), in_order=False)


_ROTATION, _BEGIN, _HEADS, _OF = Decoder._rotation, SlotCache.begin_step, Decoder._heads, Siblings.of


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (Decoder, "_rotation", _unsigned),
        (Decoder, "_rotation", _one_further),
        (SlotCache, "begin_step", _blind_to_itself),
        (SlotCache, "begin_step", _one_column_late),
        (Decoder, "_heads", _other_heads),
        (Siblings, "of", _strangers),
        (Siblings, "of", _too_much_in_common),
        (Siblings, "of", _changed_places),
    ],
)
def test_the_comparison_notices_mistakes(
    policy: QwenVL,
    prompts: list[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    wrong: Callable[..., Any],
) -> None:
    """Bug: a comparison that passes for a rotation the other way, positions or columns off by one, a token
    that does not see itself, heads in another order, or another group's prompt."""
    stock = decoded(policy, prompts, "stock")
    monkeypatch.setattr(owner, name, wrong)
    assert difference(decoded(policy, prompts, "lean"), stock) > 1e-2


@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_float32_weights_with_either_products(compute: Any) -> None:
    """Bug: products, keys or norms in another dtype than under the stock forward's autocast."""
    policy = make_policy(gain=1.0, compute=compute)
    prompts = [make_prompt(policy, seed) for seed in range(2)]
    stock, lean = (decoded(policy, prompts, kind) for kind in ("stock", "lean"))
    assert difference(lean, stock) < (1e-5 if compute is None else 0.02)


def test_bfloat16_weights() -> None:
    """Bug: a norm scaled in float32 where the model scales it in bfloat16, or a cache of another dtype."""
    policy = make_policy(gain=1.0, dtype=torch.bfloat16)
    prompts = [make_prompt(policy, seed) for seed in range(2)]
    assert difference(decoded(policy, prompts, "lean"), decoded(policy, prompts, "stock")) < 0.05


def test_keys_are_kept_in_the_dtype_of_the_products() -> None:
    """Bug: float32 keys under autocast, which attention casts as a whole at every token."""
    policy = make_policy(gain=1.0, compute="bfloat16")
    step, cache = Steps(kind="lean").make(policy, 1, 8)
    assert step is not None
    cache.add_rows(1)
    step(torch.tensor([5]), torch.tensor([0]), cache, None)
    assert {store.dtype for pair in cache._layers.values() for store in pair} == {torch.bfloat16}


def _graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Makes the lean step a recorded one without a graph, as there is no GPU here; tells what is recorded."""
    recorded: list[tuple[int, ...]] = []

    def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        recorded.append(tuple(len(tensor) for tensor in inputs))
        return without_graph(function, inputs)

    def make(_: Steps, policy: QwenVL, rows: int, columns: int) -> tuple[GraphStep, SlotCache]:
        cache = SlotCache(policy.device)
        cache.reserve(stepping.padded_rows(rows), stepping.padded_width(columns))
        return GraphStep(decoder=Decoder.of(policy), record=record), cache

    monkeypatch.setattr(Steps, "make", make)
    return recorded


@pytest.mark.parametrize("reattention", [Implicit(), ShowAgain(SPECIAL), VisualRoute(trigger="a")], ids=str)
def test_fixed_shapes_change_nothing(
    policy: QwenVL, prompts: list[Prompt], reattention: Reattention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a row that only fills up writing over a live one, a mask of another width, or a result that the
    next replay overwrites."""
    stock = decoded(policy, prompts, "stock", reattention)
    recorded = _graphs(monkeypatch)
    if reattention.probe is None:  # what is watched runs eagerly, and nothing else does
        monkeypatch.setattr(EagerStep, "__call__", lambda *_: pytest.fail("a step was not recorded"))
    assert difference(decoded(policy, prompts, "lean", reattention), stock) < 1e-5
    if reattention.probe is None:
        assert {rows for shapes in recorded for rows in shapes} <= set(stepping.ROW_COUNTS)
        assert len(recorded) == len(set(recorded)), "one for each number of rows: all fit into one width"


def test_a_filling_row_must_not_be_live(
    policy: QwenVL, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the comparison above passing although filling rows share a live row's columns."""
    stock = decoded(policy, prompts, "stock")
    _graphs(monkeypatch)
    append = SlotCache.append

    def into_live_rows(self: SlotCache, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = append(self, key, value, layer)
        keys[0, :, 0] = key[-1]
        return keys, values

    monkeypatch.setattr(SlotCache, "append", into_live_rows)
    assert difference(decoded(policy, prompts, "lean"), stock) > 1e-3


def test_graphs_are_recorded_anew_when_the_storage_has_moved(policy: QwenVL) -> None:
    """Bug: a graph that goes on writing into storage that was given back."""
    calls = 0

    def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        nonlocal calls
        calls += 1
        return without_graph(function, inputs)

    cache = SlotCache(policy.device)
    cache.reserve(2, 512)
    cache.add_rows(2)
    step, eager = GraphStep(decoder=Decoder.of(policy), record=record), EagerStep(decoder=Decoder.of(policy))
    tokens = torch.tensor([5, 6])
    eager(tokens, torch.tensor([0, 0]), cache, None)  # makes the storage
    for _ in range(2):
        step(tokens, torch.tensor([0, 0]), cache, None)
    assert calls == 1
    cache.reserve(4, 1024)
    eager(tokens, torch.tensor([0, 0]), cache, None)
    step(tokens, torch.tensor([0, 0]), cache, None)
    assert calls == 2


def test_refresh_takes_over_changed_weights() -> None:
    """Bug: rollouts of the weights from before the update, because they had been copied."""
    policy = make_policy(dtype=torch.float64)
    decoder = Decoder.of(policy)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.1)

    def hidden(decoder: Decoder) -> Tensor:
        cache = SlotCache(policy.device)
        cache.add_rows(1)
        return EagerStep(decoder=decoder)(torch.tensor([5]), torch.tensor([3]), cache, None)

    wanted = hidden(Decoder.of(policy))
    assert not torch.allclose(hidden(decoder), wanted, atol=1e-3)
    decoder.refresh()
    assert torch.equal(hidden(decoder), wanted)


def test_low_rank_adapters_take_part(prompts: list[Prompt]) -> None:
    """Bug: rollouts of the base model while its adapters are trained."""
    peft = pytest.importorskip("peft", reason="adapters are an extra")
    policy = make_policy(dtype=torch.float64)
    plain = decoded(policy, prompts, "stock")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    peft.inject_adapter_in_model(settings, adapted.model.model.language_model)
    adapted.model.double()
    stock = decoded(adapted, prompts, "stock")
    assert difference(decoded(adapted, prompts, "lean"), stock) < 1e-5
    assert difference(stock, plain) > 1e-2


def test_what_the_lean_step_cannot_do_is_left_to_the_stock_forward() -> None:
    """Bug: sliding windows ignored without a word."""
    policy = make_policy(dtype=torch.float64)
    config = policy.model.model.language_model.config
    assert Decoder.fits(policy)
    before, config.hidden_act = config.hidden_act, "gelu"
    try:
        assert Steps().make(policy, 1, 8)[0] is None
        with pytest.raises(ValueError, match=r"decode='lean' cannot run this model: .* Use decode='auto'"):
            Steps(kind="lean").make(policy, 1, 8)
    finally:
        config.hidden_act = before


def test_graphs_need_a_gpu(policy: QwenVL) -> None:
    """Bug: a graph asked for and silently not used."""
    with pytest.raises(ValueError, match="decode='graphs' needs a CUDA device, and the policy is on 'cpu'"):
        Steps(kind="graphs").make(policy, 1, 8)


def test_an_unknown_kind_is_refused(policy: QwenVL) -> None:
    """Bug: a typing error that decodes in another way than asked."""
    with pytest.raises(ValueError, match=r"decode is 'fast'\. It must be one of auto, stock, lean, graphs"):
        InProcessEngine(policy=policy, decode="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "wanted"), [(1, 1), (3, 4), (64, 64), (65, 96), (512, 512), (600, 1024)])
def test_rows_are_filled_up_to_few_counts(rows: int, wanted: int) -> None:
    """Bug: a count below the rows, or a graph for each number of rows."""
    assert stepping.padded_rows(rows) == wanted


def _recording_engine(policy: QwenVL, monkeypatch: pytest.MonkeyPatch) -> InProcessEngine:
    """An engine whose steps go the way of graphs, without one."""
    monkeypatch.setattr(stepping, "cuda_graph", without_graph)
    monkeypatch.setattr(Steps, "_chosen", lambda *_: "graphs")
    return InProcessEngine(policy=policy, max_rows=7)


def test_an_engine_with_graphs_serves_call_after_call(
    policy: QwenVL, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a second call that reads what the first has left in the cache, or decodes with its weights."""
    stock = decoded(policy, prompts, "stock")
    other = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    engine = _recording_engine(other, monkeypatch)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(1.3)
    ruined = engine.generate(prompts[::-1], 3, SAMPLING, Implicit(), seed=5)
    assert difference(ruined[::-1], stock) > 1e-2
    other.model.load_state_dict(policy.model.state_dict())
    assert difference(engine.generate(prompts, 3, SAMPLING, Implicit(), seed=2), stock) < 1e-5


def test_what_a_broken_call_left_does_not_reach_the_next(
    policy: QwenVL, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: NaN keys of a call that failed, in columns that the next call's mask covers: NaN times 0."""
    other = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    engine = _recording_engine(other, monkeypatch)
    weight = other.model.model.language_model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLogits):
        engine.generate(prompts, 3, SAMPLING, Implicit(), seed=2)
    other.model.load_state_dict(policy.model.state_dict())
    found = engine.generate(prompts, 3, SAMPLING, Implicit(), seed=2)
    assert difference(found, decoded(policy, prompts, "stock")) < 1e-5


def test_two_calls_side_by_side_are_refused_with_graphs(
    policy: QwenVL, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a call that goes on in a cache which another has cleared."""
    engine = _recording_engine(policy, monkeypatch)
    first, second = (engine.stream(prompts[0], SAMPLING, Implicit(), seed=seed) for seed in (1, 2))
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match=r"Another call of this engine has begun.* use decode='lean'"):
        list(first)


def test_low_rank_adapters_under_autocast() -> None:
    """Bug: an adapter's float32 weights meeting bfloat16 inputs, because no autocast is around a step."""
    peft = pytest.importorskip("peft", reason="adapters are an extra")
    policy = make_policy(gain=1.0, compute="bfloat16")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, policy.model.model.language_model)
    prompts = [make_prompt(policy, seed) for seed in range(2)]
    assert difference(decoded(policy, prompts, "lean"), decoded(policy, prompts, "stock")) < 0.05
