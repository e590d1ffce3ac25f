"""How a decode step runs: one token of every live row, eagerly or as a CUDA graph.

A CUDA graph replays a step's kernels without Python, but only at fixed shapes and addresses. So the rows are
filled up to the next of a few counts, the cache's width to the next of a few widths, and there is one
graph for each pair that occurs. What fills up writes into rows of the cache that nobody uses.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reflectvlm.models.attention import AttentionWatch
from reflectvlm.models.decoder import Decoder
from reflectvlm.rollout.cache import SlotCache

if TYPE_CHECKING:
    from reflectvlm.models.qwen_vl import QwenVL

log = logging.getLogger("reflectvlm")

Kind: TypeAlias = Literal["auto", "stock", "lean", "graphs"]
"""stock: the model library's forward, the reference. lean: `models.decoder`. graphs: the same as CUDA graphs.
auto: graphs on a GPU, else lean, where the decoder fits the model; else stock."""
ROW_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
WIDTH = 512
"""Widths are multiples of it: attention over columns that are masked costs little, a graph takes memory."""


class Step(Protocol):
    """ids, their positions, the cache that takes them in -> last hidden states."""

    def __call__(
        self,
        ids: Int[Tensor, " R"],
        positions: Int[Tensor, " R"],
        cache: SlotCache,
        watch: AttentionWatch | None,
        /,
    ) -> Float[Tensor, "R D"]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EagerStep:
    """Runs the decoder as it is, at the width that the rows have."""

    decoder: Decoder

    def __call__(
        self,
        ids: Int[Tensor, " R"],
        positions: Int[Tensor, " R"],
        cache: SlotCache,
        watch: AttentionWatch | None,
        /,
    ) -> Float[Tensor, "R D"]:
        mask = cache.begin_step(cache.lengths, cache.longest + 1)
        # On a GPU every row reads its own keys, and looking for siblings would wait for the device.
        siblings = cache.siblings() if ids.device.type == "cpu" else None
        return self.decoder(ids, positions, cache, mask, watch, siblings)


Recorder = Callable[[Callable[..., Tensor], Sequence[Tensor]], Callable[..., Tensor]]
"""A function and example inputs -> the same function, recorded at these inputs' shapes."""


