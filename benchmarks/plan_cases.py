"""The steps whose memory `plan.py` measures and predicts: one process, all rows of one length.

Every row is as long as the prediction is told, because ids that end an answer are never drawn; so what is
compared is the model of the memory, not a guess about lengths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reflectvlm import (
    KL,
    AdamW,
    ClippedSurrogate,
    InProcessEngine,
    Instruction,
    RLTrainer,
    Rubric,
    Sample,
    SamplingParams,
    SFTTrainer,
)
from reflectvlm.models.freezing import freeze
from reflectvlm.models.loading import enable_checkpointing
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.planning import Adapter, Compute, Job, Load, Training
from reflectvlm.planning.measured import Watch
from reflectvlm.planning.reading import shape_of
from reflectvlm.types import Rollout

sys.path.insert(0, str(Path(__file__).parent / "speed"))

GOLD = "<think>" + "The upper left digit is a three, and the one beside it is a four. " * 3 + "</think> 7"
MOMENT = 0.004
"""Seconds in which a thread of gloo lets go of what it has sent."""
STEPS = 2
"""The first has no moments yet."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: str = "tiny"
    """tiny, or the 46-million one of the speed benchmark."""
    kind: str = "rl"
    pixels: int = 128
    prompts: int = 8
    group: int = 8
    tokens: int = 32
    updates: int = 1
    micro_tokens: int = 2048
    kl: bool = True
    training: Training = field(default_factory=lambda: Training(gpu=False))


def cases() -> list[Case]:
    """All that the table has."""
    plain = Training(gpu=False)
    again = dataclasses.replace(plain, checkpointing=True)
    half = dataclasses.replace(plain, products="bfloat16")
    frozen = dataclasses.replace(plain, frozen=frozenset({"vision", "projector"}))
    low = dataclasses.replace(plain, weights="bfloat16")
    tiny = [
        Case(name="RL with KL", training=plain),
        Case(name="RL with KL, checkpointing", training=again),
        Case(name="RL, no KL, one pass", kl=False, micro_tokens=16_384, training=plain),
        Case(name="RL, a group in parts", micro_tokens=160, prompts=2, training=plain),
        Case(name="RL, vision frozen", training=frozen),
        Case(name="RL, bfloat16 products", training=half),
        Case(
            name="RL, bfloat16 products, checkpointing",
            training=dataclasses.replace(half, checkpointing=True),
        ),
        Case(name="RL, bfloat16 weights", training=low),
        Case(name="RL, LoRA", kl=False, training=dataclasses.replace(plain, adapter=Adapter(rank=8))),
        Case(name="SFT", kind="sft", prompts=16, training=plain),
        Case(name="SFT, checkpointing", kind="sft", prompts=16, training=again),
    ]
    large = [
        Case(name="RL with KL", training=plain),
        Case(name="RL with KL, checkpointing", training=again),
        Case(name="RL, vision frozen", training=frozen),
        Case(name="RL, LoRA", kl=False, training=dataclasses.replace(plain, adapter=Adapter(rank=8))),
        Case(name="SFT", kind="sft", training=plain),
        Case(name="SFT, checkpointing", kind="sft", training=again),
    ]
    changes = {"model": "46M", "pixels": 448, "prompts": 2, "tokens": 64, "micro_tokens": 1024}
    return tiny + [dataclasses.replace(case, **changes) for case in large]


# -- the step -----------------------------------------------------------------------------------------


def policy_of(case: Case, cache: Path) -> QwenVL:
    """The case's model with its settings."""
    policy = random_tiny() if case.model == "tiny" else _larger(cache)
    training = case.training
    policy.model.to(getattr(torch, training.weights))
    if training.adapter is not None:
        policy = _adapted(policy, training.adapter)
    else:
        freeze(policy.model, sorted(training.frozen))
    if training.checkpointing:
        enable_checkpointing(policy.model)
    policy = dataclasses.replace(policy, compute=training.products, prefix_attention=training.attention)
    if case.kind == "rl":
        vars(policy)["end_ids"] = policy.reserved_ids[:1]  # never drawn
    return policy


def _larger(cache: Path) -> QwenVL:
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from workload import Shape, model_config, write_processor

    from reflectvlm.models.tiny import pretrained_tiny

    folder = cache / "plan"
    tokenizer = write_processor(folder, Shape().vocabulary, pretrained_tiny())
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(model_config(Shape(), tokenizer))
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return QwenVL(model=model, tokenizer=tokenizer, image_processor=images, source="random")


def _adapted(policy: QwenVL, adapter: Adapter) -> QwenVL:
    from peft import LoraConfig, inject_adapter_in_model

    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    settings = LoraConfig(r=adapter.rank, target_modules=rf".*language_model.*\.({names})")
    inject_adapter_in_model(settings, policy.model)
    return policy


def _reward(group: Sequence[Rollout]) -> list[float]:
    return [(sum(one.sampled_ids) % 97) / 97 for one in group]


