"""Stages: what a recipe starts from, whose rows it takes, and the cache that keeps both."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from chains import write_chain
from reflectvlm import stages
from reflectvlm.config import compose, load_recipe
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.recipe_check import RecipeError
from reflectvlm.train.run import RunResult
from reflectvlm.train.sft import SFTTrainer

SMALL = ("prompts_per_step=1", "group_size=2", "sampling.max_tokens=4", "evaluation=null", "test=null")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds or leaves a cold start in the user's own cache."""
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path / "cache"))


def started(tiny: Path, *stage: str) -> list[str]:
    """Overrides that cold-start `tiny` with a small stage."""
    small = [f"policy.path={tiny}", "steps=1", "rows_per_step=2", "evaluation=null", "test=null", *stage]
    quoted = ",".join(f"'{one}'" for one in small)
    return [f"policy.path={tiny}", f"start_from.overrides=[{quoted}]", *SMALL]


# -- what a recipe starts from --------------------------------------------------------------------


def test_cold_start_is_made_once_and_then_found(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Made anew each time, ten seeds would pay for ten cold starts; not made, RL starts from the base."""
    caplog.set_level(logging.INFO, "reflectvlm")
    first = load_recipe("lookback_rl", *started(tiny))
    folder = Path(first.policy.source).parent
    assert folder.parent == tmp_path / "cache" / "stages"
    assert "runs first" in caplog.text
    caplog.clear()
    again = load_recipe("lookback_rl", *started(tiny), "steps=5")
    assert again.policy.source == first.policy.source
    assert "stage lookback_sft found in" in caplog.text


def test_a_killed_cold_start_goes_on_and_its_exit_code_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped cold start whose half-trained model is used would be silent damage."""
    seen: list[SFTTrainer] = []

    def stopped(trainer: SFTTrainer) -> RunResult:
        seen.append(trainer)
        return RunResult(folder=tmp_path, before={}, after={}, finished=False, exit_code=143)

    monkeypatch.setattr(SFTTrainer, "run", stopped)
    with pytest.raises(stages.StageStopped, match="same command goes on") as caught:
        load_recipe("lookback_rl", *started(tiny))
    assert caught.value.exit_code == 143
    assert seen[0].output.resume == "auto"
    assert seen[0].name.startswith("lookback_sft-")
    assert seen[0].variant == ""


def test_identity_is_what_decides_the_result(tiny: Path, tmp_path: Path) -> None:
    """Too narrow an identity reuses a wrong model, too wide a one trains for nothing."""
    path = f"policy.path={tiny}"
    base = stages.stage_name("lookback_sft", compose("lookback_sft", (path,)).values)
    same = ("eval_every=3", "name=other", "test=null", "evaluation=null", "root=there")
    for override in same:
        assert stages.stage_name("lookback_sft", compose("lookback_sft", (path, override)).values) == base
    for override in (
        "seed=1",
        "optimizer.lr=1e-3",
        "variant=solution",
        "data.data.size=5",
        "policy.dtype=bfloat16",
    ):
        assert stages.stage_name("lookback_sft", compose("lookback_sft", (path, override)).values) != base
    moved = tmp_path / "moved"
    shutil.copytree(tiny, moved)
    there = compose("lookback_sft", (f"policy.path={moved}",)).values
    assert stages.stage_name("lookback_sft", there) == base
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert stages.stage_name("lookback_sft", there) != base


@pytest.mark.parametrize(
    "file", ["preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "config.json", "README.md"]
)
def test_all_that_loading_reads_of_a_start_counts(tiny: Path, tmp_path: Path, file: str) -> None:
    """Another image size, chat template or tokenizer found the cold start of the old one."""
    moved = shutil.copytree(tiny, tmp_path / "moved")
    (moved / "README.md").write_text("Read by people.")
    (moved / "checkpoints").mkdir()
    base = stages.model_digest(str(moved))
    (moved / "checkpoints" / "state.json").write_text("{}")
    assert stages.model_digest(str(moved)) == base
    (moved / file).write_text((moved / file).read_text() + " ")
    assert (stages.model_digest(str(moved)) == base) == (file == "README.md")
    (moved / "model.safetensors").unlink()
    assert stages.model_digest(str(moved)) is None
    assert stages.model_digest("some/hub-name") is None


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes of weights, hashed for every stage of a chain; or a changed file taken for the old."""
    read: list[Path] = []
    hashed = stages._hashed
    monkeypatch.setattr(stages, "_LARGE", 4)
    monkeypatch.setattr(stages, "_hashed", lambda file: read.append(file) or hashed(file))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12345")
    assert stages.model_digest(str(tmp_path)) == (base := stages.model_digest(str(tmp_path)))
    assert len(read) == 1
    weights.write_bytes(b"123456")
    assert stages.model_digest(str(tmp_path)) != base


def named(values: dict[str, Any]) -> str:
    return stages.stage_name("lookback_sft", values)


def test_files_that_a_recipe_names_count_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrected rows, a new instruction or a changed reward file found the cold start of the old ones."""
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "data": {"path": "rows.jsonl", "more": [{"path": ["part.csv"]}]},
        "instruction": {"name": "own.txt"},
        "rubric": {"x": {"function": "my_rewards.py:short"}},
        "note": "x" * 5000 + "\0",
    }
    files = [tmp_path / name for name in ("rows.jsonl", "part.csv", "own.txt", "my_rewards.py")]
    names = [named(values)]
    for file in files:
        for text in ("one", "two"):
            file.write_text(text)
            names.append(named(values))
    assert len(set(names)) == 9
    files[0].write_text("one")
    files[0].write_text("two")
    assert named(values) == names[-1], "content counts, not the time it was written"


def test_a_folder_of_rows_counts_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard added to a folder is other data; a folder called like a split is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "train").mkdir()
    values = {"data": {"data": {"path": "rows", "split": "train"}}}
    empty = named(values)
    (tmp_path / "train" / "x").write_text("")
    assert named(values) == empty
    (tmp_path / "rows" / "a.jsonl").write_text("{}")
    assert named(values) != empty


