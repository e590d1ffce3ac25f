"""One call of the in-process engine: rows come, take in what they draw and what is inserted, and leave.

One step, for all live rows at once:

    draw a token -> rows that end leave -> everybody takes in its token ->
    rows whose trigger fired take in their block and, around it, their tag

A prompt is prefilled once and its cache copied to its group; vision features are computed once per
image. Rows leave when they end and waiting prompts take their place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflectvlm.interrupt import safe_point
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.rollout.cache import SlotCache
from reflectvlm.rollout.intake import Chunk, Intake, Taken
from reflectvlm.rollout.placing import Placed, answer_spans, text_ids
from reflectvlm.rollout.rows import Rows
from reflectvlm.rollout.sampling import NonFiniteLogits, draw, uniforms
from reflectvlm.rollout.triggers import Triggers
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.spans import count_tokens
from reflectvlm.types import Prompt, Rollout, SamplingParams, Spans, StopReason, Text


class Decoding:
    """The live rows and what has become of the others. All state of a call is here, so one that is
    abandoned leaves nothing behind."""

    def __init__(
        self,
        *,
        policy: QwenVL,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        seed: int,
        triggers: Triggers,
        stop_watch: TextWatch,
    ) -> None:
        self.policy, self.prompts, self.n, self.seed = policy, prompts, n, seed
        self.sampling, self.triggers, self.stop_watch = sampling, triggers, stop_watch
        self.device = policy.device
        self.end_ids = torch.tensor(sorted({*policy.end_ids}), device=self.device)
        self.stop_ids = torch.tensor(sorted({*sampling.stop_ids}), dtype=torch.long, device=self.device)
        # Positions the model was made for. Its rows may pass it by one block, never by more.
        self.context = int(policy.model.config.get_text_config().max_position_embeddings)
        self.waiting = deque(range(len(prompts)))
        self.features: dict[int, tuple[Tensor, ...]] = {}
        self.unfinished = [n] * len(prompts)
        self.placed: dict[int, list[Placed]] = {}
        self.done: dict[int, Rollout] = {}
        # ROUTE asks what the answer has attended to in its prompt.
        probe = triggers.reattention.probe
        watched = 0
        if probe is not None and prompts:
            watched = max(count_tokens(prompt.spans, prompt.grids) for prompt in prompts)
        # Only a tag of several tokens is ever taken back.
        self.remembered = triggers.longest if watched else 0
        self.cache = SlotCache(self.device)
        self.intake = Intake(policy=policy, probe=probe, width=watched, cache=self.cache)

    def steps(self, max_rows: int) -> Iterator[Rows | None]:
        """One token of every live row at a time; yields the rows that are left, None if none is."""
        rows: Rows | None = None
        while self.waiting or rows is not None:
            safe_point()
            rows = self._step(rows, max_rows)
            yield rows

    def spans(self, rows: Rows, row: int) -> Spans:
        """The answer of a live row so far."""
        job, count = int(rows.job[row]), int(rows.count[row])
        ids, logprobs = rows.ids[row, :count].tolist(), rows.logprobs[row, :count].tolist()
        return answer_spans(ids, logprobs, self.placed.get(job, []))

    @torch.no_grad()
    def _step(self, rows: Rows | None, max_rows: int) -> Rows | None:
        if self.waiting and (rows is None or len(rows) + self.n <= max_rows):
            rows = self._admit(rows, max_rows)
        assert rows is not None
        ids, logprobs = draw(
            self.policy.logits(rows.hidden),
            rows.uniform.gather(1, rows.count[:, None])[:, 0],
            self.sampling,
        )
        rows.record(ids, logprobs)
        ended = self._ended(rows, ids) | ~logprobs.isfinite()  # the latter to look at them only once
        if bool(ended.any()):
            rows, ids = self._leave(rows, ids, ended)
        if rows is not None:
            self._advance(rows, ids)
        return rows

    # -- rows come and go ---------------------------------------------------------------------

    def _admit(self, rows: Rows | None, max_rows: int) -> Rows:
        """Prefills as many waiting prompts as fit and appends their groups."""
        room = max_rows - (0 if rows is None else len(rows))
        count = min(len(self.waiting), max(1, room // self.n))
        chosen = [self.waiting.popleft() for _ in range(count)]
        hidden, position, _ = self._prefill(chosen)
        jobs = torch.tensor([p * self.n + m for p in chosen for m in range(self.n)], device=self.device)
        budget, width = self.sampling.max_tokens, self.intake.width
        random = [uniforms(self.seed, p, m, budget) for p in chosen for m in range(self.n)]
        new = Rows(
            job=jobs,
            hidden=hidden.repeat_interleave(self.n, 0),
            position=position.repeat_interleave(self.n),
            count=torch.zeros_like(jobs),
            uniform=torch.stack(random).to(self.device),
            ids=jobs.new_zeros(len(jobs), budget),
            logprobs=hidden.new_zeros(len(jobs), budget, dtype=torch.float32),
            attended=hidden.new_zeros(len(jobs), width, dtype=torch.float32),
            recent=hidden.new_zeros(len(jobs), self.remembered, width, dtype=torch.float32),
        )
        return new if rows is None else rows + new

    def _prefill(self, chosen: Sequence[int]) -> Taken:
        """Runs each prompt once and copies its cache to its group."""
        prompts = [self.prompts[p] for p in chosen]
        made = self._image_features(prompts)
        safe_point()
        shown = [tuple(made[id(patches)] for patches in prompt.patches) for prompt in prompts]
        if self.triggers.reattention.trigger is not None:  # only a block inserted later needs them again
            self.features.update(zip(chosen, shown, strict=True))
        slots = self.cache.add_rows(len(prompts) * self.n)
        first = slots[:: self.n]
        chunks = [
            Chunk(spans=prompt.spans, prompt=prompt, features=features)
            for prompt, features in zip(prompts, shown, strict=True)
        ]
        taken = self.intake.chunks(first, chunks)
        if self.n > 1:
            siblings = slots.view(-1, self.n)[:, 1:].reshape(-1)
            self.cache.copy_rows(first.repeat_interleave(self.n - 1), siblings)
        return taken

    def _image_features(self, prompts: Sequence[Prompt]) -> dict[int, Float[Tensor, "V D"]]:
        images = {id(patches): patches for prompt in prompts for patches in prompt.patches}
        features = self.policy.features(list(images.values()))
        parts = features.split([patches.grid.tokens for patches in images.values()]) if images else ()
        return dict(zip(images, parts, strict=True))

    def _ended(self, rows: Rows, ids: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
        ended = torch.isin(ids, self.end_ids) | (rows.count >= self.sampling.max_tokens)
        # Where every tag brings a block, a row would outgrow the memory long before its token budget.
        ended |= self.cache.lengths >= self.context
        if len(self.stop_ids):
            ended |= torch.isin(ids, self.stop_ids)
        return ended | self.stop_watch.completed(rows.ids, rows.count, ids)

    def _leave(
        self, rows: Rows, ids: Int[Tensor, " R"], ended: Bool[Tensor, " R"]
    ) -> tuple[Rows | None, Int[Tensor, " left"]]:
        """Turns ended rows into rollouts and closes the ranks."""
        self._check_finite(rows)
        for row in ended.nonzero().flatten().tolist():
            self._finish(rows, row)
        keep = (~ended).nonzero().flatten()
        self.cache.keep_rows(keep)
        return (rows.keep(keep) if len(keep) else None), ids[keep]

    def _check_finite(self, rows: Rows) -> None:
        newest = rows.logprobs.gather(1, rows.count[:, None] - 1)[:, 0]
        for row in (~newest.isfinite()).nonzero().flatten().tolist():
            prompt, member = divmod(int(rows.job[row]), self.n)
            raise NonFiniteLogits(
                self.prompts[prompt].sample.id, member, int(rows.count[row]), self.sampling.temperature
            )

    def _finish(self, rows: Rows, row: int) -> None:
        job, count = int(rows.job[row]), int(rows.count[row])
        ids = rows.ids[row, :count].tolist()
        spans = self.spans(rows, row)
        ended = ids[-1] in self.policy.end_ids
        # A stop string is looked at once more only if nothing else explains the end.
        stop: StopReason = "eos" if ended else "stop"
        full = count >= self.sampling.max_tokens or int(self.cache.lengths[row]) >= self.context
        if not ended and full and ids[-1] not in self.sampling.stop_ids:
            stop = "length"
        written = text_ids(spans)
        text = self.policy.decode(written[:-1] if ended else written)
        if stop == "length" and any(end in text for end in self.sampling.stop):
            stop = "stop"
        prompt = job // self.n
        self.unfinished[prompt] -= 1
        if not self.unfinished[prompt]:
            self.features.pop(prompt, None)
        self.done[job] = Rollout(
            prompt=self.prompts[prompt],
            spans=spans,
            text=text,
            stop=stop,
            offsets=self.policy.offsets(written),
        )

    # -- tokens and blocks go in --------------------------------------------------------------

    def _advance(self, rows: Rows, ids: Int[Tensor, " R"]) -> None:
        """Every row takes in its token; where the trigger fired, what is inserted as well."""
        inserts = self._inserts(rows, ids)
        # Rows that insert write their token where their chunk overwrites it: this one is a draft.
        stays = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        stays[list(inserts)] = False
        rows.hidden, rows.position, attended = self.intake.tokens(ids, rows.position, stays)
        if attended is not None:
            rows.attended += attended
            rows.recent = torch.cat([rows.recent, attended[:, None]], 1)[:, 1:]
        if inserts:
            self._insert(rows, inserts)

    def _inserts(self, rows: Rows, ids: Int[Tensor, " R"]) -> dict[int, Placed]:
        """What goes into the rows whose trigger has just fired."""
        found: dict[int, Placed] = {}
        for row in self.triggers.fired(rows, ids):
            job, count = int(rows.job[row]), int(rows.count[row])
            made = self.placed.setdefault(job, [])
            # The trigger's last token has been sampled and not been taken in: it has attended to nothing.
            attended = rows.attended[row] / max(count - 1, 1) if self.intake.width else None
            sampled = rows.ids[row, :count].tolist()
            if one := self.triggers.ask(self.prompts[job // self.n], sampled, made, attended):
                made.append(one)
                found[row] = one
        return found

    def _insert(self, rows: Rows, inserts: dict[int, Placed]) -> None:
        """Takes in each row's tag with what goes around it. Of a tag of several tokens with a block in
        front, all but the last are in the cache already and are taken back first."""
        where = torch.tensor(list(inserts), device=self.device)
        back = [one.stop - 1 - one.start if one.insertion.before else 0 for one in inserts.values()]
        for row, count in zip(inserts, back, strict=True):
            if self.intake.width and count:
                # The newest summand is this step's draft, which counted as nothing.
                rows.attended[row] -= rows.recent[row, -1 - count : -1].sum(0)
        rewound = torch.tensor(back, device=self.device)
        self.cache.commit(where, -rewound)
        starts = (rows.position[where] - rewound).tolist()
        chunks = [
            self._chunk(rows, row, one, start)
            for (row, one), start in zip(inserts.items(), starts, strict=True)
        ]
        rows.hidden[where], rows.position[where], attended = self.intake.chunks(where, chunks)
        if attended is not None:
            rows.attended[where] += attended

    def _chunk(self, rows: Rows, row: int, one: Placed, start: int) -> Chunk:
        """A tag, or what of it is not in the cache, with what goes around it."""
        number = int(rows.job[row]) // self.n
        prompt = self.prompts[number]
        before, after = one.insertion.before, one.insertion.after
        tag = Text(ids=tuple(rows.ids[row, one.start if before else one.stop - 1 : one.stop].tolist()))
        first = count_tokens(before, prompt.grids)
        return Chunk(
            spans=(*before, tag, *after),
            prompt=prompt,
            features=self.features[number],
            start=start,
            asking=range(first, first + len(tag.ids)),
        )
