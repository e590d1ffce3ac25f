"""The chain in one command: what is made once, what a restart does not do again, and the table."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from chains import write_chain
from reflectvlm import pipeline, stages
from reflectvlm.cli import main
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.pipeline import run_pipeline
from reflectvlm.recipe_check import RecipeError
from reflectvlm.recipe_files import pipelines, recipes_folder
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.train.measure import Figures, comparison, figures_of
from reflectvlm.train.signals import StopRequest
from reflectvlm.types import Grid, Patches, Prompt, Rollout, Sample, ScoredGroup, Text, Visual
from training import remainder


def judged() -> Rubric:
    return Rubric(rewards={"accuracy": per_rollout(remainder)}, weights={"accuracy": 1.0})


class Seen:
    """A measure that applies to no answer."""

    def __call__(self, group: Sequence[Rollout], /) -> list[None]:
        return [None] * len(group)


def seen_things() -> Seen:
    return Seen()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a chain of recipes, and a cache of its own."""
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path / "cache"))
    return write_chain(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a cache that tests share, since an identity knows no folder."""
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path_factory.getbasetemp() / "shared-cache"))
    return write_chain(tmp_path)


def run(folder: Path, tiny: Path, *words: str) -> pipeline.PipelineResult:
    base = (f"policy.path='{tiny}'", f"root={folder / 'runs'}")
    return run_pipeline(str(folder / "pipe.yaml"), *base, *words)


def made(folder: Path) -> list[str]:
    """Recipes of the stages in the cache."""
    return sorted(path.name.rpartition("-")[0] for path in (folder / "cache" / "stages").iterdir())


# -- making and measuring -------------------------------------------------------------------------


def test_stages_are_made_once_and_all_rows_measured(
    fresh: Path, tiny: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A chain that makes its cold start for every row takes the sum of all chains."""
    caplog.set_level(logging.INFO, "reflectvlm")
    done = run(fresh, tiny)
    assert made(fresh) == ["ask", "cold", "learn", "learn"]
    assert list(done.figures) == ["base", "taught", "taught twice"]
    assert (done.finished, done.exit_code) == (True, 0)
    base, taught, twice = done.figures.values()
    assert base.answers == 3
    assert base.accuracy is not None
    assert base.layout is None
    assert taught.accuracy is None, "its own rubric has no accuracy"
    assert all(figures.hallucination is None for figures in done.figures.values())
    assert all(0 < figures.length <= 6 for figures in done.figures.values())
    out = capsys.readouterr().out
    assert (done.folder / "summary.md").read_text().startswith("### pipeline-pipe")
    rows = json.loads((done.folder / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(done.figures)
    assert rows[0]["model"] == str(tiny)
    assert rows[2]["overrides"] == ["steps=2"]
    assert "| taught twice |" in out
    assert twice != taught


def test_the_base_has_no_tags_to_say(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New tags in an untrained vocabulary are words that the base would never have had."""
    seen: list[dict[str, Any]] = []
    genuine = pipeline.instantiated

    def watched(node: Any, key: str) -> Any:
        if key == "policy":
            seen.append(dict(node))
        return genuine(node, key)

    monkeypatch.setattr(pipeline, "instantiated", watched)
    run(folder, tiny, "+policy.new_tags=['<LOOK>']")
    assert ["new_tags" in node for node in seen] == [False, True, True]


def test_a_row_is_asked_with_its_own_reattention(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vision-only is a model of another row asked differently; mixed up, two rows of the table are one."""
    asked: list[tuple[str, str, int]] = []

    def watched(*parts: Any) -> Figures:
        asked.append((type(parts[4]).__name__, parts[3].text[:9], parts[6].keywords["max_rows"]))
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", watched)
    run(folder, tiny, "learn:engine.max_rows=2")
    # The engine too is the recipe's, or a model that fits the GPU in training does not at the end.
    assert asked == [("Implicit", "Put the f", 2), ("Implicit", "", 2), ("VisualCopy", "", 2)]


def test_overrides_go_to_one_recipe_or_to_all_that_know_the_key(fresh: Path, tiny: Path) -> None:
    """`seed=1` that reaches only the last stage mixes seeds; `rows=` in a trainer is an error."""
    run(fresh, tiny, "seed=4", "rows=3", "cold:optimizer.lr=1e-5")
    recorded = {
        path.parent.name.rpartition("-")[0]: yaml.safe_load(path.read_text())
        for path in (fresh / "cache" / "stages").glob("*/recipe.yaml")
    }
    assert {name: values["seed"] for name, values in recorded.items()} == {"cold": 4, "ask": 4, "learn": 4}
    assert recorded["ask"]["rows"] == 3
    assert recorded["cold"]["optimizer"]["lr"] == 1e-5
    assert recorded["learn"]["optimizer"]["lr"] == 1e-3
    assert recorded["learn"]["micro_tokens"] == 800, "what the pipeline's file tells a recipe"
    assert recorded["cold"]["micro_tokens"] == 8192


def test_two_seeds_have_two_folders(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second seed would be refused as another recipe of the first one's unfinished run."""
    monkeypatch.setattr(pipeline, "measure", lambda *_: FIGURES)
    monkeypatch.setattr(pipeline, "_model", lambda *_: str(tiny))
    names = [run(folder, tiny, f"seed={seed}").folder.name for seed in (1, 2)]
    assert names[0].endswith("-seed-1")
    assert names[1].endswith("-seed-2")


# -- taken up again -------------------------------------------------------------------------------

FIGURES = Figures(
    answers=3,
    accuracy=0.5,
    hallucination=0.25,
    layout=None,
    length=12.0,
    inserted=36.0,
    truncated=0.0,
    seconds=1.5,
)


def test_a_restart_measures_only_what_is_missing(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipeline killed at its last row would measure all of them again."""
    asked: list[str] = []

    def die_at_the_third(policy: Any, *_: Any) -> Figures:
        asked.append(policy.source)
        if len(asked) == 3:
            raise RuntimeError("killed")
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", die_at_the_third)
    with pytest.raises(RuntimeError, match="killed"):
        run(folder, tiny)
    (file,) = (folder / "runs").glob("*/measured.jsonl")
    with file.open("a") as torn:
        torn.write('{"row": "taught tw')
    done = run(folder, tiny)
    assert len(asked) == 4
    assert done.finished
    assert list(done.figures.values()) == [FIGURES] * 3
    again = run(folder, tiny)
    assert len(asked) == 4
    assert again.folder == done.folder
    assert again.figures == done.figures
    assert "finished; nothing to do" in capsys.readouterr().out


def test_another_model_is_measured_anew(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures of a stage that was deleted and made anew elsewhere belong to another model."""
    asked: list[str] = []

    def die(policy: Any, *_: Any) -> Figures:
        asked.append(policy.source)
        if len(asked) == 3:
            raise RuntimeError("killed")
        return FIGURES

    moved = shutil.copytree(tiny, tmp_path / "moved")
    where = [tiny]
    monkeypatch.setattr(pipeline, "measure", die)
    monkeypatch.setattr(pipeline, "_model", lambda _, row, __: str(tiny if row.start else where[0]))
    with pytest.raises(RuntimeError, match="killed"):
        run(folder, tiny)
    where[0] = moved
    run(folder, tiny)
    assert asked[3:] == [str(moved)] * 2, "the base is where it was, the other two are not"


def asked_again(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> list[str]:
    """Nothing is made, and every row that is measured is noted."""
    asked: list[str] = []

    def note(policy: Any, *_: Any) -> Figures:
        asked.append(policy.source)
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", note)
    monkeypatch.setattr(pipeline, "_model", lambda *_: str(tiny))
    return asked


def written(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "changed", ["a stage", "the version", "the start", "an instruction", "the questions"]
)
def test_a_finished_table_is_not_shown_for_another_one(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Figures of the old recipe under "finished; nothing to do" after its learning rate was changed."""
    start = shutil.copytree(tiny, tmp_path / "start")
    (tmp_path / "own.txt").write_text("Look.")
    written(folder / "pipe.yaml", "name: boxed", f"name: {tmp_path / 'own.txt'}")
    asked = asked_again(monkeypatch, start)
    first = run(folder, start)
    assert run(folder, start).folder == first.folder
    assert len(asked) == 3
    match changed:
        case "a stage":  # two before the recipe of any row
            written(folder / "cold.yaml", "steps: 1", "steps: 2")
        case "the version":
            monkeypatch.setattr("reflectvlm.__version__", "0.0.0")
        case "the start":
            written(start / "config.json", '"float32"', '"bfloat16"')
        case "an instruction":
            (tmp_path / "own.txt").write_text("Look twice.")
        case "the questions":
            written(folder / "pipe.yaml", "size: 3", "size: 4")
    other = run(folder, start)
    assert (other.folder.name, len(asked)) == (f"{first.folder.name}-2", 6)
    assert run(folder, start).folder == other.folder
    if changed == "a stage":
        written(folder / "cold.yaml", "steps: 2", "steps: 1")
        assert run(folder, start).folder == first.folder, "what it shows is this recipe's again"
    assert len(asked) == 6


def test_a_table_of_two_recipes_is_refused(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows measured before and after a change of what they are made from, in one table."""
    monkeypatch.setattr(pipeline, "measure", lambda *_: 1 / 0)
    monkeypatch.setattr(pipeline, "_model", lambda *_: str(tiny))
    with pytest.raises(ZeroDivisionError):
        run(folder, tiny)
    written(folder / "learn.yaml", "lr: 1.0e-3", "lr: 1.0e-4")
    says = r"unfinished and was started with another recipe: identity\.models\.base 'learn-.* resume=never"
    with pytest.raises(ValueError, match=says):
        run(folder, tiny)
    asked_again(monkeypatch, tiny)
    done = run(folder, tiny, "resume=never")
    rows = json.loads((done.folder / "summary.json").read_text())["rows"]
    identities = [row["identity"] for row in rows]
    assert identities[0] == identities[1] != identities[2], "of the first two one is asked before training"
    assert all(identity.startswith("learn-") for identity in identities)


def test_a_recorded_pipeline_is_one_again(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipe meant on this disk is recorded beside it, and is no key of a pipeline."""
    asked_again(monkeypatch, tiny)
    recorded = run(folder, tiny).folder / "recipe.yaml"
    shutil.copy(recorded, folder / "again.yaml")
    assert run_pipeline(str(folder / "again.yaml"), f"root={folder / 'runs'}").finished


def test_sigterm_while_measuring(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler's signal must end with its exit code and with what was measured."""

    def told(*_: Any) -> Figures:
        os.kill(os.getpid(), signal.SIGTERM)
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", told)
    done = run(folder, tiny)
    assert (done.finished, done.exit_code, list(done.figures)) == (False, 143, ["base"])
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().out
    assert not (done.folder / "summary.json").exists()
    asked: list[str] = []

    def counted(policy: Any, *_: Any) -> Figures:
        asked.append(policy.source)
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", counted)
    whole = run(folder, tiny)  # the second part: what had been measured stays
    assert (whole.folder, whole.finished, whole.exit_code, len(asked)) == (done.folder, True, 0, 2)
    assert list(whole.figures) == ["base", "taught", "taught twice"]


def test_max_minutes_while_measuring(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: `pipeline NAME max_minutes=1` limits the stages and not the measuring; or its second part, with
    another limit, begins anew in another folder. Each row takes 40 of the 60 seconds."""
    now = [0.0]
    asked: list[float] = []

    def slow(*_: Any) -> Figures:
        asked.append(now[0])
        now[0] += 40.0
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", slow)
    monkeypatch.setattr(pipeline, "StopRequest", lambda limit: StopRequest(limit, clock=lambda: now[0]))
    done = run(folder, tiny, "max_minutes=1")
    assert (done.finished, done.exit_code, list(done.figures)) == (False, 75, ["base", "taught"])
    assert "stopped by max_minutes=1; the same command goes on" in capsys.readouterr().out
    whole = run(folder, tiny, "max_minutes=2")
    assert (whole.folder, whole.finished, whole.exit_code) == (done.folder, True, 0)
    assert asked == [0.0, 40.0, 80.0]


def test_measured_rows_are_never_written_anew(
    folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a kill while the file is rewritten at a start, before all of it is there again, loses every row
    that had been measured."""

    def told(*_: Any) -> Figures:
        os.kill(os.getpid(), signal.SIGTERM)
        return FIGURES

    monkeypatch.setattr(pipeline, "measure", told)
    file = run(folder, tiny).folder / "measured.jsonl"
    before = file.read_bytes()
    with file.open("ab") as torn:
        torn.write(b'{"row": "taught')
    write = Path.write_text

    def killed(self: Path, *given: Any, **named: Any) -> int:
        if self.name == file.name:
            self.open("wb").close()
            raise RuntimeError("killed")
        return write(self, *given, **named)

    monkeypatch.setattr(Path, "write_text", killed)
    run(folder, tiny)
    assert file.read_bytes().startswith(before)
    assert len(file.read_text().splitlines()) == 2


def test_a_stopped_pipeline_keeps_its_exit_code_without_a_reader(folder: Path, tiny: Path) -> None:
    """Bug: `reflectvlm pipeline … | head` that a signal stops ends with 120, and is not started again."""
    code = f"""
import os, signal, sys
from reflectvlm import cli, pipeline
import test_pipeline
def told(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    return test_pipeline.FIGURES
pipeline.measure = told
sys.exit(cli.main(["pipeline", {str(folder / "pipe.yaml")!r}, "policy.path='{tiny}'", "root={folder}/runs"]))
"""
    run(folder, tiny)  # so that its stages are there
    shutil.rmtree(folder / "runs")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.returncode == 143, done.stderr
    assert len((next((folder / "runs").glob("*/measured.jsonl"))).read_text().splitlines()) == 1


def test_a_stopped_stage_stops_the_pipeline(fresh: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows measured with models that are not there, or an exit code of 0."""
    from reflectvlm.train.distill import Distiller
    from reflectvlm.train.distill_run import Distilled, Tally

    def stopped(_: Distiller) -> Distilled:
        return Distilled(folder=fresh, tally=Tally(), finished=False, exit_code=143)

    monkeypatch.setattr(Distiller, "run", stopped)
    with pytest.raises(stages.StageStopped, match="the same command goes on") as caught:
        run(fresh, tiny)
    assert caught.value.exit_code == 143


# -- figures --------------------------------------------------------------------------------------


def scored(text: str, tokens: int, blocks: Sequence[Visual], **parts: float) -> ScoredGroup:
    grid = Grid(1, 4, 4)
    import torch

    patches = Patches(pixels=torch.zeros(1, 1), grid=grid)
    prompt = Prompt(sample=Sample(id="s", question="?", answer="1"), spans=(), patches=(patches,))
    sampled = Text(ids=(1,) * tokens, trained=True, logprobs=(0.0,) * tokens)
    rollout = Rollout(prompt=prompt, spans=(sampled, *blocks), text=text, stop="eos")
    return ScoredGroup(
        rollouts=(rollout,),
        rewards=(0.0,),
        scored=(True,),
        parts={name: (value,) for name, value in parts.items()},
    )


def test_figures_leave_out_what_does_not_apply() -> None:
    """An answer that mentions nothing is no answer without hallucination."""
    nan = float("nan")
    groups = [
        scored("a", 10, (), accuracy=1.0, hallucination=0.5, format=1.0),
        scored("b", 20, (Visual(image=0),), accuracy=0.0, hallucination=nan, format=0.0),
    ]
    found = figures_of(groups, 3.0)
    assert found == Figures(
        answers=2,
        accuracy=0.5,
        hallucination=0.5,
        layout=0.5,
        length=15.0,
        inserted=9.0,  # 16 visual tokens and the two around them, in one of two answers
        truncated=0.0,
        seconds=3.0,
    )


def test_the_table_shows_what_is_missing_as_missing() -> None:
    """A hallucination rate of 0.0% for a model that mentions nothing is praise it did not earn."""
    assert comparison("t", {"base": FIGURES}).markdown.splitlines()[-1].split() == (
        ["|", "base", "|", "50.0%", "|", "25.0%", "|", "–", "|", "12.0", "|", "36.0", "|", "1.5", "|"]
    )


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seeed=1"], r"^No stage has a key 'seeed', nor has a recipe that is run: ask, cold, learn;"),
        (["colt:steps=2"], r"colt:… is told to a stage, but the stages here are .*Did you mean 'cold'\?"),
        (["cold:stepz=2"], r"no key 'stepz'"),
        (["ask:rows=abc"], r"^stage ask: rows is 'abc', but Distiller wants .* by ask:key="),
        (["learn:steps=0"], r"^stage learn: steps is 0. It must be at least 1"),
        (["held_out.max_token=3"], r"no key 'held_out.max_token'"),
        (["table=[3]"], r"table is \[3\]"),
    ],
)
def test_mistakes_are_told_before_anything_runs(fresh: Path, tiny: Path, words: list[str], says: str) -> None:
    """A typing error in the last recipe, told after the first two have trained for days."""
    with pytest.raises(RecipeError, match=says):
        run(fresh, tiny, *words)
    assert not (fresh / "cache" / "stages").exists() or made(fresh) == []


def test_data_that_is_not_there_is_told_before_a_stage_runs(fresh: Path, tiny: Path) -> None:
    """The questions of the distillation are read after two stages have trained."""
    text = (fresh / "ask.yaml").read_text().replace("data: digit_traces", "data: rows")
    (fresh / "ask.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match=r"stage ask: data.path has no value yet.*given a value by ask:key="
    ):
        run(fresh, tiny)
    with pytest.raises(RecipeError, match=r"stage ask: data: 'none.jsonl' is not a file"):
        run(fresh, tiny, "ask:data.path=none.jsonl")
    assert made(fresh) == []


def test_rows_need_names_of_their_own(folder: Path, tiny: Path) -> None:
    """The second row of a name would show the figures of the first."""
    text = (folder / "pipe.yaml").read_text().replace("name: taught twice", "name: taught")
    (folder / "pipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"each a name of its own"):
        run(folder, tiny)


def test_the_command(
    fresh: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`reflectvlm pipeline` is how the chain is run."""
    monkeypatch.setattr(pipeline, "measure", lambda *_: FIGURES)
    words = [f"policy.path={tiny}", f"root={fresh / 'runs'}"]
    assert main(["pipeline", str(fresh / "pipe.yaml"), *words]) == 0
    out, err = capsys.readouterr()
    assert "| base " in out
    assert "stage ask runs first, in" in err


# -- our own pipelines ----------------------------------------------------------------------------


def test_pipelines_are_listed_with_what_they_do() -> None:
    """The names that the command line offers."""
    assert list(pipelines()) == ["qwen_la", "qwen_la_7b"]
    assert all(len(text.split()) > 5 for text in pipelines().values())


@pytest.mark.parametrize("name", ["qwen_la", "qwen_la_7b"])
def test_rows_of_our_pipelines_are_the_paper_s(name: str) -> None:
    """A row left out of the ablation is a question the table does not answer."""
    rows = yaml.safe_load((recipes_folder() / "pipelines" / f"{name}.yaml").read_text())["table"]
    assert [row["name"] for row in rows] == [
        "base", "text-only", "vision-only", "COPY", "ROUTE m=25", "ROUTE m=50", "ROUTE m=75",
    ]  # fmt: skip
    suffix = name.removeprefix("qwen_la")
    assert {row["recipe"] for row in rows} == {
        f"qwen_la_{kind}{suffix}" for kind in ("text", "copy", "route")
    }