def test_start_from_null_starts_from_the_policy_itself(tiny: Path) -> None:
    """A user's own cold-started model must not be trained over."""
    trainer = load_recipe("lookback_rl", "start_from=null", f"policy.path={tiny}", *SMALL)
    assert trainer.policy.source == str(tiny)


def test_an_unfinished_stage_goes_on_whatever_its_evaluation_is(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its identity says that it is the same, and its folder refused it as another recipe."""
    steps = SFTTrainer.step

    def dies(trainer: SFTTrainer, step: int) -> Any:
        if step == 1:
            raise KeyboardInterrupt
        return steps(trainer, step)

    monkeypatch.setattr(SFTTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        load_recipe("lookback_rl", *started(tiny, "steps=2", "save_every=1"))
    monkeypatch.setattr(SFTTrainer, "step", steps)
    told = [f"lookback_sft:{word}" for word in ("test.data.size=3", "test.max_tokens=4", "name=x", "keep=9")]
    again = started(tiny, "steps=2", "save_every=1")
    again[1] = again[1].replace("'test=null',", "")
    trainer = load_recipe("lookback_rl", *again, *told)
    folder = Path(trainer.policy.source).parent
    logged = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == [1, 2]


# -- whose rows a recipe takes --------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Folder of three recipes: learn takes the rows of ask, which starts from cold."""
    return write_chain(tmp_path)


def learned(chain: Path, tiny: Path, *words: str) -> SFTTrainer:
    path = f"policy.path={tiny}"
    trainer = load_recipe(str(chain / "learn.yaml"), path, f"ask:{path}", f"cold:{path}", *words)
    assert isinstance(trainer, SFTTrainer)
    return trainer


def test_rows_of_a_stage_are_made_once_and_then_found(
    chain: Path, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SFT that distils anew for every run would pay for 40,000 answers each time."""
    caplog.set_level(logging.INFO, "reflectvlm")
    first = learned(chain, tiny)
    assert len(first.data) == 5
    assert first.policy.source == str(tiny), "the base is trained, not the model that answered"
    said = [record.getMessage() for record in caplog.records if "stage" in record.getMessage()]
    assert [line.split(",")[0] for line in said] == ["stage cold runs first", "stage ask runs first"]
    caplog.clear()
    again = learned(chain, tiny, "steps=5")
    assert [row.columns["trace"] for row in again.data] == [row.columns["trace"] for row in first.data]
    assert "stage cold found in" in caplog.text
    assert "stage ask found in" in caplog.text
    assert "runs first" not in caplog.text


def test_a_stage_is_the_same_in_another_cache(
    chain: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cache that was moved or copied to another machine would be made anew from the second stage on."""
    from reflectvlm.chain import Chain

    words = (f"policy.path={tiny}",)
    told = {"ask": words, "cold": words}
    recipe = str(chain / "learn.yaml")
    first = Chain(told=told).model(recipe, words)
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path / "moved"))
    caplog.set_level(logging.INFO, "reflectvlm")
    assert Chain(told=told).model(recipe, words).parent.name == first.parent.name
    assert "runs first" not in caplog.text
    rows = next((tmp_path / "moved" / "stages").glob("ask-*")) / "rows.jsonl"
    rows.write_text(rows.read_text().replace("<back>", "<BACK>"))
    assert Chain(told=told).model(recipe, words).parent.name != first.parent.name


