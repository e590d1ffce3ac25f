"""Runs with LoRA: small checkpoints, exact resume, and a model that others load."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adapting import ALL, FIRST, TAGS, adapters_of, bits, disturb, lora_tiny, same
from reflectvlm.models.loading import find_model
from reflectvlm.models.lora import LoRA
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.train import keeping
from reflectvlm.train.optim import AdamW
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.sft import SFTTrainer
from reflectvlm.types import SamplingParams
from test_lora import rows
from test_trained_rows import untied_folder
from training import crashed, logged, same_runs, small_rl, small_sft

pytest.importorskip("peft", reason="adapters come with the extra lora")

LOUD = SamplingParams(max_tokens=8, temperature=2.0)
AUTO = {"resume": "auto", "checks": False}


def rl(root: Path, **changes: Any) -> RLTrainer:
    output = {"checks": False} | changes.pop("output", {})
    changes = {"policy": lora_tiny(tags=TAGS), "sampling": LOUD, "output": output} | changes
    return small_rl(root, **changes)


def sft(root: Path, **changes: Any) -> SFTTrainer:
    output = {"checks": False} | changes.pop("output", {})
    changes = {"policy": lora_tiny(tags=TAGS), "output": output} | changes
    return small_sft(root, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rl(tmp_path_factory.mktemp("whole")).run().folder


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(RLTrainer, "step", 3), (torch.optim.AdamW, "step", 6), (keeping, "snapshot", 2), (QwenVL, "save", 1)],
    ids=["between steps", "between updates", "before a save", "before the model is written"],
)
def test_a_resumed_run_is_the_unbroken_one(
    owner: Any, name: str, number: int, tmp_path: Path, finished: Path
) -> None:
    """Bug: adapters, new rows, their moments or the reference's start are lost where only they are stored."""
    trainer = rl(tmp_path)
    crashed(trainer, owner, name, number, within=None if owner is RLTrainer else trainer)
    resumed = rl(tmp_path, output=AUTO).run()
    same_runs(resumed.folder, finished)
    assert any(line.get("kl", 0) > 1e-4 for line in logged(finished))
    one, other = (
        load_file(run / "model/adapter/adapter_model.safetensors") for run in (resumed.folder, finished)
    )
    assert same(one, other)


def test_a_resumed_sft_run_is_the_unbroken_one(tmp_path: Path) -> None:
    """Bug: the same, without rollouts and reference."""
    whole = sft(tmp_path / "whole").run().folder
    crashed(sft(tmp_path / "cut"), SFTTrainer, "step", 4)
    same_runs(sft(tmp_path / "cut", output=AUTO).run().folder, whole)


def test_a_checkpoint_holds_what_trains_and_nothing_else(finished: Path) -> None:
    """Bug: the base is written at every save; or a row is not."""
    newest = max((finished / "checkpoints").glob("step-*"))
    tensors = load_file(newest / "model.safetensors")
    policy = lora_tiny(tags=TAGS)
    embedding = "model.language_model.embed_tokens.weight"
    assert set(tensors) == {*adapters_of(policy), embedding}
    assert tensors[embedding].shape == (2, 128)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert numbers < sum(p.numel() for p in policy.module.parameters()) / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: lora_tiny(LoRA(rank=8), TAGS), r"belongs to another model: .*lora_A.*and was"),
        (
            lambda _: lora_tiny(LoRA(rank=4, alpha=8), TAGS),
            r"holds adapters for another base, or scaled other",
        ),
        (lambda _: load_policy("tiny", new_tags=TAGS), r"belongs to another model"),
        (
            lambda tmp: load_policy(str(tiny_folder(tmp / "other")), lora=LoRA(rank=4), new_tags=TAGS),
            r"another base",
        ),
    ],
    ids=["rank", "alpha", "no lora", "base"],
)
def test_another_base_or_adapter_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    """Bug: adapters of one base quietly correct another, or by another factor."""
    crashed(rl(tmp_path), RLTrainer, "step", 4)
    with pytest.raises(ValueError, match=message):
        rl(tmp_path, policy=change(tmp_path), output=AUTO).run()


# -- what a run leaves ----------------------------------------------------------------------------


