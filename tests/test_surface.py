"""The public surface, frozen: changing one of these lists is a decision, not an accident."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import reflectvlm
from reflectvlm import protocols
from reflectvlm.config import GROUPS, SHORT_NAMES
from reflectvlm.eval import named
from reflectvlm.recipe_files import evaluations, recipes, recipes_folder

NAMES = [
    "Accuracy",
    "AdamW",
    "ClippedSurrogate",
    "Custom",
    "DigitTraces",
    "Digits",
    "Distiller",
    "Evaluation",
    "Generator",
    "GroupMean",
    "Implicit",
    "InProcessEngine",
    "Insertion",
    "Instruction",
    "KL",
    "LeaveOneOut",
    "Output",
    "Prompt",
    "RLTrainer",
    "Rollout",
    "Rubric",
    "SFTTrainer",
    "Sample",
    "SamplingParams",
    "ScoredGroup",
    "TagFormat",
    "Text",
    "Visual",
    "VisualCopy",
    "VisualRoute",
    "__version__",
    "brpo_rubric",
    "dataset",
    "instruction",
    "load_policy",
    "load_recipe",
    "look_back",
    "look_back_rubric",
    "per_rollout",
    "qwen_la",
    "shapes",
]

PACKAGES = {
    "attention": "Ask Caption Heat MatchedText Reading Trend attended by_length heat_maps read_answers "
    "removal "
    "repairs token_maps trend",
    "data": "Columns Curriculum Dataset DigitTraces Digits ImageLimits Shapes dataset instruction",
    "models": "FeatureCache LoRA QwenVL load_policy",
    "rollout": "InProcessEngine StopGroup",
    "train": "AdamW Distiller DynamicSampling Evaluation Output PartialRollouts RLTrainer RunResult "
    "SFTTrainer",
}

RECIPES = [
    "grpo",
    "lookback_rl",
    "lookback_rl_7b",
    "lookback_sft",
    "lookback_sft_7b",
    "qwen_la_brpo",
    "qwen_la_brpo_7b",
    "qwen_la_coldstart",
    "qwen_la_coldstart_7b",
    "qwen_la_copy",
    "qwen_la_copy_7b",
    "qwen_la_distill",
    "qwen_la_distill_7b",
    "qwen_la_rl_copy",
    "qwen_la_rl_route",
    "qwen_la_route",
    "qwen_la_route_7b",
    "qwen_la_text",
    "qwen_la_text_7b",
    "tiny_base",
]

EVALUATIONS = ["lookback_eval", "qwen_la_eval"]

TASKS = (
    "chair digits geomath hallusionbench mathverse mathvision mathvista mmbench mme mmhal mmmu mmmu_pro "
    "mmstar pope shapes tallyqa wemath"
)

CHOICES = {
    "policy": "qwen2_5_vl_3b qwen2_5_vl_7b qwen2_5_vl_7b_lora qwen2_5_vl_7b_qlora qwen2_5_vl_7b_qwen_la "
    "qwen2_5_vl_7b_qwen_la_sft qwen3_vl_8b tiny tiny_lora tiny_qwen_la tiny_qwen_la_sft tiny_random",
    "data": "digit_traces digits digits_to_read messages qwen_la_questions qwen_la_traces rows shapes",
    "compute": "ddp single zero1 zero2 zero3",
}

PROTOCOLS = {
    "Advantage": "__call__",
    "DecodeState": "attention ids insertions prompt sampled special text",
    "Judge": "__call__",
    "LongTail": "__call__",
    "Objective": "__call__",
    "Policy": "answer batch decode features module offsets prompt prompt_length reserved_ids save score",
    "Reattention": "__call__ probe trigger",
    "Reference": "features states",
    "Reward": "__call__",
    "RolloutEngine": "generate",
    "Tracker": "close metrics rollouts start",
}


def test_public_names() -> None:
    """A name that vanishes breaks every notebook that imports it."""
    assert sorted(reflectvlm.__all__) == sorted(NAMES)
    assert sorted(dir(reflectvlm)) == sorted(NAMES)
    for name in NAMES:
        assert getattr(reflectvlm, name) is not None


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_names_of_packages(package: str) -> None:
    """A lazy name that points to a module which moved fails only when somebody uses it."""
    module = importlib.import_module(f"reflectvlm.{package}")
    assert sorted(module.__all__) == sorted(PACKAGES[package].split())
    for name in module.__all__:
        # A module of the same name would take its place as soon as somebody imports it.
        assert not isinstance(getattr(module, name), ModuleType)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Anything else breaks `hasattr`, `from … import` and the interactive help."""
    with pytest.raises(AttributeError, match="has no attribute 'RLTrainr'"):
        _ = reflectvlm.RLTrainr


def test_methods_of_the_protocols() -> None:
    """A method added to a protocol breaks every implementation out there."""
    found = {
        name: sorted(part for part in vars(protocol) if part == "__call__" or not part.startswith("_"))
        for name, protocol in vars(protocols).items()
        if getattr(protocol, "_is_protocol", False) and protocol.__module__ == protocols.__name__
    }
    assert found == {name: parts.split() for name, parts in PROTOCOLS.items()}


def test_recipes_choices_and_short_names() -> None:
    """Commands in papers and job scripts name them."""
    assert list(recipes()) == RECIPES
    assert list(evaluations()) == EVALUATIONS
    assert sorted(named.TASKS) == TASKS.split()
    assert set(GROUPS) == set(CHOICES)
    for group, choices in CHOICES.items():
        assert sorted(file.stem for file in (recipes_folder() / group).glob("*.yaml")) == choices.split()
    assert sorted(SHORT_NAMES) == ["eval_every", "keep", "max_minutes", "resume", "root", "save_every"]


def test_version_is_the_package_s() -> None:
    """The version is part of a cold start's identity and of a run's record."""
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert reflectvlm.__version__ == pyproject["project"]["version"]


def test_import_is_light() -> None:
    """`import reflectvlm` that loads torch makes every short command slow."""
    code = (
        "import sys, reflectvlm; print(sorted(m for m in sys.modules if '.' not in m and m in sys.argv[1:]))"
    )
    heavy = ["torch", "transformers", "numpy", "hydra", "datasets", "jaxtyping", "PIL"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "[]\n"