def trainer_of(case: Case, policy: QwenVL, compute: Compute | None = None) -> RLTrainer | SFTTrainer:
    """`compute`: how the trainer is spread over the processes that were started; None: one process."""
    from workload import pages

    images = pages(case.prompts * STEPS, case.pixels)
    rows = [
        Sample(id=str(i), question="Which?", answer="7", images=(image,), columns={"trace": GOLD})
        for i, image in enumerate(images)
    ]
    common: dict[str, Any] = {
        "policy": policy,
        "data": rows,
        "instruction": Instruction(),
        "rubric": Rubric(rewards={"number": _reward}, weights={"number": 1.0}),
        "steps": STEPS,
        "optimizer": AdamW(lr=1e-6, bits=case.training.moments),
        "micro_tokens": case.micro_tokens,
    }
    if compute is not None:
        common["compute"] = compute.settings
    if case.kind == "sft":
        return SFTTrainer(rows_per_step=case.prompts, **common)
    return RLTrainer(
        prompts_per_step=case.prompts,
        group_size=case.group,
        updates_per_step=case.updates,
        sampling=SamplingParams(max_tokens=case.tokens),
        engine=lambda policy: InProcessEngine(policy=policy, max_rows=case.prompts * case.group),
        keep_equal_groups=True,
        objective=ClippedSurrogate(kl=KL() if case.kl else None, reduce="token_mean"),
        **common,
    )


def job_of(case: Case, policy: QwenVL, compute: Compute | None = None) -> Job:
    """What the planner is told: the same numbers that the trainer gets."""
    from workload import pages

    sample = Sample(id="0", question="Which?", answer="7", images=tuple(pages(1, case.pixels)))
    prompt = policy.prompt(sample, Instruction())
    rl = case.kind == "rl"
    (gold,) = policy.answer(GOLD)
    return Job(
        shape=shape_of(policy.model.config),
        training=dataclasses.replace(
            case.training, chunk=policy.chunk, reference=rl and case.kl, gpu=torch.cuda.is_available()
        ),
        load=Load(
            kind="rl" if rl else "sft",
            prompt=policy.prompt_length(prompt),
            visual=sum(grid.tokens for grid in prompt.grids),
            answer=case.tokens if rl else len(gold.ids),
            group=case.group if rl else 1,
            prompts=case.prompts // (compute.world if compute else 1),
            updates=case.updates,
            micro_tokens=case.micro_tokens,
            max_rows=case.prompts * case.group,
        ),
        compute=compute or Compute(),
    )


def measured(
    case: Case, make: Callable[[], QwenVL], compute: Compute | None, watch: Watch
) -> tuple[Job, dict[str, int]]:
    """What the planner is told, and the peak of live bytes of each phase over the steps of a trainer, of all
    that was made since the model's first weight; of several processes, whose phases are their own affair,
    of whole steps."""
    if compute is not None:
        return _several(case, make, compute)
    with watch:
        policy = make()
        made = trainer_of(case, policy)
        made.prepare()
        for number in range(STEPS):
            if isinstance(made, SFTTrainer):
                with watch.phase("update"):
                    made.step(number)
            else:
                _phases(made, watch, number, case.updates)
    return job_of(case, policy), watch.peaks


def _several(case: Case, make: Callable[[], QwenVL], compute: Compute) -> tuple[Job, dict[str, int]]:
    """The same of one of several processes. What it holds before the first step is counted, not watched."""
    with _released_here():  # from the start: DeepSpeed keeps functions that it has looked up
        policy = make()
        made = trainer_of(case, policy, compute)
        made.prepare()
        gc.collect()
        watch = Watch(held=[one for one in gc.get_objects() if isinstance(one, torch.Tensor)])
        with watch:
            for number in range(STEPS):
                with watch.phase("step"):
                    made.step(number)
    return job_of(case, policy, compute), watch.peaks


@contextlib.contextmanager
def _released_here() -> Iterator[None]:
    """Every tensor that is sent is let go by the thread that sent it. Where one of gloo's threads is the last
    to hold it, the profiler, which watches ours, takes it to be alive for ever."""
    names = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor")
    names += ("reduce_scatter", "reduce_scatter_tensor", "all_to_all_single")
    before = {name: getattr(torch.distributed, name) for name in names}
    for name, real in before.items():
        setattr(torch.distributed, name, functools.partial(_sent, real))
    try:
        yield
    finally:
        for name, real in before.items():
            setattr(torch.distributed, name, real)


def _sent(real: Callable[..., Any], *given: Any, **named: Any) -> Any:
    work = real(*given, **named)
    if work is None:
        time.sleep(MOMENT)
        return None
    return _Waited(work)


@dataclass(eq=False)
class _Waited:
    work: Any

    def wait(self, *given: Any) -> Any:
        done = self.work.wait(*given)
        time.sleep(MOMENT)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def _phases(made: RLTrainer, watch: Watch, number: int, updates: int) -> None:
    """What `RLTrainer.step` does."""
    with watch.phase("rollout"):
        groups = made.sample_groups(number)
    share = -(-len(groups) // updates)
    with watch.phase("reference"):  # it is asked while the batches are made
        batches = [made.batch(groups[start : start + share]) for start in range(0, len(groups), share)]
    for batch in batches:
        with watch.phase("update"):
            made.updater(batch, 1e-6)
