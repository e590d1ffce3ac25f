"""The page that teaches the library: every value that travels through it, in order.

    Sample -> Prompt -> Rollout x G -> ScoredGroup -> Batch -> loss

One idea: **a sequence is a tuple of spans**. `Text` is a run of tokens, `Visual` is one image's
visual tokens shown at this place. A prompt is spans, what the policy samples is spans, and what
re-attention inserts is a `Visual` span. Which tokens enter a loss is a property of a span
(`trained`), so nothing has to remember where the prompt ended or what was inserted.

All classes here are frozen and hold meaning; the numbers for the device are in `batch.Batch`.

Legend of shapes, used in the whole library:
    B rows of a batch     G rollouts of one prompt      T tokens of a row
    V visual tokens       P patches of an image         C values of one patch
    D width of the model  K trained tokens of a batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A run of text tokens, given or sampled.

    Example: `Text(ids=(9, 4, 7), trained=True, logprobs=(-0.1, -2.3, -0.7))`
    """

    ids: tuple[int, ...]
    trained: bool = False
    """True: these tokens enter the loss."""
    logprobs: tuple[float, ...] = ()
    """Behaviour log-probs, one per id; empty unless the tokens were sampled."""

    def __post_init__(self) -> None:
        if self.logprobs and len(self.logprobs) != len(self.ids):
            raise ValueError(
                f"Text has {len(self.ids)} ids and {len(self.logprobs)} logprobs. "
                "Give one behaviour log-prob per id, or none."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Visual:
    """One image block: vision-start, the image's visual tokens, vision-end.

    Examples:
        Visual(image=0)                  all tokens of the first image: the prompt, or COPY
        Visual(image=0, keep=(3, 17))    a selection in raster order: ROUTE
    """

    image: int
    """Index into the sample's images."""
    keep: tuple[int, ...] | None = None
    """Kept visual tokens in raster order of the merged grid; None keeps all."""
    before_sampled: bool = False
    """True: the token after this block was sampled *before* the block was put in front of it, so
    its log-prob is taken from the last token before the block, never from the block's own end."""


Span: TypeAlias = Text | Visual
Spans: TypeAlias = tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Insertion:
    """What re-attention puts around the tag that asked for it.

    Examples:
        Insertion(before=(Visual(image=0),))                          the image, then `<REFLECTION>`
        Insertion(after=(Visual(image=0),))                           `<back>`, then the image
        Insertion(before=(Visual(image=0),), after=(Text(ids=(78,)),))  and `</REFLECTION>` forced at once
    """

    before: Spans = ()
    """In front of the tag's first token."""
    after: Spans = ()
    """Behind the tag's last token."""

    def __bool__(self) -> bool:
        return bool(self.before or self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProbe:
    """Which attention a `Reattention` wants to know: over these layers the mean, over heads mean or max."""

    layers: tuple[int, ...] | None = None
    """Numbers of decoder layers, negative ones from the end; None for all."""
    heads: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if self.heads not in ("mean", "max"):
            raise ValueError(f"heads is {self.heads!r}. It must be 'mean' or 'max'.")
        if self.layers is not None and (not self.layers or len({*self.layers}) < len(self.layers)):
            raise ValueError(f"layers is {self.layers}. Name at least one layer, each once, or None for all.")


class Grid(NamedTuple):
    """Size of one image in *merged* cells, which is one visual token each: frames, rows, columns."""

    frames: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patches:
    """One image as the vision tower wants it.

    Example: a 64 x 64 image with patch 8 and merge 2 has 64 patches and `grid=Grid(1, 4, 4)`.
    """

    pixels: Float[Tensor, "P C"]
    grid: Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One validated row of a data set.

    Example: `Sample(id="digits-train-17", question="Add the two upper digits.", answer="11",
    images=(page,), columns={"kind": "add"})`
    """

    id: str
    question: str
    answer: str
    images: tuple[Image, ...] = ()
    """RGB images. `<image>` markers in the question say where they stand; without markers they
    stand in front of it."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All other columns of the row; rewards may ask for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """What is asked of the model beside the question: how to reason and how to answer.

    Example: `Instruction(text="Put the final answer in \\boxed{}.", place="user")`
    """

    text: str = ""
    place: Literal["user", "system"] = "user"
    """After the question, or instead of the default system turn."""
    system: str | None = "You are a helpful assistant."
    """The system turn when `place` is "user". None: what the model's own template writes, a default turn
    (Qwen2-VL, Qwen2.5-VL) or none (Qwen3-VL)."""

    def __post_init__(self) -> None:
        if self.place not in ("user", "system"):
            raise ValueError(f"Instruction.place is {self.place!r}. It must be 'user' or 'system'.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sample as the policy sees it first: the chat template and instruction, as spans."""

    sample: Sample
    spans: Spans
    patches: tuple[Patches, ...] = ()
    """The sample's images, processed once; `Visual.image` indexes this tuple."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(patches.grid for patches in self.patches)


StopReason: TypeAlias = Literal["eos", "stop", "length", "cut"]
"""Why a rollout ended: its end-of-turn token, a stop string or stop id, the token budget or the model's
context is used up, or nobody waited for it any longer (`rollout/long_tail.py`, `train/pending.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One answer to a prompt: what was sampled and what re-attention inserted.

    Example with an image shown again before `<REFLECTION>` (id 77):
        Rollout(prompt=..., text="3 + 5<REFLECTION>...", stop="eos", spans=(
            Text(ids=(18, 10, 20), trained=True, logprobs=(...)),
            Visual(image=0, before_sampled=True),
            Text(ids=(77, ...), trained=True, logprobs=(...))))
    """

    prompt: Prompt
    spans: Spans
    text: str
    """The text spans decoded, with all tags and without the end-of-turn token. Never contains
    inserted visual tokens."""
    stop: StopReason
    policy_version: int = 0
    """Optimiser steps taken before this rollout was sampled; before its first token, if it was sampled in
    parts by several versions."""
    token_versions: tuple[int, ...] = ()
    """The version that sampled each token, if they were several; empty: all are `policy_version`'s. The
    behaviour log-probs are each token's own version's."""
    offsets: tuple[int, ...] = ()
    """Character of `text` at which each token of the text spans begins, the end-of-turn token perhaps left
    out; empty if nobody counted."""

    @property
    def truncated(self) -> bool:
        """Whether it was ended from outside: by a budget, or because nobody waited any longer."""
        return self.stop in ("length", "cut")

    @property
    def sequence(self) -> Spans:
        """Prompt and answer: the sequence that is trained on."""
        return self.prompt.spans + self.spans

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """Ids the policy sampled, insertions left out; the end-of-turn token counts."""
        texts = (span for span in self.spans if isinstance(span, Text))
        return tuple(i for span in texts if span.trained or span.logprobs for i in span.ids)

    @property
    def insertions(self) -> tuple[Visual, ...]:
        return tuple(span for span in self.spans if isinstance(span, Visual))

    def tokens_between(self, start: int, end: int) -> int:
        """Sampled tokens that begin in `text[start:end]`; text that re-attention forced does not count.

        Raises ValueError if this rollout has no `offsets`.
        """
        if self.text and not self.offsets:
            raise ValueError(
                f"The rollout of sample {self.prompt.sample.id!r} does not say where its tokens begin. "
                "Make it with offsets=policy.offsets(ids), as the engines do."
            )
        texts = [span for span in self.spans if isinstance(span, Text)]
        sampled = [span.trained or bool(span.logprobs) for span in texts for _ in span.ids]
        return sum(own and start <= at < end for own, at in zip(sampled, self.offsets, strict=False))

    def count(self, tag: str) -> int:
        """How often `tag`, e.g. `"<back>"`, occurs in the text."""
        return self.text.count(tag)

    def _repr_html_(self) -> str:
        from reflectvlm.html import rollout_html

        return rollout_html(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """The G rollouts of one prompt with their rewards.

    Example: `ScoredGroup(rollouts=(a, b), rewards=(1.0, 0.1), scored=(True, True),
    parts={"accuracy": (1.0, 0.0), "format": (1.0, 1.0)})` for weights 0.9 and 0.1.
    """

    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]
    """Weighted sum per rollout; always finite. 0.0 where `scored` is False, and then unused."""
    parts: Mapping[str, tuple[float, ...]]
    """Each reward's raw value by name; NaN where that reward gave none."""
    scored: tuple[bool, ...]
    """False: a reward failed on this rollout; it is left out of its group and teaches nothing."""

    def __post_init__(self) -> None:
        lengths = {
            "rollouts": len(self.rollouts),
            "rewards": len(self.rewards),
            "scored": len(self.scored),
            **{f"parts[{name!r}]": len(values) for name, values in self.parts.items()},
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"ScoredGroup needs one value per rollout everywhere, got {lengths}.")

    @property
    def has_signal(self) -> bool:
        """False if all scored rewards are equal: every advantage is then zero."""
        seen = {reward for reward, scored in zip(self.rewards, self.scored, strict=True) if scored}
        return len(seen) > 1

    def without_truncated(self) -> ScoredGroup:
        """Overlong filtering (DAPO, arXiv 2503.14476, sec. 3.4): rollouts cut by the token budget, or
        because nobody waited for them, become unscored, so they neither move the baseline nor enter the
        loss."""
        scored = tuple(s and not r.truncated for s, r in zip(self.scored, self.rollouts, strict=True))
        return dataclasses.replace(self, scored=scored)

    def _repr_html_(self) -> str:
        from reflectvlm.html import group_html

        return group_html(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn from the policy.

    Log-probs are those of the distribution at `temperature` with reserved ids banned, *before*
    top-p, top-k and min-p cut it: the same quantity the trainer computes, so that their ratio is 1
    at the first update. `temperature=0` is greedy and its log-probs are those at temperature 1.
    """

    max_tokens: int = 512
    """Most sampled tokens per rollout; inserted visual tokens do not count."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    stop: Sequence[str] = ()
    """Strings that end a rollout; they stay in its text."""
    stop_ids: Sequence[int] = ()
    """Ids that end a rollout, beside the model's own end-of-turn ids."""

    def __post_init__(self) -> None:
        rules: list[tuple[str, float, bool, str]] = [
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]; 1 keeps all"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more; 0 keeps all"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1); 0 keeps all"),
        ]
        if isinstance(self.stop, str):
            raise ValueError(  # noqa: TRY004 - what a user wrote in a recipe
                f"SamplingParams.stop is {self.stop!r}. It is a list of strings: stop=[{self.stop!r}]."
            )
        for name, value, holds, rule in rules:
            if not holds:
                raise ValueError(f"SamplingParams.{name} is {value}. It must be {rule}.")

    @property
    def logprob_temperature(self) -> float:
        """The temperature at which both the engine and the trainer take log-probs."""
        return self.temperature or 1.0
