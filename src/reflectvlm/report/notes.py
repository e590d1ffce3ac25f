"""What a number of the table means in this run, in a sentence: which layout "valid layout" is about.

Each run is held against the layout of its own reward, so that 0 % of plain GRPO beside 100 % of Look-Back is
no failure to write `<back>`. Left out: layouts that a recipe builds itself; only that it has one is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from reflectvlm.tags import Layout, grpo, look_back, qwen_la
from reflectvlm.train.console import label_of

if TYPE_CHECKING:
    from reflectvlm.report.reading import RunRecord

LABEL = label_of("layout_rate", {})
_LAYOUTS: Mapping[str, Callable[[], Layout]] = {
    "reflectvlm.tags.grpo": grpo,
    "reflectvlm.tags.look_back": look_back,  # its variants have the same blocks
    "reflectvlm.tags.qwen_la": qwen_la,
}
_RUBRICS: Mapping[str, Callable[[], Layout]] = {"reflectvlm.rewards.reflection.brpo_rubric": qwen_la}
"""Those that have a layout unless another is given."""


def notes(run: RunRecord) -> dict[str, str]:
    """Label of a row of the table -> a sentence about it."""
    if not run.after and not run.before:
        return {}
    rates = [values["layout_rate"] for values in (run.before, run.after) if "layout_rate" in values]
    if not rates:
        return {LABEL: "its reward asks for no layout, so there is none to be valid."}
    said = f"share of answers that are, as a whole, {_layout(run.settings)}."
    if not any(rates):
        said += " None is; accuracy is counted apart from it."
    return {LABEL: said}


def _layout(settings: Mapping[str, str]) -> str:
    for key, target in settings.items():
        if key.startswith("rubric.") and key.endswith("layout._target_") and target in _LAYOUTS:
            return f"{described(_LAYOUTS[target]())}, which its reward asks for"
    default = _RUBRICS.get(settings.get("rubric._target_", ""))
    if default is not None and not any(key.startswith("rubric.layout.") for key in settings):
        return f"{described(default())}, which its reward asks for"
    return "in the layout that its reward asks for (Settings, rubric)"


def described(layout: Layout) -> str:
    r"""`described(grpo()) == r"<think>…</think> \boxed{…}"`"""
    parts = [f"<{block.tag}>…</{block.tag}>" for block in layout.blocks]
    floating = [f"<{block.tag}> anywhere behind the first" for block in layout.floating]
    return " ".join([*parts, *(["\\boxed{…}"] if layout.boxed else [])]) + "".join(
        f", {one}" for one in floating
    )
