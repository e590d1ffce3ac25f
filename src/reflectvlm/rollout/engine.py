"""The in-process rollout engine: prompts -> groups of rollouts, on the policy's own weights.

One step of `_Decoding.run`, for all live rows at once:

    draw a token -> rows that end leave -> rows whose trigger fired take in their block ->
    everybody takes in its token

A prompt is prefilled once and its cache copied to its group; vision features are computed once per
image. Rows leave when they end and waiting prompts take their place. Nothing is padded: every row
has its own length in the cache, so a row may take in a block while its neighbours do not.

Left out here: CUDA graphs and partial rollouts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.cache import SlotCache
from reflectvlm.rollout.rows import Insertion, Rows
from reflectvlm.rollout.sampling import draw, uniforms
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.spans import flatten
from reflectvlm.types import Prompt, Rollout, SamplingParams, Span, Spans, StopReason, Text, Visual


@dataclass(frozen=True, kw_only=True, eq=False)
class InProcessEngine:
    """Satisfies `protocols.RolloutEngine`.

    Example: `InProcessEngine(policy=policy).generate(prompts, 8, SamplingParams(), Implicit(), seed=0)`
    """

    policy: QwenVL
    max_rows: int = 64
    """Rows decoded at one time; bounds the memory of the cache."""
    _watches: dict[tuple[str, ...], TextWatch] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"InProcessEngine.max_rows is {self.max_rows}. It must be at least 1.")

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        *,
        seed: int,
    ) -> list[tuple[Rollout, ...]]:
        if n < 1:
            raise ValueError(f"generate was asked for n={n} rollouts per prompt. Ask for at least 1.")
        self.policy.module.eval()
        with torch.no_grad():
            decoding = _Decoding(
                policy=self.policy,
                prompts=prompts,
                n=n,
                sampling=sampling,
                reattention=reattention,
                seed=seed,
                stop_watch=self._watch(tuple(sampling.stop)),
                trigger_watch=self._trigger_watch(reattention.trigger),
                trigger_id=self._single_id(reattention.trigger),
            )
            done = decoding.run(max(self.max_rows, n))
        return [tuple(done[p * n + m] for m in range(n)) for p in range(len(prompts))]

    def _single_id(self, trigger: str | None) -> int:
        """The id of a trigger that is one special token, else -1."""
        tokenizer = self.policy.tokenizer
        added = tokenizer.get_added_vocab()
        return int(added[trigger]) if trigger in added else -1

    def _trigger_watch(self, trigger: str | None) -> TextWatch:
        return self._watch(() if trigger is None or self._single_id(trigger) >= 0 else (trigger,))

    def _watch(self, texts: tuple[str, ...]) -> TextWatch:
        if texts not in self._watches:
            policy = self.policy
            vocabulary = policy.model.lm_head.weight.shape[0] if texts else 1
            self._watches[texts] = TextWatch.create(texts, policy.decode, vocabulary, policy.device)
        return self._watches[texts]


@dataclass(frozen=True, kw_only=True)
class RowState:
    """Satisfies `protocols.DecodeState`."""

    prompt: Prompt
    sampled: Sequence[int]
    inserted: Spans
    policy: QwenVL

    def text(self) -> str:
        return self.policy.decode(self.sampled)


class _Decoding:
    """One call of `generate`: the live rows and what has become of the others."""

    def __init__(
        self,
        *,
        policy: QwenVL,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        seed: int,
        stop_watch: TextWatch,
        trigger_watch: TextWatch,
        trigger_id: int,
    ) -> None:
        self.policy, self.prompts, self.n, self.seed = policy, prompts, n, seed
        self.sampling, self.reattention = sampling, reattention
        self.stop_watch, self.trigger_watch, self.trigger_id = stop_watch, trigger_watch, trigger_id
        self.device = policy.device
        self.end_ids = torch.tensor(sorted({*policy.end_ids}), device=self.device)
        self.stop_ids = torch.tensor(sorted({*sampling.stop_ids}), dtype=torch.long, device=self.device)
        self.cache = SlotCache(self.device)
        self.waiting = deque(range(len(prompts)))
        self.features: dict[int, tuple[Tensor, ...]] = {}
        self.unfinished = [n] * len(prompts)
        self.insertions: dict[int, list[Insertion]] = {}
        self.done: dict[int, Rollout] = {}

    def run(self, max_rows: int) -> dict[int, Rollout]:
        rows: Rows | None = None
        while self.waiting or rows is not None:
            if self.waiting and (rows is None or len(rows) + self.n <= max_rows):
                rows = self._admit(rows, max_rows)
            assert rows is not None
            ids, logprobs = draw(
                self.policy.logits(rows.hidden),
                rows.uniform.gather(1, rows.count[:, None])[:, 0],
                self.sampling,
            )
            rows.record(ids, logprobs)
            ended = self._ended(rows, ids)
            if bool(ended.any()):
                rows, ids = self._leave(rows, ids, ended)
                if rows is None:
                    continue
            self._advance(rows, ids)
        return self.done

    # -- rows come and go ---------------------------------------------------------------------

    def _admit(self, rows: Rows | None, max_rows: int) -> Rows:
        """Prefills as many waiting prompts as fit and appends their groups."""
        room = max_rows - (0 if rows is None else len(rows))
        count = min(len(self.waiting), max(1, room // self.n))
        chosen = [self.waiting.popleft() for _ in range(count)]
        hidden, position = self._prefill(chosen)
        jobs = torch.tensor([p * self.n + m for p in chosen for m in range(self.n)], device=self.device)
        budget = self.sampling.max_tokens
        random = [uniforms(self.seed, p, m, budget) for p in chosen for m in range(self.n)]
        new = Rows(
            job=jobs,
            hidden=hidden.repeat_interleave(self.n, 0),
            position=position.repeat_interleave(self.n),
            count=torch.zeros_like(jobs),
            uniform=torch.stack(random).to(self.device),
            ids=jobs.new_zeros(len(jobs), budget),
            logprobs=hidden.new_zeros(len(jobs), budget, dtype=torch.float32),
        )
        return new if rows is None else rows + new

    def _prefill(self, chosen: Sequence[int]) -> tuple[Float[Tensor, "P D"], Int[Tensor, " P"]]:
        """Runs each prompt once, copies its cache to its group, and returns the last hidden states
        and the positions of the first answer tokens."""
        prompts = [self.prompts[p] for p in chosen]
        made = self._image_features(prompts)
        shown = [tuple(made[id(patches)] for patches in prompt.patches) for prompt in prompts]
        if self.reattention.trigger is not None:  # only a block inserted later needs them again
            self.features.update(zip(chosen, shown, strict=True))
        slots = self.cache.add_rows(len(prompts) * self.n)
        first = slots[:: self.n]
        hidden, position = self._take_in(
            first,
            [(prompt.spans, features) for prompt, features in zip(prompts, shown, strict=True)],
            list(prompts),
            torch.zeros(len(prompts), dtype=torch.long, device=self.device),
        )
        if self.n > 1:
            siblings = slots.view(-1, self.n)[:, 1:].reshape(-1)
            self.cache.copy_rows(first.repeat_interleave(self.n - 1), siblings)
        return hidden, position

    def _image_features(self, prompts: Sequence[Prompt]) -> dict[int, Float[Tensor, "V D"]]:
        images = {id(patches): patches for prompt in prompts for patches in prompt.patches}
        features = self.policy.features(list(images.values()))
        parts = features.split([patches.grid.tokens for patches in images.values()]) if images else ()
        return dict(zip(images, parts, strict=True))

    def _ended(self, rows: Rows, ids: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
        ended = torch.isin(ids, self.end_ids) | (rows.count >= self.sampling.max_tokens)
        if len(self.stop_ids):
            ended |= torch.isin(ids, self.stop_ids)
        return ended | self.stop_watch.completed(rows.ids, rows.count, ids)

    def _leave(
        self, rows: Rows, ids: Int[Tensor, " R"], ended: Bool[Tensor, " R"]
    ) -> tuple[Rows | None, Int[Tensor, " left"]]:
        """Turns ended rows into rollouts and closes the ranks."""
        for row in ended.nonzero().flatten().tolist():
            self._finish(rows, row)
        keep = (~ended).nonzero().flatten()
        self.cache.keep_rows(keep)
        return (rows.keep(keep) if len(keep) else None), ids[keep]

    def _finish(self, rows: Rows, row: int) -> None:
        job, count = int(rows.job[row]), int(rows.count[row])
        ids = rows.ids[row, :count].tolist()
        spans = answer_spans(ids, rows.logprobs[row, :count].tolist(), self.insertions.get(job, []))
        ended = ids[-1] in self.policy.end_ids
        # A stop string is looked at once more only if nothing else explains the end.
        stop: StopReason = "eos" if ended else "stop"
        if not ended and count >= self.sampling.max_tokens and ids[-1] not in self.sampling.stop_ids:
            stop = "length"
        text = self.policy.decode(ids[:-1] if ended else ids)
        if stop == "length" and any(end in text for end in self.sampling.stop):
            stop = "stop"
        prompt = job // self.n
        self.unfinished[prompt] -= 1
        if not self.unfinished[prompt]:
            self.features.pop(prompt, None)
        self.done[job] = Rollout(prompt=self.prompts[prompt], spans=spans, text=text, stop=stop)

    # -- tokens and blocks go in --------------------------------------------------------------

    def _advance(self, rows: Rows, ids: Int[Tensor, " R"]) -> None:
        """Every row takes in its token; where the trigger fired, its block as well."""
        inserts = self._blocks(rows, ids)
        one = torch.ones(len(rows), dtype=torch.long, device=self.device)
        mask = self.cache.extend(None, one)
        text = torch.full_like(ids, -1)
        rows.hidden = self._forward(
            ids[:, None],
            rows.position[None, :, None].expand(3, -1, 1),
            text[:, None],
            self._no_features(),
            mask,
        )[:, 0]
        # Rows with a block wrote their token where the block's chunk now overwrites it.
        one[list(inserts)] = 0
        self.cache.commit(None, one)
        rows.position = rows.position + one
        if inserts:
            self._insert(rows, inserts)

    def _blocks(self, rows: Rows, ids: Int[Tensor, " R"]) -> dict[int, Spans]:
        """Row -> [block, trigger] or [trigger, block], for the rows whose trigger just fired."""
        if self.reattention.trigger is None:
            return {}
        special = self.trigger_id >= 0
        fired = ids == self.trigger_id if special else self.trigger_watch.completed(rows.ids, rows.count, ids)
        found: dict[int, Spans] = {}
        for row in fired.nonzero().flatten().tolist():
            job, count = int(rows.job[row]), int(rows.count[row])
            made = self.insertions.setdefault(job, [])
            state = RowState(
                prompt=self.prompts[job // self.n],
                sampled=rows.ids[row, :count].tolist(),
                inserted=tuple(span for insertion in made for span in insertion.spans),
                policy=self.policy,
            )
            spans = placed(self.reattention(state), before=special)
            if not spans:
                continue
            made.append(Insertion(offset=count - special, spans=spans))
            trigger = Text(ids=(int(ids[row]),))
            found[row] = (*spans, trigger) if special else (trigger, *spans)
        return found

    def _insert(self, rows: Rows, inserts: dict[int, Spans]) -> None:
        where = torch.tensor(list(inserts), device=self.device)
        prompts = [int(rows.job[row]) // self.n for row in inserts]
        rows.hidden[where], rows.position[where] = self._take_in(
            where,
            [(spans, self.features[p]) for spans, p in zip(inserts.values(), prompts, strict=True)],
            [self.prompts[p] for p in prompts],
            rows.position[where],
        )

    def _take_in(
        self,
        where: Int[Tensor, " R"],
        chunks: Sequence[tuple[Spans, tuple[Tensor, ...]]],
        prompts: Sequence[Prompt],
        start: Int[Tensor, " R"],
    ) -> tuple[Float[Tensor, "R D"], Int[Tensor, " R"]]:
        """Runs one chunk of spans per row behind what the row holds; returns each chunk's last
        hidden state and the position that follows it."""
        flat = [
            flatten(spans, prompt.grids, self.policy.vision, start=int(at))
            for (spans, _), prompt, at in zip(chunks, prompts, start.tolist(), strict=True)
        ]
        counts = torch.tensor([len(row) for row in flat], device=self.device)
        shape = (len(flat), int(counts.max()))
        ids = torch.full(shape, self.policy.pad_id, device=self.device)
        visual = torch.full(shape, -1, device=self.device)
        positions = torch.zeros(3, *shape, dtype=torch.long, device=self.device)
        features: list[Tensor] = []
        total = 0
        for r, (row, (_, images)) in enumerate(zip(flat, chunks, strict=True)):
            offsets = torch.tensor([0, *(len(image) for image in images)]).cumsum(0) + total
            image, cell = torch.from_numpy(row.image), torch.from_numpy(row.cell)
            ids[r, : len(row)] = torch.from_numpy(row.ids)
            positions[:, r, : len(row)] = torch.from_numpy(row.positions)
            visual[r, : len(row)] = torch.where(image < 0, image, offsets[image.clamp(min=0)] + cell)
            features += images
            total = int(offsets[-1])
        mask = self.cache.extend(where, counts)
        stacked = torch.cat(features) if features else self._no_features()
        hidden = self._forward(ids, positions, visual, stacked, mask)
        self.cache.commit(where, counts)
        last = hidden[torch.arange(len(flat), device=self.device), counts - 1]
        return last, torch.tensor([row.next_position for row in flat], device=self.device)

    def _forward(
        self, ids: Tensor, positions: Tensor, visual: Tensor, features: Tensor, mask: Tensor
    ) -> Float[Tensor, "R T D"]:
        return self.policy.hidden(self.policy.embed(ids, visual, features), positions, mask, self.cache)

    def _no_features(self) -> Float[Tensor, "0 D"]:
        return self.policy.features(())


def placed(spans: Spans, *, before: bool) -> Spans:
    """Marks blocks put in front of a token that had already been sampled."""
    if not before:
        return spans
    return tuple(
        Visual(image=span.image, keep=span.keep, before_sampled=True) if isinstance(span, Visual) else span
        for span in spans
    )


def answer_spans(ids: list[int], logprobs: list[float], insertions: Sequence[Insertion]) -> Spans:
    """Sampled tokens with the inserted blocks at their places."""
    spans: list[Span] = []
    start = 0
    for offset, inserted in [*((i.offset, i.spans) for i in insertions), (len(ids), ())]:
        if offset > start:
            piece = slice(start, offset)
            spans.append(Text(ids=tuple(ids[piece]), trained=True, logprobs=tuple(logprobs[piece])))
        spans += inserted
        start = offset
    return tuple(spans)
