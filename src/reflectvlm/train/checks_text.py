"""Checks of the text that a run is about: its tags through the tokenizer, and where its answers end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rollout.placing import next_trigger, special_id
from reflectvlm.tags import layout_tags
from reflectvlm.train.checks_parts import answer_tags, answer_text, layouts, parts, places
from reflectvlm.train.checks_result import Result, Status
from reflectvlm.train.checks_subject import Subject

_BESIDE = ("", "a", "7", " ", "\n", ".", "</")
"""What a tag may stand beside; each before it is tried with each behind it."""
_LONG = 30
"""Characters from which on an answer may well be said in fewer."""


def tags(subject: Subject) -> Result:
    """Every tag that rewards read and re-attention waits for comes out of the tokenizer as it went in, can
    be sampled, and is asked for by something."""
    wanted, reported = _tags(subject)
    if not wanted and not reported:
        return Result("tags", "not applicable", "no reward and no re-attention reads a tag")
    problems = [problem for tag in wanted if (problem := _problem(subject, tag))]
    if problems:
        return min(problems, key=lambda one: one.status != "failed")  # of equals the first
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
            "failed" if wrong[0] == ends[0] else "warning",  # gold answers end with the first
            f"the ids that end an answer are {list(ends)}, of which {wrong[0]!r} can never be sampled",
            "The tokenizer lacks <|im_end|> or <|endoftext|>, or they are out of the model's vocabulary: "
            "take tokenizer and model from one folder.",
        )
    return _budget(subject, f"answers end with {policy.decode(ends[:1])!r}")


def _budget(subject: Subject, end: str) -> Result:
    """Gold answers that are written out show what the policy needs, short ones of ours what anybody does."""
    budget = subject.sampling.max_tokens
    never = _never_fits(subject, budget)
    owner = "evaluation.max_tokens" if subject.kind == "sft" else "sampling.max_tokens"
    longest = 0
    for what, texts in (("short right answers", _shortest(subject)), ("gold answers", subject.golds)):
        lengths = [len(subject.policy.answer(text)[0].ids) for text in texts]
        longest = max([longest, *lengths])
        if long := sum(length > budget for length in lengths):
            return Result(
                "answer end",
                "failed" if never else "warning",
                f"{long} of {len(lengths)} {what} are longer than {owner}={budget}: up to {longest} tokens",
                f"An answer that is cut off cannot be right: raise {owner} to {longest} or more.",
            )
    known = f"; right ones have up to {longest} tokens, {owner} is {budget}"
    return Result("answer end", "ok", end + known * (longest > 0 and budget < 2**31))


def _never_fits(subject: Subject, budget: int) -> bool:
    """Whether RL can never see a right answer: not even without a layout, without the token at the end, and
    with no reward of the user's own to learn from. A long gold answer may have a short equal."""
    where, known = places(subject.rubric), parts(subject.rubric)
    if subject.kind != "rl" or not where or not all(part.own for part in known):
        return False
    answers = [prompt.sample.answer for prompt in subject.prompts if len(prompt.sample.answer) <= _LONG]
    bare = [subject.policy.answer(answer_text(answer, None, where[:1]))[0] for answer in answers]
    return bool(bare) and min(len(text.ids) - 1 for text in bare) > budget


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
    """Why a tag cannot do what it is for. It stops a run that waits for the tag: as a trigger, or in rewards
    that are trained on."""
    policy = subject.policy
    ids = policy.tokenizer.encode(tag, add_special_tokens=False)
    is_trigger = tag == subject.reattention.trigger
    needed = is_trigger or (subject.kind != "sft" and tag not in subject.sampling.stop)
    fatal: Status = "failed" if needed else "warning"
    if banned := [number for number in ids if number in policy.reserved_ids]:
        return Result(
            "tags",
            fatal,
            f"{tag!r} holds token {policy.decode(banned[:1])!r}, which stands for pixels or for nothing and "
            "is never sampled",
            "Choose another tag; policy.new_tags makes one that is a token of its own.",
        )
    if is_trigger and special_id(policy, tag) in policy.end_ids:
        return Result(
            "tags",
            "failed",
            f"the trigger {tag!r} ends the answer, so nothing can follow it",
            "Choose another trigger, e.g. '<back>'.",
        )
    return _changed(policy, tag, fatal) or (_unseen(policy, tag) if is_trigger else None)


def _beside(tag: str) -> list[str]:
    return [f"{before}{tag}{behind}" for before, behind in itertools.product(_BESIDE, _BESIDE)]


def _changed(policy: QwenVL, tag: str, fatal: Status) -> Result | None:
    """A tag that is lost wherever it stands stops a run; one that loses a space beside it does not."""
    came = {
        text: policy.decode(policy.tokenizer.encode(text, add_special_tokens=False)) for text in _beside(tag)
    }
    changed = next((text for text in came if came[text] != text), None)
    if changed is None:
        return None
    lost = not any(tag in text for text in came.values())
    return Result(
        "tags",
        fatal if lost else "warning",
        f"{changed!r} comes back from the tokenizer as {came[changed]!r}",
        f"Rewards and re-attention {'would never' if lost else 'may not'} see {tag!r}: choose another tag, "
        "or a tokenizer that neither strips nor normalises around its added tokens.",
    )


def _unseen(policy: QwenVL, trigger: str) -> Result | None:
    texts = _beside(trigger)
    unseen = [
        text
        for text in texts
        if next_trigger(
            policy,
            [*policy.tokenizer.encode(text, add_special_tokens=False), policy.end_ids[0]],
            trigger,
            0,
        )
        is None
    ]
    if not unseen:
        return None
    return Result(
        "tags",
        "failed" if len(unseen) == len(texts) else "warning",
        f"the trigger {trigger!r} is not seen in {unseen[0]!r}",
        "Choose a trigger that is one special token (policy.new_tags), or another spelling.",
    )


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
