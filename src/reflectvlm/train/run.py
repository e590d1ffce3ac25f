"""What a run is asked for and what it leaves behind; the loop itself is in `loop.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from reflectvlm.protocols import Policy, Tracker
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.ranks import Ranks
from reflectvlm.types import Prompt, Sample, ScoredGroup

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StepResult:
    metrics: Metrics
    groups: Sequence[ScoredGroup]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    folder: Path
    before: Metrics
    after: Metrics
    finished: bool
    """False: a signal or `max_minutes` stopped it; `exit_code` says which."""
    exit_code: int = 0

    @property
    def model(self) -> Path:
        """Folder that `from_pretrained` loads."""
        return self.folder / "model"


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a run is kept and how often it looks up. No setting here changes what is learned."""

    root: str = "runs"
    resume: str = "never"
    """never: a new folder; auto: go on with the newest unfinished run of this name and recipe, from its
    newest valid checkpoint; or a run folder; or one of its checkpoints, which must be valid."""
    save_every: int = 50
    """Steps between checkpoints; 0 for none but the last step's."""
    keep: int = 2
    """Newest checkpoints that stay."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a full disk does: stop the run, or warn and try again at the next save. The last save of a run
    must succeed either way."""
    max_minutes: float | None = None
    """Stop, save and exit with code 75 before so many minutes of this command are over; None is no
    limit."""
    eval_every: int = 0
    """Steps between evaluations on the validation rows; 0 for none."""
    samples_every: int = 10
    """Steps between written rollouts of the training; 0 for none."""
    samples_per_step: int = 4
    """Most rollouts of such a step that are written: best and worst of the first groups."""
    held_out_answers: int = 200
    """Most answers of the evaluations before and after that are written."""
    sample_images: int = 256
    """Longest side, in pixels, of the copies of their pictures that `reflectvlm report` shows; 0: none."""
    trackers: Sequence[Tracker] = ()
    """Further trackers, e.g. wandb; console, JSONL and TensorBoard are always there."""
    checks: bool = True
    """Check at the start what would make the run worthless; `reflectvlm doctor` makes these checks alone."""
    print_every: int = 10
    """Steps between two printed lines when there is no terminal."""
    recipe_yaml: str | None = None
    overrides: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name, least, meaning in (
            ("save_every", 0, "0 saves at the last step only"),
            ("eval_every", 0, "0 is for never"),
            ("samples_every", 0, "0 is for never"),
            ("samples_per_step", 0, "0 is for none"),
            ("held_out_answers", 0, "0 is for none"),
            ("sample_images", 0, "0 keeps no pictures"),
            ("keep", 1, "the newest checkpoint always stays"),
            ("print_every", 1, "1 prints every step"),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"output.{name} is {value}. It must be at least {least}; {meaning}.")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(
                f"output.max_minutes is {self.max_minutes}. It must be above 0; null is no limit."
            )
        if self.on_save_error not in ("stop", "continue"):
            raise ValueError(
                f"output.on_save_error is {self.on_save_error!r}. It must be 'stop' or 'continue'."
            )
        if not isinstance(self.resume, str) or not self.resume:
            raise ValueError(
                f"output.resume is {self.resume!r}. It must be auto, never, or the folder of a run."
            )


class Trainable(Protocol):
    """What the loop needs of a trainer."""

    steps: int
    name: str
    variant: str
    evaluation: Evaluation | None
    test: Evaluation | None
    output: Output
    data: Sequence[Sample]
    row_ids: tuple[str, ...]
    """Ids of the rows of the current step; a batch that breaks the run is reported with them."""
    max_nonfinite: int
    """Batches with a loss or gradient that is no number that a run may leave out."""

    @property
    def policy(self) -> Policy: ...
    @property
    def ranks(self) -> Ranks:
        """The processes that share the run."""
        ...

    @property
    def updater(self) -> Any: ...
    def prepare(self) -> None:
        """Makes what has to exist before the first step: the reference, the optimiser."""
        ...

    def canary_prompts(self) -> Sequence[Prompt]:
        """A few of the first prompts, taken without moving the data cursor."""
        ...

    def step(self, step: int) -> StepResult: ...
    def evaluate(self, evaluation: Evaluation) -> tuple[Metrics, list[ScoredGroup]]: ...
    def state(self) -> dict[str, Any]:
        """What, beside weights and optimiser, a resumed run needs."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...
    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What a resumed run needs beside weights and moments: a reference that moves."""
        ...

    def load_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None: ...
