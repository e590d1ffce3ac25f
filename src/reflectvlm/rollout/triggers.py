"""Where a re-attention's trigger fires while rows are decoded, and what it wants there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.looking import image_look
from reflectvlm.rollout.placing import AnswerState, Placed, checked, end, special_id, tag_length
from reflectvlm.rollout.rows import Rows
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.types import Prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Triggers:
    """One re-attention's trigger: a special token or a text."""

    policy: QwenVL
    reattention: Reattention
    special: int | None
    """Id of a trigger that is one special token."""
    watch: TextWatch
    """For a trigger in plain text."""

    @classmethod
    def create(
        cls, policy: QwenVL, reattention: Reattention, watch: Callable[[tuple[str, ...]], TextWatch]
    ) -> Triggers:
        """`watch` makes, or keeps, a watch for some texts. Raises ValueError for a trigger that can never
        be sampled, or ends the answer."""
        trigger = reattention.trigger
        special = special_id(policy, trigger)
        if special in (*policy.reserved_ids, *policy.end_ids):
            raise ValueError(
                f"The re-attention's trigger {trigger!r} stands for pixels or ends a turn, so nothing would "
                "ever be inserted. Give a tag of its own, e.g. '<REFLECTION>' or '<back>'."
            )
        texts = () if trigger is None or special is not None else (trigger,)
        return cls(policy=policy, reattention=reattention, special=special, watch=watch(texts))

    @property
    def longest(self) -> int:
        """Most tokens of a tag in plain text: one per byte. 0 for a special token or no trigger."""
        trigger = self.reattention.trigger
        return 0 if trigger is None or self.special is not None else len(trigger.encode())

    def fired(self, rows: Rows, ids: Int[Tensor, " R"]) -> list[int]:
        """Rows whose last token has just completed the trigger."""
        if self.reattention.trigger is None:
            return []
        if self.special is not None:
            return list(torch.eq(ids, self.special).nonzero().flatten().tolist())
        return list(self.watch.completed(rows.ids, rows.count, ids).nonzero().flatten().tolist())

    def completed(self, ids: Sequence[int]) -> bool:
        """Whether the last of one row's sampled ids has just completed the trigger."""
        if self.special is not None:
            return ids[-1] == self.special
        return self.watch.completes(ids)

    def ask(
        self,
        prompt: Prompt,
        sampled: Sequence[int],
        placed: Sequence[Placed],
        attended: Float[Tensor, " W"] | None,
    ) -> Placed | None:
        """What goes around the tag that the last of `sampled` has completed, given what stands already and
        what the tokens so far have attended to on average."""
        special = self.special is not None
        length = 1 if special else tag_length(self.policy, sampled, str(self.reattention.trigger))
        if len(sampled) - length < end(placed):  # it shares a token with a tag that has a block already
            return None
        state = AnswerState(
            prompt=prompt,
            sampled=sampled,
            insertions=tuple(one.insertion for one in placed),
            special=special,
            placed=tuple(placed),
            policy=self.policy,
            look=None if attended is None else image_look(self.policy, prompt, attended),
        )
        if not (insertion := checked(self.reattention(state))):
            return None
        return Placed(start=len(sampled) - length, stop=len(sampled), insertion=insertion)
