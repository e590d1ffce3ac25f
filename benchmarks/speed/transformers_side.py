"""Plain `transformers`: stock `generate` on the common work, rollout only. Started by `compare.py`.

As in the other sides a rollout begins with the image as a picture and ends with the text.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from measure import arguments, begin, memory, now, peak_memory, report
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from workload import Work, pages, prompt_inputs


@dataclass(frozen=True, kw_only=True)
class Settings:
    attention: str = "sdpa"
    cache: str | None = None
    """E.g. "static"; None is the dynamic cache."""
    dtype: str = "float32"


def inputs(model: Any, tokenizer: Any, images: Any, page: Any) -> dict[str, Any]:
    """All prompts of a step; they are equally long."""
    made = [prompt_inputs(tokenizer, images, one, model.config.image_token_id) for one in page]
    return {name: torch.cat([one[name] for one in made]).to(model.device) for name in made[0]}


@torch.no_grad()
def rollout(
    model: Any, tokenizer: Any, images: Any, page: Any, work: Work, cache: str | None
) -> tuple[int, int]:
    """Tokens sampled, and tokens of a prompt."""
    given = inputs(model, tokenizer, images, page)
    out = model.generate(
        **given,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=work.tokens,
        max_new_tokens=work.tokens,
        num_return_sequences=work.group,
        cache_implementation=cache,
    )
    prompt = given["input_ids"].shape[1]
    sampled = out[:, prompt:]
    tokenizer.batch_decode(sampled)
    return sampled.numel(), prompt


def measured(
    model: Any, tokenizer: Any, images: Any, work: Work, settings: Settings, repeats: int, seconds: float
) -> dict[str, Any]:
    taken: list[float] = []
    tokens = prompt = 0
    made = pages(work.prompts * (repeats + 1), work.pixels)
    for step in range(repeats + 1):  # the first one warms up
        page = made[step * work.prompts : (step + 1) * work.prompts]
        start = now()
        tokens, prompt = rollout(model, tokenizer, images, page, work, settings.cache)
        if step:
            taken.append(now() - start)
        if sum(taken) > seconds:
            break
    return {"rollout": taken, "update": [], "tokens": tokens, "prompt": prompt}


def main(args: argparse.Namespace) -> None:
    begin(args)
    settings = Settings(**args.settings)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, settings.dtype), attn_implementation=settings.attention
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    images = Qwen2VLImageProcessorPil.from_pretrained(args.model)
    idle = memory()
    found = measured(model, tokenizer, images, args.work, settings, args.repeats, args.seconds)
    report(side="transformers", **found, idle=idle, peak=peak_memory(), settings=dataclasses.asdict(settings))


if __name__ == "__main__":
    main(arguments(__doc__).parse_args())
