"""The work that every side of the speed benchmark does: one model folder, the same pages, the same question.

Needs torch, transformers and PIL alone, because it is also imported where reflectvlm is not installed.
Weights and pages are random: only time and memory are measured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTION = "How many red squares stand to the left of the tallest blue shape? Explain your answer."
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a random Qwen2.5-VL. The default has 46 million parameters, 39 of them in the vocabulary."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 1024
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 512
    vocabulary: int = 151_936
    tied: bool = True

    @property
    def head(self) -> int:
        return self.width // self.heads


SMALL = Shape(
    width=64,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=128,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
    vision_mlp=128,
    vocabulary=4096,
)
"""For trying the scripts out: seconds instead of minutes, and no result."""

SEVEN_B = Shape(
    width=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    mlp=18_944,
    vision_width=1280,
    vision_layers=32,
    vision_heads=16,
    vision_mlp=3420,
    vocabulary=152_064,
    tied=False,
)
"""Qwen2.5-VL-7B's own sizes."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimiser step: `prompts` pages, each answered `group` times with `tokens` tokens."""

    pixels: int = 448
    """Side of the square page; patches of 14, merged 2 x 2, make (pixels / 28) ** 2 visual tokens."""
    group: int = 8
    tokens: int = 64
    prompts: int = 1
    kl: float = 0.04

    @property
    def rollouts(self) -> int:
        return self.prompts * self.group

    @property
    def sampled(self) -> int:
        """Tokens that a step samples and trains on."""
        return self.rollouts * self.tokens

    @property
    def visual_tokens(self) -> int:
        return (self.pixels // 28) ** 2

    @classmethod
    def read(cls, text: str) -> Work:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def told(self) -> str:
        images, each = ("one image", "") if self.prompts == 1 else (f"{self.prompts} images", " each")
        return (
            f"{images} of {self.pixels} x {self.pixels} ({self.visual_tokens} visual tokens{each}), G = "
            f"{self.group}, {self.tokens} new tokens, {'KL on' if self.kl else 'no KL'}"
        )


def noise(ids: Sequence[int]) -> float:
    """The reward of an answer: costs nothing, and practically never ties a group."""
    return int(hashlib.sha256(str(tuple(ids)).encode()).hexdigest()[:8], 16) / 2**32


def pages(count: int, pixels: int) -> list[Any]:
    """Square pages of noise; no two are alike."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)) for _ in range(count)]


# -- the model ------------------------------------------------------------------------------------


def model_config(shape: Shape, tokenizer: Any) -> Any:
    """Qwen2.5-VL's configuration at these sizes, with the tokenizer's special ids."""
    from transformers import Qwen2_5_VLConfig

    ids = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.width,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32_768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [shape.head // 8, shape.head * 3 // 16, shape.head * 3 // 16],
            },
            "tie_word_embeddings": shape.tied,
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_mlp,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.width,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(shape.vision_layers))[
                -1 :: -max(1, shape.vision_layers // 4)
            ],
        },
        tie_word_embeddings=shape.tied,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def write_processor(folder: Path, vocabulary: int, tokenizer_folder: Path) -> Any:
    """Tokenizer and image processor; returns the tokenizer.

    The tokenizer is a small one, filled up with words that no text encodes to: every id of the vocabulary
    can be sampled, so nobody gains by leaving ids out that no token owns.
    """
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_folder / name).exists():
            shutil.copy(tokenizer_folder / name, folder / name)
    made = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = made["model"]["vocab"]
    words |= {token["content"]: token["id"] for token in made["added_tokens"]}
    words |= {f"w{number}": number for number in range(len(words), vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == vocabulary
    Qwen2VLImageProcessorPil(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 4096},
    ).save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, shape: Shape, tokenizer_folder: Path) -> Path:
    """A random model with tokenizer and image processor in the form that `from_pretrained` wants; every
    side loads the same weights from it."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    said = json.dumps(dataclasses.asdict(shape))
    if (folder / "shape.json").exists() and (folder / "shape.json").read_text() == said:
        return folder
    tokenizer = write_processor(folder, shape.vocabulary, tokenizer_folder)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(model_config(shape, tokenizer)).save_pretrained(folder)
    (folder / "shape.json").write_text(said)  # last, so that a folder cut short is made anew
    return folder


def prompt_inputs(tokenizer: Any, image_processor: Any, image: Any, image_token: int) -> dict[str, Any]:
    """One page with the question as stock `transformers` wants it, without the bundled processor (which
    needs torchvision)."""
    import torch

    made = image_processor(images=[image], return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    cells = int(made["image_grid_thw"].prod()) // image_processor.merge_size**2
    pad = tokenizer.convert_ids_to_tokens(image_token)
    ids = torch.tensor([tokenizer.encode(text.replace(pad, pad * cells), add_special_tokens=False)])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": made["pixel_values"],
        "image_grid_thw": made["image_grid_thw"],
        "mm_token_type_ids": (ids == image_token).long(),
    }