def test_words_for_a_stage_reach_it_however_deep(chain: Path, tiny: Path) -> None:
    """Lists of overrides within lists of overrides cannot be quoted."""
    trainer = learned(chain, tiny, "ask:rows=3", "cold:optimizer.lr=0.5", "learn:steps=7", "*:steps=2")
    assert trainer.steps == 7
    assert len(trainer.data) == 3
    kept = yaml.safe_load(trainer.output.recipe_yaml or "")
    assert kept["stages"]["cold"] == [f"policy.path={tiny}", "optimizer.lr=0.5"]
    (cold,) = (chain / "cache" / "stages").glob("cold-*")
    recorded = yaml.safe_load((cold / "recipe.yaml").read_text())
    assert (recorded["optimizer"]["lr"], recorded["steps"]) == (0.5, 2)


def test_words_for_all_reach_the_recipe_itself(chain: Path, tiny: Path) -> None:
    """Bug: `*:…` with a key of the recipe alone was refused as a key that no stage has."""
    # Only the last recipe reads rows, so only it knows data.max_bad.
    trainer = learned(chain, tiny, "*:steps=2", "*:data.max_bad=0.25", "*:micro_tokens=300")
    assert (trainer.steps, trainer.micro_tokens) == (2, 300)
    with pytest.raises(RecipeError, match=r"^No stage has a key 'data.max_badd', nor has a recipe"):
        learned(chain, tiny, "*:data.max_badd=0.25")


def test_words_for_all_where_there_is_no_stage() -> None:
    """Bug: a recipe without stages refused each of them."""
    from reflectvlm.chain import Chain

    Chain(told={"*": ["steps=2"]}).check(compose("grpo", ("*:steps=2",)))
    assert compose("grpo", ("*:steps=2",)).values["steps"] == 2
    with pytest.raises(RecipeError, match=r"^No stage has a key 'stepz', nor has a recipe that is run: grpo"):
        Chain(told={"*": ["stepz=2"]}).check(compose("grpo", ("*:stepz=2",)))


def test_a_composed_recipe_keeps_what_its_stages_are_told(chain: Path, tmp_path: Path) -> None:
    """The file in a run's folder must give the same run."""
    composed = compose(str(chain / "learn.yaml"), ("ask:rows=3",))
    (tmp_path / "again.yaml").write_text(composed.yaml)
    again = compose(str(tmp_path / "again.yaml"), ("ask:seed=2", "cold:seed=3")).values
    assert again["stages"] == {"ask": ["rows=3", "seed=2"], "cold": ["seed=3"]}


