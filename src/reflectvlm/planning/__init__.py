"""What a recipe needs before anything is loaded: memory of one GPU by part, seconds of a step.

    job (what is computed) -> moments (bytes by part at the instants that can be the fullest) -> verdict

Everything here is arithmetic on a model's sizes; no weight is read and no device asked. `docs/plan.md` has
the formulas and how well they meet what was measured.
"""

from __future__ import annotations

from reflectvlm.planning.job import Adapter, Compute, Job, Load, Training
from reflectvlm.planning.memory import Moment, peak, predict
from reflectvlm.planning.shapes import ModelShape, TextShape, VisionShape

__all__ = [
    "Adapter",
    "Compute",
    "Job",
    "Load",
    "ModelShape",
    "Moment",
    "TextShape",
    "Training",
    "VisionShape",
    "peak",
    "predict",
]
