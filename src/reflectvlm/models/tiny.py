"""The tiny policy: the stock Qwen2.5-VL classes at a size that a laptop trains in minutes.

1.7 million parameters: vision tower 3 x 96 (patch 8, merge 2, full attention), language
model 4 x 128 over the 2,318 ids of the small tokenizer, plus spare embedding rows as Qwen2.5-VL
has them. A 64 x 64 page becomes 16 visual tokens.

`tiny_folder` writes a random one; the pre-trained one ships in `models/tiny_base/` and was made by
`reflectvlm train recipe=tiny_base`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reflectvlm.models.qwen_vl import QwenVL

PATCH, MERGE = 8, 2
INIT = 0.06
"""Standard deviation of initial weights: near 1/sqrt(width), three times the default of 7B models,
with which so narrow a network barely moves at first."""
VOCABULARY = 2432
"""Rows of the embedding: the tokenizer's 2,318 ids and 114 spare ones for new tags."""


def pretrained_tiny() -> Path:
    """Folder of the pre-trained base that ships with the package."""
    return Path(str(resources.files("reflectvlm.models").joinpath("tiny_base")))


def tiny_config(tokenizer: Any) -> Any:
    """The model's configuration, with the tokenizer's own special ids."""
    from transformers import Qwen2_5_VLConfig

    ids = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "initializer_range": INIT,
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 64,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": INIT,
        },
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def tiny_model(tokenizer: Any, seed: int = 0) -> Any:
    """A randomly initialised tiny `Qwen2_5_VLForConditionalGeneration`; the global generator of
    torch is left as it was."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))


def random_tiny(seed: int = 0) -> QwenVL:
    """The tiny policy before any training: where `recipe=tiny_base` starts."""
    from reflectvlm.models.loading import load_tokenizer
    from reflectvlm.models.qwen_vl import QwenVL

    tokenizer = load_tokenizer("tiny")
    return QwenVL(
        model=tiny_model(tokenizer, seed),
        tokenizer=tokenizer,
        image_processor=tiny_image_processor(),
        source="random",
    )


def tiny_image_processor() -> Any:
    from reflectvlm.models.loading import image_processor_class

    return image_processor_class()(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 256 * (PATCH * MERGE) ** 2},
    )


def tiny_folder(folder: Path, seed: int = 0) -> Path:
    """Writes a random tiny model with tokenizer and image processor, as `from_pretrained` wants it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained_tiny())
    tiny_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return folder
