"""LoRA: which layers get adapters, what trains, and that every fast path is still the plain one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adapting import ALL, FIRST, IDS, TAGS, adapters_of, bits, disturb, lora_tiny, random_lora
from fixtures import make_prompt
from reflectvlm.models.adapters import adapter_layers
from reflectvlm.models.freezing import trained_rows
from reflectvlm.models.lora import LoRA
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.objectives import CrossEntropy
from reflectvlm.reattention import Implicit, VisualCopy
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train.optim import AdamW
from reflectvlm.train.precision import check_trainable_dtype
from reflectvlm.train.runtime import Runtime
from reflectvlm.train.update import Updater, score_without_grad
from reflectvlm.types import Prompt, SamplingParams, Spans, Text, Visual

pytest.importorskip("peft", reason="adapters come with the extra lora")

LANGUAGE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rows(policy: QwenVL) -> list[tuple[Prompt, Spans]]:
    one, two = make_prompt(policy, 0, instruction="Answer."), make_prompt(policy, 1)
    return [
        (one, (Text(ids=(100, 101, 102), trained=True),)),
        (two, (Text(ids=(100, 120, 121), trained=True), Visual(image=0), Text(ids=(130,), trained=True))),
        (one, (Text(ids=(140, 141), trained=True),)),
        (two, (Text(ids=(150, 151), trained=True),)),
    ]


def gradients(policy: QwenVL, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Log-probs, and the gradients of a weighted sum of them by name."""
    policy = dataclasses.replace(policy, **settings)
    policy.module.zero_grad(set_to_none=True)
    batch = policy.batch(rows(policy))
    logprobs = policy.score(batch, policy.features(batch.images)).logprobs
    (logprobs * torch.cos(batch.ids)).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs.detach(), **found}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    pairs = ((one[name], other[name]) for name in one)
    return max(float((a - b).abs().max()) / max(1.0, float(a.abs().max())) for a, b in pairs)


# -- which layers ---------------------------------------------------------------------------------


def test_all_linear_layers_of_the_language_model_by_default() -> None:
    """Bug: a layer forgotten, or one of the tower adapted because it is called alike."""
    policy = lora_tiny()
    wanted = {
        f"model.language_model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for i in range(4)
        for name in LANGUAGE
    }
    assert set(adapter_layers(policy.model)) == wanted
    assert type(policy.model).__name__ == "Qwen2_5_VLForConditionalGeneration"


def test_layers_by_part_and_name() -> None:
    """Bug: q_proj of a part that was not asked, or a projector that nobody matches."""
    policy = lora_tiny(LoRA(rank=2, language=["q_proj"], vision=["qkv", "mlp.down_proj"], projector="all"))
    found = set(adapter_layers(policy.model))
    assert {name.rpartition(".")[2] for name in found if "language" in name} == {"q_proj"}
    tower = {name.rpartition(".")[2] for name in found if "visual.blocks" in name}
    assert tower == {"qkv", "down_proj"}
    assert sorted(name for name in found if "merger" in name) == [
        "model.visual.merger.mlp.0",
        "model.visual.merger.mlp.2",
    ]
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.module.named_parameters())


