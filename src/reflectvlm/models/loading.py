"""Finding and loading a model's parts: weights, tokenizer, image processor.

The bundled processor of transformers is not used: it needs a video processor and with it
torchvision. Tokenizer and image processor alone are enough, and neither needs it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch

from reflectvlm.models.attention_choice import Attention
from reflectvlm.models.families import family_of
from reflectvlm.models.products import checkpoint_contexts
from reflectvlm.models.quantized import Quantize, quantization_settings, ready_for_training
from reflectvlm.models.trust import no_safetensors, refuse_code

Dtype = Literal["float32", "bfloat16", "float16"]


def image_processor_class() -> Any:
    """The image processor of all families (`families.py`) on PIL, which needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


def find_model(path: str) -> str:
    """`"tiny"` is the base that ships here, a folder is itself, anything else is a hub name.

    Raises FileNotFoundError if `path` looks like a folder that does not exist.
    """
    from reflectvlm.models.tiny import pretrained_tiny

    if path == "tiny":
        return str(pretrained_tiny())
    if Path(path).is_dir():
        return path
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise FileNotFoundError(
            f"No model folder at {path!r}. Give 'tiny', a folder written by save_pretrained, "
            "or a hub name such as 'Qwen/Qwen2.5-VL-7B-Instruct'."
        )
    return path


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration alone. Raises ValueError if code comes with the model and was not asked for."""
    from transformers import AutoConfig

    source = find_model(path)
    if not trust_remote_code:
        refuse_code(path, source)
    return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_model(
    path: str,
    *,
    dtype: Dtype,
    attention: Attention,
    quantize: Quantize | None = None,
    compute: Dtype | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The stock model class for the folder's configuration, in training dtype, without dropout. `quantize`
    stores the language model's layers in fewer bits; their products are in `compute`, else in `dtype`."""
    from transformers import AutoModelForImageTextToText

    source, config = find_model(path), load_config(path, trust_remote_code=trust_remote_code)
    family_of(config.model_type, path)
    # flash-attn is for the vision tower alone, and for the device that the model will be on.
    named = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "sdpa"}
    chosen: dict[str, Any] = {"attn_implementation": named[attention]} if attention in named else {}
    if quantize is not None:
        chosen["quantization_config"] = quantization_settings(quantize, getattr(torch, compute or dtype))
    # Else transformers asks a service of the hub to convert, and loads what that proposes.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **chosen,
        )
    except OSError as error:
        if not re.search(r"(no file named|have a file named) \S+\.safetensors", str(error)):
            raise
        raise no_safetensors(path, source) from error
    logging.getLogger("reflectvlm").debug("loaded %s from %s", type(model).__name__, source)
    return ready_for_training(model.eval(), getattr(torch, compute or dtype))


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    source = find_model(path)
    if not trust_remote_code:
        refuse_code(path, source)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def load_image_processor(path: str, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The folder's image processor with the run's pixel limits, which stand nowhere else."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    processor = image_processor_class().from_pretrained(find_model(path))
    merged = {name: value if value is not None else processor.size[name] for name, value in size.items()}
    if merged["shortest_edge"] > merged["longest_edge"]:
        raise ValueError(
            f"min_pixels={merged['shortest_edge']} is more than max_pixels={merged['longest_edge']}. "
            "Give an image's fewest and most pixels after resizing, fewest first."
        )
    processor.size = type(processor.size)(**merged) if not isinstance(processor.size, dict) else merged
    return processor


def enable_checkpointing(model: Any) -> None:
    """Activations are computed again on the way back. transformers renamed the switch in 5.x."""
    settings = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
