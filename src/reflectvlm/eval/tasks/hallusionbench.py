r"""HallusionBench (arXiv 2310.14566): 1,129 questions for yes or no, 951 of them with an image.

A row is right, wrong or unclear. With a language model every reply is judged by it, against the sentence
the authors give as the answer; an answer with "incorrect" in it is wrong, else with "correct" right, else
unclear. Without one, a reply is read where there is no doubt: its box, or its first or last word, is yes
or no and the other not the contrary, or it says that it cannot tell; any other is not scored. Unclear is
wrong, but right where a VS question comes without its image (figure 0). An empty reply is wrong everywhere.

    aAcc      right rows
    qAcc      questions whose rows, one per figure, are all right (455)
    fAcc      figures whose rows are all right (346); figure 0 of VS is none
    overall   the mean of the three
    qAcc/easy, qAcc/hard   qAcc over the rows with visual_input 0 or 1, and over those with 2
    yes_bias  share of yes among the replies less that among the answers, where a row that is not right
              counts as the other answer; false_positive_ratio: the share of yes among the rows not right

A question or figure with a row that is not scored is left out, unless another of its rows is wrong. The
prompt is ours, and so figures made with it are not those of the official one. Left out: the diagnosis of
errors (language or vision), which asks a language model to compare replies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reflectvlm.eval.tasks.figures import mean, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing, unique
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary
from reflectvlm.rewards.answers import extract_boxed, extract_tag

Told = Literal["yes", "no", "uncertain"]
_LONGEST_PROMPT = 20_000
_PICTURES = ("images", "hallusion_bench", "")
_LOOKBACK_END = r"? You final answer can only be \boxed{yes} or \boxed{no}."
"""What Look-Back's loader puts behind every question, with its spelling."""
_UNSURE = re.compile(
    r"\b(?:uncertain|unclear|unsure|not (?:sure|certain|clear)|do not know|don't know"
    r"|(?:cannot|can't|can not|unable to|(?:im|not )possible to) (?:be )?"
    r"(?:tell|told|determined?|say|said|answer(?:ed)?|know|known|judged?))\b"
)


@dataclass(frozen=True, kw_only=True)
class HallusionBench:
    """Example: `HallusionBench().load(Path("data"))`"""

    asked: Manner = "official"
    """`lookback` leaves out the rows without an image, and cuts questions at their first question mark."""

    @property
    def name(self) -> str:
        return "hallusionbench"

    def load(self, data_dir: Path) -> list[Item]:
        rows, root, pictures = _rows(data_dir)
        if self.asked == "lookback":
            rows = [row for row in rows if row.get("filename")]
        names = unique([_name(row, *_FIGURE, "question_id") for row in rows])
        return [self._item(row, name, root, pictures) for row, name in zip(rows, names, strict=True)]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        if ask is None:
            return [_by_rule(reply) for reply in replies]
        places = [place for place, reply in enumerate(replies) if reply.text.strip()]
        told = dict(zip(places, ask([judge_prompt(replies[place]) for place in places]), strict=True))
        return [_judged(reply, told.get(place)) for place, reply in enumerate(replies)]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        pairs = list(zip(items, marks, strict=True))
        values = _accuracies(pairs)
        parts = (values["aAcc"], values["qAcc"], values["fAcc"])
        values = {"overall": None if None in parts else mean(parts), **values}
        values["qAcc/easy"] = _whole(pairs, _question, lambda item: item.columns["visual_input"] != "2")
        values["qAcc/hard"] = _whole(pairs, _question, lambda item: item.columns["visual_input"] == "2")
        for category in ("VD", "VS"):
            inside = [pair for pair in pairs if pair[0].columns["category"] == category]
            values |= {f"{name}/{category}": value for name, value in _accuracies(inside).items()}
        return Summary(headline="overall", values=values | _bias(pairs), unscored=unscored(marks), mean=False)

    def _item(self, row: Mapping[str, Any], name: str, root: Path, pictures: str) -> Item:
        question, file, stored = str(row["question"]), row.get("filename"), row.get("image")
        path = (f"{pictures}/" if pictures else "") + str(file).replace("./", "") if file else None
        image = stored if stored is not None else path
        if self.asked == "lookback":
            question = question.split("?")[0] + _LOOKBACK_END
        return Item(
            id=name,
            question=question,
            answer="yes" if int(row["gt_answer"]) == 1 else "no",
            images=() if image is None else (image,),
            root=root,
            columns={
                "details": str(row.get("gt_answer_details", "")),
                **{key: str(row[key]) for key in (*_FIGURE, "question_id", "visual_input")},
            },
        )


_FIGURE = ("category", "subcategory", "set_id", "figure_id")


def _name(row: Mapping[str, Any], *keys: str) -> str:
    return "_".join(str(row[key]) for key in keys)


def _figure(item: Item) -> str:
    return _name(item.columns, *_FIGURE)


def _question(item: Item) -> str:
    return _name(item.columns, "category", "subcategory", "set_id", "question_id")


def _bare(item: Item) -> bool:
    """Asked without the image it would need: figure 0 of VS."""
    return bool(item.columns["category"] == "VS" and item.columns["figure_id"] == "0")


