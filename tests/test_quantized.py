"""A base in 4 or 8 bits under adapters, on bitsandbytes' own kernels for a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapting import ALL, FIRST, TAGS, adapters_of, bits, disturb, lora_tiny, same
from fixtures import make_prompt
from reflectvlm.models.freezing import trainable_table
from reflectvlm.models.lora import LoRA
from reflectvlm.models.quantized import count, quantized_layers
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.reference import make_reference
from reflectvlm.reattention import Implicit
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train.optim import AdamW
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.update import score_without_grad
from reflectvlm.types import SamplingParams
from test_lora import farthest, gradients, one_step
from test_lora_runs import AUTO, logits, rl
from test_reference import logprobs
from training import crashed, same_runs

KINDS = pytest.mark.parametrize("quantize", ["nf4", "int8"])


def test_bitsandbytes_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a traceback out of an import, or a base that is quietly not quantised."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"quantize=nf4 needs bitsandbytes, .*install.* `reflectvlm\[bitsand"
    ):
        load_policy("tiny", quantize="nf4")
    with pytest.raises(ValueError, match=r"quantize is 'fp4'\. It must be 'nf4', 'int8' or null"):
        load_policy("tiny", quantize="fp4")  # type: ignore[arg-type]


def qlora(quantize: Any, lora: LoRA | None = None, **settings: Any) -> QwenVL:
    pytest.importorskip("bitsandbytes", reason="quantised bases come with the extra bitsandbytes")
    return lora_tiny(lora, TAGS, quantize=quantize, **settings)


@KINDS
def test_the_language_model_is_quantised_and_nothing_else(quantize: Any) -> None:
    """Bug: a head whose weight the log-probs cannot read, a tower in 4 bits, or figures of packed numbers."""
    policy = qlora(quantize)
    found = {name for name, _ in quantized_layers(policy.model)}
    assert len(found) == 4 * 7
    assert all(name.startswith("model.language_model.layers.") for name in found)
    assert all(name.endswith(".base_layer") for name in found)
    plain = {part: total for part, total, _ in trainable_table(load_policy("tiny").model)}
    adapters = sum(p.numel() for p in adapters_of(policy).values())
    told = {part: total for part, total, _ in trainable_table(policy.model)}
    assert told == plain | {"language": plain["language"] + adapters}
    weight = policy.model.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert count(weight) == 384 * 128


@KINDS
@pytest.mark.parametrize("compute", [None, "bfloat16"])
def test_adapters_train_after_rollouts_and_the_base_never_moves(quantize: Any, compute: Any) -> None:
    """Bug: what the library changes of a weight at its first use: a layout without gradients, a bias of
    another dtype."""
    policy = qlora(quantize, compute=compute)
    before = bits(policy)
    prompts = [make_prompt(policy, 0)]
    InProcessEngine(policy=policy).generate(prompts, 2, SamplingParams(max_tokens=3), Implicit(), seed=0)
    after = bits(policy)
    assert all(torch.equal(after[name].to(before[name].dtype), before[name]) for name in before)
    one_step(policy)
    after = bits(policy)
    moved = {name for name in after if not torch.equal(after[name].to(before[name].dtype), before[name])}
    assert moved == {*adapters_of(policy), "model.language_model.embed_tokens.weight", "lm_head.weight"}


def test_the_layout_for_answering_cannot_be_trained_on() -> None:
    """The mistake that `ready_for_training` keeps away, where the processor has what that layout is for."""
    policy = qlora("nf4")
    layers = [layer for _, layer in quantized_layers(policy.model)]
    if not type(layers[0])(8, 8).support_avx512bf16_for_cpu:
        pytest.skip("this processor has no bfloat16 products")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    logprobs(policy, policy)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable"):
        gradients(policy, {})


@KINDS
@pytest.mark.parametrize("decode", ["lean", "stock"])
def test_the_engine_s_log_probs_are_the_trainer_s(quantize: Any, decode: Any) -> None:
    """Bug: rollouts of another base than the one that adapters are trained on."""
    policy = disturb(qlora(quantize), 0.02)
    engine = InProcessEngine(policy=policy, decode=decode)
    prompts = [make_prompt(policy, seed) for seed in range(2)]
    groups = engine.generate(prompts, 3, SamplingParams(max_tokens=8), Implicit(), seed=1)
    batch = policy.batch([(one.prompt, one.spans) for group in groups for one in group])
    theirs = score_without_grad(policy, batch, 4096, 1.0)[batch.trained]
    gap = (theirs - batch.old_logprobs[batch.trained]).abs()
    # 8-bit products round inputs row by row, and a rounding that falls to the other side is seen.
    assert gap.max() < (1e-3 if quantize == "nf4" else 0.2)
    assert gap.mean() < (1e-4 if quantize == "nf4" else 0.02)


def test_packed_rows_equal_plain_rows() -> None:
    """Bug: products that depend on how many rows there are."""
    policy = disturb(qlora("nf4"), 0.02)
    assert farthest(gradients(policy, {"share_prefix": False}), gradients(policy, {})) < 1e-3


@KINDS
def test_the_reference_is_the_quantised_base(quantize: Any) -> None:
    """Bug: a KL term against the base before its quantisation, or after its training."""
    policy = qlora(quantize)
    reference = make_reference(policy)
    wanted = logprobs(policy, policy)
    disturb(policy)
    assert torch.allclose(logprobs(reference, policy), wanted, atol=1e-6)
    assert (logprobs(policy, policy) - wanted).abs().max() > 1e-2


@KINDS
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_export_is_dequantised_and_merged(
    quantize: Any, dora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a folder that only bitsandbytes loads; the unquantised base merged with adapters that corrected a
    quantised one; adapters left out; a policy that saving has changed."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    policy = disturb(qlora(quantize, LoRA(rank=4, alpha=8, dora=dora, **ALL)), 0.05)
    before = bits(policy)
    with caplog.at_level("INFO", logger="reflectvlm"):
        policy.save(tmp_path)
    assert "the base is quantised: the exported model is dequantised, in bfloat16" in caplog.text
    assert same(bits(policy), before)
    assert policy.model.hf_quantizer is not None
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert policy.model.config.quantization_config is not None
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)

    wanted, exported = logits(policy.model, policy), load_policy(str(tmp_path))
    gap = (logits(exported.model, exported) - wanted).abs().mean()
    base = load_policy("tiny", new_tags=TAGS)
    assert gap < 0.1 * (logits(base.model, base) - wanted).abs().mean()
    assert torch.allclose(exported.model.lm_head.weight[FIRST], policy.model.lm_head.weight[FIRST], atol=1e-2)


def test_a_quantised_policy_without_adapters_answers_and_does_not_train() -> None:
    """Bug: torch's complaint about gradients of whole numbers, or an empty optimiser."""
    pytest.importorskip("bitsandbytes", reason="quantised bases come with the extra bitsandbytes")
    policy = load_policy("tiny", quantize="nf4")
    group = InProcessEngine(policy=policy).generate(
        [make_prompt(policy)], 1, SamplingParams(max_tokens=3), Implicit(), seed=0
    )
    assert group[0][0].sampled_ids
    with pytest.raises(
        ValueError, match=r"Nothing trains: .* give a quantised policy adapters with policy\.lora"
    ):
        AdamW().build(policy.module.parameters())


@KINDS
def test_a_resumed_run_is_the_unbroken_one(quantize: Any, tmp_path: Path) -> None:
    """Bug: a base quantised anew at the resume is another one; its weights are not in the checkpoint."""
    whole = rl(tmp_path / "whole", policy=qlora(quantize)).run().folder
    crashed(rl(tmp_path / "cut", policy=qlora(quantize)), RLTrainer, "step", 3)
    resumed = rl(tmp_path / "cut", policy=qlora(quantize), output=AUTO).run().folder
    same_runs(resumed, whole)


def test_a_base_quantised_otherwise_is_refused(tmp_path: Path) -> None:
    """Bug: adapters that correct the errors of 4 bits go on upon another base."""
    crashed(rl(tmp_path, policy=qlora("nf4")), RLTrainer, "step", 4)
    with pytest.raises(ValueError, match=r"belongs to another model: .*base_layer\.weight is float32"):
        rl(tmp_path, policy=lora_tiny(tags=TAGS), output=AUTO).run()
