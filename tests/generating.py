"""What tests of `reflectvlm generate` ask: a tiny model that carries COPY, pages, and rows about them."""

from __future__ import annotations

import json
from pathlib import Path

from fixtures import favour, make_policy, noise_image
from reflectvlm.cli import main
from reflectvlm.generator import Generator
from reflectvlm.models.carried import carry
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import VisualCopy
from reflectvlm.types import Instruction, SamplingParams

SPECIAL = "<|box_start|>"
COPY = VisualCopy(trigger=SPECIAL)
ASKED = Instruction(text="Look twice.")
DRAWN = ("max_tokens=12", "temperature=1", "seed=6")


def write_work(folder: Path) -> Path:
    """A model that carries COPY, a page, and seven rows without gold answers."""
    policy = favour(make_policy(), [SPECIAL], 4)
    carry(policy.model.config, COPY, ASKED)
    policy.save(folder / "run" / "model")
    rows = []
    for i in range(7):
        noise_image(i).save(folder / f"p{i}.png")
        rows.append({"id": f"row-{i}", "question": f"Page {i}?", "images": [f"p{i}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def generator(reattention: Reattention | None = None) -> Generator:
    sampling = SamplingParams(max_tokens=12, temperature=1)
    return Generator.load("run/model", reattention, sampling=sampling, seed=6, device="cpu")


def ask(*words: str) -> int:
    return main(["generate", "model=run/model", "device=cpu", *words])
