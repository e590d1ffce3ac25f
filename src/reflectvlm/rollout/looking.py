"""How much an answer that exists already has attended to its images: what ROUTE needs to choose in a gold
trace. The engine finds the same while it decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reflectvlm.models.attention import AttentionWatch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.spans import count_tokens, flatten
from reflectvlm.types import AttentionProbe, Prompt, Span, Text

if TYPE_CHECKING:
    from reflectvlm.rollout.placing import Placed

Look = Callable[[int], Float[Tensor, " V"]]


def looks(
    policy: QwenVL,
    answers: Sequence[tuple[Prompt, Sequence[int], Sequence[Placed]]],
    probe: AttentionProbe | None,
    rows: int = 16,
) -> list[Look] | list[None]:
    """For each (prompt, answer's first tokens, insertions among them): image number -> attention of those
    tokens to its visual tokens, by passes of the policy over `rows` answers each, without gradients."""
    if probe is None:
        return [None] * len(answers)
    parts = [answers[start : start + rows] for start in range(0, len(answers), rows)]
    return [look for part in parts for look in _looks(policy, part, probe)]


def _looks(
    policy: QwenVL,
    answers: Sequence[tuple[Prompt, Sequence[int], Sequence[Placed]]],
    probe: AttentionProbe,
) -> list[Look]:
    from reflectvlm.rollout.placing import answer_spans

    # Log-probs tell sampled tokens from forced ones; here they only have to be there.
    sequences = [(prompt, answer_spans(ids, (0.0,) * len(ids), placed)) for prompt, ids, placed in answers]
    batch = policy.batch(sequences)
    sampled = torch.zeros_like(batch.attention)
    for row, (prompt, spans) in enumerate(sequences):
        own = [torch.full((count_tokens((s,), prompt.grids),), _sampled(s)) for s in prompt.spans + spans]
        sampled[row, batch.attention[row]] = torch.cat(own).to(sampled.device)
    with torch.no_grad():
        features = policy.features(batch.images)
        watch = AttentionWatch(probe=probe, queries=sampled, width=batch.ids.shape[1])
        mask = None if bool(batch.attention[:, 0].all()) else batch.attention.long()
        policy.hidden(policy.embed(batch.ids, batch.visual, features), batch.positions, mask, watch=watch)
    counts = sampled.sum(1).clamp(min=1)
    first = [int(row.nonzero()[0]) for row in batch.attention]
    return [
        image_look(policy, prompt, watch.total[row, first[row] :] / counts[row])
        for row, (prompt, _, _) in enumerate(answers)
    ]


def _sampled(span: Span) -> bool:
    return isinstance(span, Text) and bool(span.logprobs)


def image_look(policy: QwenVL, prompt: Prompt, attended: Float[Tensor, " S"]) -> Look:
    """Attention to a row's first tokens -> attention to the visual tokens of one of its images."""
    image = flatten(prompt.spans, prompt.grids, policy.vision).image

    def look(number: int) -> Float[Tensor, " V"]:
        columns = torch.from_numpy(np.flatnonzero(image == number)).to(attended.device)
        return attended[columns]

    return look
