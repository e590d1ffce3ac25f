"""The tiny policy: the stock Qwen2.5-VL classes at a size that a laptop trains in minutes.

1.7 million parameters: vision tower 3 x 96 (patch 8, merge 2, full attention), language
model 4 x 128 over the 2,318 ids of the small tokenizer, plus spare embedding rows as Qwen2.5-VL
has them. A 64 x 64 page becomes 16 visual tokens.

`tiny_folder` writes a random one; the pre-trained one ships in `models/tiny_base/` and was made by
`reflectvlm train recipe=tiny_base`.

Random ones there are of every family, `random_tiny(family="qwen3_vl")`, about as large: what is true of a
family's big models can be tried on them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from reflectvlm.models.qwen_vl import QwenVL

TinyFamily: TypeAlias = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
PATCH, MERGE = 8, 2
INIT = 0.06
"""Standard deviation of initial weights: near 1/sqrt(width), three times the default of 7B models,
with which so narrow a network barely moves at first."""
VOCABULARY = 2432
"""Rows of the embedding: the tokenizer's 2,318 ids and 114 spare ones for new tags."""


def pretrained_tiny() -> Path:
    """Folder of the pre-trained base that ships with the package."""
    return Path(str(resources.files("reflectvlm.models").joinpath("tiny_base")))


def tiny_config(tokenizer: Any, family: TinyFamily = "qwen2_5_vl") -> Any:
    """The model's configuration, with the tokenizer's own special ids."""
    from transformers import AutoConfig

    from reflectvlm.models.families import family_of

    ids = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {
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
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "initializer_range": INIT,
    }
    text_own, vision_own = _OWN[family_of(family).model_type]
    return AutoConfig.for_model(
        family,
        text_config=text | text_own,
        vision_config=vision | vision_own,
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


_OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ({}, {"embed_dim": 96, "hidden_size": 128, "mlp_ratio": 3}),
    "qwen2_5_vl": (
        {},
        {
            "hidden_size": 96,
            "intermediate_size": 256,
            "out_hidden_size": 128,
            "spatial_patch_size": PATCH,
            "window_size": 64,
            "fullatt_block_indexes": [0, 1, 2],
        },
    ),
    # As in the large ones heads are not width / number of heads, sections share all frequencies, and the
    # tower's learned positions (6 x 6 of them) are resampled to each image.
    "qwen3_vl": (
        {
            "head_dim": 48,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [10, 7, 7],
                "mrope_interleaved": True,
            },
        },
        {
            "hidden_size": 96,
            "intermediate_size": 256,
            "out_hidden_size": 128,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
}
"""What differs from family to family: of the text model, and of the tower."""


def tiny_model(tokenizer: Any, seed: int = 0, family: TinyFamily = "qwen2_5_vl") -> Any:
    """A randomly initialised tiny model, of the stock class of its family; the global generator of
    torch is left as it was."""
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = tiny_config(tokenizer, family)
    make: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(config)


def random_tiny(seed: int = 0, family: TinyFamily = "qwen2_5_vl") -> QwenVL:
    """The tiny policy before any training: where `recipe=tiny_base` starts."""
    from reflectvlm.models.loading import load_tokenizer
    from reflectvlm.models.qwen_vl import QwenVL

    tokenizer = load_tokenizer("tiny")
    return QwenVL(
        model=tiny_model(tokenizer, seed, family),
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


def tiny_folder(folder: Path, seed: int = 0, family: TinyFamily = "qwen2_5_vl") -> Path:
    """Writes a random tiny model with tokenizer and image processor, as `from_pretrained` wants it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained_tiny())
    tiny_model(tokenizer, seed, family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return folder
