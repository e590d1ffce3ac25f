"""Every model family against its own stock classes: scores, rollouts, blocks, packing, decoding, training.

The oracles are those of Qwen2.5-VL's own tests, run on a small random model of each family. Qwen3-VL brings
what can go wrong here and nowhere else: features that are added behind the first layers (DeepStack), also for
blocks inserted later; interleaved M-RoPE; norms of queries and keys; heads that are not width / number.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import favour, make_policy, make_prompt, make_sample, score_batch, uneven
from reattending import (
    SPECIAL,
    Looking,
    difference,
    eager_attention,
    generate,
    prompts,
    ratio_gap,
    stock_logits,
)
from reflectvlm.batch import Batch
from reflectvlm.models import decoder, qwen_vl, tree_attention
from reflectvlm.models.families import FAMILIES, Embedded, family_of, with_features
from reflectvlm.models.feature_cache import FeatureCache
from reflectvlm.models.freezing import freeze, part_of
from reflectvlm.models.loading import enable_checkpointing
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import random_tiny, tiny_folder
from reflectvlm.models.varlen_kernels import plain_varlen
from reflectvlm.objectives import KL, grpo
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.placing import place_insertions
from reflectvlm.types import AttentionProbe, Instruction, Prompt, Rollout, SamplingParams, Spans, Text, Visual
from test_decoder import _graphs, decoded
from test_decoder import difference as decoded_difference
from test_policy import cases, largest, stock_logprobs, words
from test_prefix import both_ways
from test_update import in_one_graph, make_batch, make_updater
from test_update import largest as largest_gradient
from training import small_rl, small_sft

TOLERANCE = 1e-5
NAMES: tuple[Any, ...] = tuple(family.model_type for family in FAMILIES)
REATTENTIONS: dict[str, Reattention] = {
    "copy": VisualCopy(trigger=SPECIAL),
    "copy behind text": VisualCopy(trigger="a"),
    "route": VisualRoute(trigger=SPECIAL, m=40),
    "route behind text": VisualRoute(trigger="a", m=30, layers=[-1], heads="max"),
    "implicit": Implicit(),
}


@functools.cache
def exact(name: Any) -> QwenVL:
    """float64, large weights, norms and biases that are not ones and zeros."""
    return favour(uneven(make_policy(dtype=torch.float64, family=name)), [SPECIAL], 4)


@pytest.fixture(params=NAMES)
def policy(request: Any) -> QwenVL:
    """Tests must not change it."""
    return exact(request.param)


def fresh(name: Any) -> QwenVL:
    return uneven(make_policy(dtype=torch.float64, family=name))


# -- mistakes, each to be seen by a comparison ----------------------------------------------------


def nothing_added(tokens: Tensor, visual: Tensor, features: Tensor) -> Embedded:
    """No DeepStack at all."""
    return dataclasses.replace(with_features(tokens, visual, features), layers=(), visual=None)


def nothing_added_to_blocks(tokens: Tensor, visual: Tensor, features: Tensor) -> Embedded:
    """DeepStack for prompts only: while decoding, what is shorter than a prompt is an inserted block."""
    made = with_features(tokens, visual, features)
    return made if tokens.shape[1] > 30 else dataclasses.replace(made, layers=(), visual=None)


def neighbours_in_blocks(tokens: Tensor, visual: Tensor, features: Tensor) -> Embedded:
    """The same for blocks with other tokens' rows, as if ROUTE's choice had not reached them."""
    wrong = tokens.shape[1] <= 30
    return (rows_of_neighbours if wrong else with_features)(tokens, visual, features)


def layers_exchanged(tokens: Tensor, visual: Tensor, features: Tensor) -> Embedded:
    made = with_features(tokens, visual, features)
    return dataclasses.replace(made, layers=made.layers[::-1])


def rows_of_neighbours(tokens: Tensor, visual: Tensor, features: Tensor) -> Embedded:
    """Right features, another token's DeepStack rows."""
    made = with_features(tokens, visual, features)
    return dataclasses.replace(made, layers=tuple(layer.roll(1, 0) for layer in made.layers))


