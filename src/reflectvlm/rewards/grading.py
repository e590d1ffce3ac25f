"""Graders that parse model text with sympy. They run in killable workers only, never in the trainer.

math-verify stops itself by SIGALRM, which works there because the worker calls from its main
thread; what hangs inside C is killed from outside. An answer that is too hard to parse is wrong.

No text of a model is evaluated by code of ours. Both libraries hand some of it to sympy's `parse_expr`,
which ends in Python's `eval`: math-verify only digits, brackets and operators (`9**9**9**9`, which the
time-out ends), MathRuler texts with up to two different letters. It is used for `rule="lookback"` alone,
to reproduce published scores, and sees nothing with a double underscore, without which Python's
internals cannot be reached. The process is limited in time and memory and has no model in it.
"""

from __future__ import annotations

import logging
import unicodedata
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


def _verify(gold: str, answer: str, seconds: int) -> bool:
    from math_verify import parse, verify

    # It warns of every answer it gives up on, with the whole text: a hostile one floods the terminal.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return verify(
        parse(gold, parsing_timeout=seconds), parse(answer, parsing_timeout=seconds), timeout_seconds=seconds
    )
