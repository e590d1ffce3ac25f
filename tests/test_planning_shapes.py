"""Sizes of models: counted against the model library's own models on the meta device, read from where they
are at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from reflectvlm.models.tiny import random_tiny
from reflectvlm.planning.known import KNOWN, known
from reflectvlm.planning.reading import read_shape, shape_of
from reflectvlm.planning.shapes import ModelShape
from reflectvlm.planning.states import counts
from test_planning import job


def config(name: str, shape: ModelShape) -> tuple[Any, Any]:
    """The model library's configuration and class for these sizes."""
    text, vision = shape.text, shape.vision
    words: dict[str, Any] = {
        "vocab_size": text.vocabulary,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
    }
    tower: dict[str, Any] = {"depth": vision.layers, "num_heads": vision.heads}
    if name.startswith("qwen2-vl"):
        tower |= {"embed_dim": vision.width, "hidden_size": vision.out, "mlp_ratio": 4}
        kind, model = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    else:
        tower |= {
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "out_hidden_size": vision.out,
        }
        kind, model = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    if name.startswith("qwen3"):
        words |= {"head_dim": text.head}
        tower |= {
            "patch_size": vision.patch,
            "num_position_embeddings": vision.positions,
            "deepstack_visual_indexes": list(range(vision.deep)),
        }
        kind, model = transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration
    return kind(text_config=words, vision_config=tower, tie_word_embeddings=text.tied), model


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_model_librarys(name: str) -> None:
    """Bug: a bias or a norm forgotten, a tied head counted twice; or a size that no such model has."""
    made, model = config(name, KNOWN[name])
    assert shape_of(made) == KNOWN[name]
    with torch.device("meta"):
        built = model(made)
    assert KNOWN[name].parameters == sum(one.numel() for one in built.parameters())


def test_parts_are_the_librarys() -> None:
    """Bug: projector counted as tower, so that a frozen tower saves too much."""
    policy = random_tiny()
    found = counts(job(shape_of(policy.model.config))).all
    parts = dict.fromkeys(("vision", "projector", "layers", "embedding", "head"), 0)
    for name, parameter in policy.model.named_parameters():
        in_tower = "projector" if "visual.merger" in name else "vision"
        of_text = "embedding" if "embed_tokens" in name else "layers"
        parts[in_tower if "visual." in name else of_text] += parameter.numel()
    assert found == parts


def test_published_sizes() -> None:
    """Bug: sizes that agree with themselves only. The models' own pages say 8.29, 3.75, 8.77 billion."""
    assert KNOWN["qwen2.5-vl-7b"].parameters == 8_292_166_656
    assert KNOWN["qwen2.5-vl-3b"].parameters == 3_754_622_976
    assert KNOWN["qwen3-vl-8b"].parameters == 8_767_123_696


def test_names() -> None:
    """Bug: a model that is not known is planned as another one whose name begins alike."""
    assert known("Qwen/Qwen2.5-VL-7B-Instruct") is KNOWN["qwen2.5-vl-7b"]
    assert known("Qwen/Qwen2-VL-7B-Instruct-AWQ") is KNOWN["qwen2-vl-7b"]
    assert known("Qwen/Qwen2.5-VL-7Bis") is None


def test_a_folder_is_read(tmp_path: Path) -> None:
    """Bug: a flat config.json, as the hub has it for Qwen2.5-VL, is read as the class's defaults."""
    flat = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048},
    }
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert read_shape(str(tmp_path)) == KNOWN["qwen2.5-vl-3b"]
    assert read_shape("tiny") == shape_of(random_tiny().model.config)


def test_what_is_not_at_hand(tmp_path: Path) -> None:
    """Bug: a model of which nothing is known gets some plan, or a download is begun."""
    with pytest.raises(ValueError, match=r"sizes of 'someone/other' are not at hand.*qwen2\.5-vl-7b"):
        read_shape("someone/other")
    with pytest.raises(ValueError, match=r"No config.json in './nowhere'"):
        read_shape("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a 'llama' model"):
        read_shape(str(tmp_path))
