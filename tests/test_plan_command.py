"""`reflectvlm plan`: what it says, its exit codes, and that nothing is loaded for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from reflectvlm.cli import main
from reflectvlm.config import compose
from reflectvlm.planning.recipe import Lengths, job_of
from reflectvlm.planning.verdict import fullest
from reflectvlm.recipe_files import recipes, recipes_folder


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a plan has loaded something")

    from reflectvlm.data import sources
    from reflectvlm.models import loading, qwen_vl

    for module in (loading, qwen_vl):
        for name in ("load_model", "load_tokenizer", "load_image_processor"):
            monkeypatch.setattr(module, name, load)
    monkeypatch.setattr(sources, "dataset", load)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["plan", *words])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_recipe_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the table has no total, or a fitting recipe ends with an error's code."""
    code, said = plan(capsys, "recipe=lookback_rl", "gpu=24GB")
    assert code == 0
    assert "plan: lookback_rl on 1 x 24GB, compute=single" in said
    assert "1,669,312 parameters, 1,669,312 train" in said
    for part in ("weights", "gradients", "optimiser", "KV cache", "activations", "logits", "total"):
        assert f"| {part}" in said
    assert "fits: " in said
    assert "assume the rates of an L40S" in said


def test_one_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: exit code 0, so that a job script goes on; or no word about what would help. 7B in float32 with
    moments is 16 bytes a parameter, 133 GB."""
    code, said = plan(capsys, "recipe=lookback_rl_7b", "data.path=x", "gpu=80GB")
    assert code == 1
    assert "DOES NOT FIT" in said
    assert "The largest part is optimiser, 61.8 GiB" in said
    assert "It would fit with" in said
    assert "reflectvlm.models.lora.LoRA" in said


def test_a_tight_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a need that is within the plan's own error of the card's memory is promised to fit."""
    _, said = plan(capsys, "recipe=lookback_rl_7b", "data.path=x", "gpus=8", "gpu=80GB")
    assert "GiB; tight, for a plan may be 15% too low." in said
    _, said = plan(capsys, "recipe=lookback_rl", "gpu=80GB")
    assert "tight" not in said


def test_several_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the whole step's prompts are planned for each GPU: 512 prompts on 8 are 64 each."""
    code, said = plan(capsys, "recipe=lookback_rl_7b", "data.path=x", "gpus=8", "gpu=H200", "--json")
    made = json.loads(said)
    assert code == int(not made["fits"]) == 1
    assert made["load"]["prompts"] == 64
    assert made["compute"]["kind"] == "ddp"
    assert made["gpu"]["name"] == "H200"
    assert made["peak"]["total"] == pytest.approx(sum(made["peak"]["parts"].values()))
    assert made["remedy"]["peak"]["total"] <= made["gpu"]["memory"]


