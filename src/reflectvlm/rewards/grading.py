"""Graders that parse model text with sympy. They run in the isolated worker only.

math-verify stops itself by SIGALRM, which works there because the worker calls from its main
thread; what hangs inside C is killed from outside. An answer that is too hard to parse is wrong.
MathRuler hands text to sympy's parser, which evaluates it; it is used for `lookback` alone, to
reproduce published scores.
"""

from __future__ import annotations

import logging
from importlib import import_module


def math_equal(gold: str, answer: str, seconds: int) -> bool:
    """math-verify, gold first: an interval is accepted for an inequality, not the reverse."""
    return _verify(f"\\boxed{{{gold}}}", f"\\boxed{{{answer}}}", seconds)


def lookback_equal(gold: str, answer: str, seconds: int) -> bool:
    """The two graders of Look-Back's evaluation: MathRuler, else math-verify with the arguments exchanged."""
    mathruler = import_module("mathruler.grader")
    return bool(mathruler.grade_answer(answer, gold)) or _verify(answer, gold, seconds)


def _verify(gold: str, answer: str, seconds: int) -> bool:
    from math_verify import parse, verify

    # It warns of every answer it gives up on, with the whole text: a hostile one floods the terminal.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return verify(
        parse(gold, parsing_timeout=seconds), parse(answer, parsing_timeout=seconds), timeout_seconds=seconds
    )
