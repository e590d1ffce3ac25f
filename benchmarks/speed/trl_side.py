"""TRL's side: stock `GRPOTrainer` on the common work, in an environment of its own. Started by `compare.py`.

Rollout is TRL's `_generate`: images, chat template, generation, decoding. Update is the rest of the step:
rewards, log-probs of reference and policy, backward pass, optimiser. Nothing is logged or saved. `Settings`
has what was found fastest (`compare.py --tune`; benchmarks/results/speed_tuning.md has the numbers).
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from measure import arguments, begin, memory, now, peak_memory, report, trained_parameters
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from workload import QUESTION, SYSTEM, Work, noise, pages


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may be chosen without changing the work."""

    rows: int = 0
    """Rows of one pass, the rest by accumulation; 0 is all rows of a step."""
    checkpointing: bool = False
    liger: bool = False
    optim: str = "adamw_torch_fused"
    attention: str = "sdpa"
    cache: str | None = None
    """E.g. "static"; None is the dynamic cache."""
    continuous_batching: bool = False
    compile: bool = False
    workers: int = 0
    dtype: str = "float32"
    freeze_vision: bool = False


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [noise(ids) for ids in completion_ids]


def processor(folder: Path) -> Qwen2_5_VLProcessor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 4096}
    common: dict[str, Any] = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**common),
        chat_template=tokenizer.chat_template,
    )


class Clock(TrainerCallback):
    """Seconds of each optimiser step and of the generation in it; ends the run when they are spent."""

    def __init__(self, seconds: float) -> None:
        self.steps: list[float] = []
        self.rollouts: list[float] = []
        self.prompt = self.tokens = 0
        self._start = self._generating = 0.0
        self._left = seconds

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start, self._generating = now(), 0.0

    def on_step_end(self, *given: Any, **_: Any) -> None:
        control = given[2]  # behind the arguments and the state
        self.steps.append(now() - self._start)
        self.rollouts.append(self._generating)
        if sum(self.steps[1:]) > self._left:
            control.should_training_stop = True

    def watch(self, trainer: GRPOTrainer) -> None:
        inner = trainer._generate

        def watched(*args: Any, **settings: Any) -> Any:
            start = now()
            made = inner(*args, **settings)
            self._generating += now() - start
            self.prompt = len(made[0][0])
            self.tokens = sum(len(ids) for ids in made[1])
            return made

        vars(trainer)["_generate"] = watched


def rows_of(work: Work, count: int) -> Dataset:
    """Pages with the question; as many as there are steps' prompts."""
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    return Dataset.from_dict(
        {"prompt": [prompt] * count, "image": pages(count, work.pixels)},
        features=Features(
            {"prompt": [{"role": Value("string"), "content": Value("string")}], "image": Image()}
        ),
    )


def config(work: Work, steps: int, settings: Settings, folder: str) -> GRPOConfig:
    rows = settings.rows or work.rollouts
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=work.rollouts // rows,
        num_generations=work.group,
        max_completion_length=work.tokens,
        generation_kwargs={"min_new_tokens": work.tokens},
        cache_implementation=settings.cache,
        use_transformers_continuous_batching=settings.continuous_batching,
        temperature=1.0,
        beta=work.kl,
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        loss_type="dapo",
        gradient_checkpointing=settings.checkpointing,
        use_liger_kernel=settings.liger,
        torch_compile=settings.compile,
        bf16=settings.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        optim=settings.optim,
        dataloader_num_workers=settings.workers,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def measured(
    model: Any, processing: Any, work: Work, settings: Settings, repeats: int, seconds: float
) -> dict[str, Any]:
    """Seconds of each repeat; the first step only warms up."""
    if settings.freeze_vision:
        model.model.visual.requires_grad_(False)
    steps = repeats + 1
    clock = Clock(seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[rewards],
            args=config(work, steps, settings, folder),
            train_dataset=rows_of(work, work.prompts * steps),
            processing_class=processing,
            callbacks=[clock],
        )
        clock.watch(trainer)
        idle = memory()
        trainer.train()
        peak = peak_memory()
    update = [step - rollout for step, rollout in zip(clock.steps, clock.rollouts, strict=True)]
    return {
        "rollout": clock.rollouts[1:],
        "update": update[1:],
        "tokens": clock.tokens,
        "prompt": clock.prompt,
        "trained": trained_parameters(trainer.model),
        "idle": idle,
        "peak": peak,
    }


def main(args: argparse.Namespace) -> None:
    begin(args)
    settings = Settings(**args.settings)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        args.model,
        dtype=getattr(torch, settings.dtype),
        attn_implementation=settings.attention,
    )
    found = measured(model, processor(args.model), args.work, settings, args.repeats, args.seconds)
    report(side="trl", **found, settings=dataclasses.asdict(settings))


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
