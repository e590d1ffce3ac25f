"""Rewards across the border: ours in TRL's trainers, TRL's reward functions here.

A TRL reward function is called as `function(prompts=, completions=, completion_ids=, **columns)`, one
list entry per completion, and returns a float or None for each (TRL 1.16). Ours is called with the
rollouts of one prompt. This module needs no TRL: both forms are plain calls.
Left out: reward *models* (`nn.Module`), which only TRL's trainer can run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reflectvlm.protocols import Reward
from reflectvlm.rewards.custom import Custom
from reflectvlm.rewards.trl_call import TrlCall
from reflectvlm.types import Prompt, Rollout, Sample, Text

TrlFunction = Callable[..., Any]
"""Returns a sequence of floats and Nones, or is async and returns an awaitable one."""
Decode = Callable[[Sequence[int]], str]
Offsets = Callable[[Sequence[int]], Sequence[int]]


def as_trl_reward(
    reward: Reward,
    name: str | None = None,
    *,
    answer_columns: Sequence[str] = ("answer", "solution"),
    decode: Decode | None = None,
    offsets: Offsets | None = None,
    end_ids: Collection[int] | None = None,
) -> TrlReward:
    """Our reward as an entry of `reward_funcs` of a stock `trl.GRPOTrainer`.

    `name`: what TRL's metrics call it; by default the reward's own name.
    `answer_columns`: the first of these columns that the data set has is the sample's answer. With `()`
    the reward needs no answer.
    `decode`: ids -> text *with* special tags. TRL's own text leaves special tokens out, so a reward that
    looks for tags which are special tokens (`<REFLECTION>`) needs it; plain-text tags do not.
    `offsets`: ids -> the character of `decode(ids)` at which each token begins, for rewards that count
    the tokens of a part, such as `ReflectionBalance`; both are methods of a `Policy`.
    `end_ids`: ids that end an answer; a completion with another last id counts as cut ("length"), and
    the one that ends an answer is no part of its text. Without them `Rollout.stop` is always "eos",
    since TRL does not say why a completion ended.

    Example: `as_trl_reward(ReflectionBalance(), answer_columns=(), decode=policy.decode,
    offsets=policy.offsets, end_ids=policy.end_ids)`

    Adjacent rows with the same `id` column, or without one with equal prompt, answer and images, are one
    group. Where TRL spreads a group over processes, each process sees its part of it.
    An exception of the reward ends TRL's run; None, NaN and inf become None, which TRL leaves out of its
    group.
    """
    return TrlReward(
        reward=reward,
        name=name or _name_of(reward),
        answer_columns=tuple(answer_columns),
        decode=decode,
        offsets=offsets,
        end_ids=None if end_ids is None else frozenset(end_ids),
    )


def from_trl(
    function: TrlFunction,
    *,
    answer_column: str = "solution",
    conversational: bool = False,
    timeout: float | None = 10.0,
) -> Custom:
    """A TRL reward function as our `Reward`: `rewards.Custom` with what TRL's trainer would add.

    The gold answer comes as `answer_column` too, since TRL's data sets name it as they please;
    `trainer_state` is None, `log_extra` and `log_metric` do nothing. `timeout` and `conversational`
    are those of `Custom`, which runs the function in a process of its own that can be killed;
    `timeout=None` calls it here.
    A None it returns (its way to say "does not apply") stays None: a rubric leaves that reward out of
    the rollout's sum, and takes it for no failure.
    """
    return Custom(
        function=TrlCall(function=function, answer_column=answer_column),
        name=_name_of(function),
        conversational=conversational,
        timeout=timeout,
    )


@dataclass(frozen=True, kw_only=True)
class TrlReward:
    """See `as_trl_reward`. A class and not a closure, so that it can be pickled."""

    reward: Reward
    name: str
    answer_columns: tuple[str, ...]
    decode: Decode | None
    end_ids: frozenset[int] | None
    offsets: Offsets | None = None

    def __post_init__(self) -> None:
        if self.offsets is not None and self.decode is None:
            raise ValueError(
                f"Reward {self.name!r} has offsets= without decode=. Offsets are places in the text that "
                "decode gives; pass both, e.g. decode=policy.decode, offsets=policy.offsets."
            )

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if self.decode is not None and completion_ids is None:
            raise ValueError(
                f"Reward {self.name!r} has decode=, but was called without completion_ids. "
                "Pass completion_ids, as recent TRL releases do, or leave decode out."
            )
        ids = completion_ids or [()] * len(prompts)
        rows = {name: value for name, value in columns.items() if _is_column(value, len(prompts))}
        samples = list(self._samples(prompts, rows))
        rewards: list[float | None] = []
        for start, stop in _runs(samples):
            first = samples[start]
            prompt = Prompt(sample=replace(first, id=first.id or f"row {start}"), spans=())
            group = tuple(
                self._rollout(prompt, completions[row], tuple(ids[row])) for row in range(start, stop)
            )
            rewards += self._scores(group)
        return rewards

    def _samples(self, prompts: Sequence[Any], rows: Mapping[str, Sequence[Any]]) -> Iterator[Sample]:
        answer = next((name for name in self.answer_columns if name in rows), None)
        if self.answer_columns and answer is None:
            raise ValueError(
                f"Reward {self.name!r} found none of the columns {list(self.answer_columns)} among "
                f"{sorted(rows)}. Name yours with as_trl_reward(answer_columns=...), or pass () if the "
                "reward needs no answer."
            )
        own = {"id", "image", "images", answer}
        for row, prompt in enumerate(prompts):
            values = {name: column[row] for name, column in rows.items()}
            yield Sample(
                id="" if values.get("id") is None else str(values["id"]),
                question=_text_of(prompt, role="user"),
                answer="" if answer is None else str(values[answer]),
                images=_images(values),
                columns={name: value for name, value in values.items() if name not in own},
            )

    def _rollout(self, prompt: Prompt, completion: Any, ids: tuple[int, ...]) -> Rollout:
        ended = bool(ids) and ids[-1] in (self.end_ids or ())
        written = ids[:-1] if ended else ids
        return Rollout(
            prompt=prompt,
            spans=(Text(ids=ids, trained=True),) if ids else (),
            text=self.decode(written) if self.decode is not None else _text_of(completion, role="assistant"),
            stop="eos" if ended or self.end_ids is None else "length",
            offsets=() if self.offsets is None else tuple(self.offsets(written)),
        )

    def _scores(self, group: Sequence[Rollout]) -> list[float | None]:
        given: Sequence[float | None] = self.reward(group)  # None: does not apply, as in a rubric
        values = [math.nan if value is None else float(value) for value in given]
        if len(values) != len(group):
            raise ValueError(
                f"Reward {self.name!r} gave {len(values)} values for {len(group)} rollouts of one prompt. "
                "A reward returns one number per rollout, in their order."
            )
        return [value if math.isfinite(value) else None for value in values]


def _runs(samples: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of adjacent samples that are the same one."""
    start = 0
    for row in range(1, len(samples) + 1):
        if row == len(samples) or not _same(samples[start], samples[row]):
            yield start, row
            start = row


def _same(first: Sample, second: Sample) -> bool:
    if first.id or second.id:
        return first.id == second.id
    return (first.question, first.answer, first.images) == (second.question, second.answer, second.images)


def _text_of(turns: Any, role: str) -> str:
    """Text of a plain string, or of all messages of one role; images among the parts are left out."""
    if isinstance(turns, str):
        return turns
    return "\n".join(_content(turn["content"]) for turn in turns if turn["role"] == role)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part.get("type") == "text")


def _images(values: Mapping[str, Any]) -> tuple[Any, ...]:
    images = values.get("images", values.get("image"))
    if images is None:
        return ()
    return tuple(images) if isinstance(images, list | tuple) else (images,)


def _is_column(value: Any, rows: int) -> bool:
    """TRL mixes columns with `trainer_state` and logging functions."""
    return isinstance(value, list | tuple) and len(value) == rows


def _name_of(reward: object) -> str:
    """A `Custom`'s label, a function's own name, that of a lifted function, or the class's."""
    inner = getattr(reward, "function", reward)
    return str(getattr(reward, "label", None) or getattr(inner, "__name__", type(reward).__name__))
