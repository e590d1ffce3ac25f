"""Putting what re-attention inserts at its place among an answer's tokens: for sampled answers, scripted
ones and gold ones alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.types import Insertion, Prompt, Span, Spans, Text, Visual


@dataclass(frozen=True, kw_only=True)
class Placed:
    """An insertion and the tokens of the tag it goes around: `ids[start:stop]` of the answer."""

    start: int
    stop: int
    insertion: Insertion


@dataclass(frozen=True, kw_only=True)
class AnswerState:
    """Satisfies `protocols.DecodeState`."""

    prompt: Prompt
    sampled: Sequence[int]
    insertions: Sequence[Insertion]
    special: bool
    placed: Sequence[Placed]
    policy: QwenVL
    look: Callable[[int], Float[Tensor, " V"]] | None = None

    def text(self) -> str:
        return self.policy.decode(text_ids(answer_spans(self.sampled, (), self.placed)))

    def ids(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.policy.tokenizer.encode(text, add_special_tokens=False))
        if wrong := sorted({*ids} & {*self.policy.reserved_ids, *self.policy.end_ids}):
            raise ValueError(
                f"Text to be forced spells {self.policy.decode(wrong)!r}, which stands for pixels or ends a "
                f"turn. Force ordinary text, e.g. a closing tag; it was {text[:80]!r}."
            )
        return ids

    def attention(self, image: int) -> Float[Tensor, " V"]:
        if self.look is None:
            raise ValueError(
                "This re-attention asks for attention but has probe=None. Give it an AttentionProbe, "
                "so that attention is watched from the start."
            )
        return self.look(image)


def answer_spans(ids: Sequence[int], logprobs: Sequence[float], placed: Sequence[Placed]) -> Spans:
    """An answer's tokens, all trained, with the insertions around their tags.

    Of a tag of several tokens with a block in front, those after the first are not trained: they were
    sampled without the block, and in this sequence they stand behind it.
    """
    spans: list[Span] = []
    done = 0

    def take(stop: int, trained: bool = True) -> None:
        nonlocal done
        if stop > done:
            piece = slice(done, stop)
            spans.append(Text(ids=tuple(ids[piece]), trained=trained, logprobs=tuple(logprobs[piece])))
        done = stop

    for one in placed:
        assert one.start >= done, "two insertions share a token of their tags"
        if one.insertion.before:
            take(one.start)
            spans.extend(_before_sampled(one.insertion.before))
            if one.stop - one.start > 1:
                take(one.start + 1)
                take(one.stop, trained=False)
        if one.insertion.after:
            take(one.stop)
            spans.extend(one.insertion.after)
    take(len(ids))
    return tuple(spans)


def checked(given: object) -> Insertion | None:
    """What a re-attention has returned. Raises ValueError if that is no `Insertion`."""
    if given is None or isinstance(given, Insertion):
        return given or None
    raise ValueError(
        f"A re-attention returned {given!r}. Return Insertion(before=…) or Insertion(after=…) with spans "
        "such as (Visual(image=0),), or None for nothing."
    )


def text_ids(spans: Spans) -> tuple[int, ...]:
    """Ids of all text spans: sampled and forced ones."""
    return tuple(i for span in spans if isinstance(span, Text) for i in span.ids)


def tag_length(policy: QwenVL, ids: Sequence[int], tag: str) -> int:
    """How many of the last tokens spell the tag that the last one has completed."""
    count = 1
    while count < len(ids) and tag not in policy.decode(ids[len(ids) - count :]):
        count += 1
    return count


def special_id(policy: QwenVL, trigger: str | None) -> int | None:
    """The id of a trigger that is one special token."""
    added = policy.tokenizer.get_added_vocab()
    return int(added[trigger]) if trigger in added else None


def next_trigger(
    policy: QwenVL, ids: Sequence[int], trigger: str, done: int, taken: int = 0
) -> tuple[int, int] | None:
    """(start, stop) of the first tag that is complete after more than `done` tokens. One that the last
    token completes does not count, because nothing comes after it; nor one that shares a token with the
    tag of an insertion, which ends at `taken`, as the second of `<back><back>` may."""
    single = special_id(policy, trigger)
    for stop in range(done + 1, len(ids)):
        if single is not None:
            if ids[stop - 1] == single:
                return stop - 1, stop
            continue
        window = ids[max(0, stop - len(trigger.encode()) - 1) : stop]
        if policy.decode(window).count(trigger) > policy.decode(window[:-1]).count(trigger):
            start = stop - tag_length(policy, window, trigger)
            if start >= taken:
                return start, stop
    return None


def end(placed: Sequence[Placed]) -> int:
    """How many of an answer's tokens the last insertion's tag reaches to."""
    return placed[-1].stop if placed else 0


def place_insertions(
    policy: QwenVL,
    answers: Sequence[tuple[Prompt, Sequence[int]]],
    reattention: Reattention,
    *,
    rows: int = 16,
) -> list[list[Placed]]:
    """What re-attention puts into answers that exist already: gold ones and scripted ones.

    In rounds, the first trigger of every answer, then the second, and so on: what ROUTE chooses depends
    on the blocks before it. `rows` are passed through the policy at one time; bounds memory.
    """
    from reflectvlm.rollout.looking import looks

    placed: list[list[Placed]] = [[] for _ in answers]
    if reattention.trigger is None:
        return placed
    done = [0] * len(answers)
    waiting = list(range(len(answers)))
    while waiting:
        found = {
            i: tag
            for i in waiting
            if (tag := next_trigger(policy, answers[i][1], reattention.trigger, done[i], end(placed[i])))
        }
        waiting = list(found)
        seen = looks(
            policy,
            [(answers[i][0], answers[i][1][: found[i][1] - 1], placed[i]) for i in waiting],
            reattention.probe,
            rows,
        )
        for i, look in zip(waiting, seen, strict=True):
            prompt, ids = answers[i]
            start, stop = found[i]
            state = AnswerState(
                prompt=prompt,
                sampled=ids[:stop],
                insertions=tuple(one.insertion for one in placed[i]),
                special=special_id(policy, reattention.trigger) is not None,
                placed=tuple(placed[i]),
                policy=policy,
                look=look,
            )
            if insertion := checked(reattention(state)):
                placed[i].append(Placed(start=start, stop=stop, insertion=insertion))
            done[i] = stop
    return placed


def recorded(policy: QwenVL, spans: Spans, trigger: str | None) -> list[list[list[Any]]]:
    """The insertions of an answer as plain JSON, which `place_recorded` reads: for each time that the
    trigger stands in the text its blocks, each [image, kept tokens or null]; none where nothing was
    inserted."""
    if trigger is None:
        return []
    found: list[list[list[Any]]] = []
    ids: list[int] = []
    previous: Span | None = None
    for span in spans:
        if isinstance(span, Text):
            ids += span.ids
        else:
            if not isinstance(previous, Visual):
                number = policy.decode(ids).count(trigger) - (not span.before_sampled)
                found += [[] for _ in range(number - len(found) + 1)]
            found[-1].append([span.image, None if span.keep is None else list(span.keep)])
        previous = span
    return found + [[] for _ in range(policy.decode(ids).count(trigger) - len(found))]


def place_recorded(
    policy: QwenVL, prompt: Prompt, ids: Sequence[int], reattention: Reattention, choices: Any
) -> list[Placed]:
    """Recorded blocks at the triggers of a gold answer.

    Raises ValueError if `choices` is not what `recorded` gives, or not of an answer with as many triggers.
    """
    assert reattention.trigger is not None
    special = special_id(policy, reattention.trigger) is not None
    place = getattr(reattention, "place", "auto")
    before = place == "before" or (place == "auto" and special)
    blocks = _checked(choices, prompt)
    tags: list[tuple[int, int]] = []
    # Tags that share a token count one by one here, as `recorded` counts them.
    while found := next_trigger(policy, ids, reattention.trigger, tags[-1][1] if tags else 0):
        tags.append(found)
    if len(tags) != len(blocks):
        raise ValueError(
            f"Row {prompt.sample.id!r} has {len(blocks)} recorded insertions, but {reattention.trigger!r} "
            f"stands {len(tags)} times in its answer. Record them again for this answer."
        )
    shown = [(tag, one) for tag, one in zip(tags, blocks, strict=True) if one]
    if any(second[0] < first[1] for (first, _), (second, _) in itertools.pairwise(shown)):
        raise ValueError(
            f"Row {prompt.sample.id!r} has recorded insertions at two {reattention.trigger!r} that share a "
            "token. Record them again for this answer."
        )
    return [
        Placed(start=start, stop=stop, insertion=Insertion(before=one) if before else Insertion(after=one))
        for (start, stop), one in shown
    ]


def _checked(choices: Any, prompt: Prompt) -> list[tuple[Visual, ...]]:
    try:
        return [
            tuple(
                Visual(image=int(image), keep=None if keep is None else tuple(map(int, keep)))
                for image, keep in blocks
            )
            for blocks in choices
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Row {prompt.sample.id!r} has {choices!r} for recorded insertions. Per insertion a list of "
            "blocks is wanted, each [image, kept tokens or null]: [[[0, [3, 4, 9]]]]."
        ) from error


def _before_sampled(spans: Spans) -> Spans:
    """Marks blocks that stand in front of a token that had already been sampled."""
    return tuple(
        dataclasses.replace(span, before_sampled=True) if isinstance(span, Visual) else span for span in spans
    )