def test_usual_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: prompt=, answer= and visual= are taken for keys of the recipe, or change nothing."""
    words = ("recipe=lookback_rl", "gpu=24GB", "--json")
    most = json.loads(plan(capsys, *words)[1])
    usual = json.loads(plan(capsys, *words, "prompt=60", "visual=16", "answer=40")[1])
    assert (usual["load"]["prompt"], usual["load"]["visual"], usual["load"]["answer"]) == (60, 16, 40)
    assert usual["peak"]["total"] < most["peak"]["total"]
    assert usual["seconds"]["step"] < most["seconds"]["step"]


def test_an_answer_s_length_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: refused for a prompt that nobody has given. Of 512 tokens an answer of 400 leaves 112."""
    words = ("recipe=lookback_sft", "gpu=24GB", "--json")
    load = json.loads(plan(capsys, *words, "answer=400")[1])["load"]
    assert (load["answer"], load["prompt"]) == (400, 112)
    assert load["visual"] < 112
    load = json.loads(plan(capsys, *words, "answer=511")[1])["load"]
    assert (load["answer"], load["prompt"], load["visual"]) == (511, 1, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["recipe=lookback_rl", "gpus=none"], "gpus is 'none'. It must be a whole number"),
        (["recipe=lookback_rl", "gpus=0"], "gpus is '0'"),
        (["recipe=lookback_rl", "gpu=big"], "gpu is 'big'. Give memory"),
        (["recipe=lookback_rl", "policy.path=./nowhere"], "No config.json in './nowhere'"),
        (["recipe=lookback_rl", "prompt=10", "visual=20"], "cannot hold"),
        (["recipe=lookback_rl", "prompt=3000"], "longer than max_prompt_tokens=512. Give fewer"),
        (
            ["recipe=lookback_sft", "prompt=400", "answer=200"],
            "together 600 tokens, but the recipe leaves out",
        ),
        (
            ["recipe=lookback_rl", "visual=3000"],
            "visual= 3,000 tokens, but the recipe leaves out rows longer",
        ),
        (["recipe=lookback_sft", "visual=3000"], "visual= and answer= together 3,001 tokens, but"),
        (["recipe=lookback_sft", "visual=200", "answer=400"], "visual= and answer= together 600 tokens"),
        (["recipe=lookback_sft", "answer=600"], "a prompt and answer= together 601 tokens"),
        (["recipe=lookback_rl", "gpus=2", "compute=single"], "compute is single, and gpus is 2"),
        (["recipe=lookback_rl", "nodes=2"], "plan takes no nodes: it counts all GPUs"),
        (
            ["recipe=lookback_rl", "policy=qwen2_5_vl_7b_qlora", "gpus=8", "compute=zero3"],
            "compute is zero3, and policy.quantize is set",
        ),
        (["recipe=lookback_rl", "gpus=8", "compute=zero2", "+optimizer.bits=8"], "moments of 32 bits"),
        (["gpus=2"], "plan needs recipe=NAME"),
        (["recipe=lookback_rl", "stepps=2"], "Did you mean steps?"),
    ],
)
def test_wrong_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a traceback, or exit code 1, which says that the recipe does not fit."""
    code, said = plan(capsys, *words)
    assert code == 2
    assert says in said
    assert "Traceback" not in said


def chosen(recipe: str, *words: str) -> dict[str, Any]:
    return dict(compose(recipe, words).values)


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_has_a_plan(recipe: str) -> None:
    """Bug: a recipe with a key that the planner cannot read."""
    text = (recipes_folder() / f"{recipe}.yaml").read_text()
    words = (
        ["data.path=x"]
        if "data: rows" in str(yaml.safe_load(text).get("defaults")) or "_7b" in recipe
        else []
    )
    values = chosen(recipe, *words)
    planned = job_of(values, 1)
    assert fullest(planned).total > planned.shape.parameters * planned.training.w
    assert planned.training.checkpointing == bool(values["policy"].get("gradient_checkpointing"))
    spread = job_of({**values, "compute": {"kind": "zero3"}}, 8)
    assert spread.compute.stage == 3
    assert spread.load.prompts <= planned.load.prompts


def test_settings_are_read() -> None:
    """Bug: a setting of the recipe is planned with its default."""
    values = chosen("lookback_rl_7b", "data.path=x", "micro_tokens=5000", "engine.max_rows=20")
    values["policy"] |= {
        "lora": {"_target_": "reflectvlm.models.lora.LoRA", "rank": 4},
        "quantize": "nf4",
        "chunk": 99,
    }
    values["optimizer"] |= {"bits": 8}
    found = job_of(values, 1, Lengths(visual=500))
    assert found.training.adapter is not None
    assert (found.training.adapter.rank, found.training.adapter.bits) == (4, 4)
    assert (found.training.weights, found.training.products) == ("float32", "bfloat16")
    assert (found.training.moments, found.training.chunk, found.training.reference) == (8, 99, True)
    assert (found.load.micro_tokens, found.load.max_rows, found.load.visual) == (5000, 20, 500)
    assert (found.load.group, found.load.updates, found.load.cuts) == (5, 4, True)


def test_copy_makes_answers_longer() -> None:
    """Bug: the blocks that COPY and ROUTE put in are forgotten. 256 visual tokens and two around them, twice;
    of ROUTE's half 128 and two."""
    words = ("+policy.max_pixels=65536",)
    copy = chosen("qwen_la_rl_copy", *words)
    copy["reattention"] |= {"limit": 2, "budget": None}
    assert job_of(copy, 1).load.inserted == 516
    copy["reattention"] |= {"budget": 300}
    assert job_of(copy, 1).load.inserted == 300
    route = chosen("qwen_la_rl_route", *words)
    route["reattention"] |= {"m": 50.0, "limit": 1, "budget": None}
    assert job_of(route, 1).load.inserted == 130


def test_a_recipe_of_another_trainer() -> None:
    """Bug: a plan of zero bytes."""
    with pytest.raises(ValueError, match="A plan knows RLTrainer, SFTTrainer, Distiller"):
        job_of({"_target_": "some.Other", "policy": {"path": "tiny"}}, 1)
    with pytest.raises(ValueError, match="has no policy"):
        job_of({"_target_": "some.Other"}, 1)
