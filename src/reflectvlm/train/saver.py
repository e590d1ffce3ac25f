"""Checkpoints written while training goes on.

`save` copies what is to be kept into host memory and returns; a thread checks, writes, hashes and
flushes it. Training stops for the copy alone, and for a save that is still being written when the next
one is due: one set of copies at a time bounds the memory.

A save that failed is told by the next call of `save` or `wait`. Left out: pinned memory for copies from
a GPU, and processes (the disk is what takes time, and hashing lets other threads run).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reflectvlm.train.checkpoint import CheckpointStore
from reflectvlm.train.packing import JSON


class BrokenWeights(RuntimeError):
    """A tensor to be kept holds NaN or infinity. No checkpoint is made of it, so that none which is good
    goes for it."""


@dataclass
class Saver:
    """Writes into a store, one checkpoint at a time. Call `wait` before the process ends."""

    store: CheckpointStore
    seconds: float = field(default=0.0, init=False)
    """What the slowest save has taken, copy and disk."""
    saved: int | None = field(default=None, init=False)
    """Step of the newest checkpoint that is safe on the disk."""
    _thread: threading.Thread | None = field(default=None, init=False, repr=False)
    _failure: BaseException | None = field(default=None, init=False, repr=False)

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        ready: Collection[str] = (),
    ) -> None:
        """Begin checkpoint `step`. Raises what an earlier save failed with. Parts named in `ready` are nobody
        else's and in host memory already; they are not copied."""
        self.wait()
        started = time.monotonic()
        copies = {name: values if name in ready else _copied(values) for name, values in tensors.items()}
        frozen = json.loads(json.dumps(state))  # no list in it may change while the thread writes
        # A daemon: a second signal ends the process at once, and half a checkpoint is none.
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, frozen, started), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the disk has it. Raises `OSError` or `BrokenWeights` if a save failed, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(
        self, step: int, copies: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON], started: float
    ) -> None:
        # Boundary of the thread: whatever happens here must be told by the thread that trains.
        try:
            _check_finite(step, copies)
            self.store.save(step, tensors=copies, state=state)
            self.saved = step
        except BaseException as error:  # noqa: BLE001
            self._failure = error
        self.seconds = max(self.seconds, time.monotonic() - started)


def _copied(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host; tensors that share their memory share their copy."""
    made: dict[tuple[object, ...], Tensor] = {}
    copies = {}
    for name, tensor in values.items():
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or key not in made:
            plain = torch.contiguous_format
            made[key] = tensor.clone(memory_format=plain) if tensor.is_cpu else tensor.to("cpu")
        copies[name] = made[key]
    return copies


def _check_finite(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part, values in tensors.items():
        for name, tensor in values.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise BrokenWeights(
                    f"After step {step} {part} {name!r} holds {int((~tensor.isfinite()).sum())} values that "
                    "are NaN or infinite, so no checkpoint was made. Lower the learning rate and go on from "
                    "the last good one with resume=auto."
                )