def read(text: str) -> Told | None:
    """What a reply says where there is no doubt, else None."""
    box = extract_boxed(text)
    answer = (box if box is not None else extract_tag(text, "answer") or text).lower()
    words = re.findall(r"[a-z]+", answer[:200])[:1] + re.findall(r"[a-z]+", answer[-200:])[-1:]
    if {"yes", "no"} <= set(words):
        return None
    if "yes" in words:
        return "yes"
    if "no" in words:
        return "no"
    return "uncertain" if _UNSURE.search(answer) else None


def judge_prompt(reply: Reply) -> str:
    """Asks a language model about a reply. Our words, not the official prompt."""
    return (
        "Compare a reply to a question with the answer that is known to be right. Write `correct` if the "
        "reply agrees with it, `incorrect` if it contradicts it, `unclear` if one cannot tell what the reply "
        "claims. Write nothing else.\n\n"
        f"[Question]\n{reply.item.question}\n\n[Right answer]\n{reply.item.columns['details']}\n\n"
        f"[Reply]\n{reply.text[-_LONGEST_PROMPT:]}\n\n[correct, incorrect or unclear]\n"
    )


def _by_rule(reply: Reply) -> Mark:
    if not reply.text.strip():
        return Mark(value=0.0, note="the reply is empty")
    told = read(reply.text)
    if told is None:
        return Mark(value=None, note="neither yes nor no: needs a language model")
    if told == "uncertain":
        return Mark(value=float(_bare(reply.item)), answer=told, note="uncertain")
    return Mark(value=float(told == reply.item.answer), answer=told)


def _judged(reply: Reply, told: str | None) -> Mark:
    if not reply.text.strip():
        return Mark(value=0.0, note="the reply is empty")
    if told is None:
        return Mark(value=None, note="the language model gave no judgement")
    gold, word = reply.item.answer, told.lower()
    if "incorrect" in word:
        return Mark(value=0.0, answer="no" if gold == "yes" else "yes", note="judged incorrect")
    if "correct" in word:
        return Mark(value=1.0, answer=gold, note="judged correct")
    return Mark(value=float(_bare(reply.item)), answer="uncertain", note="judged unclear")


def _accuracies(pairs: Sequence[tuple[Item, Mark]]) -> dict[str, float | None]:
    return {
        "aAcc": mean(mark.value for _, mark in pairs),
        "qAcc": _whole(pairs, _question, lambda _: True),
        "fAcc": _whole(pairs, _figure, lambda item: not _bare(item)),
    }


def _whole(
    pairs: Iterable[tuple[Item, Mark]], group: Callable[[Item], str], counts: Callable[[Item], bool]
) -> float | None:
    """Share of the groups whose rows are all right."""
    groups: dict[str, list[float | None]] = {}
    for item, mark in pairs:
        if counts(item):
            groups.setdefault(group(item), []).append(mark.value)
    return mean(_all_right(values) for values in groups.values())


def _all_right(values: Sequence[float | None]) -> float | None:
    if 0.0 in values:
        return 0.0
    return None if None in values else 1.0


def _bias(pairs: Sequence[tuple[Item, Mark]]) -> dict[str, float | None]:
    """From right or wrong alone, as officially: an unclear row counts as the answer it does not give."""
    scored = [(item.answer == "yes", mark.value == 1.0) for item, mark in pairs if mark.value is not None]
    wrong = [gold for gold, right in scored if not right]
    said = [gold == right for gold, right in scored]
    return {
        "yes_bias": (sum(said) - sum(gold for gold, _ in scored)) / len(scored) if scored else None,
        "false_positive_ratio": sum(not gold for gold in wrong) / len(wrong) if wrong else None,
    }


def _rows(data_dir: Path) -> tuple[Sequence[Mapping[str, Any]], Path, str]:
    """The rows, their folder, and where in it the images are."""
    names = ("hallubench", "hallusionbench", "HallusionBench")
    if file := first(data_dir, *(f"{name}/HallusionBench.json" for name in names)):
        rows = json_rows(file)
        path = next((str(row["filename"]) for row in rows if row.get("filename")), "").replace("./", "")
        there = [place for place in _PICTURES if path and (file.parent / place / path).exists()]
        return rows, file.parent, (there or ["images"])[0]
    for root in folders(data_dir, *names):
        parts = [hub_rows(root, part) or [] for part in ("image", "non_image")]
        if any(parts):
            return [*parts[0], *parts[1]], root, ""
    raise missing(
        "HallusionBench",
        data_dir,
        "the hub's lmms-lab/HallusionBench: hallusionbench/data/image-….parquet and non_image-….parquet",
        "github.com/tianyi-lab/HallusionBench and its hallusion_bench.zip: "
        "hallusionbench/HallusionBench.json, hallusionbench/hallusion_bench/VD/illusion/0_0.png …",
        "the hub's ShuoY/Look-Back-eval, unzipped into it: hallubench/HallusionBench.json, "
        "hallubench/images/VD/illusion/0_0.png …",
    )
