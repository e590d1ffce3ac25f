"""What makes a prompt of a row, without a model's weights: tokenizer, image processor, instruction.

`settings` is a digest of each, of all that decides a prompt and of nothing else: special tokens beside those
that the chat template writes are left out of the tokenizer's, because a question's text never becomes one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from reflectvlm.models.chat import chat_spans
from reflectvlm.models.loading import load_config, load_image_processor, load_tokenizer
from reflectvlm.spans import VisionIds
from reflectvlm.types import Instruction, Sample, Spans

_STAND_IN = Image.new("RGB", (1, 1))
_PROCESSING = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "resample",
    "rescale_factor",
    "size",
    "temporal_patch_size",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptMaker:
    """Example: `PromptMaker.load("tiny").spans("How many?", 1)`"""

    tokenizer: Any
    image_processor: Any
    vision: VisionIds
    instruction: Instruction = field(default_factory=Instruction)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        instruction: Instruction | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> PromptMaker:
        config = load_config(model)
        return cls(
            tokenizer=load_tokenizer(model),
            image_processor=load_image_processor(model, min_pixels, max_pixels),
            vision=VisionIds(config.vision_start_token_id, config.image_token_id, config.vision_end_token_id),
            instruction=instruction or Instruction(),
        )

    @classmethod
    def of(cls, policy: Any, instruction: Instruction) -> PromptMaker:
        """As a policy makes prompts."""
        return cls(
            tokenizer=policy.tokenizer,
            image_processor=policy.image_processor,
            vision=policy.vision,
            instruction=instruction,
        )

    def spans(self, question: str, images: int) -> Spans:
        sample = Sample(id="", question=question, answer="", images=(_STAND_IN,) * images)
        return chat_spans(self.tokenizer, self.vision, sample, self.instruction)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which the image processor resizes. Raises ValueError for extreme shapes."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.image_processor
        rows, columns = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
        return columns, rows

    def resized(self, image: Image.Image) -> Image.Image:
        """The image as the processor has it after its first step; resized again it stays what it is."""
        return image.resize(self.size(*image.size), self.image_processor.resample)

    @property
    def settings(self) -> dict[str, str]:
        """Digests by part: equal ones make equal prompts."""
        processor = self.image_processor
        processing = {name: getattr(processor, name, None) for name in _PROCESSING}
        said = self.instruction
        return {
            "tokenizer": _digest(_tokenizer(self.tokenizer)),
            "image processor": _digest({**processing, "size": dict(processor.size)}),
            "instruction": _digest([said.text, said.place, said.system]),
        }


def _tokenizer(tokenizer: Any) -> Any:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    template = tokenizer.chat_template or ""
    added = backend.pop("added_tokens", [])
    backend.pop("padding", None)
    backend.pop("truncation", None)
    kept = [token for token in added if not token.get("special") or token["content"] in str(template)]
    return [backend, template, sorted((token["id"], token["content"]) for token in kept)]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
