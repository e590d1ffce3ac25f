"""CHAIR (arXiv 1809.02156): which of the objects that a caption names are not in the image?

CHAIRi = wrong mentions / mentions, each mention counted; CHAIRs = captions with any wrong one / captions;
recall = objects of the image that are named / objects of the image. The first two are better when lower,
and a caption that says nothing makes no mistake: read them beside the recall and the mean of mentions.

An image's objects are those of COCO's instances and those that its five captions name, read as replies are
(`chair_words.py`). Mark 1: no wrong mention; its answer lists the mentions, from which the figures are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reflectvlm.eval.tasks.chair_truth import PARTS, Draw, objects_of_images
from reflectvlm.eval.tasks.chair_words import Objects
from reflectvlm.eval.tasks.figures import mean, unscored
from reflectvlm.eval.tasks.files import first, missing
from reflectvlm.eval.types import Ask, Item, Mark, Reply, Summary

_WAYS = (
    "images.cocodataset.org/annotations/annotations_trainval2014.zip and zips/val2014.zip, unpacked: "
    "CHAIR/annotations/instances_val2014.json, CHAIR/annotations/captions_val2014.json and "
    "CHAIR/val2014/COCO_val2014_000000000042.jpg …; CHAIR/images.txt, a file name on each line, chooses "
    "images, the train2014 ones too if their annotations and folder are there",
    "objects that are known already, as the POPE repository keeps them: CHAIR/objects.jsonl with lines "
    '{"image": "COCO_val2014_000000000042.jpg", "objects": ["dog"]}, and CHAIR/val2014/',
)
_BETWEEN = ", "


@dataclass(frozen=True, kw_only=True)
class CHAIR:
    """Example: `CHAIR(size=500).load(Path("eval_data"))` reads `eval_data/CHAIR`."""

    size: int = 500
    """Images, drawn from all of val2014 by `seed` where no `images.txt` names them."""
    seed: int = 0
    question: str = "Describe this image in detail."
    synonyms: str | None = None
    """File of the authors' list (github.com/LisaAnne/Hallucination, data/synonyms.txt); None: our own list.
    Figures of the two are not comparable."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"CHAIR.size is {self.size}. It must be at least 1.")
        if not self.question.strip():
            raise ValueError("CHAIR.question is empty. Say what is asked of every image.")
        if self.synonyms is not None and not Path(self.synonyms).is_file():
            raise ValueError(
                f"CHAIR.synonyms is {self.synonyms!r}, and there is no such file. Give the path of the "
                "authors' synonyms.txt, or leave it out for our own list."
            )

    @property
    def name(self) -> str:
        return "chair" if self.synonyms is None else "chair_official_words"

    @property
    def objects(self) -> Objects:
        return Objects.ours() if self.synonyms is None else Objects.official(Path(self.synonyms))

    def load(self, data_dir: Path) -> list[Item]:
        root = first(data_dir, "CHAIR", "chair") or data_dir / "CHAIR"
        truth = objects_of_images(root, self.objects, Draw(size=self.size, seed=self.seed))
        if not truth:
            raise missing("CHAIR", data_dir, *_WAYS)
        return [self._item(root, name, present) for name, present in truth.items()]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:
        """Nothing is left for a language model."""
        del ask
        objects = self.objects
        return [_mark(reply, objects.named(reply.text)) for reply in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        """Of the marks of this task: they say what was named. A caption that is not there is out of `chair_s`
        and stays in the recall."""
        scored = [
            (_listed(mark.answer), set(item.columns["objects"]))
            for item, mark in zip(items, marks, strict=True)
            if mark.value is not None or mark.note == _NO_CAPTION
        ]
        written = [mark.value for mark in marks if mark.value is not None]
        wrong = [sum(name not in truth for name in named) for named, truth in scored]
        mentions = sum(len(named) for named, _ in scored)
        present = sum(len(truth) for _, truth in scored)
        seen = sum(len(truth.intersection(named)) for named, truth in scored)
        values: dict[str, float | None] = {
            "chair_i": sum(wrong) / mentions if mentions else None,
            "chair_s": mean(1.0 - value for value in written),
            "recall": seen / present if present else None,
            "mentions": mean(float(len(named)) for named, _ in scored),
            "names_nothing": mean(float(not named) for named, _ in scored),
        }
        return Summary(headline="chair_i", values=values, unscored=unscored(marks), mean=False)

    def _item(self, root: Path, name: str, present: tuple[str, ...]) -> Item:
        folder = next((part for part in PARTS if part in name and (root / part).is_dir()), "")
        return Item(
            id=name,
            question=self.question,
            answer="",
            images=(f"{folder}/{name}" if folder else name,),
            root=root,
            columns={"objects": present},
        )


_NO_CAPTION = "no caption, so nothing to look for mistakes in"


def _mark(reply: Reply, named: Sequence[str]) -> Mark:
    if not reply.text.strip():
        return Mark(value=None, note=_NO_CAPTION)
    present = reply.item.columns["objects"]
    wrong = [name for name in named if name not in present]
    note = f"not in the image: {_BETWEEN.join(wrong)}" if wrong else ""
    return Mark(value=float(not wrong), answer=_BETWEEN.join(named), note=note)


def _listed(answer: str) -> list[str]:
    return answer.split(_BETWEEN) if answer else []
