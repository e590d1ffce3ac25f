"""What is asked of vLLM and what comes back, by whichever way it is reached.

A prompt has two forms, and mistaking one for the other gives nonsense that trains without an error:

    collapsed   one image token for each image block: what vLLM takes together with the images
    expanded    as many as the image has visual tokens: what the trainer, and the model, run on

`Backend` is all that the engine knows of vLLM. `vllm_backends.py` has the two real ones; tests have others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reflectvlm.spans import VisionIds
from reflectvlm.types import Prompt, Spans, Text

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer from where it stands to its next stop, with sampling parameters of its own."""

    ids: tuple[int, ...]
    """Prompt and answer so far, collapsed."""
    images: tuple[Image, ...]
    """One for each image token in `ids`; an image that is shown again is here again."""
    image_tokens: tuple[int, ...]
    """How many visual tokens each of them has for the trainer."""
    image_id: int
    """The image token."""
    max_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]
    """Ids that end it; they stay in what comes back."""
    stop: tuple[str, ...]
    """Texts that end it. To save work only: where an answer stops is decided on its ids afterwards."""
    banned: tuple[int, ...]

    @property
    def expanded(self) -> tuple[int, ...]:
        counts = iter(self.image_tokens)
        repeated = ((one,) * (next(counts) if one == self.image_id else 1) for one in self.ids)
        return tuple(one for same in repeated for one in same)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was sampled for one request."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """One per id, at the request's temperature."""
    prompt_ids: tuple[int, ...]
    """The prompt as vLLM ran it: expanded, by its own image processor."""


class Backend(Protocol):
    """A vLLM engine. All calls of one rank's engine come from one thread, in the order

    [load_weights] wake [reset_caches] generate ... generate sleep
    """

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in their order, each drawn with its own seed."""
        ...

    def load_weights(self) -> None:
        """The policy's weights of now become vLLM's. With several processes all of them call it together."""
        ...

    def reset_caches(self, *, encoder: bool) -> None:
        """Forgets keys and values of prompts, processed images and, if asked, their features: all that
        earlier weights have left."""
        ...

    def wake(self) -> None:
        """Makes it ready to generate."""
        ...

    def sleep(self) -> bool:
        """Gives back the memory it can do without. True if its weights are gone and must be loaded again."""
        ...


def collapse(spans: Spans, vision: VisionIds) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(collapsed ids, number of the image at each image token). Every block must be a whole image."""
    ids: list[int] = []
    images: list[int] = []
    for span in spans:
        if isinstance(span, Text):
            ids += span.ids
        else:
            assert span.keep is None, "vLLM cannot show a part of an image"
            ids += vision
            images.append(span.image)
    return tuple(ids), tuple(images)


def check_prompt(request: Request, completion: Completion, prompt: Prompt) -> None:
    """Raises ValueError unless vLLM has run the very prompt that the trainer will."""
    ours, theirs = request.expanded, completion.prompt_ids
    if ours == theirs:
        return
    counts = tuple(_runs(theirs, request.image_id))
    if counts != request.image_tokens:
        raise image_mismatch(f"Row {prompt.sample.id!r}", request.image_tokens, counts)
    at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    raise ValueError(
        f"Row {prompt.sample.id!r}: vLLM ran a prompt of {len(theirs)} tokens that is not the trainer's of "
        f"{len(ours)}; they part at token {at}. The two must have the same tokenizer and chat template: let "
        "vLLM load the folder that the policy was loaded from."
    )


def image_mismatch(what: str, ours: Sequence[int], theirs: Sequence[int]) -> ValueError:
    """vLLM's image processor has made other grids than the policy's."""
    return ValueError(
        f"{what}: the policy cut its images into {list(ours)} visual tokens, vLLM into {list(theirs)}, so "
        "these rollouts are not those that would be trained on. Give vLLM the policy's limits "
        "(policy.min_pixels, policy.max_pixels): a server by --mm-processor-kwargs "
        '\'{"min_pixels": …, "max_pixels": …}\'.'
    )


def _runs(ids: Sequence[int], wanted: int) -> list[int]:
    """Lengths of the runs of one id."""
    lengths: list[int] = []
    previous: int | None = None
    for one in ids:
        if one == wanted:
            if previous == wanted:
                lengths[-1] += 1
            else:
                lengths.append(1)
        previous = one
    return lengths
