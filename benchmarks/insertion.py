"""What insertion costs: decoding with COPY and ROUTE against the same engine without.

    python benchmarks/insertion.py                # the tiny policy on this machine
    python benchmarks/insertion.py --width 512 --layers 8

Every row samples the same number of tokens and asks for its image once, at a step of its own (drawn evenly
from the middle third), so the work is the same in all variants but for the blocks. Compared are

    COPY  /  (plain decoding + one prefill of as many tokens as COPY inserts)
    ROUTE /  COPY                                   (m = 100 - epsilon: the same blocks, but chosen)

Medians of repeats that take turns, as ratios; weights are random, because only time is measured. Results
go to benchmarks/results/insertion.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reflectvlm import Digits, Implicit, InProcessEngine, Instruction, SamplingParams
from reflectvlm.models.loading import load_tokenizer
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import tiny_config, tiny_image_processor
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import VisualCopy, VisualRoute
from reflectvlm.types import Prompt, Text, Visual

RAW = argparse.RawDescriptionHelpFormatter  # the text above as it is written
HERE = Path(__file__).parent
TRIGGER = "<|box_start|>"


def build(width: int, layers: int) -> QwenVL:
    """A random model of the tiny family; width 128 and 4 layers are the tiny policy's own."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = load_tokenizer("tiny")
    config = tiny_config(tokenizer)
    config.text_config.hidden_size = width
    config.text_config.intermediate_size = 3 * width
    config.text_config.num_hidden_layers = layers
    config.text_config.num_attention_heads = width // 32
    config.text_config.num_key_value_heads = width // 64
    config.text_config.layer_types = ["full_attention"] * layers
    config.vision_config.out_hidden_size = width
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    return QwenVL(model=model, tokenizer=tokenizer, image_processor=tiny_image_processor(), source="random")


def scheduled(policy: QwenVL, rows: int, tokens: int) -> Callable[[], None]:
    """Makes row r draw the trigger at a step of its own and never an end; returns the reset of the clock."""
    trigger = policy.tokenizer.convert_tokens_to_ids(TRIGGER)
    never = torch.tensor([trigger, *policy.end_ids], device=policy.device)
    first, last = tokens // 3, 2 * tokens // 3
    at = torch.tensor([first + (r * (last - first)) // rows for r in range(rows)], device=policy.device)
    clock = [0]
    inner = QwenVL.logits

    def logits(hidden: Tensor) -> Tensor:
        made = inner(policy, hidden).index_fill(1, never, float("-inf"))
        due = (at == clock[0]).nonzero().flatten()
        clock[0] += 1
        made[due] = float("-inf")
        made[due, trigger] = 0.0
        return made

    vars(policy)["logits"] = logits

    def reset() -> None:
        clock[0] = 0

    return reset


def prefill(policy: QwenVL, prompts: list[Prompt]) -> None:
    """One pass over the blocks of all rows, features given."""
    blocks = [(prompt, (Visual(image=0), Text(ids=(5,), trained=True))) for prompt in prompts]
    empty = [(Prompt(sample=p.sample, spans=(), patches=p.patches), spans) for p, spans in blocks]
    batch = policy.batch(empty)
    features = torch.zeros(int(batch.visual.max()) + 1, policy.model.lm_head.weight.shape[1])
    with torch.no_grad():
        policy.hidden(
            policy.embed(batch.ids, batch.visual, features.to(policy.device)), batch.positions, None
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--name", default="insertion")
    options = parser.parse_args()
    policy = build(options.width, options.layers)
    if torch.cuda.is_available():
        policy.module.to("cuda")
    reset = scheduled(policy, options.rows, options.tokens)
    prompts = [policy.prompt(Digits(split="test")[i], Instruction()) for i in range(options.rows)]
    engine = InProcessEngine(policy=policy, max_rows=options.rows)
    sampling = SamplingParams(max_tokens=options.tokens)

    def decode(reattention: Reattention) -> int:
        reset()
        groups = engine.generate(prompts, 1, sampling, reattention, seed=0)
        return sum(len(rollout.insertions) for (rollout,) in groups)

    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: decode(Implicit()),
        "copy": lambda: decode(VisualCopy(trigger=TRIGGER)),
        "route": lambda: decode(VisualRoute(trigger=TRIGGER, m=99.99)),
        "prefill": lambda: prefill(policy, prompts),
    }
    assert variants["copy"]() == variants["route"]() == options.rows, "every row must insert once"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeats):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    report(options, seconds)


def line(name: str, ratios: list[float]) -> str:
    return f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"


def report(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    copy_ratio = [
        c / (p + f) for c, p, f in zip(seconds["copy"], seconds["plain"], seconds["prefill"], strict=True)
    ]
    route_ratio = [r / c for r, c in zip(seconds["route"], seconds["copy"], strict=True)]
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    about = {
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {device}, {threads}",
        "copy / (plain + prefill)": statistics.median(copy_ratio),
        "route / copy": statistics.median(route_ratio),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all": {"copy": copy_ratio, "route": route_ratio},
    }
    lines = [
        "# What insertion costs",
        "",
        f"`{about['command']}`, {about['machine']}",
        "",
        f"{options.rows} rows of {options.tokens} sampled tokens, one insertion each at a step of its own; "
        f"medians of {options.repeats} repeats that took turns.",
        "",
        "| | ratio | lowest | highest |",
        "|---|---:|---:|---:|",
        line("COPY / (plain decoding + one prefill)", copy_ratio),
        line("ROUTE / COPY", route_ratio),
    ]
    results = HERE / "results"
    (results / f"{options.name}.json").write_text(json.dumps(about, indent=1) + "\n")
    (results / f"{options.name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
