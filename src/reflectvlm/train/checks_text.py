"""Checks of the text that a run is about: its tags through the tokenizer, and where its answers end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rollout.placing import next_trigger, special_id
from reflectvlm.tags import layout_tags
from reflectvlm.train.checks_parts import answer_tags, answer_text, layouts, places
from reflectvlm.train.checks_result import Result
from reflectvlm.train.checks_subject import Subject

_BESIDE = ("", "a", "7", " ", "\n", ".", "</")
"""What a tag may stand beside; each before it is tried with each behind it."""


def tags(subject: Subject) -> Result:
    """Every tag that rewards read and re-attention waits for comes out of the tokenizer as it went in, can
    be sampled, and is asked for by something."""
    wanted, reported = _tags(subject)
    if not wanted and not reported:
        return Result("tags", "not applicable", "no reward and no re-attention reads a tag")
    for tag in wanted:
        if problem := _problem(subject, tag):
            return problem
    for tag in reported:
        if _problem(subject, tag) is not None:
            return Result(
                "tags",
                "warning",
                f"{tag!r}, whose rate is reported, does not come back from the tokenizer as it is",
                "Change tag, or the tag of evaluation and test.",
            )
    if unasked := _unasked(subject):
        return unasked
    return Result("tags", "ok", _spelled(subject.policy, wanted or reported))


def answer_end(subject: Subject) -> Result:
    """The token that ends an answer exists and can be sampled, and gold answers fit into the budget."""
    policy = subject.policy
    ends = policy.end_ids
    if wrong := [number for number in ends if not isinstance(number, int) or number in policy.reserved_ids]:
        return Result(
            "answer end",
            "failed",
            f"the ids that end an answer are {list(ends)}, of which {wrong[0]!r} can never be sampled",
            "The tokenizer lacks <|im_end|> or <|endoftext|>, or they are out of the model's vocabulary: "
            "take tokenizer and model from one folder.",
        )
    return _budget(subject, f"answers end with {policy.decode(ends[:1])!r}")


def _budget(subject: Subject, end: str) -> Result:
    """Gold answers that are written out show what the policy needs, short ones of ours what anybody does."""
    budget = subject.sampling.max_tokens
    owner = "evaluation.max_tokens" if subject.kind == "sft" else "sampling.max_tokens"
    longest = 0
    for what, texts, certain in (
        ("short right answers", _shortest(subject), subject.kind == "rl"),
        ("gold answers", subject.golds, False),
    ):
        lengths = [len(subject.policy.answer(text)[0].ids) for text in texts]
        longest = max([longest, *lengths])
        if long := sum(length > budget for length in lengths):
            return Result(
                "answer end",
                "failed" if certain and long == len(lengths) else "warning",
                f"{long} of {len(lengths)} {what} are longer than {owner}={budget}: up to {longest} tokens",
                f"An answer that is cut off cannot be right: raise {owner} to {longest} or more.",
            )
    known = f"; right ones have up to {longest} tokens, {owner} is {budget}"
    return Result("answer end", "ok", end + known * (longest > 0 and budget < 2**31))


# -- tags -----------------------------------------------------------------------------------------


def _tags(subject: Subject) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tags that something depends on, and those that are only reported."""
    wanted = [tag for layout in layouts(subject.rubric) for tag in layout_tags(layout)]
    wanted += [tag for name in answer_tags(subject.rubric) for tag in (f"<{name}>", f"</{name}>")]
    again = subject.reattention
    wanted += [text for text in (again.trigger, getattr(again, "close", None)) if text]
    wanted += list(subject.sampling.stop)
    return tuple(dict.fromkeys(wanted)), tuple(tag for tag in subject.reported if tag not in wanted)


def _problem(subject: Subject, tag: str) -> Result | None:
    """Why a tag cannot do what it is for."""
    policy = subject.policy
    ids = policy.tokenizer.encode(tag, add_special_tokens=False)
    if banned := [number for number in ids if number in policy.reserved_ids]:
        return Result(
            "tags",
            "failed",
            f"{tag!r} holds token {policy.decode(banned[:1])!r}, which stands for pixels or for nothing and "
            "is never sampled",
            "Choose another tag; policy.new_tags makes one that is a token of its own.",
        )
    is_trigger = tag == subject.reattention.trigger
    if is_trigger and special_id(policy, tag) in policy.end_ids:
        return Result(
            "tags",
            "failed",
            f"the trigger {tag!r} ends the answer, so nothing can follow it",
            "Choose another trigger, e.g. '<back>'.",
        )
    for before, behind in itertools.product(_BESIDE, _BESIDE):
        text = f"{before}{tag}{behind}"
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        if (came := policy.decode(ids)) != text:
            return Result(
                "tags",
                "failed",
                f"{text!r} comes back from the tokenizer as {came!r}",
                f"Rewards and re-attention would never see {tag!r}: choose another tag, or a tokenizer that "
                "neither strips nor normalises around its added tokens.",
            )
        if is_trigger and next_trigger(policy, [*ids, policy.end_ids[0]], tag, 0) is None:
            return Result(
                "tags",
                "failed",
                f"the trigger {tag!r} is not seen in {text!r}",
                "Choose a trigger that is one special token (policy.new_tags), or another spelling.",
            )
    return None


def _unasked(subject: Subject) -> Result | None:
    """A tag that neither the instruction nor a gold answer ever writes may never come."""
    golds, asked = subject.golds, " ".join(one.text for one in subject.instructions)
    known = "".join(golds) if subject.kind == "sft" else "".join((*golds, asked))
    where = f"none of {len(golds)} gold answers" if golds else "the instruction does not"
    if golds and subject.kind != "sft":
        where = f"neither the instruction nor one of {len(golds)} gold answers"
    holds = f"{where} {'name' if not golds else 'holds'}"
    trigger = subject.reattention.trigger
    if trigger and trigger not in known:
        return Result(
            "tags",
            "warning",
            f"{holds} the trigger {trigger!r} of reattention",
            "Nothing is inserted unless the policy writes it: name it in the instruction or in gold answers, "
            "or start from a model that was taught it.",
        )
    if subject.kind == "sft":  # whether gold answers have the layout is what rewards say of them
        return None
    required = [
        f"<{block.tag}>" for layout in layouts(subject.rubric) for block in layout.blocks if block.min
    ]
    required += ["\\boxed" for layout in layouts(subject.rubric) if layout.boxed]
    if missing := [tag for tag in dict.fromkeys(required) if tag not in known]:
        return Result(
            "tags",
            "warning",
            f"{holds} {', '.join(missing)}, which the rewards demand",
            "Name them in the instruction, unless the policy was taught them before.",
        )
    return None


def _spelled(policy: QwenVL, wanted: Sequence[str]) -> str:
    """`one special token each: <REFLECTION>; in pieces: <back> 3`."""
    special = [tag for tag in wanted if special_id(policy, tag) is not None]
    others = [tag for tag in wanted if tag not in special]
    pieces = [f"{tag} {len(policy.tokenizer.encode(tag, add_special_tokens=False))}" for tag in others]
    shown = [f"one special token each: {' '.join(special)}"] if special else []
    shown += [f"in pieces: {', '.join(pieces)}"] if pieces else []
    return f"unchanged by the tokenizer; {'; '.join(shown)}"


def _shortest(subject: Subject) -> list[str]:
    """Short right answers to the rows, if it is known what a right one is."""
    where, found = places(subject.rubric), layouts(subject.rubric)
    if not where:
        return []
    layout = found[0] if found else None
    return [answer_text(prompt.sample.answer, layout, where) for prompt in subject.prompts]
