"""What the checks look at: a trainer's parts and its first rows, read without moving its data cursor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from reflectvlm.data.rows import BadRow
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention, RolloutEngine
from reflectvlm.reattention import Implicit
from reflectvlm.spans import count_tokens
from reflectvlm.train.checks_result import Result
from reflectvlm.train.feed import Feed
from reflectvlm.train.row_rules import LongRow, RowRules
from reflectvlm.types import Instruction, Prompt, Rollout, SamplingParams

Kind: TypeAlias = Literal["rl", "sft", "rows", "other"]
"""What a run makes of rows: a policy by rewards, a policy by gold answers, or more rows (distillation);
other: a trainer of the user's own, of which only policy and prompts are known."""

ROWS = 8
"""Rows that are looked at."""
_FURTHER = 64
"""Rows that are read until one can be used: of data of which much is left out, eight may all be."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Example: `Subject.of(trainer).prompts[0].sample.id`"""

    kind: Kind
    policy: QwenVL
    engine: RolloutEngine | None
    """None: the run never asks the policy for an answer."""
    rubric: Any
    rows: Result
    """What reading them came to."""
    prompts: tuple[Prompt, ...]
    """Of those that can be used."""
    looked: int = 0
    """How many rows were looked at, whether or not they can be used."""
    group_size: int = 1
    """Answers to one prompt that the rubric gets at once."""
    reattention: Reattention = field(default_factory=Implicit)
    instructions: tuple[Instruction, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How the run samples; SFT only evaluates, and has the budget of that."""
    target: str | None = None
    """Column with gold answers written out."""
    repairs: bool = False
    """Whether those may become the run's rows as they are, though it asks the policy for them."""
    evaluates: bool = True
    """Whether the rubric is ever asked."""
    reported: tuple[str, ...] = ()
    """Tags whose rate is reported, whether or not anything asks for them."""

    @classmethod
    def of(cls, trainer: Any) -> Subject:
        readers = {"rl": _of_rl, "sft": _of_sft, "rows": _of_distiller}
        if reader := readers.get(kind_of(trainer)):
            return reader(trainer)
        prompts = tuple(trainer.canary_prompts())
        read = Result("rows", "ok", f"{len(prompts)} rows are read")
        return cls(
            kind="other",
            policy=trainer.policy,
            engine=None,
            rubric=None,
            rows=read,
            prompts=prompts,
            looked=len(prompts),
        )

    def gold(self, prompt: Prompt) -> str | None:
        """The row's gold answer as it is written out in its data, if it is."""
        text = prompt.sample.columns.get(self.target) if self.target else None
        return text if isinstance(text, str) and text else None

    @property
    def golds(self) -> tuple[str, ...]:
        return tuple(text for prompt in self.prompts if (text := self.gold(prompt)) is not None)

    def written(self, prompt: Prompt, text: str) -> Rollout:
        """A text as if the policy had sampled it, for rewards."""
        (span,) = self.policy.answer(text)
        sampled = dataclasses.replace(span, logprobs=(0.0,) * len(span.ids))
        return Rollout(
            prompt=prompt,
            spans=(sampled,),
            text=self.policy.decode(span.ids[:-1]),
            stop="eos",
            offsets=self.policy.offsets(span.ids),
        )


def kind_of(trainer: Any) -> Kind:
    from reflectvlm.train.distill import Distiller
    from reflectvlm.train.rl import RLTrainer
    from reflectvlm.train.sft import SFTTrainer

    kinds: tuple[tuple[type, Kind], ...] = ((RLTrainer, "rl"), (SFTTrainer, "sft"), (Distiller, "rows"))
    return next((kind for made, kind in kinds if isinstance(trainer, made)), "other")


def samples(trainer: Any) -> bool:
    """Whether a run of ours ever asks its engine; SFT does so for evaluations alone."""
    kind = kind_of(trainer)
    if kind == "sft":
        return trainer.evaluation is not None or trainer.test is not None
    return kind in ("rl", "rows")


def _of_rl(trainer: Any) -> Subject:
    rows, prompts = _read(trainer)
    return Subject(
        kind="rl",
        policy=trainer.policy,
        engine=trainer.rollout_engine,
        rubric=trainer.rubric,
        rows=rows,
        prompts=prompts,
        looked=min(ROWS, len(trainer.data)),
        group_size=getattr(trainer, "group_size", 1),
        reattention=trainer.reattention,
        instructions=(trainer.instruction,),
        sampling=trainer.sampling,
        reported=_reported(trainer, trainer.tag),
    )


def _of_sft(trainer: Any) -> Subject:
    evaluations = [one for one in (trainer.evaluation, trainer.test) if one is not None]
    rows, prompts = _read(trainer)
    return Subject(
        kind="sft",
        policy=trainer.policy,
        engine=trainer.rollout_engine if samples(trainer) else None,
        rubric=trainer.rubric,
        rows=rows,
        prompts=prompts,
        looked=min(ROWS, len(trainer.data)),
        reattention=trainer.reattention,
        instructions=tuple(trainer.instructions),
        sampling=SamplingParams(max_tokens=min((one.max_tokens for one in evaluations), default=2**31)),
        target=trainer.target,
        evaluates=bool(evaluations),
        reported=_reported(trainer),
    )


def _of_distiller(trainer: Any) -> Subject:
    return dataclasses.replace(
        _of_rl(trainer),
        kind="rows",
        target=trainer.target,
        repairs=trainer.wrong == "repair",
        group_size=trainer.samples_per_row,
    )


def _reported(trainer: Any, *tags: str) -> tuple[str, ...]:
    held_out = (getattr(trainer, name, None) for name in ("evaluation", "test"))
    return tuple(dict.fromkeys([*tags, *(one.tag for one in held_out if one is not None)]))


# -- rows -----------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    text: str
    ends_the_run: bool


def _read(trainer: Any) -> tuple[Result, tuple[Prompt, ...]]:
    """The first rows as the run would take them, and what reading them came to."""
    feed: Feed = trainer.feed
    rules = feed.rules
    # A feed of its own counts for itself, and says of each row why it is left out.
    strict = dataclasses.replace(
        rules, on_bad="error", on_long="truncate_text" if rules.on_long == "truncate_text" else "error"
    )
    looking = dataclasses.replace(feed, rules=strict)
    prompts: list[Prompt] = []
    lengths: list[int] = []
    problems: list[_Problem] = []
    count = 0
    for position in range(min(_FURTHER, len(trainer.data))):
        if count >= ROWS and (prompts or any(one.ends_the_run for one in problems)):
            break
        count += 1
        try:
            ((prompt, answer),) = looking.these([position], ahead=False)
        except Exception as error:  # noqa: BLE001  boundary: data sets and their readers may be the user's own
            problems.append(_problem(error, rules))
            continue
        prompts.append(prompt)
        lengths.append(count_tokens(prompt.spans + answer, prompt.grids))
    limit = f"{feed.limit_name} is {feed.limit}"
    return _told(prompts, lengths, problems, count, limit), tuple(prompts)


def _problem(error: Exception, rules: RowRules) -> _Problem:
    if isinstance(error, LongRow):
        rule = rules.on_bad if rules.on_long == "truncate_text" else rules.on_long
        return _Problem(f"row {error.sample.id!r}: {error.reason}", rule == "error")
    text = " ".join(str(error).split())
    if isinstance(error, BadRow):
        return _Problem(text, rules.on_bad == "error")
    return _Problem(f"{type(error).__name__}: {text}", True)


def _told(
    prompts: Sequence[Prompt], lengths: Sequence[int], problems: Sequence[_Problem], count: int, limit: str
) -> Result:
    if problems:
        fatal = next((one for one in problems if one.ends_the_run), None)
        first = fatal or problems[0]
        what = f"{len(problems)} of the first {count} rows cannot be used: {first.text}"
        then = "The run would end there" if fatal else "row_rules leave such rows out"
        remedy = f"{then}: repair or remove them, or raise the limit ({limit})."
        return Result("rows", "failed" if fatal or not prompts else "warning", what, remedy)
    images = sum(len(prompt.patches) for prompt in prompts)
    between = f"{min(lengths)} to {max(lengths)}"
    return Result("rows", "ok", f"the first {count} have {between} tokens ({limit}) and {images} images")
