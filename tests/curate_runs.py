"""Sets that are made, killed and made again, in a process that imports once and forks for every place to die.

Places are the calls to the disk of the thread that makes the set (`torture_disk.py`), the writes of replies
by any thread, and moments that no call announces.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calls_runs import die_in_write
from torture_disk import Disk, KillAt, Point

STAGES = ("questions", "answers", "traces", "votes", "rewrites")
RULE: Mapping[str, list[str]] = {
    "coldstart": [
        "method=semantic_back",
        "model=rule,wrong=0.5",
        "teacher=rule,faulty=0.2,seed=1",
        "n=3",
        "judges=rule,seed=2",
        "judges=rule,misjudged=0.3,seed=3",
    ],
    "distill": [
        "model=rule,wrong=0.5",
        "teacher=rule,faulty=0.2,seed=1",
        "judges=rule,seed=2,misjudged=0.2",
        "judges=rule,misjudged=0.3,seed=3",
    ],
}


@dataclass
class Making:
    """One set, made again and again. `words` are given the number of the try."""

    root: Path
    command: str
    words: Callable[[int], list[str]]
    tries: int = 0
    points: list[Point] = field(default_factory=list)
    wrong: list[Any] = field(default_factory=list)
    """Places after which the set was another one."""
    killed: int = 0
    """How many of the forks that were to die have."""

    def whole(self) -> None:
        """The set that nobody killed."""
        begun = time.monotonic()
        with Disk(self.points.append).watch():
            self.make(self.root / "whole")
        self.took = time.monotonic() - begun
        self.files = found(self.root / "whole")
        self.replies = sum(one.read_bytes().count(b"\n") for one in replies(self.root / "whole"))

    def make(self, out: Path) -> None:
        from reflectvlm.curate import coldstart_command, distil_command

        self.tries += 1
        run = {"coldstart": coldstart_command.run, "distill": distil_command.run}[self.command]
        with contextlib.redirect_stdout(io.StringIO()):
            assert run([*self.words(self.tries), f"out={out}"]) == 0

    def at(self, number: int) -> None:
        """Dies at a call to the disk."""
        with contextlib.ExitStack() as stack:
            self._again(f"at{number}", lambda: stack.enter_context(Disk(KillAt(number)).watch()))

    def in_reply(self, number: int, where: str) -> None:
        """Dies before, in the middle of or after a write of a reply."""
        self._again(f"reply{number}{where}", lambda: die_in_write(number, where))

    def now_and_then(self, times: int) -> None:
        """The same piece of work is killed several times, each time later in it."""
        out = self.root / "again"
        for number in range(times):
            child = self._fork(out, lambda: None)
            time.sleep(self.took * (number + 0.5) / (2 * times))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self._compare("again", out)

    def _again(self, name: str, deadly: Callable[[], Any]) -> None:
        out = self.root / name
        self.killed += os.WIFSIGNALED(os.waitpid(self._fork(out, deadly), 0)[1])
        self._compare(name, out)

    def _fork(self, out: Path, deadly: Callable[[], Any]) -> int:
        self.tries += 1
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            deadly()
            self.make(out)
            os._exit(0)
        return child

    def _compare(self, name: str, out: Path) -> None:
        self.make(out)
        files = found(out)
        if files != self.files:
            self.wrong.append([name, sorted(one for one in self.files if files.get(one) != self.files[one])])
        for file in replies(out):
            keys = [json.loads(line)["key"] for line in file.read_bytes().splitlines() if whole_line(line)]
            if len({*keys}) < len(keys):
                self.wrong.append([name, f"{file.name} has a reply twice"])

    def told(self, places: int) -> str:
        out = self.root / "whole"
        rows, dropped = (
            [json.loads(line)["id"] for line in (out / f"{name}.jsonl").read_text().splitlines()]
            for name in ("rows", "dropped")
        )
        whys = [json.loads(line)["stage"] for line in (out / "dropped.jsonl").read_text().splitlines()]
        known = whys.count("overlap")
        return json.dumps([places, self.killed, self.wrong, sorted(self.files), rows, dropped, known])


def found(out: Path) -> dict[str, bytes]:
    """All that a set consists of, but for the replies, whose order is that of their coming."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.parent.name != "replies" and path.name != ".lock"
    }


def replies(out: Path) -> list[Path]:
    return sorted((out / "replies").iterdir())


def whole_line(line: bytes) -> bool:
    """One that was cut by a kill is passed over."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def served(url: str, tries: int) -> list[str]:
    """The rule's words with everybody behind a server, which takes each try for a new client. How fast it is
    asked differs from try to try, too."""

    def who(name: str) -> str:
        speed = f"concurrency={1 + tries % 4},retries=12,backoff=0.01,timeout={0.5 + tries % 2}"
        return f"{url}/{tries}/v1,model={name},label=rules,{speed}"

    return [
        "method=semantic_back",
        f"model={who('base')}",
        f"teacher={who('teacher')}",
        "n=2",
        *(f"judges={who(name)}" for name in ("judge-a", "judge-b")),
    ]


def exam(root: Path) -> list[str]:
    """The words for an evaluation set that has two of the pages."""
    from reflectvlm.curate.set_words import digit_questions

    rows = []
    for place, one in enumerate(digit_questions(2, 0)):
        (root / f"{place}.png").write_bytes(one.images[0])  # type: ignore[arg-type]
        rows.append({"id": str(place), "question": "?", "answer": "1", "images": [f"{place}.png"]})
    (root / "exam.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [f"without={root / 'exam.jsonl'}", "without.distance=0", "without.tint=0"]


def main() -> None:
    """`root command stride url`: kills every few places, all of them for stride 1."""
    import httpx  # noqa: F401
    import torch

    import reflectvlm.curate.teachers.http  # noqa: F401

    torch.set_num_threads(1)
    root, command, stride, url = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    root.mkdir()
    rows = ["source=digits", f"max_rows={8 if url else 12}", "rows_at_once=4", *([] if url else exam(root))]
    making = Making(root, command, lambda tries: [*rows, *(served(url, tries) if url else RULE[command])])
    making.whole()
    places = set(range(1, len(making.points) + 1, stride))  # and in the middle of every line of a stage
    stages = [str(root / "whole" / f"{name}.jsonl") for name in STAGES]
    lines = [n for n, one in enumerate(making.points, 1) if one.when == "during" and one.path in stages]
    places |= {*lines}
    written = [
        (number, where)
        for number in range(1, making.replies + 1)
        for place, where in enumerate(("before", "middle", "after"))
        if (3 * number + place) % stride == 0 or stride == 1
    ]
    for number in sorted(places):
        making.at(number)
    for number, where in written:
        making.in_reply(number, where)
    making.now_and_then(4 if stride > 1 else 20)
    print(making.told(len(places) + len(written)))


if __name__ == "__main__":
    main()
