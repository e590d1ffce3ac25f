"""COPY and ROUTE against stock Qwen2.5-VL, with the oracles of `reattending.py`. The other families are in
`test_families.py`, with the same oracles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fixtures import make_policy
from reattending import (
    SPECIAL,
    TOLERANCE,
    Looking,
    difference,
    eager_attention,
    exact,
    generate,
    prompts,
    reattentions,
    stock_logits,
    trained_logprobs,
)
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.looking import looks
from reflectvlm.rollout.placing import place_insertions
from reflectvlm.types import AttentionProbe, Visual


@pytest.mark.parametrize("name", list(reattentions()))
def test_decoding_with_blocks_is_the_stock_model_given_the_image_again(name: str) -> None:
    """Ids, positions or features of a block that are not those a stock model would see there; a cache
    that moved a neighbour; rows insert at different steps, several times, and are replaced."""
    policy = exact()
    given = prompts(policy)
    reattention = reattentions()[name]
    if name == "copy, last image":
        given = given[:3]
    rollouts = generate(policy, given, reattention)
    assert difference(policy, rollouts) < TOLERANCE
    if name != "implicit":
        assert any(rollout.insertions for rollout in rollouts), "nothing was inserted: this proved nothing"


@pytest.mark.parametrize("name", ["copy, special", "copy, plain", "route, special"])
def test_logits_are_the_stock_models_in_float32(name: str) -> None:
    """All logits of a row, not only those of what was sampled, at the precision of a usual CPU run."""
    policy = make_policy(gain=1.0)
    trigger = policy.tokenizer.convert_tokens_to_ids(SPECIAL)
    seen: list[Tensor] = []
    inner = policy.logits

    def logits(hidden: Tensor) -> Tensor:
        """The engine's own, but at two steps only the trigger is left to draw."""
        seen.append(inner(hidden))
        if len(seen) not in (6, 13):
            return seen[-1]
        return torch.full_like(seen[-1], float("-inf")).index_fill(1, torch.tensor([trigger]), 0.0)

    vars(policy)["logits"] = logits
    blocks = 0
    for prompt in prompts(policy)[:3]:
        seen.clear()
        (rollout,) = generate(policy, [prompt], reattentions()[name], n=1, tokens=24)
        blocks += len(rollout.insertions)
        stock, _ = stock_logits(policy, rollout)
        stock = stock.float().index_fill(-1, policy.banned, float("-inf"))
        row = policy.batch([(rollout.prompt, rollout.spans)])
        predictors = row.predictor[row.trained]
        made = torch.cat(seen)
        finite = torch.isfinite(made)
        assert torch.equal(finite, torch.isfinite(stock[predictors]))
        assert (made - stock[predictors])[finite].abs().max() < TOLERANCE
    assert blocks >= 3


# -- ROUTE's choice -------------------------------------------------------------------------------


PROBES = [
    AttentionProbe(),
    AttentionProbe(heads="max"),
    AttentionProbe(layers=(1, -1)),
]


@pytest.mark.parametrize("probe", PROBES, ids=str)
@pytest.mark.parametrize("trigger", [SPECIAL, "a"])
def test_attention_is_that_of_eager_attention(probe: AttentionProbe, trigger: str) -> None:
    """ROUTE would choose by something else than what the answer attended to."""
    policy = exact()
    looking = Looking(trigger=trigger, probe=probe, seen=[])
    rollouts = generate(policy, prompts(policy)[:3], looking)
    compared = 0
    for prompt, count, told in looking.seen:
        owners = [r for r in rollouts if r.prompt is prompt]
        if count == 1:
            assert not any(bool(one.any()) for one in told)
            continue
        gaps = []
        for owner in owners:
            wanted = eager_attention(policy, owner, count - 1, probe)
            gaps.append(max(float((a - b).abs().max()) for a, b in zip(told, wanted, strict=True)))
        assert min(gaps) < 1e-6
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("trigger", [SPECIAL, "a"])
def test_a_pass_over_an_answer_finds_what_decoding_found(trigger: str, side: str) -> None:
    """SFT would choose other tokens than a rollout does; also with several insertions in one answer."""
    policy = dataclasses.replace(exact(), padding_side=side)  # type: ignore[arg-type]
    route = VisualRoute(trigger=trigger, m=40)
    rollouts = generate(policy, prompts(policy)[:3], route, tokens=20)
    answers = [(rollout.prompt, rollout.sampled_ids) for rollout in rollouts]
    again = place_insertions(policy, answers, route)
    several = 0
    for rollout, placed in zip(rollouts, again, strict=True):
        made = [span for one in placed for span in (*one.insertion.before, *one.insertion.after)]
        assert [(span.image, span.keep) for span in made if isinstance(span, Visual)] == [
            (span.image, span.keep) for span in rollout.insertions
        ]
        several += len(placed) > 1
    assert several, "no answer with two insertions"


def test_a_pass_with_a_wrong_token_count_is_noticed() -> None:
    """The comparison above must see one token more."""
    policy = exact()
    rollouts = generate(policy, prompts(policy)[:1], Implicit(), n=1)
    ids = rollouts[0].sampled_ids
    one, other = (looks(policy, [(rollouts[0].prompt, ids[:n], ())], AttentionProbe())[0] for n in (6, 7))
    assert one is not None
    assert other is not None
    assert (one(0) - other(0)).abs().max() > 1e-4


def test_watching_changes_no_logprob() -> None:
    """The watched attention function is used for the answer itself, and gone after it."""
    policy = exact()
    config = policy.model.model.language_model.config
    before = config._attn_implementation
    given = prompts(policy)
    plain = generate(policy, given, VisualCopy(trigger=SPECIAL))
    watched = generate(policy, given, VisualRoute(trigger=SPECIAL, m=99.999))
    for a, b in zip(plain, watched, strict=True):
        assert a.sampled_ids == b.sampled_ids
        gaps = [abs(x - y) for x, y in zip(trained_logprobs(a), trained_logprobs(b), strict=True)]
        assert max(gaps) < TOLERANCE
    assert config._attn_implementation == before
