"""A job from a recipe's values. Nothing is built: numbers and names are read, and where a recipe leaves
something out, the default of what it calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from reflectvlm.planning.job import Adapter, Compute, Job, Load, Training
from reflectvlm.planning.reading import read_shape
from reflectvlm.planning.shapes import ModelShape
from reflectvlm.recipe_check import RecipeError, arguments, check_trains

TEXT = 256
"""Tokens of a question with its instruction, where only the whole row's limit is known (SFT)."""
QUANTIZED = {"nf4": 4, "int8": 8}
TINY_PIXELS = 256 * 16**2
MOST_PIXELS = 12_845_056
"""What the models' own image processors cut an image down to."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What the user says about rows; None is the recipe's limit."""

    prompt: int | None = None
    answer: int | None = None
    visual: int | None = None


def job_of(values: Mapping[str, Any], gpus: int, lengths: Lengths = Lengths()) -> Job:
    """Raises ValueError for a recipe that makes no trainer, and for settings that cannot be."""
    check_trains(values)
    policy = values.get("policy")
    if not isinstance(policy, Mapping):
        raise RecipeError("The recipe has no policy, so there is no model to plan for.")
    shape = _shape(policy)
    compute = _compute(values, gpus)
    kind = _kind(values)
    load = _rows(values, shape, lengths) if kind == "sft" else _rollouts(values, kind, shape, lengths)
    training = _training(values, policy, kind)
    _check_together(training, compute)
    return Job(
        shape=shape,
        training=training,
        load=_shared(load, compute.world),
        compute=compute,
    )


def _check_together(training: Training, compute: Compute) -> None:
    """What a start refuses when the weights are there (`train/zero.py`), said before."""
    if compute.stage == 3 and training.adapter is not None and training.adapter.bits is not None:
        raise ValueError(
            "compute is zero3, and policy.quantize is set: a quantised base cannot be shared. Take "
            "compute=zero2 or ddp, where only adapters are trained anyway."
        )
    if compute.stage and training.moments == 8:
        raise ValueError(
            f"compute is {compute.kind}, and optimizer.bits is 8: ZeRO divides moments of 32 bits. Set "
            "optimizer.bits=32, or take compute=ddp."
        )


def get(node: Mapping[str, Any], name: str, default: Any) -> Any:
    """A value of a node, or the default of what the node calls."""
    if name in node:
        return node[name]
    known = arguments(str(node["_target_"])) if "_target_" in node else {}
    said = known[name].default if name in known else Parameter.empty
    plain = said is None or isinstance(said, bool | int | float | str | tuple)
    return said if plain else default


def _kind(values: Mapping[str, Any]) -> str:
    target = str(values.get("_target_")).rpartition(".")[2]
    kinds = {"RLTrainer": "rl", "SFTTrainer": "sft", "Distiller": "distill"}
    if target not in kinds:
        raise ValueError(
            f"The recipe's _target_ is {values.get('_target_')!r}. A plan knows {', '.join(kinds)}."
        )
    return kinds[target]


def _shape(policy: Mapping[str, Any]) -> ModelShape:
    return read_shape(str(get(policy, "path", "tiny")))


def _compute(values: Mapping[str, Any], gpus: int) -> Compute:
    """`compute=zero2`, or a mapping with `kind`; without any it is that of the trainers, ddp."""
    said = values.get("compute") or {}
    node: Mapping[str, Any] = {"kind": said} if isinstance(said, str) else said
    kind = str(get(node, "kind", "ddp"))
    if gpus == 1 and kind == "ddp":
        kind = "single"
    return Compute(
        kind=kind,  # type: ignore[arg-type]
        world=gpus,
        offload_optimizer=bool(get(node, "offload_optimizer", False)),
        offload_parameters=bool(get(node, "offload_parameters", False)),
        bucket=int(get(node, "bucket", Compute.bucket)),
    )


def _training(values: Mapping[str, Any], policy: Mapping[str, Any], kind: str) -> Training:
    objective = values.get("objective") or {}
    attention = get(policy, "prefix_attention", "auto")
    lora, quantize = policy.get("lora"), policy.get("quantize")
    adapter = None
    if lora:
        adapter = Adapter(rank=int(get(lora, "rank", 16)), bits=QUANTIZED.get(str(quantize)))
    return Training(
        weights=get(policy, "dtype", "float32"),
        products=get(policy, "compute", None),
        frozen=frozenset(get(policy, "freeze_parts", ())),
        rows_only=get(policy, "embeddings", "all") == "new_tags" or bool(lora and policy.get("new_tags")),
        adapter=adapter,
        checkpointing=bool(get(policy, "gradient_checkpointing", False)),
        attention="eager" if get(policy, "attention", "auto") == "eager" else attention,
        chunk=int(get(policy, "chunk", 256)),
        moments=8 if get(values.get("optimizer") or {}, "bits", 32) == 8 else 32,
        reference=kind == "rl" and bool(objective.get("kl")),
        exact_kl=kind == "rl" and get(objective.get("kl") or {}, "estimator", "k3") == "full",
    )