def no_gradient(tokens: Tensor, visual: Tensor, features: Tensor) -> Embedded:
    """DeepStack rows whose gradient is lost."""
    made = with_features(tokens, visual, features)
    return dataclasses.replace(made, layers=tuple(layer.detach() for layer in made.layers))


MISTAKES = [nothing_added, layers_exchanged, rows_of_neighbours]


def in_sections(freqs: Tensor) -> Tensor:
    """Qwen2-VL's M-RoPE, section by section, with Qwen3-VL's sections."""
    parts = freqs.split([10, 7, 7], dim=-1)
    joined = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    return torch.cat([joined, joined], dim=-1)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_the_stock_models(policy: QwenVL, side: Any) -> None:
    """Bug: ids, positions, features or masks are not those of the stock model given ids and pixels."""
    sided = dataclasses.replace(policy, padding_side=side)
    expected = [stock_logprobs(policy, prompt, answer) for prompt, answer in cases(policy)]
    batch = sided.batch(cases(sided))
    assert largest(score_batch(sided, batch).logprobs, batch, expected) < TOLERANCE


@pytest.mark.parametrize("mistake", MISTAKES)
def test_scores_see_deepstack(monkeypatch: pytest.MonkeyPatch, mistake: Callable[..., Embedded]) -> None:
    """Bug: a comparison that passes whatever is added behind the first layers."""
    policy = exact("qwen3_vl")
    expected = [stock_logprobs(policy, prompt, answer) for prompt, answer in cases(policy)]
    batch = policy.batch(cases(policy))
    monkeypatch.setattr(qwen_vl, "with_features", mistake)
    assert largest(score_batch(policy, batch).logprobs, batch, expected) > 1000 * TOLERANCE


def test_scores_see_how_positions_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a comparison that passes for M-RoPE in sections."""
    policy = exact("qwen3_vl")
    expected = [stock_logprobs(policy, prompt, answer) for prompt, answer in cases(policy)]
    batch = policy.batch(cases(policy))
    rotary = policy.model.model.language_model.rotary_emb
    monkeypatch.setattr(rotary, "recomposition_frequencies", in_sections)
    assert largest(score_batch(policy, batch).logprobs, batch, expected) > 1000 * TOLERANCE


def test_copy_is_the_stock_model_shown_the_image_twice(policy: QwenVL) -> None:
    """Bug: an image shown again in training lacks what the first layers get."""
    prompt = make_prompt(policy, 5)
    copied: Spans = (words(11, 21), Visual(image=0), words(31, 41))
    plain: Spans = (words(11, 21), words(31, 41))
    batch = policy.batch([(prompt, copied)])
    assert len(batch.images) == 1
    ours = score_batch(policy, batch).logprobs
    assert largest(ours, batch, [stock_logprobs(policy, prompt, copied)]) < TOLERANCE
    assert largest(ours, batch, [stock_logprobs(policy, prompt, plain)]) > 1000 * TOLERANCE


# -- rollouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(REATTENTIONS))
def test_rollouts_are_the_stock_models(policy: QwenVL, name: str) -> None:
    """Bug: an inserted block that is not what the stock model sees when it is given the image again (COPY),
    or that sequence without the tokens left out (ROUTE), with their DeepStack rows."""
    rollouts = generate(policy, prompts(policy), REATTENTIONS[name])
    assert difference(policy, rollouts) < TOLERANCE
    assert ratio_gap(policy, policy.batch([(r.prompt, r.spans) for r in rollouts])) < TOLERANCE
    if name != "implicit":
        assert any(rollout.insertions for rollout in rollouts), "nothing was inserted: this proved nothing"


@pytest.mark.parametrize("mistake", [nothing_added_to_blocks, neighbours_in_blocks])
@pytest.mark.parametrize("name", ["copy", "copy behind text", "route"])
def test_rollouts_see_the_layers_of_a_block(
    monkeypatch: pytest.MonkeyPatch, name: str, mistake: Callable[..., Embedded]
) -> None:
    """Bug: DeepStack rows for prompts, none or wrong ones for what is inserted, and nothing that notices."""
    policy = exact("qwen3_vl")
    monkeypatch.setattr(qwen_vl, "with_features", mistake)
    rollouts = generate(policy, prompts(policy), REATTENTIONS[name])
    shown = [rollout for rollout in rollouts if rollout.insertions]
    others = [rollout for rollout in rollouts if not rollout.insertions]
    assert difference(policy, shown) > 100 * TOLERANCE
    assert difference(policy, others) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_rollouts_are_the_stock_models_in_float32(name: Any) -> None:
    """Bug: what is equal on paper differs at the precision of a usual run on a CPU."""
    policy = make_policy(gain=1.0, family=name)
    rollouts = generate(policy, prompts(policy)[:3], VisualCopy(trigger="a"))
    assert any(rollout.insertions for rollout in rollouts)
    assert difference(policy, rollouts) < TOLERANCE
    assert ratio_gap(policy, policy.batch([(r.prompt, r.spans) for r in rollouts])) < TOLERANCE


def stock_generated(policy: QwenVL, prompt: Prompt, tokens: int) -> tuple[int, ...]:
    """The stock model's own greedy generation, on ids and pixels."""
    ids = policy.batch([(prompt, ())]).ids
    pictures: dict[str, Tensor] = {}
    if prompt.patches:
        grids = [(g.frames, 2 * g.rows, 2 * g.columns) for g in prompt.grids]
        pictures["pixel_values"] = torch.cat([image.pixels for image in prompt.patches])
        pictures["image_grid_thw"] = torch.tensor(grids)
    pictures = {name: tensor.to(policy.device) for name, tensor in pictures.items()}
    model = copy.deepcopy(policy.model)  # it keeps `rope_deltas`
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == policy.vision.pad).int(),
        max_new_tokens=tokens,
        do_sample=False,
        suppress_tokens=list(policy.reserved_ids),
        eos_token_id=list(policy.end_ids),
        pad_token_id=policy.pad_id,
        **pictures,
    )
    return tuple(made[0, ids.shape[1] :].tolist())


