"""The in-process rollout engine: prompts -> groups of rollouts, on the policy's own weights.

The work is done by `decoding.Decoding`, one per call; of a call nothing stays behind in the engine but, with
CUDA graphs, the graphs and the memory of the cache.
`groups` hands out each group as soon as it is complete, and `go_on` takes up rollouts that an earlier call
has left unfinished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import LongTail, Reattention
from reflectvlm.rollout.continuing import BegunGroup
from reflectvlm.rollout.decoding import Decoding
from reflectvlm.rollout.stepping import Kind, Steps
from reflectvlm.rollout.telling import Telling
from reflectvlm.rollout.triggers import Triggers
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.spans import count_tokens
from reflectvlm.types import Prompt, Rollout, SamplingParams, Visual


@dataclass(frozen=True, kw_only=True, eq=False)
class InProcessEngine:
    """Satisfies `protocols.RolloutEngine`.

    Example: `InProcessEngine(policy=policy).generate(prompts, 8, SamplingParams(), Implicit(), seed=0)`
    """

    policy: QwenVL
    max_rows: int = 64
    """Rows decoded at one time; bounds the memory of the cache."""
    long_tail: LongTail | None = None
    """May end a group's last rollouts early, e.g. `StopGroup()`; None: none is cut."""
    decode: Kind = "auto"
    """How one token of every row is computed: see `stepping.Kind`. "stock" is the plain way."""
    _watches: dict[tuple[str, ...], TextWatch] = field(default_factory=dict, init=False, repr=False)
    _steps: Steps = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_steps", Steps(kind=self.decode))
        if self.long_tail is not None and not callable(self.long_tail):
            raise ValueError(
                f"engine.long_tail is {self.long_tail!r}. It takes a rule such as StopGroup, in a recipe "
                "{_target_: reflectvlm.rollout.long_tail.StopGroup, share: 0.75, grace: 64}, or null."
            )
        if self.max_rows < 1:
            raise ValueError(f"InProcessEngine.max_rows is {self.max_rows}. It must be at least 1.")

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
        places: Sequence[int] | None = None,
    ) -> list[tuple[Rollout, ...]]:
        found = dict(self.groups(prompts, n, sampling, reattention, seed=seed, places=places))
        return [found[place] for place in range(len(prompts))]

    def groups(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
        places: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, tuple[Rollout, ...]]]:
        """The same groups, each with its prompt's number among `prompts`, in the order in which they are
        complete. `places` are the prompts' places in the whole step, where other processes have the rest."""
        if n < 1:
            raise ValueError(f"generate was asked for n={n} rollouts per prompt. Ask for at least 1.")
        drawn = range(len(prompts)) if places is None else places
        fresh = [
            BegunGroup.fresh(prompt, n, seed, place) for prompt, place in zip(prompts, drawn, strict=True)
        ]
        for place, group in self.go_on(fresh, sampling, reattention):
            yield place, group.finished(self.policy)

    def go_on(
        self,
        groups: Sequence[BegunGroup],
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        tokens: int | None = None,
    ) -> Iterator[tuple[int, BegunGroup]]:
        """Goes on with groups that are begun, under the weights of now, until each rollout has ended or has
        `tokens` more tokens. Each group comes, with its place, as soon as nothing of it goes on."""
        if tokens is not None and tokens < 1:
            raise ValueError(f"go_on was asked for tokens={tokens} more. Ask for at least 1, or None.")
        decoding = self._decoding(groups, sampling, reattention, tokens)
        yield from _ready(decoding)
        for _ in decoding.steps(max([self.max_rows, *(len(group.rollouts) for group in groups)])):
            yield from _ready(decoding)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams, reattention: Reattention, *, seed: int = 0
    ) -> Iterator[str | Visual | Rollout]:
        """One rollout as it comes: pieces of its text and inserted blocks in their order, and at the end the
        rollout."""
        decoding = self._decoding([BegunGroup.fresh(prompt, 1, seed, 0)], sampling, reattention, None)
        telling = Telling(self.policy.decode)
        for rows in decoding.steps(1):
            if rows is not None:
                yield from telling.news(decoding.spans(rows, 0))
        (rollout,) = decoding.group(0).finished(self.policy)
        yield telling.rest(rollout)
        yield rollout

    def _decoding(
        self,
        groups: Sequence[BegunGroup],
        sampling: SamplingParams,
        reattention: Reattention,
        tokens: int | None,
    ) -> Decoding:
        self.policy.module.eval()
        sizes = [len(group.rollouts) for group in groups]
        rows = max([min(sum(sizes), self.max_rows), *sizes])  # a group is never split
        columns = max((self._room(group, sampling, reattention) for group in groups), default=0)
        step, cache = self._steps.make(self.policy, rows, columns)
        return Decoding(
            policy=self.policy,
            groups=groups,
            sampling=sampling,
            triggers=Triggers.create(self.policy, reattention, self._watch),
            stop_watch=self._watch(tuple(sampling.stop)),
            long_tail=self.long_tail,
            tokens=tokens,
            step=step,
            cache=cache,
        )

    def _room(self, group: BegunGroup, sampling: SamplingParams, reattention: Reattention) -> int:
        """Columns that a group's rows need, if they look again at most once."""
        prompt = group.prompt
        blocks = sum(grid.tokens for grid in prompt.grids) if reattention.trigger is not None else 0
        return count_tokens(prompt.spans, prompt.grids) + sampling.max_tokens + blocks

    def _watch(self, texts: tuple[str, ...]) -> TextWatch:
        if texts not in self._watches:
            policy = self.policy
            vocabulary = policy.model.lm_head.weight.shape[0] if texts else 1
            self._watches[texts] = TextWatch.create(texts, policy.decode, vocabulary, policy.device)
        return self._watches[texts]


def _ready(decoding: Decoding) -> Iterator[tuple[int, BegunGroup]]:
    while decoding.ready:
        place = decoding.ready.popleft()
        yield place, decoding.group(place)
