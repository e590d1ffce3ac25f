"""A policy of one's own as a teacher: any model folder, hub name or `tiny`, in this process.

It is asked what the request says and nothing more: an instruction that the model carries is not added. It
looks at the image again as it carries it (`models/carried.py`). What it draws at a temperature above 0
depends on the request and the seed alone; the last bits of its numbers depend on who is decoded with it, so
`Calls` keeps its batches the same. Left out: several processes.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reflectvlm.curate.request_key import content_hash
from reflectvlm.curate.teachers.reasons import nothing
from reflectvlm.curate.types import Request, Said
from reflectvlm.data.images import BadImage, ImageLimits, load_image
from reflectvlm.generator import Generator
from reflectvlm.stages import model_digest
from reflectvlm.types import Instruction, Prompt, Rollout, Sample, SamplingParams


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTeacher:
    """Example: `LocalTeacher(path="tiny")([Request(row="17", purpose="answer", text="How many?")])`"""

    path: str
    """A folder, a hub name or `tiny`. Loaded when it is first asked."""
    batch: int = 16
    """Requests decoded at one time."""
    seed: int = 0
    """Of what is drawn at a temperature above 0."""
    top_p: float = 1.0
    top_k: int = 0
    dtype: str | None = None
    """None: the policy's default."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    """Of each image; None: what the model's processor says."""
    device: str | None = None
    """None: the one that training takes."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """What an image may cost."""
    load: Callable[..., Generator] = Generator.load
    """Makes the generator from the path."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"LocalTeacher.batch is {self.batch}. It must be at least 1.")
        if not self.path:
            raise ValueError("LocalTeacher.path is empty. Give a folder, a hub name or tiny.")
        self._sampling(1, 0.0)  # its own checks

    @functools.cached_property
    def name(self) -> str:
        """Of a folder its content counts, so a model that was trained on is another teacher."""
        digest = model_digest(self.path)
        defaults: dict[str, Any] = {"seed": 0, "top_p": 1.0, "top_k": 0}
        defaults |= dict.fromkeys(("dtype", "min_pixels", "max_pixels"))
        told = {key: value for key in defaults if (value := getattr(self, key)) != defaults[key]}
        more = f" {json.dumps(told, sort_keys=True)}" if told else ""
        return f"local {digest[:16] if digest else self.path}{more}"

    @functools.cached_property
    def generator(self) -> Generator:
        given = {name: getattr(self, name) for name in ("dtype", "min_pixels", "max_pixels", "device")}
        return self.load(self.path, **{name: value for name, value in given.items() if value is not None})

    def __call__(self, requests: Sequence[Request], /) -> list[Said]:
        said: list[Said | None] = [None] * len(requests)
        alike: dict[SamplingParams, list[tuple[int, int, Prompt]]] = defaultdict(list)
        for place, request in enumerate(requests):
            try:
                drawn = int(content_hash(request)[:15], 16)
                prompt = self._prompt(request)
            except BadImage as bad:
                said[place] = nothing("image", str(bad))
            else:
                alike[self._sampling(request.max_tokens, request.temperature)].append((place, drawn, prompt))
        for sampling, asked in alike.items():
            for (place, _, _), one in zip(asked, self._answers(sampling, asked), strict=True):
                said[place] = one
        return [one for one in said if one is not None]

    def _answers(self, sampling: SamplingParams, asked: Sequence[tuple[int, int, Prompt]]) -> list[Said]:
        reattention = self.generator.reattention
        assert reattention is not None
        start = time.monotonic()
        groups = self.generator.rollout_engine.generate(
            [prompt for _, _, prompt in asked],
            1,
            sampling,
            reattention,
            seed=self.seed,
            places=[drawn for _, drawn, _ in asked],
        )
        seconds = (time.monotonic() - start) / len(asked)
        return [self._as_said(group[0], sampling, seconds) for group in groups]

    def _as_said(self, rollout: Rollout, sampling: SamplingParams, seconds: float) -> Said:
        spent: dict[str, Any] = {
            "prompt_tokens": self.generator.policy.prompt_length(rollout.prompt),
            "tokens": len(rollout.sampled_ids),
            "seconds": seconds,
        }
        if rollout.truncated:
            return nothing("cut", f"at {sampling.max_tokens} tokens: {rollout.text[-80:]!r}", **spent)
        if not rollout.text.strip():
            return nothing("empty", "the model ended at once", **spent)
        return Said(text=rollout.text, **spent)

    def _prompt(self, request: Request) -> Prompt:
        images = tuple(load_image(image, request.root, self.limits) for image in request.images)
        sample = Sample(id=request.row, question=request.text, answer="", images=images)
        system = Instruction() if request.system is None else Instruction(system=request.system)
        return self.generator.policy.prompt(sample, system)

    def _sampling(self, max_tokens: int, temperature: float) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=self.top_p, top_k=self.top_k
        )