# -- how much ------------------------------------------------------------------------------------------


def _rollouts(values: Mapping[str, Any], kind: str, shape: ModelShape, lengths: Lengths) -> Load:
    sampling = values.get("sampling") or {}
    limit = int(get(values, "max_prompt_tokens", 2048))
    _check_room(lengths.prompt, limit, "prompt=", "max_prompt_tokens")
    _check_room(lengths.visual, limit, "visual=", "max_prompt_tokens")
    visual = _visual(values, shape, lengths, limit)
    rl = kind == "rl"
    prompts = get(values, "prompts_per_step", 8) if rl else get(values, "rows_per_batch", 64)
    return Load(
        kind=kind,  # type: ignore[arg-type]
        prompt=lengths.prompt or max(limit, visual),
        visual=visual,
        answer=lengths.answer or int(get(sampling, "max_tokens", 512)),
        inserted=_inserted(values, visual),
        group=int(get(values, "group_size", 8) if rl else get(values, "samples_per_row", 1)),
        prompts=int(prompts),
        updates=int(get(values, "updates_per_step", 1)) if rl else 1,
        micro_tokens=int(get(values, "micro_tokens", 16_384)) if rl else 16_384,
        max_rows=int(get(values.get("engine") or {}, "max_rows", 64)),
        cuts=float(get(sampling, "top_p", 1.0)) < 1 or bool(get(sampling, "top_k", 0)),
    )


def _rows(values: Mapping[str, Any], shape: ModelShape, lengths: Lengths) -> Load:
    """Of SFT: the longest row, with one image in front of its question."""
    limit = int(get(values, "max_tokens", 4096))
    answer = lengths.answer or 1
    if lengths.prompt is not None:
        _check_room(lengths.prompt + answer, limit, "prompt= and answer= together", "max_tokens")
    if lengths.visual is not None:
        _check_room(lengths.visual + answer, limit, "visual= and answer= together", "max_tokens")
    _check_room(lengths.answer and lengths.answer + 1, limit, "a prompt and answer= together", "max_tokens")
    room = limit - answer
    visual = _visual(values, shape, lengths, limit)
    if lengths.visual is None:
        visual = max(0, min(visual, room - 1))
    prompt = lengths.prompt or max(visual, min(visual + TEXT, room))
    return Load(
        kind="sft",
        prompt=prompt,
        visual=visual,
        answer=lengths.answer or max(1, limit - prompt),
        prompts=int(get(values, "rows_per_step", 16)),
        micro_tokens=int(get(values, "micro_tokens", 16_384)),
        max_rows=int(get(values.get("engine") or {}, "max_rows", 64)),
    )


def _check_room(tokens: int | None, limit: int, what: str, setting: str) -> None:
    if tokens is not None and tokens > limit:
        raise ValueError(
            f"{what} {tokens:,} tokens, but the recipe leaves out rows longer than {setting}={limit:,}. Give "
            f"fewer, or plan with {setting}={tokens}."
        )


def _visual(values: Mapping[str, Any], shape: ModelShape, lengths: Lengths, limit: int) -> int:
    """Of one image of the largest size that the policy takes and the limit lets pass."""
    if lengths.visual is not None:
        return lengths.visual
    policy = values["policy"]
    tiny = shape.vision.side < 20
    pixels = get(policy, "max_pixels", None) or (TINY_PIXELS if tiny else MOST_PIXELS)
    room = min(limit, lengths.prompt or limit)
    return max(0, min(int(pixels) // shape.vision.side**2, room - 1))


def _inserted(values: Mapping[str, Any], visual: int) -> int:
    """Tokens that re-attention puts into an answer: the budget, or its blocks, or at least one."""
    node = values.get("reattention") or {}
    target = str(node.get("_target_", "")).rpartition(".")[2]
    if target not in ("VisualCopy", "VisualRoute"):
        return 0
    share = float(get(node, "m", 50.0)) / 100 if target == "VisualRoute" else 1.0
    blocks = int(visual * share + 2) * int(get(node, "limit", None) or 1)
    budget = get(node, "budget", None)
    return min(blocks, int(budget)) if budget and get(node, "limit", None) else int(budget or blocks)


def _shared(load: Load, world: int) -> Load:
    """What falls to one of so many processes."""
    import dataclasses

    prompts = max(load.updates, -(-load.prompts // world))
    return dataclasses.replace(load, prompts=prompts)
