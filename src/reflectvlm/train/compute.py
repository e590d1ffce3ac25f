"""How a run is spread over processes: what each of them holds whole, and what it holds a share of.

| kind   | weights | gradients | moments | needs |
|--------|---------|-----------|---------|-------|
| single | whole   | whole     | whole   | one process |
| ddp    | whole   | whole     | whole   | nothing |
| zero1  | whole   | whole     | shared  | DeepSpeed |
| zero2  | whole   | shared    | shared  | DeepSpeed |
| zero3  | shared  | shared    | shared  | DeepSpeed |

ZeRO is that of arXiv 1910.02054, as DeepSpeed has it. None of these settings changes what is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

Kind = Literal["single", "ddp", "zero1", "zero2", "zero3"]
KINDS: tuple[Kind, ...] = ("single", "ddp", "zero1", "zero2", "zero3")
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Example: `Compute(kind="zero2", offload_optimizer=True)`"""

    kind: Kind = "ddp"
    """`ddp` with one process is the same as `single`."""
    offload_optimizer: bool = False
    """Moments and float32 weights live in host memory; ZeRO only."""
    offload_parameters: bool = False
    """Shared weights live in host memory too; zero3 only."""
    bucket: int = 50_000_000
    """Numbers that are sent at one time."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"compute.kind is {self.kind!r}. It must be one of {', '.join(KINDS)}.")
        if (self.offload_optimizer or self.offload_parameters) and not self.stage:
            names = [name for name in ("offload_optimizer", "offload_parameters") if getattr(self, name)]
            take = "zero3" if self.offload_parameters else "zero1, zero2 or zero3"
            raise ValueError(
                f"compute.{' and compute.'.join(names)}: set with kind={self.kind!r}, which keeps weights "
                f"and moments where they are worked on. Take {take}, or leave it out."
            )
        if self.offload_parameters and self.stage != 3:
            raise ValueError(
                f"compute.offload_parameters is set with kind={self.kind!r}, whose weights are whole "
                "everywhere. Take zero3."
            )
        if self.bucket < 1:
            raise ValueError(f"compute.bucket is {self.bucket}. It must be at least 1.")

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 is without."""
        return _STAGES.get(self.kind, 0)

    def check(self, world: int) -> None:
        """Raises ValueError if this cannot run with so many processes, or what it needs is not installed."""
        if self.kind == "single" and world > 1:
            raise ValueError(
                f"compute is single, but {world} processes were started. Take compute=ddp, zero1, zero2 or "
                "zero3, or start one process."
            )
        if self.stage and find_spec("deepspeed") is None:
            raise ValueError(
                f"compute={self.kind} needs DeepSpeed, which is not installed: "
                "pip install 'reflectvlm[deepspeed]'. compute=ddp needs nothing."
            )

    def deepspeed(self, *, max_grad_norm: float, half: bool) -> dict[str, Any]:
        """DeepSpeed's configuration. Passes, accumulation and the rate are ours; `half`: weights are bfloat16
        on the device, with float32 ones beside the moments. For them DeepSpeed's stage 1 is an optimiser of
        another kind, whose state a checkpoint could not hold, so gradients are shared as well."""
        zero: dict[str, Any] = {
            "stage": max(2, self.stage) if half else self.stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": self.bucket,
            "allgather_bucket_size": self.bucket,
        }
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.stage == 3:
            zero |= {"stage3_prefetch_bucket_size": self.bucket, "stage3_max_reuse_distance": 0}
            if self.offload_parameters:
                zero["offload_param"] = {"device": "cpu"}
        made: dict[str, Any] = {
            # A pass is as large as a number of tokens allows, so these two count nothing.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if half:
            made |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
        return made
