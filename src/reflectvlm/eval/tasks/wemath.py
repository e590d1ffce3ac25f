"""We-Math (arXiv 2407.01284): 525 problems, each asked whole and in two or three steps, 1,740 rows.

The answer is what follows the last `Answer` of a reply, or the whole reply, without `>`, `<`, `:` and `.`:
its first character, where that is from A to H. A problem is then one of

    IK  inadequate knowledge       a step is wrong, and so is the whole
    IG  inadequate generalisation  all steps are right, the whole is wrong
    CM  complete mastery           the whole is right, and the steps are (strict: all; loose: at least one)
    RM  rote memorisation          the whole is right, and the steps are not (strict: not all; loose: none)

    score = (N - IG / 2 - RM - IK) / N,  N = 525;   IK, IG and CM are shares of N, RM is RM / (RM + CM)

S1 is the accuracy over all steps, S2 and S3 over the wholes of two and of three steps. With the authors'
`knowledge_structure_nodes.json` beside the rows also the 12 domains: the mean over the concepts of each of
the mean over its steps. N is the number of complete problems where not all are asked.

Of two parts here the names differ: what the files call `2steps_multi` is "the whole".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.eval.tasks.figures import mean, unscored
from reflectvlm.eval.tasks.files import first, folders, hub_rows, json_rows, missing
from reflectvlm.eval.types import Ask, Item, Manner, Mark, Reply, Summary

_MARKS = str.maketrans("", "", "><:.")
_LOOKBACK_END = "Your final answer must be one of A, B, C, or D."
"""What Look-Back's loader puts behind every question, though some have an option E."""
_WHOLE = "multi"


@dataclass(frozen=True, kw_only=True)
class WeMath:
    """Example: `WeMath().load(Path("data"))`

    The official rule reads what follows the last `Answer`: ask for `Answer: X` where its figures count.
    """

    asked: Manner = "official"

    @property
    def name(self) -> str:
        return "wemath"

    def load(self, data_dir: Path) -> list[Item]:
        rows, root, pictures = _rows(data_dir)
        domains = _domains(root)
        return [self._item(row, root, pictures, domains) for row in rows]

    def marks(self, replies: Sequence[Reply], ask: Ask | None = None) -> list[Mark]:  # noqa: ARG002
        return [_mark(reply) for reply in replies]

    def summary(self, items: Sequence[Item], marks: Sequence[Mark]) -> Summary:
        pairs = list(zip(items, marks, strict=True))
        values: dict[str, float | None] = {
            **_problems(pairs),
            "accuracy": mean(mark.value for mark in marks),
            "S1": mean(mark.value for item, mark in pairs if item.columns["part"] != _WHOLE),
        }
        for steps in ("2", "3"):
            whole = [
                mark.value
                for item, mark in pairs
                if item.columns["part"] == _WHOLE and item.columns["steps"] == steps
            ]
            values[f"S{steps}"] = mean(whole)
        values |= _by_domain(pairs)
        return Summary(headline="score_strict", values=values, unscored=unscored(marks), mean=False)

    def _item(self, row: Mapping[str, Any], root: Path, pictures: str, domains: Mapping[str, str]) -> Item:
        # `2steps_1`, `3steps_multi`
        steps, part = str(row["key"]).split("steps_")
        question, options = str(row["question"]), str(row["option"])
        asked = f"{question}\n\nOptions: {options}"
        image = row["image_path"]
        concept = str(row.get("knowledge concept", ""))
        return Item(
            id=f"{row['ID']}@{row['key']}",
            question=f"{asked}\n{_LOOKBACK_END}" if self.asked == "lookback" else asked,
            answer=str(row["answer"]).strip(),
            images=(pictures + image if isinstance(image, str) else image,),
            root=root,
            choices=_choices(options),
            columns={
                "problem": str(row["ID"]),
                "steps": steps,
                "part": part,
                "concept": concept,
                "domain": domains.get(concept, ""),
            },
        )


def _mark(reply: Reply) -> Mark:
    rest = reply.text.rsplit("Answer", 1)[-1].strip().translate(_MARKS).strip()
    letter = rest[:1] if rest[:1] in set("ABCDEFGH") else ""
    note = "" if letter else "no letter follows the last 'Answer'"
    return Mark(value=float(letter == reply.item.answer), answer=letter, note=note)


