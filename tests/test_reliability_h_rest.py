"""Reliability, section H: what else may happen to a run. Killed evaluations and answer files, many resumes,
mistyped settings, logs, no network, clocks and places.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures import make_policy, noise_image
from reflectvlm.answer_card import card_of
from reflectvlm.answer_file import AnswerFile
from reflectvlm.config import load_recipe
from reflectvlm.reattention import Implicit
from reflectvlm.recipe_check import RecipeError
from reflectvlm.types import Instruction, SamplingParams
from torture_runs import KILLED, Forks, assert_same
from training import logged, small_rl

HERE = Path(__file__).parent


def child(code: str, *arguments: object, prelude: str = "", **environment: str | None) -> str:
    """What a fresh process prints. `environment`: variables to set, or with None to remove."""
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH") or str(HERE.parent / "src")])
    variables: dict[str, str | None] = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        env={key: value for key, value in variables.items() if value is not None},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    return done.stdout.decode(errors="replace")


# -- H1: evaluations and answer files ---------------------------------------------------------------


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


def test_h1_a_run_killed_inside_of_an_evaluation(forks: Forks, tmp_path: Path) -> None:
    """Bug: an evaluation that was killed half-way is taken for done, is counted twice, or moves the random
    numbers of what comes after. A run of one step has three: before, of the step, and at the end."""
    whole = tmp_path / "whole"
    forks.finish("small_rl", whole, 1)
    for number in (1, 2, 3):
        cut = tmp_path / f"cut-{number}"
        found = forks.run("small_rl", cut, 1, in_evaluation=number)
        assert found["code"] == KILLED, (cut / "log.txt").read_text()[-4000:]
        forks.finish("small_rl", cut, 1)
        assert_same(cut / "rl", whole / "rl")


ANSWERS = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
transformers.Qwen2_5_VLForConditionalGeneration, transformers.AutoTokenizer
from reflectvlm.cli import main
from reflectvlm.models.loading import image_processor_class
from torture_disk import Disk, KillAt
image_processor_class()

folder, most = Path(sys.argv[1]), int(sys.argv[2])
os.chdir(folder)

def ask(out, act=None):
    words = ["data=rows.jsonl", f"out={out}", "batch=3", "max_tokens=6", "temperature=1", "seed=6"]
    run = os.fork()
    if run == 0:
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if act is None:
            os._exit(main(["generate", "model=model", "device=cpu", "resume=auto", *words]))
        with Disk(act).watch():
            main(["generate", "model=model", "device=cpu", "resume=auto", *words])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])

assert ask("whole.jsonl") == 0
whole = Path("whole.jsonl").read_bytes()

class KillAtFile(KillAt):
    # Only what touches the answers or their card counts.
    def __call__(self, point):
        if "cut" in point.path:
            super().__call__(point)

results, deadly, step = [], 1, 1
while True:
    out = Path(f"cut-{deadly}.jsonl")
    code = ask(out, KillAtFile(deadly))
    before = out.read_bytes() if out.exists() else b""
    if code == 0:
        break
    assert ask(out) == 0
    after = out.read_bytes()
    # Only ever added to: what was whole before the kill is still the beginning.
    results.append([code, after == whole, after.startswith(before[: before.rfind(b"\\n") + 1])])
    deadly += most
print(json.dumps([results, len(whole.splitlines())]))
"""