def logits(model: Any, policy: QwenVL) -> Tensor:
    """Of the stock forward, on two prompts with images."""
    batch = policy.batch(rows(policy))
    with torch.no_grad():
        features = policy.features(batch.images)
        embedded = policy.embed(batch.ids, batch.visual, features)
        return model(inputs_embeds=embedded.tokens, position_ids=batch.positions).logits


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_saved_model_is_merged_and_stock(tied: bool, dora: bool, tmp_path: Path) -> None:
    """Bug: a folder that only peft loads, adapters merged at another scale or twice, rows of new tags lost,
    or a policy that saving has changed."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = "tiny" if tied else untied_folder(tmp_path / "base")
    policy = load_policy(path, lora=LoRA(rank=4, alpha=4, dora=dora, rslora=True, **ALL), new_tags=TAGS)
    disturb(policy, 0.02)  # so little that float32's rounding is not magnified layer by layer
    before, types = bits(policy), [type(module) for module in policy.module.modules()]
    policy.save(tmp_path / "model")
    assert same(bits(policy), before)
    assert [type(module) for module in policy.module.modules()] == types

    stock, told = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = load_policy(str(tmp_path / "model"))
    assert torch.equal(stock.lm_head.weight[FIRST], policy.model.lm_head.weight[FIRST])
    wanted = logits(policy.model, policy)
    assert (logits(plain.model, plain) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    base = load_policy(path, new_tags=TAGS)
    assert (logits(base.model, base) - wanted).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_saved_adapter_is_peft_s(tied: bool, dora: bool, tmp_path: Path) -> None:
    """Bug: keys or settings that peft reads otherwise, or drops in silence; rows of new tags lost."""
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = "tiny" if tied else untied_folder(tmp_path / "base")
    policy = load_policy(
        path, lora=LoRA(rank=4, dora=dora, language=["q_proj", "mlp.up_proj"]), new_tags=TAGS
    )
    disturb(policy)
    policy.save(tmp_path / "model")
    settings = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["base_model_name_or_path"] == path
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(find_model(path))
    adapted = PeftModel.from_pretrained(base, tmp_path / "model/adapter").eval()
    ids = torch.tensor([[100, FIRST, 101, FIRST + 1, 102]])
    with torch.no_grad():
        wanted, found = policy.model(input_ids=ids).logits, adapted(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-4


def test_the_model_of_a_run_is_where_the_next_one_starts(finished: Path, tmp_path: Path) -> None:
    """Bug: adapters of the first stage lost, or their folder taken for adapters to load."""
    first = load_policy(str(finished / "model"))
    second = load_policy(str(finished / "model"), lora=LoRA(rank=2), new_tags=TAGS)
    wanted = logits(first.model, first)
    assert torch.equal(logits(second.model, second), wanted)
    base = lora_tiny(tags=TAGS)
    assert (logits(base.model, base) - wanted).abs().max() > 1e-3
    assert sft(tmp_path, policy=second, steps=1).run().finished


def test_a_bfloat16_base_is_saved_as_bfloat16(tmp_path: Path) -> None:
    """Bug: a folder in two dtypes, or weights that stay rounded in the policy."""
    policy = disturb(lora_tiny(tags=TAGS, dtype="bfloat16", compute="bfloat16"))
    before = bits(policy)
    policy.save(tmp_path)
    assert same(bits(policy), before)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_policy_without_adapters_is_saved_as_ever(tmp_path: Path) -> None:
    """Bug: an empty adapter beside every model."""
    load_policy("tiny").save(tmp_path)
    assert not (tmp_path / "adapter").exists()


# -- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", [LoRA(rank=4), LoRA(rank=4, dora=True, init="gaussian")], ids=["lora", "dora"]
)
def test_a_few_steps_lower_the_loss(lora: LoRA, tmp_path: Path) -> None:
    """Bug: gradients that reach no adapter, or steps too small to matter."""
    policy = lora_tiny(lora)
    frozen = copy.deepcopy({name: p for name, p in policy.module.named_parameters() if not p.requires_grad})
    run = sft(tmp_path, policy=policy, steps=12, optimizer=AdamW(lr=5e-3)).run()
    losses = [line["loss"] for line in logged(run.folder) if "loss" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    now = dict(policy.module.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