def greedy(policy: QwenVL, given: list[Prompt]) -> list[tuple[int, ...]]:
    engine = InProcessEngine(policy=policy)
    groups = engine.generate(given, 1, SamplingParams(max_tokens=12, temperature=0), Implicit(), seed=0)
    return [rollout.sampled_ids for (rollout,) in groups]


def test_greedy_rollouts_are_those_of_generate(policy: QwenVL) -> None:
    """Bug: the engine's prefill, cache or decode step is another model than the library's."""
    given = prompts(policy)
    answers = greedy(policy, given)
    assert answers == [stock_generated(policy, prompt, 12) for prompt in given]
    assert len(set(answers)) == len(answers), "all alike: this proved little"


def test_greedy_rollouts_see_deepstack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: answers so alike that they would be the same without DeepStack."""
    policy = exact("qwen3_vl")
    given = prompts(policy)[:3]
    stock = [stock_generated(policy, prompt, 12) for prompt in given]
    monkeypatch.setattr(qwen_vl, "with_features", nothing_added)
    assert greedy(policy, given) != stock


def test_attention_is_that_of_eager_attention(policy: QwenVL) -> None:
    """Bug: ROUTE chooses by something else than what the answer attended to; norms of queries and keys, and
    what is added behind the first layers, are part of it."""
    probe = AttentionProbe()
    looking = Looking(trigger="a", probe=probe, seen=[])
    rollouts = generate(policy, prompts(policy)[:3], looking)
    compared = 0
    for prompt, count, told in looking.seen:
        if count == 1:
            continue
        gaps = []
        for owner in (rollout for rollout in rollouts if rollout.prompt is prompt):
            wanted = eager_attention(policy, owner, count - 1, probe)
            gaps.append(max(float((a - b).abs().max()) for a, b in zip(told, wanted, strict=True)))
        assert min(gaps) < 1e-6
        compared += 1
    assert compared >= 2


def test_a_pass_over_an_answer_chooses_what_decoding_chose(policy: QwenVL) -> None:
    """Bug: SFT's blocks are others than a rollout's."""
    route = VisualRoute(trigger="a", m=40)
    rollouts = generate(policy, prompts(policy)[:3], route, tokens=20)
    again = place_insertions(policy, [(r.prompt, r.sampled_ids) for r in rollouts], route)
    blocks = 0
    for rollout, placed in zip(rollouts, again, strict=True):
        made = [span for one in placed for span in (*one.insertion.before, *one.insertion.after)]
        chosen = [(span.image, span.keep) for span in made if isinstance(span, Visual)]
        assert chosen == [(span.image, span.keep) for span in rollout.insertions]
        blocks += len(chosen)
    assert blocks


# -- the decode step ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["implicit", "copy", "route"])
def test_the_lean_step_equals_the_stock_forward(policy: QwenVL, name: str) -> None:
    """Bug: another norm, rotation, size of heads or product than the model's own."""
    given = prompts(policy)[:3]
    stock = decoded(policy, given, "stock", REATTENTIONS[name])
    assert decoded_difference(decoded(policy, given, "lean", REATTENTIONS[name]), stock) < TOLERANCE


