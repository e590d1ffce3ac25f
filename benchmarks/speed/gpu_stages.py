"""The stages of the GPU run; each is started by `gpu.py` in a process of its own.

All sides get the same: bfloat16 weights, gradients and AdamW moments. Full float32 training states of 7B
would be 8.3e9 x 16 bytes = 133 GB, which leaves no room for activations and the reference of the KL term on
one GPU of 141 GB; in bfloat16 they are 66 GB, and the reference 17 GB. Such a step learns nothing at a rate
of 1e-6 (the weights are too coarse for it); it is as fast as one that does, but for the optimiser's traffic.
For the same reason the vision tower is frozen, as in much RL on such models: its activations for a step's
images would take as much room as those of a language pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flops import decode_bytes, update_flops
from gpu import say
from measure import now, trained_parameters
from workload import QUESTION, SEVEN_B, SMALL, SYSTEM, Shape, Work, model_config, pages, write_processor

FULL = Work(pixels=896, group=8, tokens=512, prompts=8)
TINY = Work(pixels=112, group=4, tokens=8, prompts=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage is given."""

    out: Path
    stage: str
    shape: Shape
    work: Work
    device: torch.device
    dtype: torch.dtype

    def say(self, what: str, **values: Any) -> None:
        say(self.out, self.stage, what, **values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        raise SystemExit("No GPU is visible to torch. Use --tiny to try the stages on a CPU.")
    job = Job(
        out=args.out,
        stage=args.stage,
        shape=SMALL if args.tiny else SEVEN_B,
        work=TINY if args.tiny else FULL,
        device=torch.device("cuda" if gpu else "cpu"),
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    STAGES[args.stage](job)


# -- machine ------------------------------------------------------------------------------------------


def machine(job: Job) -> None:
    """The two ceilings: how fast memory is copied, how fast bfloat16 matrices are multiplied."""
    gpu = job.device.type == "cuda"
    properties = torch.cuda.get_device_properties(0) if gpu else None
    job.say(
        "device",
        name=properties.name if properties else "cpu",
        memory=properties.total_memory if properties else None,
        torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"),
        work=dataclasses.asdict(job.work),
        shape=dataclasses.asdict(job.shape),
    )
    size = 2**31 if gpu else 2**22
    source, target = torch.randn(size, device=job.device).to(job.dtype), torch.empty(0)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), 10)
    job.say("copy", bytes_per_second=2 * source.nbytes / seconds)
    del source, target
    width = 8192 if gpu else 256
    left, right = (torch.randn(width, width, device=job.device).to(job.dtype) for _ in range(2))
    seconds = _median(lambda: left @ right, 20)
    job.say("matmul", flops_per_second=2 * width**3 / seconds)


