"""Distillation: which answers become rows, that SFT can read them, and that a kill costs nothing."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fixtures import ShowAgain
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import Digits
from reflectvlm.data.rows import BadRow
from reflectvlm.data.sources import dataset
from reflectvlm.models.tiny import random_tiny
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.rewards.rubric import RewardFailure, Rubric
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.train.distill import Distiller
from reflectvlm.train.distill_run import Tally
from reflectvlm.train.run import Output
from reflectvlm.types import Rollout, Sample, SamplingParams
from training import small_sft


@per_rollout
def right(rollout: Rollout) -> float:
    """Says so itself, or else half of what a random policy writes."""
    return float(
        "right" in rollout.text or ("wrong" not in rollout.text and sum(rollout.sampled_ids) % 2 == 0)
    )


@per_rollout
def in_layout(rollout: Rollout) -> float:
    return float("messy" not in rollout.text)


@per_rollout
def likes(rollout: Rollout) -> float:
    return float(rollout.text.count("!"))


def rubric() -> Rubric:
    rewards = {"accuracy": right, "format": in_layout, "likes": likes}
    return Rubric(rewards=rewards, weights={"accuracy": 1.0, "format": 1.0, "likes": 0.1})


def small(root: Path, **changes: Any) -> Distiller:
    output = {"root": str(root)} | changes.pop("output", {})
    settings: dict[str, Any] = {
        "policy": random_tiny(),
        "data": DigitTraces(data=Digits(size=12), style="semantic"),
        "rubric": rubric(),
        "rows": 8,
        "rows_per_batch": 3,
        "sampling": SamplingParams(max_tokens=6),
        "output": Output(**output),
    }
    return Distiller(**settings | changes)


def scripted(root: Path, *lines: str, **changes: Any) -> Distiller:
    """Three rows, answered with these lines in turn."""

    def engine(policy: Any) -> ScriptedEngine:
        return ScriptedEngine(policy=policy, texts=lines)

    page = Digits(size=1)[0].images
    data = [
        Sample(id=f"s{i}", question="q?", answer=str(i), images=page, columns={"trace": f"gold<back>{i}"})
        for i in range(3)
    ]
    settings: dict[str, Any] = {"data": data, "rows": None, "rows_per_batch": 9, "engine": engine}
    return small(root, **settings | {"sampling": SamplingParams(max_tokens=60)} | changes)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


# -- which answers become rows --------------------------------------------------------------------


def test_good_answers_are_kept_and_others_dropped(tmp_path: Path) -> None:
    """A wrong answer among the gold ones is learned like a right one."""
    done = scripted(tmp_path, "right", "wrong", "right messy").run()
    assert [row["trace"] for row in rows_of(done.folder)] == ["right"]
    assert done.tally == Tally(asked=3, kept=1, wrong=1, broken_layout=1)
    assert done.finished
    assert done.exit_code == 0
    assert done.model is None


def test_repair_writes_the_gold_answer(tmp_path: Path) -> None:
    """The paper rewrites wrong answers; dropping them leaves only what was easy."""
    done = scripted(tmp_path, "right", "wrong", "wrong", wrong="repair").run()
    order = {row["id"]: row for row in rows_of(done.folder)}
    assert sorted(order) == ["s0", "s1", "s2"]
    assert [row["source"] for row in rows_of(done.folder)] == ["model", "gold", "gold"]
    assert all(
        row["trace"] == f"gold<back>{row['answer']}" for row in order.values() if row["source"] == "gold"
    )
    assert done.tally == Tally(asked=3, kept=1, wrong=2, repaired=2)


def test_of_several_good_answers_the_best_becomes_the_row(tmp_path: Path) -> None:
    """Two rows of one id, or the longest instead of the best answer."""
    lines = ("right", "wrong!!!!", "right!!", "right!!")
    done = scripted(tmp_path, *lines, samples_per_row=4).run()
    assert [row["trace"] for row in rows_of(done.folder)] == ["right!!"] * 3
    assert done.tally == Tally(asked=3, kept=3)


def test_what_is_good_is_a_setting(tmp_path: Path) -> None:
    """A rubric of one's own has other names; a threshold must be one from below."""
    done = scripted(tmp_path, "wrong", "wrong!", "wrong!! messy", accept={"likes": 1}).run()
    assert [row["trace"] for row in rows_of(done.folder)] == ["wrong!", "wrong!! messy"]
    assert done.tally == Tally(asked=3, kept=2, wrong=1)