@pytest.mark.parametrize("settings", [{"compute": "bfloat16"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_lean_step_in_bfloat16(name: Any, settings: dict[str, Any]) -> None:
    """Bug: norms of queries and keys in another dtype than in the stock forward."""
    policy = uneven(make_policy(gain=1.0, family=name, **settings))
    given = prompts(policy)[:3]
    stock, lean = (decoded(policy, given, kind) for kind in ("stock", "lean"))
    assert decoded_difference(lean, stock) < 0.05


def test_fixed_shapes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: norms, or heads of another size, at shapes that a recorded step cannot have."""
    policy = exact("qwen3_vl")
    stock = decoded(policy, prompts(policy)[:3], "stock", REATTENTIONS["copy"])
    _graphs(monkeypatch)
    found = decoded(policy, prompts(policy)[:3], "lean", REATTENTIONS["copy"])
    assert decoded_difference(found, stock) < TOLERANCE


def no_norms(attention: Any, heads: int) -> Callable[[Tensor], Tensor]:
    del attention, heads
    return lambda x: x


def norms_exchanged(attention: Any, heads: int) -> Callable[[Tensor], Tensor]:
    other = copy.copy(attention)
    other._modules = attention._modules | {"q_norm": attention.k_norm, "k_norm": attention.q_norm}
    return EVENED(other, heads)


def norm_of_all_heads(attention: Any, heads: int) -> Callable[[Tensor], Tensor]:
    del heads
    return EVENED(attention, 1)


EVENED = decoder._evened


@pytest.mark.parametrize("mistake", [no_norms, norms_exchanged, norm_of_all_heads])
def test_the_lean_step_sees_norms(monkeypatch: pytest.MonkeyPatch, mistake: Any) -> None:
    """Bug: a comparison that passes for a step without norms, or with the wrong ones."""
    policy = exact("qwen3_vl")
    stock = decoded(policy, prompts(policy)[:2], "stock")
    monkeypatch.setattr(decoder, "_evened", mistake)
    assert decoded_difference(decoded(policy, prompts(policy)[:2], "lean"), stock) > 1e-2


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "split", "varlen"])
def test_packed_rows_equal_plain_rows(policy: QwenVL, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an answer sees its siblings, or a gradient, of the tower's mergers too, is lost or doubled."""
    monkeypatch.setattr(tree_attention, "varlen_kernel", lambda _: plain_varlen)
    assert max(both_ways(policy, kind)) < TOLERANCE
    silent = [
        name for name, p in policy.module.named_parameters() if p.grad is None or not bool(p.grad.any())
    ]
    assert [name for name in silent if "bias" not in name] == []


def test_packed_rows_see_a_lost_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: mergers of DeepStack that never train."""
    policy = fresh("qwen3_vl")
    objective, batch = grpo(kl=KL()), make_batch(policy)
    _, wanted = in_one_graph(policy, objective, batch)
    monkeypatch.setattr(qwen_vl, "with_features", no_gradient)
    _, found = in_one_graph(policy, objective, batch)
    lost = {name for name in found if bool(wanted[name].any()) and not bool(found[name].any())}
    assert lost == {name for name in found if "deepstack_merger_list" in name}
    assert len(lost) == 2 * 6


@pytest.mark.parametrize("kind", ["dense", "split"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    """Bug: layers that run again on the way back add the features of layers before them again, or not."""
    policy = fresh("qwen3_vl")
    objective, batch = grpo(kl=KL()), make_batch(policy)
    loss, wanted = in_one_graph(dataclasses.replace(policy, share_prefix=False), objective, batch)
    enable_checkpointing(policy.model)
    policy.module.train()
    packed: Any = dataclasses.replace(policy, prefix_attention=kind)  # type: ignore[arg-type]
    again, found = in_one_graph(packed, objective, batch)
    assert again == pytest.approx(loss, abs=TOLERANCE)
    assert largest_gradient(found, wanted) < TOLERANCE


@pytest.mark.parametrize("micro_tokens", [4096, 150, 1])
def test_micro_batches_change_nothing(policy: QwenVL, micro_tokens: int) -> None:
    """Bug: the feature leaf collects the last features' gradient only; with one token a pass every image is
    encoded once more on the way back."""
    objective, batch = grpo(kl=KL()), make_batch(policy)
    loss, wanted = in_one_graph(policy, objective, batch)
    report = make_updater(policy, objective, micro_tokens)(batch, lr=0.0)
    policy.module.eval()
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert report["loss"] == pytest.approx(loss, abs=TOLERANCE)
    assert largest_gradient(found, wanted) < TOLERANCE


def test_a_feature_row_is_as_wide_as_the_language_model_takes(policy: QwenVL) -> None:
    """Bug: features without their DeepStack rows that are taken without a word."""
    layers = 2 if policy.family.deepstack else 0
    batch = policy.batch([(make_prompt(policy), (words(10),))])
    features = policy.features(batch.images)
    assert features.shape == (16, 128 * (1 + layers))
    assert policy.features(()).shape == (0, 128 * (1 + layers))
    with pytest.raises(AssertionError, match=f"feature rows of 64 numbers, not {128 * (1 + layers)}"):
        score_batch_with(policy, batch, features[:, :64])


def score_batch_with(policy: QwenVL, batch: Batch, features: Tensor) -> Tensor:
    with torch.no_grad():
        return policy.score(batch, features).logprobs


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_cache_changes_nothing(name: Any, tmp_path: Path) -> None:
    """Bug: what is kept of an image lacks its DeepStack rows, in memory or in a folder."""
    plain = favour(make_policy(family=name), [SPECIAL], 4)
    freeze(plain.model, ("vision", "projector"))
    given = prompts(plain)[:3]
    # The tower takes an image alone with a cache, and products may round otherwise in company.
    alone = torch.cat([plain.features([image]) for prompt in given for image in prompt.patches])
    images = [image for prompt in given for image in prompt.patches]
    for _ in range(2):  # the second finds them in the folder
        kept = dataclasses.replace(plain, feature_cache=FeatureCache(folder=tmp_path))
        for _ in range(2):
            assert torch.equal(kept.features(images), alone)
    a, b = (generate(each, given[:1], REATTENTIONS["copy"]) for each in (plain, kept))
    assert [r.sampled_ids for r in a] == [r.sampled_ids for r in b]
    assert any(r.insertions for r in a)


@pytest.mark.parametrize("frozen", [("vision",), ("vision", "projector"), ("language",)], ids=str)
def test_freezing(frozen: tuple[Any, ...]) -> None:
    """Bug: DeepStack's mergers are no projector, and train or rest with the tower."""
    policy = random_tiny(family="qwen3_vl")
    freeze(policy.model, frozen)
    mergers = [p for name, p in policy.model.named_parameters() if "deepstack_merger_list" in name]
    assert len(mergers) == 2 * 6
    assert all(p.requires_grad == ("projector" not in frozen) for p in mergers)


# -- chat -----------------------------------------------------------------------------------------

NO_DEFAULT = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As Qwen3-VL's, of which only this matters: no system turn unless one is given."""


def like_qwen3(policy: QwenVL) -> QwenVL:
    """With the peculiarities of Qwen3-VL's tokenizer: `<think>` is a token, though none that counts as
    special, and there is no default system turn."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.add_tokens(
        [AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")]
    )
    tokenizer.chat_template = NO_DEFAULT
    return dataclasses.replace(policy, tokenizer=tokenizer)


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_prompts_are_those_of_the_template(system: str | None) -> None:
    """Bug: a system turn that the model has not been trained with and nobody can leave out, or `<think>` of a
    question cut into other tokens than by the model's own tokenizer."""
    policy = like_qwen3(exact("qwen3_vl"))
    sample = make_sample(0, "<image>Think in <think> tags.")
    prompt = policy.prompt(sample, Instruction(system=system))
    turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    turns.append(
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question[7:]}]}
    )
    rendered = policy.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    stock = policy.tokenizer.encode(rendered, add_special_tokens=False)
    block = list(policy.vision)
    ours = [i for span in prompt.spans for i in (span.ids if isinstance(span, Text) else block)]
    assert ours == stock
    assert policy.tokenizer.convert_tokens_to_ids("<think>") in ours


