"""The run folder: provenance without secrets, one writer, no overwritten run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reflectvlm.train import lock as lock_file
from reflectvlm.train.environment import git_state
from reflectvlm.train.run_folder import RunFolder


def make(root: Path, name: str = "a", **extra: Any) -> RunFolder:
    return RunFolder.create(root, name, recipe_yaml="steps: 3\n", overrides=("steps=3",), **extra)


def test_what_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents runs that nobody can repeat, and tokens from the environment in a shared folder."""
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2-secret")
    with make(tmp_path / "runs") as run:
        run.write_summary({"accuracy": 0.5, "kl": float("nan")}, "# Done")
    assert run.path == tmp_path / "runs" / "a"
    assert not run.resumed
    assert run.recipe.read_text() == "steps: 3\n"
    assert (run.path / "overrides.txt").read_text() == "steps=3\n"
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    assert {"python", "platform", "cpu_count", "torch_threads", "devices"} <= set(environment)
    assert set(json.loads((run.path / "git.json").read_text())) == {"revision", "dirty"}
    assert json.loads((run.path / "summary.json").read_text()) == {"accuracy": 0.5, "kl": None}
    assert (run.path / "summary.md").read_text() == "# Done\n"
    assert all("hunter2" not in file.read_text() for file in run.path.iterdir())
    assert run.metrics.parent == run.samples.parent == run.checkpoints.parent == run.path


def test_an_existing_run_is_never_written_over(tmp_path: Path) -> None:
    """Prevents a second start from mixing its curves into the first one's."""
    names = []
    for _ in range(3):
        with make(tmp_path) as run:
            names.append(run.path.name)
    assert names == ["a", "a-2", "a-3"]
    with make(tmp_path, resume="auto") as again:
        assert (again.path.name, again.resumed) == ("a-3", True)
    with make(tmp_path, "b", resume="auto") as fresh:
        assert (fresh.path.name, fresh.resumed) == ("b", False)


RECIPE = "name: a\nsteps: 3\noptimizer: {lr: 0.1}\nclip: []\noutput: {keep: 2}\n"


def take(root: Path, recipe: str | None = RECIPE, resume: str = "auto", *, finish: bool = False) -> str:
    """Name of the folder that a start gets."""
    with RunFolder.create(root, "a", recipe_yaml=recipe, overrides=(), resume=resume) as run:
        if finish and not run.finished:
            run.write_summary({}, "# Done")
        return run.path.name


def test_another_output_keeps_the_earlier_recipe(tmp_path: Path) -> None:
    """Prevents a resume from rewriting what the first part was run with, and a finished run from
    being described by a start that did nothing."""
    texts = [RECIPE, RECIPE.replace("keep: 2", "keep: 3"), RECIPE.replace("keep: 2", "keep: 4")]
    for text in (texts[0], texts[0], *texts[1:]):
        assert take(tmp_path, text) == "a"
    assert take(tmp_path, texts[2], finish=True) == "a"
    assert take(tmp_path, texts[0]) == "a"  # finished: nothing is written any more
    found = {p.name: p.read_text() for p in (tmp_path / "a").glob("recipe*")}
    assert found == {"recipe.yaml": texts[2], "recipe.1.yaml": texts[0], "recipe.2.yaml": texts[1]}


def test_auto_takes_the_newest_unfinished(tmp_path: Path) -> None:
    """Prevents "finished; nothing to do" where a later run of the name was killed."""
    take(tmp_path, finish=True)
    for expected in ("a-2", "a-3"):
        assert take(tmp_path, resume="never") == expected
    for number in range(4, 11):  # 10 is newer than 9, though not as a text
        (tmp_path / f"a-{number}").mkdir()
    assert take(tmp_path, finish=True) == "a-10"
    assert take(tmp_path) == "a-9"
    for other in ("a-b", "a-02", "a-1", "b-99"):
        (tmp_path / other).mkdir()
    (tmp_path / "a-98").touch()
    assert take(tmp_path) == "a-9"


