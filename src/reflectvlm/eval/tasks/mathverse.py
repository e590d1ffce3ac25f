"""MathVerse (arXiv 2403.14624): 788 problems in five versions each, 3,940 rows, and 788 without an image.

A language model takes the answer out of the reply, another call of it says 1 or 0: is it the gold answer?
`quick_match` compares the two texts instead. Accuracy over all, by version and by subject and subfield; the
version "Text Only" is asked on request, has a figure of its own, and is in no other.

Without a language model nothing is scored, but for `quick_match`: the answer is then the last box, or
what stands in the last `<answer>`, or the whole reply. The prompts are ours, and so figures made with them
are not those of the official ones, which show six and five examples. The official script asks again for
ever where it is told neither 1 nor 0; here the row is not scored after three times. Left out: the score of
the reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.eval.tasks.figures import accuracies, mean, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary
from reflectvlm.rewards.answers import extract_boxed, extract_tag

TEXT_ONLY = "Text Only"
_LONGEST_PROMPT = 20_000
_OPTION = re.compile(r"^([A-H]) ?:(.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class MathVerse:
    """Example: `MathVerse(text_only=True).load(Path("data"))`"""

    asked: Manner = "official"
    query: Literal["query_cot", "query_wo"] = "query_cot"
    """With reasoning first, or the answer alone. Look-Back asks `query_cot`."""
    quick_match: bool = False
    """True: the extraction is right if it is the gold answer, letter by letter."""
    text_only: bool = False
    """True: also the 788 rows without an image. They are in no figure but their own."""

    def __post_init__(self) -> None:
        if self.asked == "lookback" and (self.query != "query_cot" or self.text_only):
            raise ValueError(
                f"MathVerse(asked='lookback') has query={self.query!r} and text_only={self.text_only}. "
                "Look-Back asks query_cot of the rows with images: leave both out."
            )

    @property
    def name(self) -> str:
        return "mathverse"

    def load(self, data_dir: Path) -> list[Item]:
        items = self._part(data_dir, "testmini")
        return items + self._part(data_dir, "testmini_text_only") if self.text_only else items

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        if ask is None:
            return [self._by_rule(reply) for reply in replies]
        found = _asked(
            ask, [None if not reply.text.strip() else extraction_prompt(reply) for reply in replies]
        )
        answers = [None if text is None else text.replace("Extracted Answer: ", "").strip() for text in found]
        if self.quick_match:
            return [_matched(reply, answer) for reply, answer in zip(replies, answers, strict=True)]
        return _judged(replies, answers, ask)

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        pairs = list(zip(items, marks, strict=True))
        inside = [pair for pair in pairs if pair[0].columns["version"] != TEXT_ONLY]
        by: dict[str, Callable[[Item], list[str]]] = {
            "version": lambda item: [item.columns["version"]],
            "subject": lambda item: [item.columns["subject"]],
            "subfield": lambda item: [f"{item.columns['subject']}/{item.columns['subfield']}"],
        }
        values = accuracies([item for item, _ in inside], [mark for _, mark in inside], by)
        if len(inside) < len(pairs):
            apart = [mark.value for item, mark in pairs if item.columns["version"] == TEXT_ONLY]
            values[f"accuracy/version/{TEXT_ONLY}"] = mean(apart)
        return Summary(headline="accuracy", values=values, unscored=unscored(marks))

    def _by_rule(self, reply: Reply) -> Mark:
        if not self.quick_match:  # an empty one too: it alone would make the accuracy 0
            return Mark(value=None, note="needs a language model to extract and judge the answer")
        if not reply.text.strip():
            return Mark(value=0.0, note="the reply is empty")
        text = reply.text
        return _matched(reply, (extract_boxed(text) or extract_tag(text, "answer") or text).strip())

    def _part(self, data_dir: Path, part: str) -> list[Item]:
        rows, root = _rows(data_dir, part)
        return [self._item(row, root) for row in rows]

    def _item(self, row: Mapping[str, Any], root: Path) -> Item:
        gold, question = str(row["answer"]), str(row.get("question") or "")
        metadata = row.get("metadata") or {}
        bare = row["problem_version"] == TEXT_ONLY
        # A letter among the two files' indices would name two rows.
        prefix = "text-only-" if bare else ""
        return Item(
            id=f"{prefix}{row['sample_index']}",
            question=str(row[self.query]),
            answer=gold.strip(),
            images=() if bare else (_image(row["image"], root),),
            root=root,
            choices=_options(question) if row["question_type"] == "multi-choice" else (),
            lookback_answer=gold if gold != gold.strip() else None,
            columns={
                "gold": gold,
                "question": str(row.get("question_for_eval") or question),
                "version": str(row["problem_version"]),
                "question_type": str(row["question_type"]),
                "subject": str(metadata.get("subject", "")),
                "subfield": str(metadata.get("subfield", "")),
            },
        )


def extraction_prompt(reply: Reply) -> str:
    """Asks a language model for the answer in a reply. Our words, not the official prompt."""
    return (
        "Here is a reply to a problem of mathematics. Write down the final answer it gives - a letter, if it "
        "names an option, else the value with its unit - and nothing else. If it gives none, write None.\n\n"
        f"[Reply]\n{reply.text[-_LONGEST_PROMPT:]}\n\n[Final answer]\n"
    )


def judgement_prompt(item: Item, answer: str) -> str:
    """Asks a language model whether an answer is the gold one. Our words, as above."""
    return (
        "Decide whether an answer to a problem of mathematics agrees with the correct one. Write 1 if both "
        "mean the same, however they are written, else 0; write nothing else.\n\n"
        f"[Problem]\n{item.columns['question']}\n\n[Correct answer]\n{item.columns['gold']}\n\n"
        f"[Answer]\n{answer}\n\n[1 or 0]\n"
    )


def _judged(replies: Sequence[Reply], answers: Sequence[str | None], ask: Ask) -> list[Mark]:
    """Once each: a greedy model says the same to the same prompt."""
    prompts = [
        None if answer is None else judgement_prompt(reply.item, answer)
        for reply, answer in zip(replies, answers, strict=True)
    ]
    told = [None if text is None else text.replace("Judgement:", "").strip() for text in _asked(ask, prompts)]
    return [_verdict(*one) for one in zip(replies, answers, told, strict=True)]


def _verdict(reply: Reply, answer: str | None, told: str | None) -> Mark:
    if not reply.text.strip():
        return Mark(value=0.0, note="the reply is empty")
    if answer is None:
        return Mark(value=None, note="the language model extracted nothing")
    if told not in ("0", "1"):
        return Mark(
            value=None, answer=answer, note=f"the language model judged {(told or '')[:80]!r}, not 0 or 1"
        )
    return Mark(value=float(told), answer=answer, note="judged")


def _matched(reply: Reply, answer: str | None) -> Mark:
    if not reply.text.strip():
        return Mark(value=0.0, note="the reply is empty")
    if answer is None:
        return Mark(value=None, note="the language model extracted nothing")
    return Mark(value=float(answer == reply.item.columns["gold"]), answer=answer[:2000])


def _asked(ask: Ask, prompts: Sequence[str | None]) -> list[str | None]:
    """The replies to those prompts that there are."""
    places = [place for place, prompt in enumerate(prompts) if prompt is not None]
    found: list[str | None] = [None] * len(prompts)
    told = ask([prompt for prompt in prompts if prompt is not None]) if places else []
    for place, text in zip(places, told, strict=True):
        found[place] = text
    return found


def _rows(data_dir: Path, part: str) -> tuple[Sequence[Mapping[str, Any]], Path]:
    names = ("mathverse", "MathVerse")
    spelled = (part, "testmini_text-only") if part != "testmini" else (part,)
    wanted = [f"{name}/{inner}{one}.json" for name in names for inner in ("", "data/") for one in spelled]
    if file := first(data_dir, *wanted):
        return json_rows(file), file.parent
    for root in folders(data_dir, *names):
        if rows := hub_rows(root, part):
            return rows, root
    raise missing(
        "MathVerse" if part == "testmini" else f"MathVerse's {part}",
        data_dir,
        f"the hub's AI4Math/MathVerse: mathverse/{part}.parquet",
        f"the hub's AI4Math/MathVerse or github.com/ZrrSkywalker/MathVerse, with images.zip unpacked: "
        f"mathverse/{part}.json" + (", mathverse/images/images_version_1-4/…" if part == "testmini" else ""),
    )


def _image(value: Any, root: Path) -> Any:
    """Files name an image below `images`, tables hold it."""
    return f"images/{value}" if isinstance(value, str) and (root / "images").is_dir() else value


def _options(question: str) -> tuple[str, ...]:
    """The texts behind `Choices:`, where they are lettered from A without a gap."""
    found = _OPTION.findall(question.partition("Choices:")[2])
    lettered = [letter for letter, _ in found] == [chr(ord("A") + place) for place in range(len(found))]
    return tuple(text.strip() for _, text in found) if lettered else ()
