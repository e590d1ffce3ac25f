"""The interfaces. Each is a `Protocol` with one method wherever possible, so that a plain function
or a small frozen dataclass satisfies it. Nothing is registered anywhere: a recipe names a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from reflectvlm.batch import Batch, LossInputs, LossOutputs, ReferenceStates, TokenScores
from reflectvlm.rewards.verdict import Verdict
from reflectvlm.types import (
    AttentionProbe,
    Insertion,
    Instruction,
    Patches,
    Prompt,
    Rollout,
    Sample,
    SamplingParams,
    ScoredGroup,
    Spans,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@runtime_checkable
class Reward(Protocol):
    """A group's rollouts -> one number each.

    The whole group is seen because some rewards compare siblings; `rewards.per_rollout` lifts a
    function of one rollout. A reward that cannot decide raises; it never returns NaN on purpose.

    Optional attributes, see `rewards.asking`: `rowwise = True` asks about one rollout at a time, and a
    method `many(groups)` about all groups of a step at once, which pays for rewards that wait. With
    `early(group, place)` and `lanes`, see `rewards.early`, these wait while other groups are still decoded.
    """

    def __call__(self, group: Sequence[Rollout], /) -> Sequence[float]: ...


@runtime_checkable
class Judge(Protocol):
    """How right is an answer? Question, gold answer, answer, perhaps the images -> a verdict.

    What it cannot decide has a verdict without a score and says why; it is never scored 0 for that. A
    judge may be asked from several threads at once.
    """

    def __call__(self, question: str, gold: str, answer: str, images: Sequence[Image] = (), /) -> Verdict: ...


@runtime_checkable
class Advantage(Protocol):
    """Rewards of one group -> advantages. Unscored rollouts get exactly 0 and move no baseline."""

    def __call__(self, group: ScoredGroup, /) -> Float[Tensor, " G"]: ...


@runtime_checkable
class Objective(Protocol):
    """Log-probs and advantages -> loss and metrics.

    The loss of a micro-batch is already divided by the *global* counts in `LossInputs`, so the sum
    over micro-batches and ranks is the loss of the whole batch, however it was split.
    """

    def __call__(self, inputs: LossInputs, /) -> LossOutputs: ...


@runtime_checkable
class DecodeState(Protocol):
    """What a `Reattention` may look at when its trigger has just been sampled in one row."""

    @property
    def prompt(self) -> Prompt: ...
    @property
    def sampled(self) -> Sequence[int]:
        """Ids sampled so far, the trigger included."""
        ...

    @property
    def insertions(self) -> Sequence[Insertion]:
        """What went into this answer before."""
        ...

    @property
    def special(self) -> bool:
        """True if the trigger is one special token, False if it is a tag in plain text."""
        ...

    def text(self) -> str:
        """The answer so far, decoded with all tags."""
        ...

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is to be forced, e.g. a closing tag."""
        ...

    def attention(self, image: int) -> Float[Tensor, " V"]:
        """Attention that the answer's tokens paid to each visual token of one image of the prompt: mean
        over the tokens sampled before the one that completed the trigger; 0 if there are none. Raises
        ValueError if the `Reattention` has no `probe`."""
        ...


@runtime_checkable
class Reattention(Protocol):
    """When and with what a row looks at its image again.

    `trigger` is the tag that asks for it, e.g. `"<REFLECTION>"`, or None for never. When a row has
    just sampled it, whole, the object is called and its `Insertion` goes around the tag. A false
    value inserts nothing. `probe` says which attention it will ask the state for; None for none.
    """

    @property
    def trigger(self) -> str | None: ...
    @property
    def probe(self) -> AttentionProbe | None: ...

    def __call__(self, state: DecodeState, /) -> Insertion | None: ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Prompts -> a group of `n` rollouts each, in the order of the prompts.

    `seed` decides every random choice together with the prompt's place and the rollout's number,
    so the same call gives the same rollouts whatever else the machine did in between. `places` are given
    where several processes share a step: the places of these prompts among those of all.

    Two optional methods, see `rollout.engine`: `groups`, the same as an iterator of (place, group) in the
    order in which they are complete, so that rewards may begin; and `go_on`, for partial rollouts.
    An engine that holds a copy of the weights may have `sync(version)`: which optimiser step's weights the
    next rollouts are to be sampled from. One that computes log-probs in its own way says so by
    `foreign_logprobs = True`; the trainer then corrects for it (`ClippedSurrogate.importance_cap`).
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
        places: Sequence[int] | None = None,
    ) -> list[tuple[Rollout, ...]]: ...


@runtime_checkable
class LongTail(Protocol):
    """When a group stops waiting for its longest rollouts: lengths of those that have ended, shortest
    first, and how many the group has -> most tokens that the others may have, or None for no such limit.

    A function of these counts alone, so that a rollout does not depend on time or on what else is decoded.
    It is asked again whenever one more has ended.
    """

    def __call__(self, ended: Sequence[int], size: int, /) -> int | None: ...


@runtime_checkable
class Policy(Protocol):
    """One per model family: the only place that knows chat formats, vocabularies and positions."""

    @property
    def module(self) -> nn.Module:
        """What the optimiser trains and a checkpoint saves."""
        ...

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that must never be sampled, and have probability 0 in training: see docs/design.md."""
        ...

    def prompt(self, sample: Sample, instruction: Instruction) -> Prompt:
        """Renders the chat and processes the images. Text of the sample is text, whatever special
        token it spells."""
        ...

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, visual tokens counted."""
        ...

    def answer(self, text: str) -> Spans:
        """A gold answer as one trained span that ends its turn."""
        ...

    def batch(self, sequences: Sequence[tuple[Prompt, Spans]]) -> Batch:
        """Rows of prompt + answer spans -> one batch on the policy's device."""
        ...

    def features(self, images: Sequence[Patches]) -> Float[Tensor, "V F"]:
        """Visual features of these images, one after another."""
        ...

    def score(
        self,
        batch: Batch,
        features: Float[Tensor, "V F"],
        temperature: float = 1.0,
        *,
        entropy: bool = True,
        reference: ReferenceStates | None = None,
    ) -> TokenScores:
        """Log-prob and entropy of every trained token; with the states of a reference at the same tokens the
        exact KL to it. `entropy=False` leaves the entropy out."""
        ...

    def save(self, folder: Path) -> None:
        """Writes a folder that stock `from_pretrained` loads."""
        ...

    def offsets(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Character of `decode(ids)` at which each token begins."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text with every tag, special ones too: rewards must see special tags too."""
        ...


@runtime_checkable
class Reference(Protocol):
    """Whom an exact KL compares the policy with: a frozen copy of it, or whatever else has its vocabulary."""

    def features(self, images: Sequence[Patches]) -> Float[Tensor, "V D"]:
        """Visual features of these images, one after another, of its own tower."""
        ...

    def states(self, batch: Batch, features: Float[Tensor, "V F"]) -> ReferenceStates:
        """Hidden states at the trained tokens, and the head; without a gradient."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """Where metrics go. A tracker that raises is reported once and dropped; training goes on."""

    def start(self, card: Mapping[str, Any]) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None: ...
    def close(self) -> None: ...