def test_a_failed_reward_refuses_the_answer(tmp_path: Path) -> None:
    """NaN >= 1 is False, and must stay the reason why such a row is not kept."""

    @per_rollout
    def broken(rollout: Rollout) -> float:
        raise ZeroDivisionError(rollout.text)

    judged = Rubric(rewards={"accuracy": broken, "format": in_layout}, weights={"accuracy": 1, "format": 1})
    done = scripted(tmp_path, "right", rubric=judged, wrong="repair", output={"checks": False}).run()
    assert done.tally == Tally(asked=3, wrong=3, repaired=3)


def test_nothing_kept_is_said(tmp_path: Path) -> None:
    """An empty file of rows fails later, in the SFT, with a message about its data."""
    with pytest.raises(RuntimeError, match=r"No row was made: of 3 answers 2 are wrong and 1 have a broken"):
        scripted(tmp_path, "wrong", "wrong", "messy").run()
    assert not (tmp_path / "distill" / "summary.json").exists()


def test_rows_that_cannot_be_asked_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One image that has gone must not end a run of hours."""

    class Holes(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise BadRow("rows.jsonl:2", "images", "missing image", "Copy it.")
            return super().__getitem__(index)

    whole = scripted(tmp_path, "right")
    done = scripted(tmp_path, "right", data=Holes(whole.data)).run()
    assert done.tally == Tally(asked=2, kept=2, left_out=1)
    assert "rows.jsonl:2" in caplog.text
    short = scripted(tmp_path / "short", "right", max_prompt_tokens=3, output={"checks": False})
    with pytest.raises(RuntimeError, match="No row was made: of 0 answers"):
        short.run()
    assert "max_prompt_tokens is 3" in caplog.text


# -- what the rows are good for -------------------------------------------------------------------


def test_sft_reads_the_rows(tmp_path: Path) -> None:
    """Rows that need code between the two stages are no chain."""
    distiller = small(tmp_path, wrong="repair")
    done = distiller.run()
    data = dataset(done.rows)
    assert not data.report.skipped
    assert len(data) == 8
    asked = {sample.id: sample for sample in distiller.data}
    for row in data:
        assert (row.question, row.answer) == (asked[row.id].question, asked[row.id].answer)
        assert row.images[0].tobytes() == asked[row.id].images[0].tobytes()
    trainer = small_sft(tmp_path, data=data)
    trainer.prepare()
    assert math.isfinite(trainer.step(0).metrics["loss"])


def test_an_image_is_written_once(tmp_path: Path) -> None:
    """Ten questions about one page are one file, and its name tells what is in it."""
    done = scripted(tmp_path, "right").run()
    (file,) = (done.folder / "images").iterdir()
    assert {image for row in rows_of(done.folder) for image in row["images"]} == {f"images/{file.name}"}


def test_chosen_blocks_are_recorded_and_trained_on(tmp_path: Path) -> None:
    """ROUTE's choice of the model that answered is what its text was written after."""
    again = ShowAgain("<back>", keep=(1, 3))
    done = scripted(tmp_path, "right<back>seen", "wrong", "right", reattention=again, wrong="repair").run()
    rows = {row["trace"]: row["keep"] for row in rows_of(done.folder)}
    assert rows.pop("right<back>seen") == [[[0, [1, 3]]]]
    assert rows.pop("right") == []
    assert list(rows.values()) == [[[[0, [1, 3]]]]]  # of a gold answer: what the policy chooses in it
    trainer = small_sft(tmp_path, data=dataset(done.rows), reattention=again, choices="keep")
    (_, spans), *_ = trainer.sequences(range(3))
    assert spans


# -- cut off and taken up again -------------------------------------------------------------------


