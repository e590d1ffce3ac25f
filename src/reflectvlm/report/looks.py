"""The run's own model looks at its recorded answers once more: attention of each token over the image.

Asked for with `attention=N`: the last answers of the held-out rows, wrong ones first. Their rows are read
again as the recipe says, since only small copies of the pictures are kept, and the recorded tokens go
through the model as they are. Left out: training rows, which a run of years has too many of to look through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflectvlm.recipe_check import RecipeError
from reflectvlm.report.heat import Heat
from reflectvlm.report.reading import Answer, RunRecord
from reflectvlm.train.run_folder import RunFolder
from reflectvlm.types import Grid, Prompt, Rollout, Sample, Span, StopReason, Text, Visual

if TYPE_CHECKING:
    from reflectvlm.generator import Generator

_MOST_ROWS = 20_000
"""Held-out rows that are looked through for the samples."""


def looks_of(run: RunRecord, count: int) -> dict[int, Heat]:
    """Heat for at most `count` of a run's answers, by their place in `run.answers`."""
    places = worth_a_look(run.answers, count)
    if not places:
        raise RecipeError(_why_none(run))
    model = RunFolder(run.path).model
    if not model.is_dir():
        raise RecipeError(
            f"attention={count} asks the run's own model, and {model} is not there: the run is not finished. "
            "Leave attention out until it is."
        )
    from reflectvlm.generator import Generator

    samples = _samples(run, {run.answers[place].sample for place in places})
    generator = Generator.load(model)
    made = {}
    for place in places:
        answer = run.answers[place]
        if (sample := samples.get(answer.sample)) is not None and sample.images:
            made[place] = _heat(generator, answer, sample)
    return made


def _why_none(run: RunRecord) -> str:
    """Why no answer can be looked at, and what can be done."""
    if run.answers and not any(one.ids for one in run.answers):
        return (
            f"The answers of {run.path} were recorded without their tokens, as in runs from before tokens "
            "were kept. attention=N needs them, and nothing adds them afterwards: train again, or ask its "
            f"model anew: reflectvlm attention model={RunFolder(run.path).model} data=ROWS."
        )
    if any(one.held_out for one in run.answers):
        return (
            f"The held-out answers of {run.path} have no tokens that fit their text, which attention=N "
            "needs: of an answer with more than 8,192 tokens only the text is kept. Leave attention out."
        )
    return (
        f"{run.path} holds no answers of held-out rows, which attention=N looks at. Runs record them where "
        "they have `test` and output.held_out_answers above 0."
    )


def worth_a_look(answers: Sequence[Answer], count: int) -> list[int]:
    """Places of the newest answer to each held-out row, those with the lowest accuracy, or reward, first."""
    newest = {one.sample: place for place, one in enumerate(answers) if one.held_out and one.has_tokens}
    last = max((answers[place].step for place in newest.values()), default=0)
    places = [place for place in newest.values() if answers[place].step == last]
    return sorted(places, key=lambda place: (_worth(answers[place]), place))[:count]


def _worth(answer: Answer) -> float:
    value = answer.parts.get("accuracy", answer.reward)
    return 0.0 if value is None else value


def _samples(run: RunRecord, wanted: set[str]) -> dict[str, Sample]:
    """The held-out rows of these ids, as the recipe reads them."""
    import yaml

    from reflectvlm.building import instantiated

    values: Any = yaml.safe_load(RunFolder(run.path).recipe.read_text(encoding="utf-8"))
    node = values.get("test") if isinstance(values, dict) else None
    if not isinstance(node, dict) or "_target_" not in node:
        raise RecipeError(
            f"The recipe of {run.path} names no held-out rows (test), so there are none to look at. Leave "
            "attention out."
        )
    data: Sequence[Sample] = instantiated(node, "test").data
    rows = (data[place] for place in range(min(len(data), _MOST_ROWS)))
    found = {sample.id: sample for sample in rows if sample.id in wanted}
    if not found:
        raise RecipeError(
            f"None of the recorded answers of {run.path} is to a row of its recipe's test rows."
        )
    return found


def _heat(generator: Generator, answer: Answer, sample: Sample) -> Heat:
    from reflectvlm.attention import token_maps

    assert generator.instruction is not None
    policy = generator.policy
    rollout = as_rollout(answer, policy.prompt(sample, generator.instruction))
    maps = token_maps(policy, rollout)
    weights = np.zeros((len(answer.ids), maps[0].size), maps.dtype)
    weights[[known is not None for known in answer.logprobs]] = maps.reshape(len(maps), -1)
    _, rows, columns = rollout.prompt.grids[0]
    return Heat.of(weights, Grid(1, rows, columns))


def as_rollout(answer: Answer, prompt: Prompt) -> Rollout:
    """The recorded answer as it was: its tokens, forced ones among them, and its blocks in their places."""
    spans: list[Span] = []
    end = 0
    for block in answer.blocks:
        spans += _texts(answer, end, block["after"])
        keep = block.get("keep")
        spans.append(
            Visual(
                image=block["image"],
                keep=None if keep is None else tuple(keep),
                before_sampled=block.get("before_sampled") is True,
            )
        )
        end = block["after"]
    spans += _texts(answer, end, len(answer.ids))
    stop: StopReason = "length" if answer.stop == "length" else "eos"
    return Rollout(
        prompt=prompt, spans=tuple(spans), text=answer.text, stop=stop, offsets=tuple(answer.offsets)
    )


def _texts(answer: Answer, start: int, stop: int) -> list[Span]:
    """Tokens as spans, a new one wherever sampled and forced tokens meet."""
    made: list[Span] = []
    while start < stop:
        forced = answer.logprobs[start] is None
        end = start
        while end < stop and (answer.logprobs[end] is None) == forced:
            end += 1
        known = () if forced else tuple(one for one in answer.logprobs[start:end] if one is not None)
        made.append(Text(ids=tuple(answer.ids[start:end]), trained=not forced, logprobs=known))
        start = end
    return made
