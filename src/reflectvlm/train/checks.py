"""Checks before the first step: what would make days of training worthless and shows in a second.

    rows            the first rows can be read and fit
    weights         every number of the policy is finite
    sight           what the policy says depends on its images (`canary.py`)
    engine          log-probs of sampled tokens are those that training computes
    tags            every tag survives the tokenizer, and something asks for it
    answer end      an answer can end, and the gold ones fit into its budget
    gold answers    the run's own rewards give them full marks

`run_checks(trainer)` only looks: random numbers, the place in the data, gradients and the model's mode are
what they were. It reads a few rows and samples a few tokens. Left out: whether the policy is any good.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from reflectvlm.train.checks_gold import gold_answers
from reflectvlm.train.checks_policy import engine, sight, weights
from reflectvlm.train.checks_result import CheckFailed, Result, Status
from reflectvlm.train.checks_subject import Kind, Subject, kind_of, samples
from reflectvlm.train.checks_text import answer_end, tags
from reflectvlm.train.packing import rng_state, set_rng_state

__all__ = ["CheckFailed", "Result", "check_start", "lines", "run_checks"]

log = logging.getLogger("reflectvlm")

Check = Callable[[Subject], Result]

# What breaks in these breaks the run as well; of any other nothing says so.
_SURE = {("rows", "rl"), ("rows", "sft"), ("rows", "rows"), ("engine", "rl")}

CHECKS: tuple[tuple[str, Check], ...] = (
    ("weights", weights),
    ("sight", sight),
    ("engine", engine),
    ("tags", tags),
    ("answer end", answer_end),
    ("gold answers", gold_answers),
)
_NEED_WEIGHTS = ("sight", "engine")
_OF_ANY_TRAINER = ("weights", "sight")
_MARKS: dict[Status, str] = {
    "ok": "ok",
    "warning": "warning",
    "failed": "FAILED",
    "not applicable": "–",
}


def run_checks(trainer: Any) -> list[Result]:
    """All checks of an `RLTrainer`, `SFTTrainer` or `Distiller`, in the order of the list above."""
    module = trainer.policy.module
    _move(trainer)
    with _undisturbed(module), torch.no_grad():
        module.eval()  # dropout is noise to both sight and parity, and not every engine turns it off
        try:
            subject = Subject.of(trainer)
        except Exception as error:  # noqa: BLE001  boundary: whatever rows or engines raise is a finding
            return [_broke("rows", kind_of(trainer), error)]
        found = [subject.rows]
        for name, check in CHECKS:
            found.append(_checked(name, check, subject, found))
    return found


def check_start(trainer: Any, say: Callable[[str], None]) -> None:
    """What a run does before its first step: all checks, one line if they are well, and what is not.

    Raises CheckFailed if one failed.
    """
    started = time.perf_counter()
    results = run_checks(trainer)
    for line in lines([result for result in results if result.status == "warning"]):
        say(line)
    if failed := [result for result in results if result.status == "failed"]:
        raise CheckFailed(failed)
    say(f"{summary(results)} in {time.perf_counter() - started:.1f} s")


def summary(results: Sequence[Result]) -> str:
    """`checks: 5 ok, 1 warning, 1 not applicable`."""
    states: dict[Status, int] = {}
    for result in results:
        states[result.status] = states.get(result.status, 0) + 1
    shown = [f"{states[status]} {status}" for status in _MARKS if status in states]
    return f"checks: {', '.join(shown)}"


def lines(results: Sequence[Result]) -> list[str]:
    """One line per check, and under it what to do where something is wrong."""
    mark = max((len(_MARKS[result.status]) for result in results), default=0)
    name = max((len(result.name) for result in results), default=0)
    shown: list[str] = []
    for result in results:
        shown.append(f"{_MARKS[result.status]:<{mark}}  {result.name:<{name}}  {result.found}")
        if result.remedy:
            shown.append(f"{'':<{mark}}  {'':<{name}}  {result.remedy}")
    return shown


def _checked(name: str, check: Check, subject: Subject, before: Sequence[Result]) -> Result:
    if name in _NEED_WEIGHTS and any(one.name == "weights" and one.status == "failed" for one in before):
        return Result(name, "not applicable", "the weights are not finite")
    if name != "weights" and not subject.prompts:
        return Result(name, "not applicable", "no row could be read")
    if name not in _OF_ANY_TRAINER and subject.kind == "other":
        return Result(name, "not applicable", "a trainer of your own")
    try:
        return check(subject)
    except Exception as error:  # noqa: BLE001  boundary: what a check meets in the user's parts is its finding
        return _broke(name, subject.kind, error)


def _broke(name: str, kind: Kind, error: Exception) -> Result:
    """A check that could not be made is no proof that the run cannot: it needs other memory, at least."""
    text = " ".join(str(error).split())
    log.debug("check %s", name, exc_info=error)
    own = isinstance(error, RuntimeError | ValueError) and text
    text = text if own else f"{type(error).__name__}: {text}"
    if (name, kind) in _SURE and not isinstance(error, torch.OutOfMemoryError):
        return Result(name, "failed", text)
    return Result(name, "warning", f"this check could not be made: {text}", "The run goes on without it.")


def _move(trainer: Any) -> None:
    """The policy to the device that it will work on; no engine is made that the run does not use."""
    if (runtime := getattr(trainer, "runtime", None)) is not None:
        trainer.policy.module.to(runtime.device)
    if samples(trainer):
        _ = trainer.rollout_engine  # made here: one that cannot be is the run's own error, not a finding


@contextmanager
def _undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Random generators and every part's mode are as before afterwards."""
    generators = rng_state()
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        set_rng_state(generators.tensors, generators.json)
