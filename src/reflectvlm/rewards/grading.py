"""Graders that parse model text with sympy. They run in killable workers only, never in the trainer.

Both math-verify and `_in_time` stop by SIGALRM, which works there because the worker calls from its main
thread; what hangs inside C is killed from outside. An answer that is too hard to parse is wrong.

No text of a model is evaluated by code of ours. Both libraries hand some of it to sympy's `parse_expr`,
which ends in Python's `eval`: math-verify only digits, brackets and operators (`9**9**9**9`, which the
time-out ends), MathRuler texts with up to two different letters. It is used for `rule="lookback"` alone,
to reproduce published scores, and sees nothing with a double underscore, without which Python's
internals cannot be reached. The process is limited in time and memory and has no model in it.
"""

from __future__ import annotations

import logging
import signal
import unicodedata
from collections.abc import Callable
from importlib import import_module


def math_equal(gold: str, answer: str, seconds: int) -> bool:
    """math-verify, gold first: an interval is accepted for an inequality, not the reverse."""
    return _verify(f"\\boxed{{{gold}}}", f"\\boxed{{{answer}}}", seconds)


def lookback_equal(gold: str, answer: str, seconds: int) -> bool:
    """The two graders of Look-Back's evaluation: MathRuler, else math-verify with the arguments exchanged."""
    if "__" not in unicodedata.normalize("NFKC", answer):  # Python reads names in that form
        mathruler = import_module("mathruler.grader")
        if mathruler.grade_answer(answer, gold):
            return True
    return _verify(answer, gold, seconds)


def exchanged_equal(gold: str, answer: str, seconds: int) -> bool:
    """math-verify with the arguments exchanged, on the texts as they are: it looks for the answer itself."""
    return _verify(answer, gold, seconds)


def mathvision_equal(gold: str, answer: str, seconds: int) -> bool:
    """MATH-Vision's comparison: the same tuple, or the same number to two decimals. What cannot be read, or
    not in time, is wrong, as where the official script fails to evaluate it."""

    def compare() -> bool:
        one, other = _tuple(gold), _tuple(answer)
        if one == other:
            return True
        value = _rounded(one)
        return value is not None and value == _rounded(other)

    try:
        return _in_time(compare, seconds)
    except _Late:
        return False
    except Exception:  # noqa: BLE001 - boundary: whatever the grammar and sympy raise on hostile text
        return False


class _Late(BaseException):
    """The time is up. No `Exception`, so that no parser takes it for an error in the text."""


def _in_time(compare: Callable[[], bool], seconds: float) -> bool:
    """What it returns; `_Late` where it takes longer. Main thread only.

    The alarm is raised again every half second: Python drops an exception that is raised inside a finaliser
    or a callback of the garbage collector, and an alarm that rings once could be lost there.
    """

    def ring(_number: int, _frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
    try:
        return compare()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _tuple(text: str) -> str:
    """`(2*3,5)` -> `(6,5)`, brackets too; unchanged where one of several parts has no value."""
    parts = text[1:-1].split(",")
    if len(parts) < 2 or text[0] + text[-1] not in ("()", "[]"):
        return text
    done = []
    for part in parts:
        kept = "infty" in part or part in ("a", "-a")
        value = None if kept else _rounded(part)
        if value is None and not kept:
            return text
        done.append(part if kept else str(value))
    return text[0] + ",".join(done) + text[-1]


def _rounded(text: str) -> int | float | None:
    """The value of a formula to two decimals; None where it is no real number."""
    from latex2sympy2_extended import latex2sympy

    found = latex2sympy(text)
    if not getattr(found, "is_number", False) or not found.is_real:
        return None
    value = found.evalf(30)
    # 2*3 is a whole number and 6.0 is not, which shows where tuples are compared as texts.
    return int(value) if found.is_integer else round(float(value), 2)


def _verify(gold: str, answer: str, seconds: int) -> bool:
    from math_verify import parse, verify

    # It warns of every answer it gives up on, with the whole text: a hostile one floods the terminal.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return verify(
        parse(gold, parsing_timeout=seconds), parse(answer, parsing_timeout=seconds), timeout_seconds=seconds
    )