@pytest.mark.parametrize(
    ("recipe", "word", "says"),
    [
        (
            "learn",
            "data=digit_traces",
            r"data_from gives data.path, but data is DigitTraces.*data=rows",
        ),
        (
            "learn",
            "data.path=mine.jsonl",
            r"^data.path is 'mine.jsonl', but data_from would.*=null",
        ),
        ("learn", "data_from=ask", r"^data_from is 'ask'. Write \{recipe: name"),
        ("learn", "data_from.recipe=lookback_sft", r"data_from names lookback_sft, which makes a model"),
        ("ask", "start_from.recipe={folder}/ask.yaml", r"^start_from names .*ask.yaml, which makes rows"),
        ("ask", "start_from.recipe={folder}/loop.yaml", r"^stage loop: .*loop.yaml is made from itself"),
        ("learn", "data_from=null", r"^data.path has no value yet. Give it with data.path=…"),
        ("learn", "aks:rows=3", r"^aks:… is told to a stage, but the stages here are .*Did you mean 'ask'"),
        (
            "learn",
            "*:stepz=3",
            r"^No stage has a key 'stepz', nor has a recipe that is run: ask, cold",
        ),
        ("learn", "ask:rows=zero", r"^stage ask: rows is 'zero'.*A stage is given a value by ask:key=…"),
        ("learn", "cold:steps=0", r"^stage cold: steps is 0"),
        ("learn", "cold:+stages={{a:['b=1']}}", r"^stage cold: stages has no effect in a stage"),
        ("learn", "+stages=[ask]", r"stages is \['ask'\]. Write \{recipe: \[key=value"),
    ],
)
def test_mistakes_in_a_chain_are_told_before_anything_runs(
    chain: Path, tiny: Path, recipe: str, word: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the last stage, told when the first ones have trained."""

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("something was run or loaded")

    (chain / "loop.yaml").write_text(
        "defaults: [lookback_sft, _self_]\n"
        f"start_from: {{recipe: {chain}/loop.yaml, overrides: ['policy.path={tiny}']}}\n"
    )
    monkeypatch.setattr(SFTTrainer, "run", too_late)
    monkeypatch.setattr("reflectvlm.models.qwen_vl.load_model", too_late)
    path = f"policy.path={tiny}"
    words = [path, f"cold:{path}", *([f"ask:{path}"] if recipe == "learn" else [])]
    if "loop" in word:
        words = [path, f"loop:{path}"]
    with pytest.raises(RecipeError, match=says):
        load_recipe(str(chain / f"{recipe}.yaml"), *words, word.format(folder=chain))


def test_rows_that_are_not_there_are_told_before_a_stage_runs(chain: Path, tiny: Path) -> None:
    """The data of the second stage is read when the first has trained."""
    text = (chain / "ask.yaml").read_text().replace("data: digit_traces", "data: rows")
    (chain / "ask.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"^stage ask: data: 'none.jsonl' is not a file"):
        learned(chain, tiny, "ask:data.path=none.jsonl")
    assert not list((chain / "cache" / "stages").glob("cold-*"))


def test_a_stopped_distillation_stops_the_chain(
    chain: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the rows would be trained on as if they were all."""
    from reflectvlm.train.distill import Distiller
    from reflectvlm.train.distill_run import Distilled, Tally

    def stopped(_: Distiller) -> Distilled:
        return Distilled(folder=chain, tally=Tally(), finished=False, exit_code=143)

    monkeypatch.setattr(Distiller, "run", stopped)
    with pytest.raises(
        stages.StageStopped, match="stage ask was stopped; the same command goes on"
    ) as caught:
        learned(chain, tiny)
    assert caught.value.exit_code == 143


def test_finished_rows_that_are_gone_are_said(tmp_path: Path) -> None:
    """The reader's error about a missing file names no remedy."""
    assert stages.finished_rows(tmp_path) is None
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"finished stage without rows\. Delete the folder"):
        stages.finished_rows(tmp_path)


# -- the cache ------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only home gave a bare PermissionError from deep inside."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(RecipeError, match=r"REFLECTVLM_CACHE is .* cannot be written"):
        stages.stages_folder()
    monkeypatch.delenv(stages.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(RecipeError, match=r"Stages are kept in .* Set REFLECTVLM_CACHE"):
        stages.stages_folder()


def test_a_finished_stage_without_its_model_is_said(tmp_path: Path) -> None:
    """Somebody who deletes only the weights would get a loader's error about a missing file."""
    assert stages.finished_model(tmp_path) is None
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"finished stage without a model\. Delete the folder"):
        stages.finished_model(tmp_path)