def test_adapters_begin_as_the_seed_says_and_change_nothing() -> None:
    """Bug: two starts of one recipe that differ, a global generator that moved, or a policy that is not its
    base at the first step."""
    state = torch.get_rng_state()
    one, other = adapters_of(lora_tiny()), adapters_of(lora_tiny())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], other[name]) for name in one)
    third = adapters_of(lora_tiny(LoRA(rank=4, seed=1)))
    assert not any(torch.equal(one[name], third[name]) for name in one if "lora_A" in name)
    assert not any(p.any() for name, p in one.items() if "lora_B" in name)
    assert {p.dtype for p in adapters_of(lora_tiny(dtype="bfloat16")).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "scale"),
    # By hand: 6 over 4, 6 over the root of 4, and 32 over 16.
    [({"rank": 4, "alpha": 6.0}, 1.5), ({"rank": 4, "alpha": 6.0, "rslora": True}, 3.0), ({}, 2.0)],
)
def test_scale(settings: dict[str, Any], scale: float) -> None:
    """Bug: alpha read as another quantity than the papers'."""
    layers = adapter_layers(lora_tiny(LoRA(**settings)).model).values()
    assert {layer.scaling["default"] for layer in layers} == {scale}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"LoRA\.rank is 0\. It must be at least 1"),
        ({"alpha": 0}, r"LoRA\.alpha is 0\. It must be above 0"),
        ({"init": "pissa"}, r"LoRA\.init is 'pissa'\. It must be 'kaiming' or 'gaussian': others change the"),
        ({"dropout": 0.05}, r"LoRA\.dropout is 0\.05\. It must be 0: .*weight_decay holds back as well"),
        ({"language": "q_proj"}, r"LoRA\.language is 'q_proj'\. It is a list of names, \[q_proj\], or 'all'"),
        ({"language": []}, r"LoRA names no layers\. Give language, vision or projector a list, or 'all'"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    """Bug: a run that trains something else than was written, or nothing."""
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


@pytest.mark.parametrize(
    ("lora", "settings", "message"),
    [
        (LoRA(language=["qproj"]), {}, r"names \['qproj'\], and no linear layer .* It has \['down_proj', 'g"),
        (LoRA(language=["lm_head"]), {}, r"names \['lm_head'\].* the head cannot be adapted"),
        (
            LoRA(projector=["mlp.1"]),
            {},
            r"LoRA\.projector names \['mlp\.1'\].* It has \['mlp\.0', 'mlp\.2'\]",
        ),
        (
            LoRA(),
            {"freeze_parts": ["language"]},
            r"freeze_parts names language, and LoRA\.language adapts it",
        ),
        (LoRA(), {"freeze_parts": ["tower"]}, r"freeze_parts is \['tower'\]\. It is a list of some of"),
        (LoRA(), {"freeze_parts": "vision"}, r"freeze_parts is 'vision'\. It is a list"),
        (
            {"rank": 4},
            {},
            r"policy\.lora is \{'rank': 4\}\. It takes LoRA, in a recipe \{_target_: reflectvlm",
        ),
        (LoRA(), {"dtype": "bfloat16", "tags": TAGS}, r"dtype is bfloat16 and the rows .*compute=bfloat16"),
    ],
)
def test_policies_that_cannot_be(lora: Any, settings: dict[str, Any], message: str) -> None:
    """Bug: a name that matches nothing is dropped in silence."""
    with pytest.raises(ValueError, match=message):
        lora_tiny(lora, **settings)


def test_peft_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback out of an import where one line would do."""
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(
        ValueError, match=r"policy\.lora needs peft, .* `reflectvlm\[lora\]`, or set policy\."
    ):
        lora_tiny()


# -- what trains ----------------------------------------------------------------------------------


def one_step(policy: QwenVL) -> None:
    updater = Updater(
        policy=policy,
        objective=CrossEntropy(),
        optimizer=AdamW(lr=1e-2, weight_decay=0.5).build(policy.module.parameters()),
        runtime=Runtime(),
        max_grad_norm=1.0,
    )
    for _ in range(2):
        updater(policy.batch(rows(policy)), 1e-2)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "bfloat16", "compute": "bfloat16"}, {"gradient_checkpointing": True}],
    ids=["float32", "bfloat16", "checkpointing"],
)
def test_adapters_and_new_rows_train_and_nothing_else(settings: dict[str, Any], dora: bool) -> None:
    """Bug: weight decay or a hook that comes too late moves the base; a row that does not train; steps lost
    because new rows are as coarse as the base."""
    policy = lora_tiny(LoRA(rank=2, dora=dora, **ALL), TAGS, **settings)
    before = bits(policy)
    one_step(policy)
    after = bits(policy)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    embedding = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    assert moved - embedding == set(adapters_of(policy))
    weight = after["lm_head.weight"]
    changed = (weight != before["lm_head.weight"]).any(1).nonzero().flatten().tolist()
    assert changed == [FIRST, FIRST + 1]
    assert weight.dtype == torch.float32
    assert {p.dtype for p in policy.module.parameters() if p.requires_grad} == {torch.float32}


def test_without_new_tags_the_embedding_is_frozen() -> None:
    """Bug: the whole embedding trains beside the adapters, with moments for all of it."""
    policy = lora_tiny(embeddings="all")
    assert not policy.model.lm_head.weight.requires_grad
    assert trained_rows(policy.model.lm_head.weight) is None


def test_dtypes_of_what_trains() -> None:
    """Bug: a frozen base in half precision is refused though only float32 trains; or gradients pass through
    float16."""
    policy = lora_tiny(dtype="float16", compute="bfloat16")
    check_trainable_dtype(policy.module, policy.compute)
    with pytest.raises(ValueError, match=r"is float16 and policy\.compute is null, .* may stay float16"):
        check_trainable_dtype(policy.module, None)


# -- fast paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["dense", "split"])
def test_packed_rows_equal_plain_rows(kind: str, dora: bool) -> None:
    """Bug: adapters, in the tower too, or new rows see other rows where prompts are shared."""
    policy = random_lora(LoRA(rank=4, dora=dora, **ALL), IDS)
    plain = gradients(policy, {"share_prefix": False})
    packed = gradients(policy, {"share_prefix": True, "prefix_attention": kind})
    assert farthest(plain, packed) < 1e-5
    assert len(plain) == 2 + len(adapters_of(policy))  # log-probs and the tied embedding
    assert all(float(gradient.abs().max()) > 0 for gradient in plain.values())


@pytest.mark.parametrize("fused", [True, False], ids=["fused head", "plain head"])
def test_gradient_checkpointing_and_head_change_no_gradient(fused: bool) -> None:
    """Bug: what is computed again leaves the adapters out, or the head's new rows get no gradient."""
    from reflectvlm.models.loading import enable_checkpointing

    policy = random_lora(ids=IDS)
    policy.module.train()
    plain = gradients(policy, {"fused_head": False})
    enable_checkpointing(policy.model)
    assert farthest(plain, gradients(policy, {"fused_head": fused})) < 1e-5


def test_onednn_products_change_nothing() -> None:
    """Bug: the adapter's products go past the mode, or the base's twice."""
    policy = disturb(lora_tiny())
    exact, fast = (gradients(policy, {"fast_products": fast}) for fast in (False, True))
    assert farthest(exact, fast) < 1e-4


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("decode", ["lean", "stock"])
@pytest.mark.parametrize("reattention", [Implicit(), VisualCopy(trigger="a", limit=1)], ids=["text", "copy"])
def test_the_engine_s_log_probs_are_the_trainer_s(decode: Any, reattention: Any, dora: bool) -> None:
    """Bug: rollouts of the base while its adapters are trained: a ratio that is not 1 before an update."""
    policy = random_lora(LoRA(rank=4, dora=dora, **ALL), IDS)
    engine = InProcessEngine(policy=policy, decode=decode)
    prompts = [make_prompt(policy, seed) for seed in range(2)]
    groups = engine.generate(prompts, 3, SamplingParams(max_tokens=10), reattention, seed=1)
    batch = policy.batch([(one.prompt, one.spans) for group in groups for one in group])
    theirs = score_without_grad(policy, batch, 4096, 1.0)
    trained = batch.trained
    assert (theirs[trained] - batch.old_logprobs[trained]).abs().max() < 1e-5
    for layer in adapter_layers(policy.model).values():
        layer.enable_adapters(False)
    base = score_without_grad(policy, batch, 4096, 1.0)
    assert (base[trained] - batch.old_logprobs[trained]).abs().max() > 1e-2


def test_a_bfloat16_base_is_decoded_as_it_is_trained() -> None:
    """Bug: a lean step that cannot multiply float32 rows with bfloat16 weights, or multiplies otherwise."""
    policy = disturb(lora_tiny(tags=TAGS, dtype="bfloat16", compute="bfloat16"), 0.02)
    prompts = [make_prompt(policy, seed) for seed in range(2)]
    for decode in ("lean", "stock"):
        engine = InProcessEngine(policy=policy, decode=decode)  # type: ignore[arg-type]
        groups = engine.generate(prompts, 3, SamplingParams(max_tokens=10), Implicit(), seed=1)
        batch = policy.batch([(one.prompt, one.spans) for group in groups for one in group])
        theirs = score_without_grad(policy, batch, 4096, 1.0)[batch.trained]
        assert (theirs - batch.old_logprobs[batch.trained]).abs().max() < 0.2
        assert (theirs - batch.old_logprobs[batch.trained]).abs().mean() < 0.03