def _problems(pairs: Sequence[tuple[Item, Mark]]) -> dict[str, float | None]:
    """The four kinds and the score; problems with a part that is missing or not scored are left out."""
    found: dict[str, dict[str, float | None]] = defaultdict(dict)
    steps = {}
    for item, mark in pairs:
        found[item.columns["problem"]][item.columns["part"]] = mark.value
        steps[item.columns["problem"]] = int(item.columns["steps"])
    wanted = {name: [*map(str, range(1, count + 1)), _WHOLE] for name, count in steps.items()}
    whole = [
        [parts[part] == 1 for part in wanted[name]]
        for name, parts in found.items()
        if all(parts.get(part) is not None for part in wanted[name])
    ]
    values: dict[str, float | None] = {}
    for manner, enough in (("strict", all), ("loose", any)):
        values |= _kinds(whole, manner, enough)
    return values | {"problems": float(len(whole))}


def _kinds(problems: Sequence[Sequence[bool]], manner: str, enough: Any) -> dict[str, float | None]:
    """Each problem: its steps, then the whole. `enough` says of the steps whether they count as mastered."""
    count = len(problems)
    lacking = sum(not all(steps) for *steps, whole in problems if not whole)
    general = sum(all(steps) for *steps, whole in problems if not whole)
    mastered = sum(enough(steps) for *steps, whole in problems if whole)
    rote = sum(not enough(steps) for *steps, whole in problems if whole)

    def share(value: float, of: int) -> float | None:
        return value / of if of else None

    return {
        f"score_{manner}": share(count - 0.5 * general - rote - lacking, count),
        "IK": share(lacking, count),
        "IG": share(general, count),
        f"CM_{manner}": share(mastered, count),
        f"RM_{manner}": share(rote, rote + mastered),
    }


def _by_domain(pairs: Sequence[tuple[Item, Mark]]) -> dict[str, float | None]:
    concepts: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for item, mark in pairs:
        if item.columns["domain"] and item.columns["part"] != _WHOLE:
            concepts[item.columns["domain"]][item.columns["concept"]].append(mark.value)
    return {
        f"accuracy/domain/{domain}": mean(map(mean, found.values())) for domain, found in concepts.items()
    }


def _rows(data_dir: Path) -> tuple[Sequence[Mapping[str, Any]], Path, str]:
    """The rows, their folder, and where in it the images are."""
    names = ("wemath", "WeMath", "We-Math")
    if file := first(
        data_dir, *(f"{name}/{inner}testmini.json" for name in names for inner in ("", "data/"))
    ):
        pictures = "images/" if (file.parent / "images").is_dir() else ""
        return json_rows(file), file.parent, pictures
    for root in folders(data_dir, *names):
        if rows := hub_rows(root, "testmini"):
            return rows, root, ""
    raise missing(
        "We-Math",
        data_dir,
        "the hub's We-Math/We-Math: wemath/data/testmini-….parquet",
        "github.com/We-Math/We-Math, folder data: wemath/testmini.json, wemath/2steps/image/1-1.png …, "
        "wemath/knowledge_structure_nodes.json",
        "the hub's ShuoY/Look-Back-eval, unzipped into it: wemath/testmini.json, "
        "wemath/images/2steps/image/1-1.png …",
    )


def _domains(root: Path) -> dict[str, str]:
    """Concept -> domain, where the authors' file is."""
    file = first(root, "knowledge_structure_nodes.json", "data/knowledge_structure_nodes.json")
    nodes = json_rows(file) if file else []
    return {str(node["full node"]).split("_")[-1]: str(node["root2"]) for node in nodes}


def _choices(options: str) -> tuple[str, ...]:
    """`A. 3; B. 4;C. 5.` -> ("3", "4", "5"); nothing where they are not lettered from A without a gap."""
    texts, at = [], options.find("A.")
    for letter in "BCDEFGHI":
        following = re.compile(rf"[;；]\s*{letter}\s*\.").search(options, max(at, 0))
        end = following.start() if following else len(options)
        texts.append(options[at + 2 : end].strip().rstrip(";"))
        if following is None:
            break
        at = following.end() - 2
    return tuple(texts) if options.lstrip().startswith("A.") else ()