@pytest.mark.parametrize(
    "stride", [pytest.param(14, id="quick"), pytest.param(1, marks=pytest.mark.torture, id="long")]
)
def test_h1_answers_killed_at_a_write_are_the_same_in_the_end(tmp_path: Path, stride: int) -> None:
    """Bug: `generate data= out= resume=auto` after a kill draws other answers, leaves half a line in the file
    or answers a row twice."""
    make_policy().save(tmp_path / "model")
    rows = []
    for i in range(7):
        noise_image(i).save(tmp_path / f"p{i}.png")
        rows.append({"id": f"row-{i}", "question": f"Page {i}?", "images": [f"p{i}.png"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, lines = json.loads(child(ANSWERS, tmp_path, stride).splitlines()[-1])
    assert lines == 7
    assert len(found) > 20 / stride
    assert found == [[KILLED, True, True]] * len(found)


def test_h1_a_cut_line_is_dropped_and_whole_ones_stay(tmp_path: Path) -> None:
    """Bug: a file whose last line a kill has cut cannot be gone on with, or loses its whole lines."""
    path = tmp_path / "a.jsonl"
    card = card_of("m", Implicit(), Instruction(), SamplingParams(), seed=0, batch=1)
    line = (
        json.dumps({"id": "é-1", "question": "Q?", "text": "a\u2028b"}, ensure_ascii=False).encode() + b"\n"
    )
    AnswerFile.open(path, card)
    for cut in range(len(line)):
        path.write_bytes(line + line[:cut].replace(b"-1", b"-2"))
        assert AnswerFile.open(path, card, "auto").asked == {"é-1": "Q?"}
        assert path.read_bytes() == line


# -- H2: many resumes -------------------------------------------------------------------------------


RESUMES = """
import gc, json, os, sys, threading
from pathlib import Path
import torch
torch.set_num_threads(1)
from torture_runs import files
from training import small_rl

class Crash(Exception):
    pass

def resume(root, step, steps):
    # Goes on, takes one step, and crashes at the next.
    output = {"resume": "auto", "save_every": 1, "eval_every": 0, "checks": False, "print_every": 1000}
    trainer = small_rl(root, steps=steps, output=output, test=None, updates_per_step=1, epochs_per_step=1)
    take = trainer.step
    def step_or_crash(number):
        if number > step:
            raise Crash
        return take(number)
    trainer.step = step_or_crash
    try:
        trainer.run()
    except Crash:
        return
    raise AssertionError("it did not crash")

def resources():
    mib = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
    return {"open": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "MiB": mib}

root, resumes = Path(sys.argv[1]), int(sys.argv[2])
for step in range(resumes + 2):
    resume(root, step, resumes + 3)
    gc.collect()  # a trainer is full of circles; what counts is whether it can be freed
    if step == 1:
        before, listed = resources(), files(root / "rl")
print(json.dumps([before, resources(), listed, files(root / "rl")]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "resumes", [pytest.param(5, id="quick"), pytest.param(100, marks=pytest.mark.torture, id="long")]
)
def test_h2_resumes_in_a_row_leak_nothing(tmp_path: Path, resumes: int) -> None:
    """Bug: every resume leaves a file, an open descriptor, a thread or a model in memory; a job that its
    scheduler stops every hour dies of it after a week. One event file each is TensorBoard's way."""
    before, after, listed, left = json.loads(child(RESUMES, tmp_path, resumes).splitlines()[-1])
    assert len([line for line in logged(tmp_path / "rl") if "loss" in line]) == resumes + 2
    # A picture for each row of data that was ever a sample, and no second one of any.
    pictures = [name for name in left if name.startswith("sample_images/")]
    assert 0 < len(pictures) <= 12
    listed, left = ([name for name in names if name not in pictures] for names in (listed, left))
    # The same other files as after two resumes, with the newest steps instead of those.
    expected = [name.replace("000002", f"{resumes + 2:06}") for name in listed]
    assert left == sorted(name.replace("000001", f"{resumes + 1:06}") for name in expected)
    assert len(list((tmp_path / "rl" / "tensorboard").iterdir())) <= resumes + 2
    assert after["open"] <= before["open"] + 1
    assert after["threads"] <= before["threads"] + 1
    # A model, its reference and two moments are 27 MiB: kept alive, they would be that many each time.
    assert after["MiB"] - before["MiB"] < 20 + resumes


# -- H3: mistyped settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lrr=1", r"Did you mean optimizer\.lr\?"),
        ("output.save_evry=1", r"Did you mean output\.save_every\?"),
        ("+output.keep_last=1", r"keep_last is no argument of Output\. Did you mean 'output\.keep'\?"),
        (
            "+sampling.max_new_tokens=5",
            r"no argument of SamplingParams\. Did you mean 'sampling\.max_tokens'\?",
        ),
        ("steps=many", r"^steps is 'many', but RLTrainer wants int"),
        ("optimizer.lr=fast", r"^optimizer\.lr is 'fast'"),
        ("output.save_every=[1]", r"^output\.save_every is "),
    ],
)
def test_h3_a_typo_a_wrong_type_and_an_old_name_are_refused(override: str, says: str) -> None:
    """Bug: a setting that does not exist, or no longer, is ignored, and a run of days had another one."""
    with pytest.raises(RecipeError, match=says):
        load_recipe("grpo", override)


def test_h3_a_recipe_of_an_older_version_is_refused(tmp_path: Path) -> None:
    """Bug: an old file of one's own with a key that was renamed since runs with the default instead."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [grpo, _self_]\nname: mine\nlearning_rate: 0.1\n")
    with pytest.raises(RecipeError, match="learning_rate is no argument of RLTrainer"):
        load_recipe(str(recipe))


# -- H4: logs ---------------------------------------------------------------------------------------


class Watcher:
    """A tracker that looks at the file while the run goes on, and raises wherever it is told to."""

    def __init__(self, file: Path, fails: str = "") -> None:
        self.file, self.fails, self.seen = file, fails, []  # type: ignore[var-annotated]

    def _at(self, name: str) -> None:
        if self.fails == name:
            raise ConnectionError(f"{name}: the service is down")

    def start(self, card: Any) -> None:
        del card
        self._at("start")

    def metrics(self, step: int, values: Any) -> None:
        del values
        last = json.loads(self.file.read_text().splitlines()[-1])
        self.seen.append((step, last["step"], self.file.read_text().endswith("\n")))
        self._at("metrics")

    def rollouts(self, step: int, groups: Any) -> None:
        del step, groups
        self._at("rollouts")

    def close(self) -> None:
        self._at("close")


def run_watched(root: Path, fails: str) -> tuple[Watcher, Path]:
    watcher = Watcher(root / "rl" / "metrics.jsonl", fails)
    found = small_rl(root, steps=2, output={"trackers": (watcher,), "samples_every": 1}).run()
    assert found.finished
    return watcher, found.folder


def test_h4_every_line_is_in_the_file_when_it_was_logged(tmp_path: Path) -> None:
    """Bug: metrics that wait in a buffer are lost with the process, or stand there as half a line."""
    watcher, _ = run_watched(tmp_path, "")
    assert [step for step, *_ in watcher.seen] == [0, 1, 2, 2]
    assert all(step == last and whole for step, last, whole in watcher.seen)


def test_h4_a_failing_tracker_never_stops_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a dashboard that cannot be reached ends a run of days, or changes its results."""
    _, expected = run_watched(tmp_path / "fine", "")
    for fails in ("start", "metrics", "rollouts", "close"):
        caplog.clear()
        _, folder = run_watched(tmp_path / fails, fails)
        assert logged(folder) == logged(expected)
        assert "Tracker Watcher failed" in caplog.text
        assert "training goes on" in caplog.text
        assert f"{fails}: the service is down" in caplog.text


# -- H5, H6: no network, and odd places -------------------------------------------------------------

DEFAULT = """
import os, sys
from reflectvlm.cli import main
words = ("start_from=null", "policy=tiny_random", "steps=2", "prompts_per_step=2", "group_size=2")
sizes = ("sampling.max_tokens=40", "evaluation.data.size=2", "evaluation.max_tokens=4")
tests = ("test.data.size=2", "test.max_tokens=4", "output.samples_every=1")
root = "output.root=" + repr(sys.argv[1])
sys.exit(main(["train", "recipe=lookback_rl", *words, *sizes, *tests, root]))
"""
NAME = "lookback_rl-semantic"

NO_NETWORK = """
import socket, sys
def watch(event, arguments):
    calls = "connect", "getaddrinfo", "gethostbyname", "sendto", "bind"
    if event in [f"socket.{call}" for call in calls]:
        raise SystemExit(f"{event} {arguments}")
    if event == "socket.__new__" and arguments[1] in (socket.AF_INET, socket.AF_INET6):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(watch)
"""

BACKWARDS = """
import time
_real, _start, _calls = time.time, time.time(), [0]
def _backwards():
    _calls[0] += 1
    return _start - 3600.0 * (_calls[0] % 7)
time.time = _backwards
"""


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the default recipe with sockets forbidden, and without being told to stay offline."""
    root = tmp_path_factory.mktemp("plain")
    child(DEFAULT, root, prelude=NO_NETWORK, HF_HUB_OFFLINE=None, TRANSFORMERS_OFFLINE=None)
    return root / NAME


def results_of(folder: Path) -> tuple[list[dict[str, Any]], str]:
    assert (folder / "summary.json").is_file()
    return logged(folder), (folder / "samples.jsonl").read_text(encoding="utf-8")


def test_h5_the_default_recipe_opens_no_socket(default_run: Path) -> None:
    """Bug: a run on a machine without a network waits for a hub, or tells one what is being trained."""
    metrics, samples = results_of(default_run)
    assert [line["step"] for line in metrics if "reward" in line] == [1, 2]
    assert samples


def test_h5_the_watch_would_see_a_socket() -> None:
    """Bug: the test above passes because its watch is blind."""
    for code in ("socket.socket()", "socket.create_connection(('127.0.0.1', 9))"):
        with pytest.raises(AssertionError, match=r"socket\.(__new__|getaddrinfo)"):
            child(f"import socket; {code}", prelude=NO_NETWORK)


def test_h6_a_clock_that_jumps_back(default_run: Path, tmp_path: Path) -> None:
    """Bug: the wall clock is set back during a run: negative seconds, an ETA of years, another order."""
    child(DEFAULT, tmp_path, prelude=BACKWARDS, TZ="Pacific/Kiritimati")
    assert results_of(tmp_path / NAME) == results_of(default_run)
    lines = [json.loads(line) for line in (tmp_path / NAME / "metrics.jsonl").read_text().splitlines()]
    times = [value for line in lines for key, value in line.items() if key.startswith("time/")]
    assert times
    assert all(value is not None and value >= 0 for value in times)


def test_h6_the_c_locale_an_odd_path_and_no_home(default_run: Path, tmp_path: Path) -> None:
    """Bug: files are read in the locale's encoding, a path is cut at its space, a table with lines ends the
    run where the terminal knows only ASCII, or a cache must be written below HOME."""
    root = tmp_path / "mit Leer zeichen, é 中 ' [1]"
    root.mkdir()
    places: dict[str, str | None] = {"HOME": "/dev/null/nowhere", "XDG_CACHE_HOME": None, "HF_HOME": None}
    locale = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = DEFAULT.replace('"output.root=" + repr(sys.argv[1])', '"output.root=here"')
    prelude = "import os, sys; os.chdir(os.fsencode(sys.argv[1]))\n"
    child(code, root, prelude=prelude, **places, **locale)
    assert results_of(root / "here" / NAME) == results_of(default_run)
