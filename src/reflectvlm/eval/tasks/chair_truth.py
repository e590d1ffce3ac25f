"""Which objects are in an image of COCO: those of its instances, and those that people's captions name.

Two forms: COCO's own annotations, and a file that lists the objects of each image. Only the images that are
asked about have their captions read, which takes most of the time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.eval.tasks.chair_words import Objects
from reflectvlm.eval.tasks.files import first, json_rows, read_json

PARTS = ("val2014", "train2014")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which images are asked about: those that `images.txt` names, else `size` of val2014 by `seed`."""

    size: int
    seed: int

    def __call__(self, root: Path, names: Sequence[str], known: Sequence[str]) -> list[str]:
        file = first(root, "images.txt")
        if file is None:
            names = sorted(names)
            return names if len(names) <= self.size else random.Random(self.seed).sample(names, self.size)
        wanted = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if unknown := set(wanted).difference(known):
            raise ValueError(
                f"{file} names {min(unknown)!r}, of which the annotations know nothing. Give file names as "
                "COCO has them, e.g. COCO_val2014_000000000042.jpg, and the annotations of their part of "
                "COCO."
            )
        return list(dict.fromkeys(wanted))


def objects_of_images(root: Path, objects: Objects, draw: Draw) -> dict[str, tuple[str, ...]]:
    """By file name, in the order in which they are asked about; nothing where there are no annotations."""
    if listed := first(root, "objects.jsonl", "objects.json"):
        rows = {str(row["image"]): row["objects"] for row in json_rows(listed)}
        chosen = draw(root, list(rows), list(rows))
        return {name: tuple(dict.fromkeys(_coco_name(one, objects) for one in rows[name])) for name in chosen}
    folder = first(root, "annotations") or root
    parts = [_Part.read(folder, part) for part in PARTS]
    found = [part for part in parts if part is not None]
    if not found:
        return {}
    known = [name for part in found for name in part.names.values()]
    truth: dict[str, set[str]] = {name: set() for name in draw(root, list(found[0].names.values()), known)}
    for part in found:
        part.add(truth, objects)
    return {name: tuple(sorted(one)) for name, one in truth.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """`instances_val2014.json` and `captions_val2014.json`."""

    names: dict[int, str]
    instances: Any
    captions: Any

    @classmethod
    def read(cls, folder: Path, part: str) -> _Part | None:
        instances, captions = (first(folder, f"{kind}_{part}.json") for kind in ("instances", "captions"))
        if instances is None or captions is None:
            return None
        drawn, told = read_json(instances), read_json(captions)
        names = {image["id"]: str(image["file_name"]) for image in (*told["images"], *drawn["images"])}
        return cls(names=names, instances=drawn, captions=told)

    def add(self, truth: dict[str, set[str]], objects: Objects) -> None:
        kinds = {kind["id"]: _coco_name(kind["name"], objects) for kind in self.instances["categories"]}
        for row in self.instances["annotations"]:
            if (here := truth.get(self.names[row["image_id"]])) is not None:
                here.add(kinds[row["category_id"]])
        for row in self.captions["annotations"]:
            if (here := truth.get(self.names[row["image_id"]])) is not None:
                here.update(objects.named(row["caption"]))


def _coco_name(name: str, objects: Objects) -> str:
    return objects.name_of.get(name, name)