class Crash(Exception):
    pass


def dying(distiller: Distiller, batch: int) -> Distiller:
    """Dies before it takes that batch."""
    answers = distiller.answers

    def or_die(prompts: Any, number: int) -> Any:
        if number == batch:
            raise Crash
        return answers(prompts, number)

    distiller.answers = or_die  # type: ignore[method-assign]
    return distiller


@pytest.mark.parametrize("wrong", ["drop", "repair"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_resumed_distillation_equals_the_unbroken_one(tmp_path: Path, batch: int, wrong: str) -> None:
    """Rows lost, written twice or answered with other random numbers."""
    whole = small(tmp_path / "whole", wrong=wrong).run()
    with pytest.raises(Crash):
        dying(small(tmp_path / "cut", wrong=wrong), batch).run()
    folder = tmp_path / "cut" / "distill"
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"id": "torn", "quest')
    with (folder / "batches.jsonl").open("a") as file:
        file.write('{"batch": 9, "by')
    done = small(tmp_path / "cut", wrong=wrong, output={"resume": "auto"}).run()
    assert done.folder == folder
    assert done.rows.read_bytes() == whole.rows.read_bytes()
    assert done.tally == whole.tally
    assert sorted(p.name for p in (folder / "images").iterdir()) == sorted(
        p.name for p in (whole.folder / "images").iterdir()
    )
    assert [f["step"] for f in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())] == [
        1,
        2,
        3,
    ]


def test_whole_rows_without_their_batch_are_asked_again(tmp_path: Path) -> None:
    """A kill between the rows and the line that counts them doubled a batch."""
    whole = small(tmp_path / "whole", wrong="repair").run()
    with pytest.raises(Crash):
        dying(small(tmp_path / "cut", wrong="repair"), 2).run()
    progress = tmp_path / "cut" / "distill" / "batches.jsonl"
    progress.write_text(progress.read_text().splitlines(keepends=True)[0])
    done = small(tmp_path / "cut", wrong="repair", output={"resume": "auto"}).run()
    assert done.rows.read_bytes() == whole.rows.read_bytes()


@pytest.mark.parametrize("torn", [b'{"batch": 2, "by\n', b"\0\0\0\n", b"7\n"])
def test_progress_ends_at_the_first_line_that_is_none(tmp_path: Path, torn: bytes) -> None:
    """Bug: a line that a power cut has filled with something else ends each resume with a traceback, or
    lines behind it count although their rows do not."""
    whole = small(tmp_path / "whole", wrong="repair").run()
    with pytest.raises(Crash):
        dying(small(tmp_path / "cut", wrong="repair"), 2).run()
    progress = tmp_path / "cut" / "distill" / "batches.jsonl"
    first, second = progress.read_bytes().splitlines(keepends=True)
    progress.write_bytes(first + torn + second)
    done = small(tmp_path / "cut", wrong="repair", output={"resume": "auto"}).run()
    assert done.rows.read_bytes() == whole.rows.read_bytes()
    assert [json.loads(line)["batch"] for line in progress.read_text().splitlines()] == [1, 2, 3]


def test_images_are_on_the_disk_before_the_rows_that_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: after a power cut rows name images of no bytes, since only the rows had been flushed."""
    flushed: list[Any] = []
    renamed: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def note(handle: int) -> None:
        fsync(handle)
        status = os.fstat(handle)
        flushed.append((status.st_dev, status.st_ino))

    def moved(old: Any, new: Any) -> None:
        if Path(new).suffix == ".png":
            status = Path(old).stat()
            assert (status.st_dev, status.st_ino) in flushed
            renamed.append(Path(new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", moved)
    folder = small(tmp_path, wrong="repair").run().folder
    assert renamed
    places = [(path.stat().st_dev, path.stat().st_ino) for path in (folder / "images", folder / "rows.jsonl")]
    names, rows = map(flushed.index, places)
    assert names < rows


def test_the_budget_of_failures_survives_a_resume(tmp_path: Path) -> None:
    """Bug: each restart forgives max_failures failures anew. Batches of 3, 3 and 2 rows, all of which fail:
    the second is one too many, and is no more to a run that begins to count with it (3 + 2 <= 5)."""

    @per_rollout
    def broken(_: Rollout) -> float:
        raise RuntimeError("no judge")

    def run(root: Path, **changes: Any) -> Distiller:
        judged = Rubric(
            rewards={"accuracy": broken, "format": in_layout},
            weights={"accuracy": 1.0, "format": 1.0},
            max_failures=5,
            max_failed_share=None,
        )
        output = {"checks": False} | changes.pop("output", {})
        return small(root, rubric=judged, wrong="repair", output=output, **changes)

    with pytest.raises(RewardFailure, match="6 failures so far"):
        run(tmp_path / "whole").run()
    with pytest.raises(Crash):
        dying(run(tmp_path / "cut"), 1).run()
    with pytest.raises(RewardFailure, match="6 failures so far"):
        run(tmp_path / "cut", output={"resume": "auto"}).run()


def test_a_finished_one_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stages of a chain ask for it each time."""
    first = small(tmp_path, wrong="repair").run()
    again = dying(small(tmp_path, wrong="repair", output={"resume": "auto"}), 0).run()
    assert (again.folder, again.tally, again.finished) == (first.folder, first.tally, True)
    assert "finished; nothing to do" in capsys.readouterr().out


def test_sigterm_gives_the_batch_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preempted job that looks finished leaves a chain with a tenth of its rows."""
    distiller = small(tmp_path, wrong="repair")
    answers = distiller.answers

    def told(prompts: Any, number: int) -> Any:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(prompts, number)

    distiller.answers = told  # type: ignore[method-assign]
    done = distiller.run()
    assert (done.finished, done.exit_code) == (False, 143)
    assert len(rows_of(done.folder)) == 3  # the second batch was given up
    assert not (done.folder / "summary.json").exists()
    assert "after batch 1 of 3" in capsys.readouterr().out
    named = small(tmp_path, wrong="repair", output={"resume": str(done.folder)}).run()
    assert len(rows_of(named.folder)) == 8


# -- mistakes and the table -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": 13}, r"rows is 13, but the data has 12, and each is asked once"),
        ({"rows": 0}, r"rows is 0, but the data has 12"),
        ({"data": []}, r"data has no rows"),
        ({"samples_per_row": 0}, r"samples_per_row is 0. It must be at least 1"),
        ({"rows_per_batch": 0}, r"rows_per_batch is 0. It must be at least 1"),
        ({"wrong": "mend"}, r"wrong is 'mend'. It must be 'drop' or 'repair'"),
        ({"accept": {"acuracy": 1}}, r"accept names 'acuracy', but the rubric's rewards are \['accuracy'"),
        ({"target": "answer"}, r"target is 'answer', which is another column"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Told at the start, not after the answers of a day."""
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **changes)


def test_repair_needs_gold(tmp_path: Path) -> None:
    """Told before the first answer, although it matters only for the first wrong one."""
    with pytest.raises(
        ValueError, match=r"Row 'digits-train-\d+' has no text in its column 'trace'.*wrong='drop'"
    ):
        dying(small(tmp_path, data=Digits(size=12), wrong="repair", output={"checks": False}), 0).run()


def test_resume_names_a_folder_of_a_distillation(tmp_path: Path) -> None:
    """The folder of a training has other files, and would be written over."""
    with pytest.raises(ValueError, match=r"is no run folder: it has no batches.jsonl"):
        small(tmp_path, output={"resume": str(tmp_path)}).run()


def test_the_summary_and_the_table_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is what the next stage's reader believes."""
    done = scripted(tmp_path, "right", "wrong", "messy", wrong="repair").run()
    summary = json.loads((done.folder / "summary.json").read_text())
    assert summary == {**done.tally._asdict(), "rows": 3}
    out = capsys.readouterr().out
    assert re.search(r"\| broken layout\s+\|\s+1 \|\s+33.3% \|", out)
    assert re.search(r"\| repaired\s+\|\s+2 \|\s+66.7% \|", out)
    assert (done.folder / "summary.md").read_text() in out
