"""A model's sizes from its configuration: config.json of a folder or of the hub's cache, or what is known
of the name. Nothing is downloaded and no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reflectvlm.planning.known import KNOWN, known
from reflectvlm.planning.shapes import ModelShape, TextShape, VisionShape

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def read_shape(path: str) -> ModelShape:
    """Sizes of `"tiny"`, a folder or a hub name. Raises ValueError where nothing is at hand."""
    if (file := config_file(path)) is not None:
        return shape_of(_config(json.loads(file.read_text(encoding="utf-8")), path))
    if (shape := known(path)) is not None:
        return shape
    if path.startswith((".", "/", "~")):
        raise ValueError(f"No config.json in {path!r}. Give policy.path a folder written by save_pretrained.")
    raise ValueError(
        f"The sizes of {path!r} are not at hand: it is in no cache, and only {', '.join(KNOWN)} are known. "
        "Give policy.path a folder with its config.json."
    )


def config_file(path: str) -> Path | None:
    """Where the configuration lies on this machine, if it does."""
    from reflectvlm.models.tiny import pretrained_tiny

    folder = pretrained_tiny() if path == "tiny" else Path(path)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    return Path(found) if isinstance(found, str) else None


def _config(values: dict[str, Any], path: str) -> Any:
    """The model library's object, which fills in what a file leaves out."""
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path!r} is a {kind!r} model. A plan knows the families {', '.join(FAMILIES)}.")
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind].from_dict(values)


def shape_of(config: Any) -> ModelShape:
    """The sizes in a configuration object of one of the `FAMILIES`."""
    text, vision = config.get_text_config(), config.vision_config
    qwen3 = config.model_type == "qwen3_vl"
    heads = text.num_attention_heads
    return ModelShape(
        text=TextShape(
            width=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=text.num_key_value_heads,
            head=getattr(text, "head_dim", None) or text.hidden_size // heads,
            mlp=text.intermediate_size,
            vocabulary=text.vocab_size,
            tied=bool(config.tie_word_embeddings),
            bias=bool(getattr(text, "attention_bias", False)) if qwen3 else True,
            head_norms=qwen3,
        ),
        vision=_vision(config.model_type, vision),
    )


def _vision(kind: str, config: Any) -> VisionShape:
    first = kind == "qwen2_vl"
    width = config.embed_dim if first else config.hidden_size
    return VisionShape(
        width=width,
        layers=config.depth,
        heads=config.num_heads,
        mlp=int(width * config.mlp_ratio) if first else config.intermediate_size,
        out=config.hidden_size if first else config.out_hidden_size,
        patch=config.patch_size,
        merge=config.spatial_merge_size,
        frames=config.temporal_patch_size,
        activation="quick_gelu" if first else "silu" if kind == "qwen2_5_vl" else "gelu",
        positions=getattr(config, "num_position_embeddings", 0) if kind == "qwen3_vl" else 0,
        deep=len(getattr(config, "deepstack_visual_indexes", ())) if kind == "qwen3_vl" else 0,
    )
