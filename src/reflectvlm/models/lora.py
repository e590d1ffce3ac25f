"""LoRA (arXiv 2106.09685): of each chosen linear layer only a correction of low rank trains,

    y = W x + (alpha / rank) B A x,    A [rank, in], B [out, rank], B = 0 at the start.

peft puts its layers into the stock model (`inject_adapter_in_model`), so the model object stays what it was:
packing, checkpointing, rollouts and the fused head know nothing of adapters. The base is frozen; the rows of
new tags train beside the adapters (`freezing.py`). A begins as `seed` says, and both are in float32
whatever the base is in.

What an adapter is switched off for, what of it is stored and how it is merged: `adapters.py`, `export.py`.

Left out: dropout (see `LoRA.dropout`); initialisations that change the base (PiSSA, OLoRA, LoftQ), because
the model with its adapters switched off is the reference of the KL term; an adapter on the head, whose weight
the log-probs read directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from reflectvlm.models.freezing import (
    Embeddings,
    Part,
    freeze,
    part_of,
    train_only_rows,
    widen_trained_rows,
)
from reflectvlm.models.quantized import quantized_layers

Layers: TypeAlias = Sequence[str] | Literal["all"]
"""Ends of names, such as q_proj or mlp.down_proj; or all linear layers of the part."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which layers get adapters, and how large ones.

    Example: `load_policy("tiny", lora=LoRA(rank=8))`; in a recipe `policy.lora: {_target_:
    reflectvlm.models.lora.LoRA, rank: 8}`
    """

    rank: int = 16
    alpha: float = 32.0
    """Corrections are scaled by alpha / rank, so that another rank needs no other learning rate."""
    language: Layers = "all"
    vision: Layers = ()
    projector: Layers = ()
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A begins; B is 0 either way, so the policy begins as the base."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732), for high ranks."""
    dora: bool = False
    """DoRA (arXiv 2402.09353): the length of each row of W trains by itself. Slower."""
    dropout: float = 0.0
    """Must be 0. Log-probs under dropout are those of another policy than the one that sampled, so the ratio
    would not be 1 before the first update, and rows that share a prompt would share its holes."""
    seed: int = 0
    """Of A."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA.rank is {self.rank}. It must be at least 1; 8 to 64 are usual.")
        if not self.alpha > 0:
            raise ValueError(f"LoRA.alpha is {self.alpha}. It must be above 0.")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(
                f"LoRA.init is {self.init!r}. It must be 'kaiming' or 'gaussian': others change the base, "
                "which is the reference once the adapters are switched off."
            )
        if self.dropout != 0:
            raise ValueError(
                f"LoRA.dropout is {self.dropout}. It must be 0: with dropout the trainer's log-probs are not "
                "those of the policy that sampled. A lower rank or optimizer.weight_decay holds back as well."
            )
        for part, layers in self.by_part.items():
            if isinstance(layers, str) and layers != "all":
                raise ValueError(f"LoRA.{part} is {layers!r}. It is a list of names, [{layers}], or 'all'.")
        if not any(self.by_part.values()):
            raise ValueError("LoRA names no layers. Give language, vision or projector a list, or 'all'.")

    @property
    def by_part(self) -> Mapping[Part, Layers]:
        return {"vision": self.vision, "projector": self.projector, "language": self.language}


def check_lora(lora: LoRA | None, dtype: str, compute: str | None, new_tags: Sequence[str]) -> None:
    """Raises ValueError, before anything is loaded, for what is no LoRA, and for a base in which new tags'
    rows cannot train: they are float32, and meet the weights of a coarser base only under autocast."""
    if lora is None:
        return
    if not isinstance(lora, LoRA):
        raise ValueError(  # noqa: TRY004 - what a user wrote in a recipe
            f"policy.lora is {lora!r}. It takes LoRA, in a recipe "
            "{_target_: reflectvlm.models.lora.LoRA, rank: 16}, or null."
        )
    if new_tags and dtype in ("bfloat16", "float16") and compute is None:
        raise ValueError(
            f"policy.dtype is {dtype} and the rows of new_tags train, in float32. Set policy.compute="
            "bfloat16, in which both are multiplied, or policy.dtype=float32."
        )


def choose_what_trains(
    model: Any,
    tags: Sequence[int],
    *,
    freeze_parts: Sequence[Part] = (),
    embeddings: Embeddings = "all",
    lora: LoRA | None = None,
) -> None:
    """Parts and rows (`freezing.py`), or adapters and the rows of `tags`; of a quantised model without
    adapters nothing, for whole numbers have no gradient."""
    if lora is not None:
        add_lora(model, lora, freeze_parts)
        if tags:
            train_only_rows(model, tags)
            widen_trained_rows(model)
        return
    if any(quantized_layers(model)):
        model.requires_grad_(False)
        return
    freeze(model, freeze_parts)
    if embeddings == "new_tags":
        train_only_rows(model, tags)


def add_lora(model: Any, lora: LoRA, freeze_parts: Sequence[Part] = ()) -> None:
    """Freezes the model and puts adapters into it, in place. What `freeze_parts` names gets none.

    Raises ValueError for a part that is to be frozen and adapted, and for names that match nothing.
    """
    if isinstance(freeze_parts, str) or (unknown := [p for p in freeze_parts if p not in get_args(Part)]):
        wrong = freeze_parts if isinstance(freeze_parts, str) else unknown
        raise ValueError(f"freeze_parts is {wrong!r}. It is a list of some of {get_args(Part)}.")
    for part in freeze_parts:
        if lora.by_part[part]:
            raise ValueError(
                f"freeze_parts names {part}, and LoRA.{part} adapts it. Take it out of freeze_parts (with "
                f"LoRA the base is frozen anyway), or set policy.lora.{part}=[]."
            )
    targets = [name for part, layers in lora.by_part.items() for name in _named(model, part, layers)]
    model.requires_grad_(False)
    _inject(model, lora, targets)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.promote_types(torch.float32, parameter.dtype))


def _named(model: Any, part: Part, layers: Layers) -> list[str]:
    """Full names of the part's linear layers that `layers` means."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(name) == part
    ]
    if layers == "all":
        return linear
    found = {end: [name for name in linear if f".{name}".endswith(f".{end}")] for end in layers}
    if missed := [end for end, names in found.items() if not names]:
        ends = sorted({_end(name) for name in linear})
        raise ValueError(
            f"LoRA.{part} names {missed}, and no linear layer of that part is called so. It has {ends}; "
            "the head cannot be adapted."
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _end(name: str) -> str:
    """What tells a layer from others of its block: `mlp.0` of `visual.merger.mlp.0`, else the last word."""
    *before, last = name.split(".")
    return f"{before[-1]}.{last}" if last.isdigit() and before else last


def _inject(model: Any, lora: LoRA, targets: Sequence[str]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "policy.lora needs peft, which is not installed. Install the extra `reflectvlm[lora]`, or set "
            "policy.lora=null."
        ) from error
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number scales
        target_modules=list(targets),
        init_lora_weights=True if lora.init == "kaiming" else "gaussian",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
    )
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(lora.seed)
    try:
        inject_adapter_in_model(settings, model)
    finally:
        torch.set_rng_state(state)
