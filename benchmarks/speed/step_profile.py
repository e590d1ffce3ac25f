"""Where a step's time goes, and its memory: rollout, reference, update, each by its parts.

    python benchmarks/speed/step_profile.py                     # the comparison's work
    python benchmarks/speed/step_profile.py --ops 12            # and the operators that cost most, by phase
    python benchmarks/speed/step_profile.py --policy '{"share_prefix": false}'        # without a fast path

Seconds are exclusive: what a part calls that is listed itself counts there. Times are medians over steps
after one that warms up; memory is the most that was resident while a part ran, looked at every few
milliseconds. (Not called profile.py: Python's own profiler would import it.)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import made_model
from driving import ROOT
from measure import memory, now
from ours import trainer
from workload import SMALL, Shape, Work

import reflectvlm.rollout.decoding
import reflectvlm.train.rl
from reflectvlm import load_policy
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rewards.rubric import Rubric
from reflectvlm.rollout.intake import Intake
from reflectvlm.train.feed import Feed
from reflectvlm.train.update import score_without_grad
from reflectvlm.train.weights import Whole

PARTS: list[tuple[Any, str, str]] = [
    (Feed, "share", "rows and images"),
    (Intake, "chunks", "prefill"),
    (Intake, "tokens", "decoding: layers"),
    (QwenVL, "logits", "decoding: head"),
    (reflectvlm.rollout.decoding, "draw", "decoding: sampling"),
    (Rubric, "score", "rewards"),
    (QwenVL, "features", "vision tower"),
    (QwenVL, "hidden", "layers"),
    (QwenVL, "score", "head and packing"),
    (Whole, "backward", "backward"),
    (torch.nn.utils, "clip_grad_norm_", "gradient norm"),
    (torch.optim.AdamW, "step", "optimiser"),
]
"""Who is timed, and as what. A name that has gone is an error: change it here too."""
INSIDE = {"layers": ("prefill", "decoding: layers")}
"""These count as the part that called them, if it is one of those."""


class Watch:
    """Exclusive seconds and largest memory of each part of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.peaks: dict[tuple[str, str], float] = defaultdict(float)
        self.phase = ""
        self._stack = ["the rest"]
        self._last = 0.0

    def begin(self, phase: str) -> None:
        self._account()
        self.phase, self._stack = phase, ["the rest"]

    def end(self) -> None:
        self.begin("")

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*args: Any, **settings: Any) -> Any:
            inside = self._stack[-1] in INSIDE.get(name, ())
            self._account()
            self._stack.append(self._stack[-1] if inside else name)
            try:
                return call(*args, **settings)
            finally:
                self._account()
                self._stack.pop()

        return watched

    def look(self) -> None:
        """Notes the memory in use for whatever runs now."""
        at = (self.phase, self._stack[-1])
        self.peaks[at] = max(self.peaks[at], memory())

    def _account(self) -> None:
        at = now()
        if self.phase:
            self.seconds[self.phase, self._stack[-1]] += at - self._last
        self._last = at


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Work.read, default=Work())
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ops", type=int, default=0, help="operators to list for each phase")
    parser.add_argument("--policy", type=json.loads, default={}, help="fields of the policy, as JSON")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    work = Work(pixels=112, group=4, tokens=8) if args.tiny else args.work
    folder = made_model(args.cache, SMALL if args.tiny else Shape())
    policy = dataclasses.replace(load_policy(str(folder)), **args.policy)
    made = trainer(policy, work, args.steps + 2)
    watch = Watch()
    for owner, name, label in PARTS:
        setattr(owner, name, watch.part(label, getattr(owner, name)))
    vars(reflectvlm.train.rl)["score_without_grad"] = as_phase(watch, "reference", score_without_grad)
    made.prepare()
    steps = measured(made, watch, args.steps)
    print(f"{work.told()}; {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(steps, watch.peaks))
    if args.ops:
        print(operators(made, args.steps + 1, args.ops))


def as_phase(watch: Watch, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A phase within another."""

    def watched(*args: Any, **settings: Any) -> Any:
        before = watch.phase
        watch.begin(phase)
        try:
            return call(*args, **settings)
        finally:
            watch.begin(before)

    return watched


def measured(made: Any, watch: Watch, steps: int) -> list[dict[tuple[str, str], float]]:
    """Seconds by (phase, part) of each step; the first one only warms up."""
    done = threading.Event()
    looker = threading.Thread(target=_look, args=(watch, done), daemon=True)
    found = []
    for step in range(steps + 1):
        if step == 1:
            watch.peaks.clear()
            looker.start()
        watch.seconds.clear()
        watch.begin("rollout")
        groups = made.sample_groups(step)
        watch.begin("update")
        made.update(groups, step)
        watch.end()
        found.append(dict(watch.seconds))
    done.set()
    looker.join()
    return found[1:]


def _look(watch: Watch, done: threading.Event) -> None:
    while not done.is_set():
        watch.look()
        time.sleep(0.004)


def table(steps: list[dict[tuple[str, str], float]], peaks: dict[tuple[str, str], float]) -> str:
    keys = sorted({key for step in steps for key in step}, key=lambda key: _order(key[0]))
    middle = {key: statistics.median(step.get(key, 0.0) for step in steps) for key in keys}
    whole = sum(middle.values())
    lines = ["| phase | part | seconds | share | peak memory, MB |", "|---|---|---:|---:|---:|"]
    for phase in dict.fromkeys(key[0] for key in keys):
        mine = {key[1]: middle[key] for key in keys if key[0] == phase}
        most = max((peaks.get((phase, part), 0.0) for part in mine), default=0.0)
        lines.append(_line(f"**{phase}**", "", sum(mine.values()), whole, most))
        for part, seconds in sorted(mine.items(), key=lambda item: -item[1]):
            lines.append(_line("", part, seconds, whole, peaks.get((phase, part), 0.0)))
    return "\n".join([*lines, _line("**step**", "", whole, whole, max(peaks.values(), default=0.0))])


def _order(phase: str) -> int:
    return ("rollout", "reference", "update").index(phase)


def _line(phase: str, part: str, seconds: float, whole: float, peak: float) -> str:
    shown = f"{peak:.0f}" if peak else ""  # a part of microseconds was never seen
    return f"| {phase} | {part} | {seconds:.4f} | {100 * seconds / whole:.1f} % | {shown} |"


def operators(made: Any, step: int, count: int) -> str:
    """The operators with most time of their own, of one rollout and of one update."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    out, groups = [], []
    for phase in ("rollout", "update"):
        with profile(activities=activities) as found:
            if phase == "rollout":
                groups = made.sample_groups(step)
            else:
                made.update(groups, step)
        out.append(f"\n{phase}\n" + found.key_averages().table(sort_by=by, row_limit=count))
    return "\n".join(out)


if __name__ == "__main__":
    main()
