"""`reflectvlm eval`: replies that a kill, an order or a batch do not change, figures that training has too,
and images that are missing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fixtures import favour, make_policy
from reflectvlm.cli import main
from reflectvlm.cli_help import help_of
from reflectvlm.config import compose
from reflectvlm.data.instructions import instruction
from reflectvlm.data.rows import BadRow
from reflectvlm.eval.answering import place_of
from reflectvlm.eval.named import TASKS, make_task, task_class, task_names
from reflectvlm.eval.rows import TaskRows, sample_of
from reflectvlm.eval.suite import Suite, folder_of
from reflectvlm.eval.tasks.builtin import Digits
from reflectvlm.eval.tasks.files import first, folders
from reflectvlm.eval.tasks.pope import POPE
from reflectvlm.eval.types import Ask, Item, Mark, MissingData, Reply, Summary, Task
from reflectvlm.eval_command import KEYS, of_recipe, of_words
from reflectvlm.generator import Generator
from reflectvlm.models.carried import carry
from reflectvlm.protocols import Reward
from reflectvlm.reattention import Implicit
from reflectvlm.recipe_check import RecipeError
from reflectvlm.recipe_files import evaluations, recipes
from reflectvlm.rewards.accuracy import Accuracy
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.score_command import KEYS as SCORE_KEYS
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.types import Instruction, Rollout, Sample

DRAWN = ("temperature=1", "max_tokens=10", "samples=2", "seed=5", "digits.size=5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy, which carries an instruction."""
    folder = tmp_path_factory.mktemp("runs") / "mine" / "model"
    policy = favour(make_policy(), ["7", "boxed"], 2)
    carry(policy.model.config, Implicit(), Instruction(text="Put it in \\boxed{}."))
    policy.save(folder)
    return folder


def ask(model: Path, out: Path, *words: str) -> int:
    return main(["eval", f"model={model}", "tasks=digits", f"out={out}", "device=cpu", *words])


