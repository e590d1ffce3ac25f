"""Sizes of the published models, so that a plan needs no download. The numbers are those of their
config.json; `tests/test_planning_shapes.py` holds the parameter counts against the model library's."""

from __future__ import annotations

from collections.abc import Mapping

from reflectvlm.planning.shapes import ModelShape, TextShape, VisionShape


def _text(width: int, mlp: int, layers: int, heads: int, kv_heads: int, *, vocabulary: int) -> TextShape:
    return TextShape(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head=128,
        mlp=mlp,
        vocabulary=vocabulary,
        tied=vocabulary == 151_936,
    )


def _qwen2(text: TextShape) -> ModelShape:
    vision = VisionShape(
        width=1280, layers=32, heads=16, mlp=5120, out=text.width, patch=14, activation="quick_gelu"
    )
    return ModelShape(text=text, vision=vision)


def _qwen2_5(text: TextShape, mlp: int) -> ModelShape:
    vision = VisionShape(width=1280, layers=32, heads=16, mlp=mlp, out=text.width, patch=14)
    return ModelShape(text=text, vision=vision)


_QWEN3_8B = ModelShape(
    text=TextShape(
        width=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head=128,
        mlp=12_288,
        vocabulary=151_936,
        tied=False,
        bias=False,
        head_norms=True,
    ),
    vision=VisionShape(
        width=1152,
        layers=27,
        heads=16,
        mlp=4304,
        out=4096,
        patch=16,
        activation="gelu",
        positions=2304,
        deep=3,
    ),
)

SMALL, LARGE = 151_936, 152_064
"""Rows of the vocabulary: the small models share them between embedding and head."""

KNOWN: Mapping[str, ModelShape] = {
    "qwen2-vl-2b": _qwen2(_text(1536, 8960, 28, 12, 2, vocabulary=SMALL)),
    "qwen2-vl-7b": _qwen2(_text(3584, 18_944, 28, 28, 4, vocabulary=LARGE)),
    "qwen2-vl-72b": _qwen2(_text(8192, 29_568, 80, 64, 8, vocabulary=LARGE)),
    "qwen2.5-vl-3b": _qwen2_5(_text(2048, 11_008, 36, 16, 2, vocabulary=SMALL), 3420),
    "qwen2.5-vl-7b": _qwen2_5(_text(3584, 18_944, 28, 28, 4, vocabulary=LARGE), 3420),
    "qwen2.5-vl-32b": _qwen2_5(_text(5120, 27_648, 64, 40, 8, vocabulary=LARGE), 3456),
    "qwen2.5-vl-72b": _qwen2_5(_text(8192, 29_568, 80, 64, 8, vocabulary=LARGE), 3456),
    "qwen3-vl-8b": _QWEN3_8B,
}


def known(name: str) -> ModelShape | None:
    """The sizes behind a hub name such as `Qwen/Qwen2.5-VL-7B-Instruct`, if it names a model above."""
    short = name.rpartition("/")[2].lower()
    return next((KNOWN[key] for key in KNOWN if short == key or short.startswith(f"{key}-")), None)
