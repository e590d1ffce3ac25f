r"""A spliced wrong first reading, and how often the model repairs it.

A model that answers right may have read right at once, and its look back may be a ritual. So the beginning
of an answer is put into its mouth, with one reading wrong, and the model goes on from there. Repaired is an
answer that is right in the end, though what follows from the spliced reading is not. The same beginning with
the right readings tells how often going on spoils a right one.

Pages of digits have their beginnings made (`digit_beginnings`); rows of a user bring theirs in the columns
`wrong_start` and `right_start`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from reflectvlm.data.digit_mentions import mentions
from reflectvlm.data.digit_traces import DigitTraces
from reflectvlm.data.digits import conclude
from reflectvlm.generator import Generator
from reflectvlm.types import Prompt, Rollout, Sample, Text

Form: TypeAlias = Literal["back", "qwen_la", "think"]
"""How the beginning is written: `<think>…</think>`, so that `<back>` may come; the four blocks up to
`</REASONING>`; or `<think>…` left open, as plain GRPO writes."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A row and the beginning of an answer to it."""

    sample: Sample
    wrong: str
    right: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Spliced:
    """What became of one row's two beginnings."""

    id: str
    repaired: bool
    """The answer is right, after the wrong beginning."""
    kept: bool
    """The answer is right, after the right beginning."""
    wrong_text: str
    """The whole answer after the wrong beginning, which is its start."""
    right_text: str


def starts(samples: Iterable[Sample], form: Form = "back", seed: int = 0) -> Iterator[Start]:
    """Of every row that has or makes both beginnings. Of a page of digits only those are taken where what
    follows from the wrong reading is a wrong answer."""
    for sample in samples:
        wrong, right = sample.columns.get("wrong_start"), sample.columns.get("right_start")
        if isinstance(wrong, str) and isinstance(right, str):
            yield Start(sample=sample, wrong=wrong, right=right)
        elif sample.columns.get("digits") is not None:
            yield from digit_beginnings(sample, form, seed)


def digit_beginnings(sample: Sample, form: Form = "back", seed: int = 0) -> Iterator[Start]:
    """The beginning of a cold-start trace with one place misread, and of the one without."""
    if form not in ("back", "qwen_la", "think"):
        raise ValueError(f"form is {form!r}. It must be 'back', 'qwen_la' or 'think'.")
    facts = sample.columns
    own = zlib.crc32(f"{seed} {sample.id}".encode())  # another misreading for every row
    style: Literal["qwen_la", "semantic"] = "qwen_la" if form == "qwen_la" else "semantic"
    traces = [DigitTraces(data=[sample], style=style, wrong_first=share, seed=own)[0] for share in (1.0, 0.0)]
    made = [_cut(str(trace.columns["trace"]), form) for trace in traces]
    seen = list(facts["digits"])
    for place, digit in mentions(made[0]):
        seen[place] = None if digit is None else int(digit)
    if conclude(facts["kind"], facts["looks"], seen, sample.question)[1] != sample.answer:
        yield Start(sample=sample, wrong=made[0], right=made[1])


def _cut(trace: str, form: Form) -> str:
    match form:
        case "back":
            return trace[: trace.index("</think>") + len("</think>")]
        case "think":
            return trace[: trace.index("</think>")]
        case _:
            return trace[: trace.index("</REASONING>") + len("</REASONING>")]


def repairs(
    generator: Generator, begun: Sequence[Start], answer_from: str = "boxed", batch: int = 64
) -> list[Spliced]:
    """What the generator, with its own re-attention, makes of each beginning."""
    from reflectvlm.rewards.accuracy import Accuracy

    assert generator.instruction is not None
    accuracy = Accuracy(answer_from=answer_from)
    texts: dict[str, list[Rollout]] = {}
    for which in ("wrong", "right"):
        prompts = [
            begin(generator, generator.policy.prompt(one.sample, generator.instruction), getattr(one, which))
            for one in begun
        ]
        texts[which] = [
            dataclasses.replace(rollout, text=getattr(one, which) + rollout.text, offsets=())
            for one, rollout in zip(begun, _answers(generator, prompts, batch), strict=True)
        ]
    return [
        Spliced(
            id=one.sample.id,
            repaired=bool(accuracy([wrong])[0]),
            kept=bool(accuracy([right])[0]),
            wrong_text=wrong.text,
            right_text=right.text,
        )
        for one, wrong, right in zip(begun, texts["wrong"], texts["right"], strict=True)
    ]


def begin(generator: Generator, prompt: Prompt, text: str) -> Prompt:
    """The prompt with the beginning of an answer: what is sampled goes on from there."""
    (span,) = generator.policy.answer(text)
    return dataclasses.replace(
        prompt, spans=(*prompt.spans, Text(ids=span.ids[:-1]))
    )  # without the end of turn


def _answers(generator: Generator, prompts: Sequence[Prompt], batch: int) -> Iterator[Rollout]:
    assert generator.reattention is not None
    for first in range(0, len(prompts), batch):
        groups = generator.rollout_engine.generate(
            prompts[first : first + batch], 1, generator.sampling, generator.reattention, seed=generator.seed
        )
        yield from (group[0] for group in groups)