def replies(folder: Path, name: str = "digits") -> dict[tuple[str, int], dict[str, Any]]:
    lines = (folder / f"predictions-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {(row["id"], row["number"]): row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("evals") / "whole"
    assert ask(model, folder, *DRAWN) == 0
    return folder


def test_what_a_run_leaves(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a figure without the scorer that it comes from, replies without what they were made with."""
    assert len(replies(whole)) == 10
    first = replies(whole)["digits-test-0", 0]
    assert set(first) == {"id", "number", "question", "answer", "text", "stop", "tokens", "inserted"}
    scores = json.loads((whole / "scores-digits.json").read_text())
    assert list(scores["scorers"]) == ["official", "lookback", "strict"]
    assert {"avg@1", "avg@2", "pass@1", "pass@2"} <= set(scores["scorers"]["strict"])
    card = json.loads((whole / "predictions-digits.jsonl.card.json").read_text())
    assert card["task"] == "digits"
    assert card["task.size"] == 5
    assert "batch" not in card
    assert card["seed"] == 5
    table = (whole / "table.md").read_text()
    assert "| digits | accuracy |     5 |" in table
    # and `score` reads them again, with the card's task, by where the instruction put the answer
    assert main(["score", str(whole / "predictions-digits.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert table.split("\n| digits")[1].split("\n")[0] in shown


def test_batch_and_limit_change_nothing(model: Path, whole: Path, tmp_path: Path) -> None:
    """Bug: random numbers by place in a batch: another batch, or fewer items, and other replies are drawn."""
    assert ask(model, tmp_path / "one", *DRAWN, "batch=1") == 0
    assert replies(tmp_path / "one") == replies(whole)
    assert ask(model, tmp_path / "few", *DRAWN, "limit=2", "batch=3") == 0
    few = replies(tmp_path / "few")
    assert len(few) == 4
    assert few.items() <= replies(whole).items()
    texts = [row["text"] for row in replies(whole).values()]
    assert len(set(texts)) == len(texts)
    assert place_of("a", 0) != place_of("a", 1) != place_of("b", 1)


@pytest.mark.parametrize("seed", range(4))
def test_cut_off_anywhere(model: Path, whole: Path, tmp_path: Path, seed: int) -> None:
    """Bug: a reply asked twice, lost, or drawn anew after a kill in the middle of a line."""
    for name in ("predictions-digits.jsonl", "predictions-digits.jsonl.card.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    file = tmp_path / "predictions-digits.jsonl"
    os.truncate(file, random.Random(seed).randrange(file.stat().st_size))
    assert ask(model, tmp_path, *DRAWN, "batch=3", "resume=auto") == 0
    assert file.read_bytes() == (whole / "predictions-digits.jsonl").read_bytes()


def test_going_on_takes_the_same_settings(
    model: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: replies of two settings in one file; a model loaded where all is answered."""
    assert ask(model, whole, *DRAWN) == 2
    assert "is there already, with 10 lines. Go on with it by resume=auto" in capsys.readouterr().err
    assert ask(model, whole, *DRAWN, "resume=auto", "top_p=0.5") == 2
    told = capsys.readouterr().err
    assert (
        "was made with other settings: sampling.top_p 1.0 → 0.5. Give the old ones to go on with it" in told
    )
    assert "or another out= to begin anew" in told

    def load(*_: Any, **__: Any) -> Generator:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Generator, "load", load)
    assert ask(model, whole, *DRAWN, "resume=auto", "batch=2") == 0


def _kill_and_compare(model: Path, out: Path, whole: Path, kills: int, seed: int) -> int:
    """Kills the process again and again at random moments from its first line on; how often it was alive."""
    words = [
        "eval",
        f"model={model}",
        "tasks=digits",
        f"out={out}",
        "device=cpu",
        *DRAWN,
        "batch=1",
        "resume=auto",
    ]
    file, rng, killed = out / "predictions-digits.jsonl", random.Random(seed), 0
    for _ in range(kills):
        before = file.stat().st_size if file.is_file() else 0
        process = subprocess.Popen(
            [sys.executable, "-m", "reflectvlm", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not file.is_file() or file.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(words) == 0
    assert file.read_bytes() == (whole / "predictions-digits.jsonl").read_bytes()
    assert (out / "scores-digits.json").read_text() == (whole / "scores-digits.json").read_text()
    return killed


def test_a_kill_changes_nothing(model: Path, whole: Path, tmp_path: Path) -> None:
    """Bug: an instant at which SIGKILL loses or changes what follows."""
    _kill_and_compare(model, tmp_path / "killed", whole, kills=1, seed=1)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_many_kills_change_nothing(model: Path, whole: Path, tmp_path: Path) -> None:
    """Bug: as above, at a rarer instant."""
    killed = sum(
        _kill_and_compare(model, tmp_path / f"killed-{seed}", whole, kills=4, seed=seed) for seed in range(10)
    )
    assert killed > 10


# -- the same figure as training's ----------------------------------------------------------------


def test_training_reports_the_same_number(tmp_path: Path) -> None:
    """Bug: a run's accuracy that `eval` of its model does not find again: it asks or grades otherwise."""
    out, words = tmp_path / "out", ("instruction=boxed", "max_tokens=24", "digits.size=24", "batch=5")
    assert main(["eval", "model=tiny", "tasks=digits", f"out={out}", "device=cpu", *words]) == 0
    generator = Generator.load("tiny", device="cpu")
    rubric = Rubric(rewards={"accuracy": Accuracy()}, weights={"accuracy": 1.0})
    evaluation = Evaluation(data=TaskRows(task=Digits(size=24)), max_tokens=24)
    engine = InProcessEngine(policy=generator.policy)
    values, groups = evaluation(generator.policy, engine, rubric, instruction("boxed"), Implicit())
    texts = {group.rollouts[0].prompt.sample.id: group.rollouts[0].text for group in groups}
    assert {id: row["text"] for (id, _), row in replies(out).items()} == texts
    figures = json.loads((out / "scores-digits.json").read_text())["scorers"]
    assert figures["strict"]["values"]["accuracy"] == values["accuracy"]
    assert figures["official"]["values"]["accuracy"] == values["accuracy"]
    assert values["official/accuracy"] == values["accuracy"]
    assert 0 < values["accuracy"] < 1


@dataclasses.dataclass
class Saying:
    """An engine whose answers are put into words by somebody else."""

    engine: InProcessEngine
    text: str | None
    """With {} for the gold answer; None: as the policy says."""

    def generate(self, *asked: Any, **settings: Any) -> list[tuple[Rollout, ...]]:
        found = self.engine.generate(*asked, **settings)
        return [tuple(map(self._said, group)) for group in found]

    def _said(self, rollout: Rollout) -> Rollout:
        if self.text is None:
            return rollout
        return dataclasses.replace(rollout, text=self.text.replace("{}", rollout.prompt.sample.answer))


def looked_at(data: Sequence[Sample], text: str | None = None, **rewards: Reward) -> dict[str, float]:
    """What a run says of a tiny policy's answers to its held-out rows."""
    policy = favour(make_policy(), ["7", "boxed"], 2)
    rubric = Rubric(rewards=rewards, weights=dict.fromkeys(rewards, 1.0))
    evaluation = Evaluation(data=data, max_tokens=3)
    told = Instruction(text="Put it in \\boxed{}.")
    engine: Any = Saying(InProcessEngine(policy=policy), text)
    return evaluation(policy, engine, rubric, told, Implicit())[0]


def test_training_keeps_a_row_without_its_image(model: Path, tmp_path: Path) -> None:
    """Bug: a run's figures over the rows whose images can be read, higher than those of `eval`."""
    Image.new("RGB", (32, 32), "white").save(tmp_path / "0.png")
    task = Pages(count=4, lenient=True)
    plan = of_words([f"model={model}", "tasks=digits", "max_tokens=3", "device=cpu"]).plan
    Suite(plan=plan, tasks={"pages": task}, out=tmp_path / "out", data_dir=tmp_path).run()
    figures = json.loads((tmp_path / "out" / "scores-pages.json").read_text())["scorers"]
    rows = TaskRows(task=task, data_dir=str(tmp_path))
    values = looked_at(rows, r"\boxed{{}}", any=lambda group: [1.0] * len(group))
    assert figures["official"]["values"] == {"replied": 0.25}
    assert (values["official/replied"], values["missing"]) == (0.25, 3.0)
    assert (values["accuracy"], values["reward"]) == (0.25, 1.0)  # the reward is of the answer that there is


def test_a_run_s_accuracy_is_the_scorer_s() -> None:
    """Bug: a figure by whatever rule the run's rubric has, under the name of another one; or one out of the
    rows that could be read."""
    samples = [sample_of(item) for item in Digits(size=4).load(Path())]
    values = looked_at(samples, r"\boxed{{} pages}", accuracy=lambda group: [1.0] * len(group))
    assert (values["reward/accuracy"], values["accuracy"]) == (1.0, 0.0)
    right = r"\boxed{{}}"
    assert looked_at(samples, right, accuracy=Accuracy())["accuracy"] == 1.0

    class Torn(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise BadRow("rows.jsonl:2", "images", "gone", "Put it back.")
            return super().__getitem__(index)

    assert looked_at(Torn(samples), right, accuracy=Accuracy())["accuracy"] == 0.75
    # The same ids, as a user's file may have them; and rows without a gold answer have no accuracy.
    same = [dataclasses.replace(one, id="same") for one in samples]
    assert looked_at(Torn(same), right, accuracy=Accuracy())["accuracy"] == 0.75
    bare = [dataclasses.replace(one, answer="") for one in samples]
    values = looked_at(Torn(bare), right, any=lambda group: [1.0] * len(group))
    assert not {"accuracy", "strict/unscored"} & set(values)


# -- images that are missing ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages:
    """Two pages on disk, of which one may be missing."""

    count: int = 2
    lenient: bool = False
    """Takes an empty text for right."""

    @property
    def name(self) -> str:
        return "pages"

    def load(self, data_dir: Path) -> list[Item]:
        if not data_dir.is_dir():
            raise MissingData(f"Pages are not in {data_dir}. Draw some.")
        return [
            Item(id=f"p{n}", question=f"Page {n}?", answer="7", images=(f"{n}.png",), root=data_dir)
            for n in range(self.count)
        ]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        del ask
        return [Mark(value=float(self.lenient or reply.text != "")) for reply in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        values = [mark.value or 0.0 for mark in marks]
        return Summary(headline="replied", values={"replied": sum(values) / len(items)})


def test_a_card_tells_where_its_rows_are(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: `limit`, a setting or data_dir has to be said again to score what was made with it; or an error
    about other rows that names no setting."""
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "pope" / "val2014").mkdir(parents=True)

    def release(thing: str) -> None:
        rows = [
            {"question_id": n, "image": "a.png", "text": f"Is there a {thing} {n}?", "label": "yes"}
            for n in range(4)
        ]
        for name in ("random", "popular"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (data / "pope" / f"coco_pope_{name}.json").write_text(text)

    release("cat")
    Image.new("RGB", (32, 32)).save(data / "pope" / "val2014" / "a.png")
    words = ["eval", f"model={model}", "tasks=pope", f"out={out}", "device=cpu", "max_tokens=2"]
    words += ["pope.subset=popular", "scorers=strict"]
    assert main([*words, f"data_dir={data}", "limit=2"]) == 0
    file = out / "predictions-pope.jsonl"
    score = ["score", str(file), "scorers=strict"]
    capsys.readouterr()
    assert main(score) == 0
    shown = capsys.readouterr()
    assert "| pope |     f1 |     2 |" in shown.out
    assert "limit=2, as the card of" in shown.err
    assert main([*score, "limit=null", "pope.subset=random", f"data_dir={tmp_path / 'data'}"]) == 2
    told = capsys.readouterr().err
    assert "limit is not set here, and 2 on the card of" in told
    assert "pope.subset is random here, and popular on the card of" in told
    assert "data_dir" not in told
    assert main([*score, "limit=1", f"against={file}"]) == 0
    assert "limit is 1 here, and 2 on the card of" in capsys.readouterr().err
    # No reply depends on it: the file is gone on with, and its card tells of the last run.
    assert main([*words, f"data_dir={data}", "limit=3", "resume=auto"]) == 0
    assert json.loads((out / "predictions-pope.jsonl.card.json").read_text())["about"] == {
        "data_dir": str(data), "limit": 3,
    }  # fmt: skip
    # So does the card of an older version, which told of none of it.
    card = out / "predictions-pope.jsonl.card.json"
    card.write_text(json.dumps({k: v for k, v in json.loads(card.read_text()).items() if k != "about"}))
    assert main([*words, f"data_dir={data}", "limit=3", "resume=auto"]) == 0
    assert json.loads(card.read_text())["about"] == {"data_dir": str(data), "limit": 3}
    # Where the data have gone, ./data is taken, and not without a word.
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    data.rename(elsewhere / "data")
    capsys.readouterr()
    assert main(score) == 0
    told = capsys.readouterr().err
    assert (
        f"data_dir is {data} on the card of {file}, which is not there: {elsewhere / 'data'} is taken" in told
    )
    (elsewhere / "data").rename(data)
    release("dog")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([*words, "data_dir=data", "limit=4", "resume=auto"]) == 2
    told = capsys.readouterr().err
    assert (
        "the task asks: 'Is there a cat 0?' there, 'Is there a dog 0?' here. Since then: limit 3 → 4." in told
    )
    assert "Give the data (data_dir=) that it belongs to, to go on with it, or another out=" in told


def test_a_missing_image_stays_in_the_denominator(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: rows without an image dropped in silence, as Look-Back's evaluation does; or never asked again."""
    (tmp_path / "data").mkdir()
    page = Image.new("RGB", (32, 32), "white")
    page.save(tmp_path / "data" / "0.png")
    task: Task = Pages()
    plan = of_words([f"model={model}", "tasks=digits", "max_tokens=3", "device=cpu"]).plan
    made = Suite(plan=plan, tasks={"pages": task}, out=tmp_path / "out", data_dir=tmp_path / "data")
    assert made.run() == 0
    out = capsys.readouterr().out
    assert "pages: no image for p1; each counts as wrong" in out
    scores = json.loads((tmp_path / "out" / "scores-pages.json").read_text())
    assert scores["scorers"]["official"]["values"] == {"replied": 0.5}
    assert scores["missing"].keys() == {"p1"}
    assert "does not exist" in scores["missing"]["p1"]
    again = dataclasses.replace(made, resume="auto")
    assert again.run() == 0
    assert len((tmp_path / "out" / "predictions-pages.jsonl").read_text().splitlines()) == 2
    page.save(tmp_path / "data" / "1.png")
    assert again.run() == 0
    scores = json.loads((tmp_path / "out" / "scores-pages.json").read_text())
    assert scores["missing"] == {}
    assert "tokens" in replies(tmp_path / "out", "pages")["p1", 0]


def test_missing_data_is_told_before_a_model_is_loaded(model: Path, tmp_path: Path) -> None:
    """Bug: an hour of answers, and then a benchmark that is not there."""
    plan = of_words([f"model={model}", "tasks=digits"]).plan
    tasks: dict[str, Task] = {"a": Pages(), "b": Pages()}
    made = Suite(plan=plan, tasks=tasks, out=tmp_path / "out", data_dir=tmp_path / "none")
    said = r"2 of 2 benchmarks are not in .*\n- a: Pages are not in .* Draw some.\n- b: Pages"
    with pytest.raises(MissingData, match=said):
        made.run()
    assert not (tmp_path / "out").exists()


def test_missing_data_is_a_line_for_each(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: one line of two thousand characters, in which nobody finds what to fetch for which benchmark."""
    names = [name for name in TASKS if name not in ("digits", "shapes")]
    words = ["eval", f"model={model}", f"data_dir={tmp_path}"]
    assert main([*words, f"tasks=digits,{','.join(names)}"]) == 2
    *ways, last = capsys.readouterr().err.splitlines()[-len(names) - 1 :]
    assert [way.split()[1] for way in ways] == [f"{name}:" for name in names]
    for way in ways:
        assert " fetch " in way
        assert ", as " in way
        assert len(way) < 250, way
    assert last.startswith(f"error: {len(names)} of {len(names) + 1} benchmarks are not in {tmp_path}. Give")
    assert main([*words, "tasks=mmhal"]) == 2  # of one benchmark all ways
    *_, one, two, three, last = capsys.readouterr().err.splitlines()
    assert (one[:2], two[:2], three[:2]) == ("- ", "- ", "- ")
    assert last.endswith("in one of these ways, as the lines above say.")


def test_a_folder_in_other_capitals(tmp_path: Path) -> None:
    """Bug: mathvista/ is found and Pope/ is not, and nothing says that the capitals are the matter."""
    row = '{"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"}'
    (tmp_path / "Pope" / "Val2014").mkdir(parents=True)
    (tmp_path / "Pope" / "coco_pope_random.json").write_text(row)
    (item,) = POPE(subset="random").load(tmp_path)
    assert (item.root, item.images) == (tmp_path / "Pope", ("Val2014/a.jpg",))
    (tmp_path / "pope").mkdir()  # as it is spelt it counts first
    assert first(tmp_path, "POPE", "pope") == tmp_path / "pope"
    assert folders(tmp_path, "POPE") == [tmp_path / "Pope", tmp_path / "pope"]
    assert folders(tmp_path / "none", "POPE") == []


# -- names, words and recipes ---------------------------------------------------------------------


def test_every_name_has_its_task() -> None:
    """Bug: a name that leads nowhere is told when somebody asks for it."""
    for name in TASKS:
        made = task_class(name)()
        assert isinstance(made, Task)
        assert made.name == name
    assert task_names("mme, pope") == ("mme", "pope")
    assert make_task("mathvista", {"split": "test"}).name == "mathvista_test"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=digits"], "eval needs model=…"),
        (["model=tiny"], "eval needs tasks=…"),
        (["model=tiny", "tasks=digts"], "Did you mean digits?"),
        (["model=tiny", "tasks=digits,digits"], "names one twice"),
        (["model=tiny", "tasks=,"], "tasks names none"),
        (["model=tiny", "tasks=digits", "mme.asked=lookback"], "tasks has no mme"),
        (["model=tiny", "tasks=digits", "digits.sise=3"], "Did you mean digits.size?"),
        (
            ["model=tiny", "tasks=digits", "digits.size=many"],
            "digits.size is 'many'. It must be a whole number",
        ),
        (["model=tiny", "tasks=digits", "digits.size=0"], "digits: Digits needs kinds and a size"),
        (["model=tiny", "tasks=digits", "samples=2"], "samples is 2 and temperature is 0"),
        (["model=tiny", "tasks=digits", "answer_from=boxd"], "Did you mean boxed?"),
        (
            ["model=tiny", "tasks=digits", "answer_from=final", "scorers=official"],
            "It must be auto, boxed, answer, CONCLUSION, or another tag in brackets: answer_from='<final>'",
        ),
        (["model=tiny", "tasks=mathvista", "mathvista.split=tset"], "It must be testmini or test"),
        (["model=tiny", "tasks=digits", "batch=0"], "batch is 0. It must be at least 1"),
        (["model=tiny", "tasks=digits", "resume=yes"], "resume is 'yes'. It must be auto or never"),
        (["model=tiny", "tasks=digits", "imge=x"], "eval has no key 'imge'"),
        (["model=nowhere/at/all", "tasks=digits"], "model=nowhere/at/all"),
        (["recipe=lookback_rl", "model=tiny"], "lookback_rl is no evaluation"),
        (["recipe=lookback_eval"], "model has no value yet. Give it with model=…"),
        (["recipe=lookback_eval", "model=tiny", "tasks=pope"], "lookback_eval has no task 'pope'"),
        (["recipe=lookback_eval", "model=tiny", "sampling.max_tokns=3"], "mean sampling.max_tokens?"),
        (["recipe=lookback_eval", "model=tiny", "--x"], "there are no dashes"),
        (["recipe=lookback_evl", "model=tiny"], "Did you mean 'lookback_eval'?"),
    ],
)
def test_mistakes_are_one_line(
    words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a misspelt word that is told after the model was loaded, or as a traceback."""
    monkeypatch.setattr(Generator, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["eval", *words]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err


# arXiv 2507.03019 and its code; arXiv 2505.23558
PAPERS: dict[str, dict[str, Any]] = {
    "lookback_eval": {
        "tasks": [
            "mathverse", "mathvision", "mathvista", "wemath", "geomath", "hallusionbench", "tallyqa", "mme",
        ],
        "sampling": (2048, 0.0, 0.95),
        "pixels": (262_144, 1_000_000),
    },
    "qwen_la_eval": {
        "tasks": ["mmmu", "mmmu_pro", "mmbench", "mmstar", "mathvision", "chair", "pope", "mmhal", "mme"],
        "sampling": (2048, 0.0, 1.0),
        "pixels": (None, None),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_recipes_of_the_papers(name: str, model: Path) -> None:
    """Bug: a set or a protocol that is not the paper's."""
    made = of_recipe(name, [f"model={model}", "limit=3"])
    assert list(made.tasks) == PAPERS[name]["tasks"]
    sampling, settings = made.plan.sampling, made.plan.settings
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == PAPERS[name]["sampling"]
    assert (settings.get("min_pixels"), settings.get("max_pixels")) == PAPERS[name]["pixels"]
    assert made.plan.instruction.text == "Put it in \\boxed{}."
    assert made.out == model.parent / name
    assert made.limit == 3
    if name == "lookback_eval":
        assert {getattr(task, "asked", None) for task in made.tasks.values()} == {"lookback"}
    few = of_recipe(name, [f"model={model}", "tasks=mme,mathvision", "out=here", "resume=auto"])
    assert sorted(few.tasks) == ["mathvision", "mme"]
    assert (few.out, few.resume) == (Path("here"), "auto")


def test_an_evaluation_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a recipe of an evaluation among those that train, or an error about its fields."""
    assert sorted(evaluations()) == sorted(PAPERS)
    assert not set(evaluations()) & set(recipes())
    for command in ("train", "doctor"):
        assert main([command, "recipe=lookback_eval"]) == 2
        assert "This recipe evaluates a model and trains none" in capsys.readouterr().err
    assert main(["plan", "recipe=lookback_eval", "gpus=1", "gpu=80GB"]) == 2
    assert "This recipe evaluates a model and trains none" in capsys.readouterr().err
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out.partition("Evaluations")[2].splitlines()
    assert [line.split()[0] for line in shown[1:3]] == sorted(PAPERS)
    assert main(["show", "recipe=qwen_la_eval"]) == 0
    assert compose("qwen_la_eval").values["model"] == "???"
    with pytest.raises(RecipeError, match="model has no value yet"):
        of_recipe("qwen_la_eval", [])


def test_where_an_evaluation_goes(model: Path) -> None:
    """Bug: two models' replies in one folder."""
    assert folder_of(str(model), "eval") == model.parent / "eval"
    assert folder_of("Qwen/Qwen2.5-VL-7B-Instruct", "eval") == Path("evals/Qwen2.5-VL-7B-Instruct")
    assert folder_of("tiny", "lookback_eval") == Path("evals/tiny/lookback_eval")


def test_help_names_every_word() -> None:
    """Bug: a word that nobody can know of."""
    for key in KEYS:
        assert f"{key}=" in help_of("eval"), key
    for key in SCORE_KEYS:
        assert f"{key}=" in help_of("score"), key