def test_no_system_turn_is_the_templates_default() -> None:
    """Bug: an empty turn where Qwen2.5-VL's template would write its own."""
    policy = exact("qwen2_5_vl")
    sample = make_sample(0)
    assert policy.prompt(sample, Instruction(system=None)).spans == policy.prompt(sample, Instruction()).spans


def test_tags_that_are_tokens_are_encoded_and_decoded_as_such() -> None:
    """Bug: a gold answer whose `<think>` is not the token that the model writes, or that no reward sees."""
    policy = like_qwen3(exact("qwen3_vl"))
    (span,) = policy.answer("<think>a</think>")
    opening, closing = policy.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert (span.ids[0], span.ids[-2]) == (opening, closing)
    assert policy.decode(span.ids[:-1]) == "<think>a</think>"
    assert not {opening, closing} & {*policy.reserved_ids}


# -- runs -----------------------------------------------------------------------------------------


def stock_logits_of(model: Any, policy: QwenVL, prompt: Prompt) -> Tensor:
    rollout = Rollout(prompt=prompt, spans=(Text(ids=(10, 20, 30)),), stop="length", text="")
    return stock_logits(dataclasses.replace(policy, model=model), rollout)[0]


@pytest.mark.parametrize("make", [small_sft, small_rl])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_trains_all_parts_and_saves_a_stock_model(name: Any, make: Any, tmp_path: Path) -> None:
    """Bug: a family whose weights do not move, or whose saved folder stock transformers loads otherwise."""
    from transformers import AutoModelForImageTextToText

    before = {key: p.detach().clone() for key, p in random_tiny(family=name).module.named_parameters()}
    trainer = make(tmp_path, policy=random_tiny(family=name), steps=1)
    result = trainer.run()
    moved: dict[str, bool] = {}
    for key, parameter in trainer.policy.module.named_parameters():
        part = "deepstack" if "deepstack" in key else part_of(key)
        moved[part] = moved.get(part, False) or not torch.equal(parameter, before[key])
    assert moved == dict.fromkeys(moved, True)
    assert len(moved) == (4 if name == "qwen3_vl" else 3)
    model = AutoModelForImageTextToText.from_pretrained(result.folder / "model").eval()
    assert model.config.model_type == name
    again = load_policy(str(result.folder / "model"))
    prompt = make_prompt(again)
    logits = stock_logits_of(model, again, prompt)
    assert torch.equal(logits, stock_logits_of(trainer.policy.model.eval(), again, prompt))
    batch = again.batch([(prompt, (words(10, 20, 30),))])
    expected = stock_logprobs(again, prompt, (words(10, 20, 30),))
    assert largest(score_batch(again, batch).logprobs, batch, [expected]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_each_family_loads(name: Any, tmp_path: Path) -> None:
    """Bug: a family that the loader refuses, or takes for another."""
    policy = load_policy(str(tiny_folder(tmp_path / "tiny", family=name)))
    assert policy.family.model_type == name
    classes = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    assert type(policy.model).__name__ == f"{classes[name]}ForConditionalGeneration"


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    """Bug: a model whose tower or positions differ is run as if it were one of these."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))
    with pytest.raises(
        ValueError,
        match=r"is a 'qwen3_vl_moe' model\. This policy works for Qwen2-VL \('qwen2_vl'\), .*Qwen3-VL",
    ):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="is a 'llava' model"):
        family_of("llava")
