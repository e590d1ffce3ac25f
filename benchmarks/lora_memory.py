"""What weights, gradients and moments of Qwen2.5-VL-7B take with each way to train it.

Run: `python benchmarks/lora_memory.py`. The model is made without its weights, so it takes seconds and no
memory; activations, logits and rollouts come on top. A base in 4 bits is worked out from the one in bfloat16:
0.516 bytes a number (half a byte, a byte for 64 of them, four bytes for 64 times 256).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from reflectvlm import AdamW
from reflectvlm.models.lora import LoRA, choose_what_trains
from reflectvlm.train.table import Table
from reflectvlm.train.what_trains import Memory, memory_by_part

TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
}
TAGS = tuple(range(151665, 151675))
"""Ten new tags, as Qwen-LA has."""
LAYERS = 6_525_288_448
"""Numbers in the linear layers of the language model: 28 times those of q, k, v, o, gate, up and down."""


def model(dtype: torch.dtype) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)
        return Qwen2_5_VLForConditionalGeneration(config).to(dtype)


def memory(
    dtype: torch.dtype, lora: LoRA | None, tags: Sequence[int], bits: Any = 32, nf4: bool = False
) -> Memory:
    made = model(dtype)
    choose_what_trains(made, tags, lora=lora)
    total = sum(memory_by_part(made, AdamW(bits=bits)).values(), Memory())
    saved = int(LAYERS * (2 - (0.5 + 1 / 64 + 4 / 64 / 256))) if nf4 else 0
    return total + Memory(weights=-saved)


def main() -> None:
    half, lora = torch.bfloat16, LoRA(rank=64)
    rows = {
        "whole, float32": memory(torch.float32, None, ()),
        "whole, float32, bits=8": memory(torch.float32, None, (), 8),
        "LoRA, rank 64": memory(half, lora, ()),
        "LoRA, rank 64, bits=8": memory(half, lora, (), 8),
        "QLoRA, rank 64, bits=8": memory(half, lora, (), 8, nf4=True),
        "LoRA, rank 64, ten new tags": memory(half, lora, TAGS),
        "QLoRA, rank 64, ten new tags, bits=8": memory(half, lora, TAGS, 8, nf4=True),
    }
    table = Table("Qwen2.5-VL-7B, GiB", ("", "trained", "weights", "gradients", "moments", "all"))
    for name, row in rows.items():
        sizes = (row.weights, row.gradients, row.optimizer, row.weights + row.gradients + row.optimizer)
        table.add(name, f"{row.trained:,}", *(f"{size / 2**30:.1f}" for size in sizes))
    table.show()


if __name__ == "__main__":
    main()