def _median(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(repeats):
        start = now()
        call()
        taken.append(now() - start)
    return statistics.median(taken)


# -- the 7B model -------------------------------------------------------------------------------------


def made_model(job: Job, folder: Path) -> tuple[Any, Any, Any]:
    """Model on the device, tokenizer, image processor. Weights are drawn there; no file of them exists."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from reflectvlm.models.tiny import pretrained_tiny

    tokenizer = write_processor(folder, job.shape.vocabulary, pretrained_tiny())
    start = time.perf_counter()
    with torch.device(job.device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            model_config(job.shape, tokenizer), dtype=job.dtype, attn_implementation="sdpa"
        )
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    count = sum(p.numel() for p in model.parameters())
    job.say("model", parameters=count, seconds=round(time.perf_counter() - start, 1))
    return model.eval(), tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder)


def policy_of(job: Job) -> Any:
    from ours import never_ends

    from reflectvlm.models.qwen_vl import QwenVL

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, images = made_model(job, Path(folder))
    made = QwenVL(model=model, tokenizer=tokenizer, image_processor=images, source="random")
    return never_ends(made)


def memory_now(job: Job) -> dict[str, float]:
    if job.device.type != "cuda":
        return {}
    return {
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
    }


def forget_peak(job: Job) -> None:
    gc.collect()
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -- decoding -----------------------------------------------------------------------------------------


def decode(job: Job) -> None:
    """Our engine: seconds of a decoding step, and the bytes it has to read; then, for fewer tokens, the same
    without graphs and without our decoder."""
    from reflectvlm import Instruction
    from reflectvlm.types import Sample

    policy, work = policy_of(job), job.work
    prompts = [
        policy.prompt(
            Sample(id=str(i), question=QUESTION, answer="3", images=(page,)), Instruction(system=SYSTEM)
        )
        for i, page in enumerate(pages(work.prompts, work.pixels))
    ]
    prompt = policy.prompt_length(prompts[0])
    few = dataclasses.replace(work, tokens=max(2, work.tokens // 8))
    first = 0.0
    for kind, asked in (("auto", work), ("auto", work), ("auto", work), ("lean", few), ("stock", few)):
        forget_peak(job)
        if not first:
            generated(policy, prompts, dataclasses.replace(work, tokens=4), kind)  # warms up
            one = dataclasses.replace(work, tokens=1)
            first = statistics.median(generated(policy, prompts, one, kind) for _ in range(3))
        whole = generated(policy, prompts, asked, kind)  # the first time it also captures
        say_decoded(job, "ours" if kind == "auto" else f"decode={kind}", asked, first, whole, prompt)


_engines: dict[str, Any] = {}
"""Kept between calls, as a trainer does: graphs are captured once."""


def generated(policy: Any, prompts: list[Any], work: Work, kind: Any) -> float:
    """Seconds of one call of the engine."""
    from reflectvlm import Implicit, InProcessEngine, SamplingParams

    if kind not in _engines:
        _engines.clear()
        _engines[kind] = InProcessEngine(policy=policy, max_rows=work.rollouts, decode=kind)
    start = now()
    groups = _engines[kind].generate(
        prompts, work.group, SamplingParams(max_tokens=work.tokens), Implicit(), seed=0
    )
    taken = now() - start
    assert sum(len(one.sampled_ids) for group in groups for one in group) == work.sampled
    return taken


def say_decoded(job: Job, side: str, work: Work, first: float, whole: float, prompt: int) -> None:
    """`first` is the time of one token, which is the prompts' prefill; the rest are decoding steps."""
    step = (whole - first) / (work.tokens - 1)
    moved = decode_bytes(job.shape, work.rollouts, prompt + work.tokens / 2)
    job.say(
        "decode",
        side=side,
        prompt=prompt,
        tokens=work.tokens,
        prefill=first,
        seconds=whole,
        tokens_per_second=work.sampled / whole,
        step=step,
        bytes_per_second=moved / step,
        **memory_now(job),
    )


def transformers(job: Job) -> None:
    """Stock `generate`, with the dynamic cache and with the static, compiled one."""
    from transformers_side import rollout

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, images = made_model(job, Path(folder))
    work = job.work
    page = pages(work.prompts, work.pixels)

    def seconds(tokens: int, cache: str | None) -> tuple[float, int]:
        start = now()
        asked = dataclasses.replace(work, tokens=tokens)
        sampled, prompt = rollout(model, tokenizer, images, page, asked, cache)
        assert sampled == work.rollouts * tokens
        return now() - start, prompt

    seconds(4, None)  # warms up
    for cache, name in ((None, "transformers generate"), ("static", "transformers generate, static cache")):
        if cache:
            seconds(work.tokens, cache)  # compiles for this length
        first = seconds(1, None)[0]
        forget_peak(job)
        whole, prompt = seconds(work.tokens, cache)
        say_decoded(job, name, work, first, whole, prompt)


# -- updates ------------------------------------------------------------------------------------------


def update(job: Job) -> None:
    """Our trainer's own steps, rollouts and all. A pass holds a packed group; if that does not fit, half of
    one; if that does not either, activations are computed again."""
    from ours import measured, trainer

    from reflectvlm.models.freezing import freeze
    from reflectvlm.models.loading import enable_checkpointing

    policy, work = policy_of(job), job.work
    freeze(policy.model, ["vision", "projector"])
    for tokens, checkpointing in ((6144, False), (3584, False), (6144, True)):
        settings = {"micro_tokens": tokens, "checkpointing": checkpointing}
        if checkpointing:
            enable_checkpointing(policy.model)
        forget_peak(job)
        made = trainer(policy, work, 4, micro_tokens=tokens)
        try:
            made.prepare()
            found = measured(made, 3, 10.0) | {"trained": trained_parameters(policy.module)}
        except torch.OutOfMemoryError as error:
            job.say("out of memory", side="ours", settings=settings, why=str(error)[:300])
            del made
            policy.module.zero_grad(set_to_none=True)
            continue
        say_updated(job, "ours", found, settings)
        return


def say_updated(job: Job, side: str, found: dict[str, Any], settings: dict[str, Any]) -> None:
    work = job.work
    assert found["tokens"] == work.sampled
    seconds = statistics.median(found["update"])
    useful = update_flops(job.shape, work, found["prompt"], frozen_vision=True)
    job.say(
        "update",
        side=side,
        seconds=seconds,
        all_updates=found["update"],
        all_rollouts=found["rollout"],
        rollout=statistics.median(found["rollout"]),
        tokens_per_second=work.sampled / seconds,
        useful_flops=useful,
        flops_per_second=useful / seconds,
        prompt=found["prompt"],
        trained=found["trained"],
        settings=settings,
        **memory_now(job),
    )


def trl(job: Job) -> None:
    """TRL's trainer on the same work: as many rows a pass as fit, then with checkpointing."""
    import copy

    import trl.trainer.grpo_trainer as library
    from trl_side import Settings, measured, processor

    with tempfile.TemporaryDirectory() as folder:
        model, _, _ = made_model(job, Path(folder))
        processing = processor(Path(folder))
    # TRL loads the reference from the model's folder, and there is none.
    vars(library)["create_model_from_path"] = lambda *_, **__: copy.deepcopy(model).requires_grad_(False)
    start = Settings(dtype="bfloat16", freeze_vision=True)
    for rows, checkpointing in ((4, False), (2, False), (8, True)):
        settings = dataclasses.replace(start, rows=min(rows, job.work.rollouts), checkpointing=checkpointing)
        forget_peak(job)
        try:
            found = measured(model, processing, job.work, settings, 2, 10.0)
        except torch.OutOfMemoryError as error:
            job.say("out of memory", side="TRL", settings=dataclasses.asdict(settings), why=str(error)[:300])
            model.zero_grad(set_to_none=True)
            continue
        say_updated(job, "TRL", found, dataclasses.asdict(settings))
        return


def checks(job: Job) -> None:
    from gpu_checks import all_checks

    all_checks(job.device, job.say)


STAGES: dict[str, Callable[[Job], None]] = {
    "machine": machine,
    "checks": checks,
    "decode": decode,
    "update": update,
    "transformers": transformers,
    "trl": trl,
}


if __name__ == "__main__":
    main()