def test_auto_where_all_are_finished(tmp_path: Path) -> None:
    """Prevents another recipe's result from being given out as this one's, and a repeated start from
    training again."""
    other = RECIPE.replace("steps: 3", "steps: 5")
    assert [take(tmp_path, text, finish=True) for text in (RECIPE, RECIPE)] == ["a", "a"]
    assert [take(tmp_path, text, finish=True) for text in (other, other)] == ["a-2", "a-2"]
    assert take(tmp_path) == "a"
    assert take(tmp_path, None) == "a-2"  # no recipe, no comparison: the newest


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    """Prevents one curve of two recipes; the line names what differs. The lock is given back."""
    take(tmp_path)
    other = RECIPE.replace("steps: 3", "steps: 5").replace("0.1", "0.2").replace("clip: []", "seed: 1")
    expected = (
        r"a is unfinished and was started with another recipe: clip \[\] → \(not given\), "
        r"optimizer\.lr 0\.1 → 0\.2, seed \(not given\) → 1, steps 3 → 5\. .*resume=never"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        take(tmp_path, other)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a" / "lock.json").read_text() == ""
    with pytest.raises(ValueError, match="steps 3 → 5"):
        RunFolder.reopen(tmp_path / "a", recipe_yaml=other, overrides=())
    assert (tmp_path / "a" / "recipe.yaml").read_text() == RECIPE
    assert take(tmp_path, None) == "a"
    assert take(tmp_path, other, resume="never") == "a-2"


def test_a_run_that_is_named_like_a_number(tmp_path: Path) -> None:
    """Prevents `name=a` from being refused because of an unfinished run named `a-7`."""
    take(tmp_path)
    RunFolder.create(tmp_path, "a-7", recipe_yaml="name: a-7\n", overrides=()).close()
    assert take(tmp_path) == "a"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    """Prevents a run's name from reaching outside of the runs folder."""
    with pytest.raises(ValueError, match="is no plain folder name"):
        make(tmp_path, name)


def test_resume_is_checked(tmp_path: Path) -> None:
    """Prevents `resume=ture` from silently starting over."""
    with pytest.raises(ValueError, match=r"resume is 'ture'\. It must be 'auto' or 'never'"):
        make(tmp_path, resume="ture")


def holder(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_lock_of_a_living_process(tmp_path: Path) -> None:
    """Prevents two processes from writing to one run; the message says who and what to do."""
    make(tmp_path).close()
    lock = tmp_path / "a" / "lock.json"
    assert lock.read_text() == ""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        born = lock_file._born(other.pid)
        lock.write_text(json.dumps({"pid": other.pid, "host": socket.gethostname(), "born": born}))
        with pytest.raises(RuntimeError, match=rf"in use by process {other.pid} on .*delete {lock}"):
            make(tmp_path, resume="auto")
        lock.write_text(json.dumps({"pid": other.pid, "host": socket.gethostname(), "born": "1"}))
        make(tmp_path, resume="auto").close()  # the number was reused: that process is another one
        other.communicate(b"\n")
    lock.write_text(json.dumps({"pid": other.pid, "host": socket.gethostname(), "born": born}))
    with make(tmp_path, resume="auto"):  # dead now: taken over
        assert holder(lock)["pid"] == os.getpid()
    # In containers every process has the number 1: that of another host is not ours.
    for pid in (other.pid, os.getpid()):
        elsewhere = json.dumps({"pid": pid, "host": "elsewhere", "born": born})
        lock.write_text(elsewhere)
        with pytest.raises(RuntimeError, match="on elsewhere"):
            make(tmp_path, resume="auto")
        lock_file.unlock(lock)
        assert lock.read_text() == elsewhere


@pytest.mark.parametrize("text", ["", '{"pid": 1', "[]", '{"pid": "x"}'])
def test_a_broken_lock_is_free(tmp_path: Path, text: str) -> None:
    """Prevents a lock file cut by a kill from blocking a run for ever."""
    make(tmp_path).close()
    (tmp_path / "a" / "lock.json").write_text(text)
    with make(tmp_path, resume="auto") as run:
        assert holder(run.lock)["pid"] == os.getpid()


RACE = """
import os, sys
from pathlib import Path
from reflectvlm.train.lock import lock as take

lock, stale = Path(sys.argv[1]), sys.argv[2]
for _ in range(20):
    lock.write_text(stale)
    go, start = os.pipe()
    answers, answer = os.pipe()
    end, stop = os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            os.read(go, 1)
            try:
                take(lock)
                os.write(answer, b"+")
            except RuntimeError:
                os.write(answer, b"-")
            os.read(end, 1)
            os._exit(0)
    os.write(start, b"0000")
    seen = b""
    while len(seen) < 4:
        seen += os.read(answers, 4)
    os.write(stop, b"0000")
    for child in children:
        os.waitpid(child, 0)
    print("".join(sorted(seen.decode())))
"""


def test_only_one_of_many_gets_a_stale_lock(tmp_path: Path) -> None:
    """Prevents a race over a dead process's lock: of four that start together exactly one goes on."""
    stale = json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "born": None})
    (tmp_path / "race.py").write_text(RACE)
    command = [sys.executable, str(tmp_path / "race.py"), str(tmp_path / "lock.json"), stale]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["+---"] * 20, done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state(tmp_path: Path) -> None:
    """Prevents "clean" for changed code, and an error outside of a repository."""
    assert git_state(tmp_path) == {"revision": None, "dirty": None}

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_state(tmp_path)["revision"] is None
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "one")
    assert git_state(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path)["dirty"] is True


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a machine without git from failing every run."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == {"revision": None, "dirty": None}
