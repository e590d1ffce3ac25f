"""Traces to filter: a question, and an answer to it in the layout of each method."""

from __future__ import annotations

from typing import Any

from reflectvlm.curate.types import Look, Question, Trace


def asked(question: str = "How many bars?", answer: str = "7", *images: Any, row: str = "1") -> Question:
    return Question(id=row, question=question, answer=answer, images=images)


def back(
    first: str = "The chart has bars, I count 6.",
    look: str = "Looking again: 7 red bars.",
    then: str = "So there are 7.",
    box: str = "7",
    question: Question | None = None,
    **more: Any,
) -> Trace:
    text = f"<think>{first}</think> <back>{look}</back> <think>{then}</think> \\boxed{{{box}}}"
    return Trace(question=question or asked(), text=text, **{"method": "semantic_back", **more})


def qwen(
    summary: str = "Count the bars.",
    caption: str = "A chart with red bars.",
    reasoning: str = "I count 6 from the left.",
    reflections: tuple[str, ...] = ("Looking again: 7 red bars.",),
    conclusion: str = "7",
    look: Look = "confirmed",
    question: Question | None = None,
) -> Trace:
    text = f"<SUMMARY>{summary}</SUMMARY><CAPTION>{caption}</CAPTION><REASONING>{reasoning}</REASONING>"
    text += "".join(f"<REFLECTION>{one}</REFLECTION>" for one in reflections)
    text += f"<CONCLUSION>{conclusion}</CONCLUSION>"
    return Trace(question=question or asked(), text=text, method="qwen_la", look=look)