@dataclass(kw_only=True, eq=False)
class GraphStep:
    """Replays recorded steps. A step whose attention is watched (ROUTE) is not recorded: it runs eagerly,
    with the same results.

    It belongs to one cache, whose storage must stay where it is: reserve room first. Graphs recorded for
    another storage are dropped.
    """

    decoder: Decoder
    record: Recorder
    """`cuda_graph`, or on a CPU, where only the arithmetic can be tested, `without_graph`."""
    _recorded: dict[tuple[int, int], Callable[..., Tensor]] = field(default_factory=dict, init=False)
    _storage: tuple[int, ...] = field(default=(), init=False)
    _told: bool = field(default=False, init=False)

    def __call__(
        self,
        ids: Int[Tensor, " R"],
        positions: Int[Tensor, " R"],
        cache: SlotCache,
        watch: AttentionWatch | None,
        /,
    ) -> Float[Tensor, "R D"]:
        rows, width = padded_rows(len(ids)), padded_width(cache.longest + 1)
        if watch is None and not cache.has_room(rows, width) and not self._told:
            self._told = True
            log.info(
                "%d rows of %d tokens are more than was reserved: some steps run without graphs", rows, width
            )
        if watch is not None or not cache.has_room(rows, width):
            return EagerStep(decoder=self.decoder)(ids, positions, cache, watch)
        if self._storage != (found := cache.addresses()):
            self._recorded.clear()
            self._storage = found
        inputs = [_filled(tensor, rows) for tensor in (ids, positions, cache.lengths)]
        if (rows, width) not in self._recorded:
            self._recorded[rows, width] = self.record(self._function(cache, width), inputs)
        made = self._recorded[rows, width](*inputs)[: len(ids)]
        cache.begin_step(cache.lengths, cache.longest + 1)  # what rows hold, not what the graph covers
        return made

    def _function(self, cache: SlotCache, width: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def step(ids: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
            return self.decoder(ids, positions, cache, cache.begin_step(columns, width))

        return step


@dataclass(kw_only=True, eq=False)
class Steps:
    """Makes the step and the cache of each call of an engine. With graphs both outlive the call, because a
    graph knows its tensors by their addresses; so does the memory of the cache, which is reserved for `rows`
    of `columns` tokens at once. Two calls of one engine must then not go on side by side."""

    kind: Kind = "auto"
    _cache: SlotCache | None = field(default=None, init=False)
    _step: GraphStep | None = field(default=None, init=False)
    _weights: tuple[int, ...] = field(default=(), init=False)
    _told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"decode is {self.kind!r}. It must be one of {', '.join(get_args(Kind))}.")

    def make(self, policy: QwenVL, rows: int, columns: int) -> tuple[Step | None, SlotCache]:
        """For a call of at most `rows` rows, which mostly stay below `columns` tokens."""
        dtype = getattr(torch, policy.compute) if policy.compute else None
        match self._chosen(policy):
            case "stock":
                return None, SlotCache(policy.device, dtype)
            case "lean":
                return EagerStep(decoder=Decoder.of(policy)), SlotCache(policy.device, dtype)
        weights = tuple(p.data_ptr() for p in policy.model.model.language_model.parameters())
        if self._cache is None or self._step is None or weights != self._weights:
            self._cache, self._weights = SlotCache(policy.device, dtype), weights
            self._step = GraphStep(decoder=Decoder.of(policy), record=cuda_graph)
        self._step.decoder.refresh()
        self._cache.clear()
        self._cache.reserve(padded_rows(rows), padded_width(columns))
        return self._step, self._cache

    def _chosen(self, policy: QwenVL) -> Kind:
        on_gpu, fits = policy.device.type == "cuda", Decoder.fits(policy)
        if self.kind == "auto" and not fits and not self._told:
            self._told = True
            log.info("decode=auto is the stock forward here: the decoder does not know such text layers")
        if self.kind == "auto":
            return "stock" if not fits else "graphs" if on_gpu else "lean"
        if self.kind == "graphs" and not on_gpu:
            raise ValueError(
                f"decode='graphs' needs a CUDA device, and the policy is on {policy.device.type!r}. "
                "Use decode='auto' or 'lean'."
            )
        if self.kind != "stock" and not fits:
            raise ValueError(
                f"decode={self.kind!r} cannot run this model: its text layers have sliding-window attention "
                "or another activation than silu. Use decode='auto' or 'stock'."
            )
        return self.kind


def padded_rows(rows: int) -> int:
    """The next of `ROW_COUNTS`, or multiple of the last."""
    last = ROW_COUNTS[-1]
    return next((count for count in ROW_COUNTS if count >= rows), -(-rows // last) * last)


def padded_width(width: int) -> int:
    return -(-width // WIDTH) * WIDTH


def without_graph(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """What a graph does, without one: the function runs on buffers that its inputs are copied into."""
    buffers = [tensor.clone() for tensor in inputs]

    def replay(*values: Tensor) -> Tensor:
        _copy_all(buffers, values)
        return function(*buffers)

    return replay


def cuda_graph(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Captures the function's kernels once and replays them on its buffers. The result is copied out,
    because the next replay overwrites it."""
    buffers = [tensor.clone() for tensor in inputs]
    with torch.cuda.device(buffers[0].device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up before a capture, not in it
            for _ in range(2):
                function(*buffers)
        torch.cuda.current_stream().wait_stream(stream)
        graph: Any = torch.cuda.CUDAGraph()
        # Other threads, such as those that ask rewards, may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
            result = function(*buffers)

    def replay(*values: Tensor) -> Tensor:
        _copy_all(buffers, values)
        graph.replay()
        return result.clone()

    return replay


@functools.cache
def _pool() -> Any:
    """One pool of memory for all graphs: they never run at the same time, and results are copied out."""
    return torch.cuda.graph_pool_handle()


def _copy_all(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def _filled(values: Int[Tensor, " R"], rows: int) -> Int[Tensor, " N"]:
    return torch.cat([values, values.new_zeros(rows - len(values))])
