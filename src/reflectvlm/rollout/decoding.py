"""One call of the in-process engine: rows come, take in what they draw and what is inserted, and leave.

One step, for all live rows at once:

    draw a token -> rows that end leave -> everybody takes in its token ->
    rows whose trigger fired take in their block and, around it, their tag

A prompt is prefilled once and its cache copied to its group; vision features are computed once per
image. Rows leave when they end and waiting prompts take their place. A group's rows come together and so
are always equally long: what ends them early depends on such counts alone, never on time or neighbours.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflectvlm.interrupt import safe_point
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import LongTail
from reflectvlm.rollout.cache import SlotCache
from reflectvlm.rollout.continuing import Begun, BegunGroup, take_up
from reflectvlm.rollout.intake import Chunk, Intake, Taken
from reflectvlm.rollout.placing import Placed, answer_spans, text_ids
from reflectvlm.rollout.rows import NEVER, Rows
from reflectvlm.rollout.sampling import NonFiniteLogits, draw, uniforms
from reflectvlm.rollout.stepping import Step
from reflectvlm.rollout.triggers import Triggers
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.spans import count_tokens
from reflectvlm.types import Prompt, SamplingParams, Spans, StopReason, Text


class Decoding:
    """The live rows and what has become of the others. All state of a call is here, so one that is
    abandoned leaves nothing behind."""

    def __init__(
        self,
        *,
        policy: QwenVL,
        groups: Sequence[BegunGroup],
        sampling: SamplingParams,
        triggers: Triggers,
        stop_watch: TextWatch,
        long_tail: LongTail | None = None,
        tokens: int | None = None,
        step: Step | None = None,
        cache: SlotCache | None = None,
    ) -> None:
        """`tokens`: after so many more a rollout that has not ended leaves as it is; None: it goes on.
        `step` and the empty `cache` it goes with: see `stepping`."""
        self.policy, self.groups = policy, groups
        self.sampling, self.triggers, self.stop_watch = sampling, triggers, stop_watch
        self.long_tail, self.tokens = long_tail, tokens
        self.device = policy.device
        self.end_ids = torch.tensor(sorted({*policy.end_ids}), device=self.device)
        self.stop_ids = torch.tensor(sorted({*sampling.stop_ids}), dtype=torch.long, device=self.device)
        # Positions the model was made for. Its rows may pass it by one block, never by more.
        self.context = int(policy.model.config.get_text_config().max_position_embeddings)
        self.features: dict[int, tuple[Tensor, ...]] = {}
        self.ready: deque[int] = deque()
        """Places of groups of which no row is live or waiting, in the order in which they came so far."""
        self._take_jobs()
        # ROUTE asks what the answer has attended to in its prompt.
        probe = triggers.reattention.probe
        watched = 0
        if probe is not None and groups:
            watched = max(count_tokens(one.prompt.spans, one.prompt.grids) for one in groups)
        # Only a tag of several tokens is ever taken back.
        self.remembered = triggers.longest if watched else 0
        self.cache = SlotCache(self.device) if cache is None else cache
        self.call = self.cache.calls
        self.intake = Intake(policy=policy, probe=probe, width=watched, cache=self.cache, step=step)

    def _take_jobs(self) -> None:
        """Numbers all rollouts and puts those that have not ended into line."""
        self.waiting: deque[int] = deque()
        self.owner: list[int] = []
        self.first: list[int] = []
        self.rollouts: list[Begun] = []
        """Of each job, as it was begun; as it has become once its row has left."""
        self.placed: dict[int, list[Placed]] = {}
        self.live: list[list[int]] = []
        """Of each group, the jobs that have a row or wait for one."""
        for place, group in enumerate(self.groups):
            self.first.append(len(self.owner))
            self.rollouts += [self._closed(one) for one in group.rollouts]
            self.owner += [place] * len(group.rollouts)
            jobs = range(self.first[place], len(self.owner))
            self.live.append([job for job in jobs if self.rollouts[job].stop is None])
            self.placed |= {job: list(self.rollouts[job].placed) for job in self.live[place]}
            (self.waiting if self.live[place] else self.ready).append(place)

    def _closed(self, begun: Begun) -> Begun:
        """A rollout begun with a larger budget than there is now has used it up."""
        if begun.stop is None and len(begun.ids) >= self.sampling.max_tokens:
            return dataclasses.replace(begun, stop="length")
        return begun

    def steps(self, max_rows: int) -> Iterator[Rows | None]:
        """One token of every live row at a time; yields the rows that are left, None if none is."""
        rows: Rows | None = None
        while self.waiting or rows is not None:
            safe_point()
            rows = self._step(rows, max_rows)
            yield rows

    def group(self, place: int) -> BegunGroup:
        """A group as it stands, once it is ready."""
        group, first = self.groups[place], self.first[place]
        made = self.rollouts[first : first + len(group.rollouts)]
        return dataclasses.replace(group, rollouts=tuple(made))

    def spans(self, rows: Rows, row: int) -> Spans:
        """The answer of a live row so far."""
        job, count = int(rows.job[row]), int(rows.count[row])
        ids, logprobs = rows.ids[row, :count].tolist(), rows.logprobs[row, :count].tolist()
        return answer_spans(ids, logprobs, self.placed[job])

    @torch.no_grad()
    def _step(self, rows: Rows | None, max_rows: int) -> Rows | None:
        if self.cache.calls != self.call:
            raise RuntimeError(
                "Another call of this engine has begun, and with decode='graphs' both use one cache. Finish "
                "one first, or use decode='lean'."
            )
        rows = self._admitted(rows, max_rows)
        ids, logprobs = draw(
            self.policy.logits(rows.hidden),
            rows.uniform.gather(1, rows.count[:, None])[:, 0],
            self.sampling,
        )
        rows.record(ids, logprobs)
        ended = self._ended(rows, ids) | ~logprobs.isfinite()  # the latter to look at them only once
        if bool(ended.any()):
            self._check_finite(rows)
            rows, ids = self._leave(rows, ids, ended | self._cut_off(rows, ended), ended=True)
        if rows is not None:
            self._advance(rows, ids)
        if rows is not None and self.tokens is not None and bool((pausing := rows.count >= rows.pause).any()):
            rows, _ = self._leave(rows, ids, pausing, ended=False)
        return rows

    # -- rows come ----------------------------------------------------------------------------

    def _admitted(self, rows: Rows | None, max_rows: int) -> Rows:
        """The rows with as many waiting groups as there is room for, but with one if none is live."""
        room = max_rows - (0 if rows is None else len(rows))
        chosen: list[int] = []
        while self.waiting and (len(self.live[self.waiting[0]]) <= room or (rows is None and not chosen)):
            chosen.append(self.waiting.popleft())
            room -= len(self.live[chosen[-1]])
        if not chosen:
            assert rows is not None
            return rows
        new = self._begin(chosen, 0 if rows is None else len(rows))
        return new if rows is None else rows + new

    def _begin(self, chosen: Sequence[int], first: int) -> Rows:
        """Rows of these groups up to their next token; `first` is the first one's number in the cache."""
        sizes = torch.tensor([len(self.live[place]) for place in chosen], device=self.device)
        listed = [job for place in chosen for job in self.live[place]]
        hidden, position, _ = self._prefill(chosen, sizes)
        jobs = torch.tensor(listed, device=self.device)
        begun = [self.rollouts[job] for job in listed]
        counts = torch.tensor([len(one.ids) for one in begun], device=self.device)
        budget, width = self.sampling.max_tokens, self.intake.width
        made = Rows(
            job=jobs,
            hidden=hidden.repeat_interleave(sizes, 0),
            position=position.repeat_interleave(sizes),
            count=counts,
            until=torch.tensor([self._until(job) for job in listed], device=self.device),
            pause=torch.tensor([self._pause(job) for job in listed], device=self.device),
            uniform=torch.stack([self._uniforms(job) for job in listed]).to(self.device),
            ids=jobs.new_zeros(len(jobs), budget),
            logprobs=hidden.new_zeros(len(jobs), budget, dtype=torch.float32),
            attended=hidden.new_zeros(len(jobs), width, dtype=torch.float32),
            recent=hidden.new_zeros(len(jobs), self.remembered, width, dtype=torch.float32),
        )
        if any(one.ids for one in begun):
            self._resume(made, listed, first)
        return made

    def _resume(self, made: Rows, jobs: Sequence[int], first: int) -> None:
        """What rows that are not new hold already."""
        for row, job in enumerate(jobs):
            one = self.rollouts[job]
            made.ids[row, : len(one.ids)] = torch.tensor(one.ids, dtype=torch.long)
            made.logprobs[row, : len(one.ids)] = torch.tensor(one.logprobs)
        resumed = [
            (one, self.groups[place].prompt, self.features.get(place, ())) if one.ids else None
            for one, place in ((self.rollouts[job], self.owner[job]) for job in jobs)
        ]
        take_up(made, first, resumed, self.intake, self.remembered)

    def _uniforms(self, job: int) -> Float[Tensor, " M"]:
        place = self.owner[job]
        group, member = self.groups[place], job - self.first[place]
        return uniforms(group.seed, group.number, member, self.sampling.max_tokens)

    def _until(self, job: int) -> int:
        """Tokens after which a rollout is ended, whatever it says."""
        place, most = self.owner[job], self.sampling.max_tokens
        if self.tokens is not None and self.groups[place].last:
            most = min(most, len(self.rollouts[job].ids) + self.tokens)
        limit = self._group_limit(place)
        return most if limit is None else min(most, limit)

    def _pause(self, job: int) -> int:
        """Tokens after which a rollout leaves to go on in another call."""
        if self.tokens is None or self.groups[self.owner[job]].last:
            return NEVER
        return len(self.rollouts[job].ids) + self.tokens

    def _prefill(self, chosen: Sequence[int], sizes: Int[Tensor, " groups"]) -> Taken:
        """Runs each prompt once and copies its cache to its group."""
        prompts = [self.groups[place].prompt for place in chosen]
        made = self._image_features(prompts)
        safe_point()
        shown = [tuple(made[id(patches)] for patches in prompt.patches) for prompt in prompts]
        if self.triggers.reattention.trigger is not None:  # only a block inserted later needs them again
            self.features.update(zip(chosen, shown, strict=True))
        slots = self.cache.add_rows(int(sizes.sum()))
        starts = sizes.cumsum(0) - sizes
        first = slots[starts]
        chunks = [
            Chunk(spans=prompt.spans, prompt=prompt, features=features)
            for prompt, features in zip(prompts, shown, strict=True)
        ]
        taken = self.intake.chunks(first, chunks)
        if len(slots) > len(first):
            sibling = torch.ones_like(slots, dtype=torch.bool)
            sibling[starts] = False
            self.cache.copy_rows(first.repeat_interleave(sizes - 1), slots[sibling])
        return taken

    def _image_features(self, prompts: Sequence[Prompt]) -> dict[int, Float[Tensor, "V F"]]:
        images = {id(patches): patches for prompt in prompts for patches in prompt.patches}
        features = self.policy.features(list(images.values()))
        parts = features.split([patches.grid.tokens for patches in images.values()]) if images else ()
        return dict(zip(images, parts, strict=True))

    # -- rows go ------------------------------------------------------------------------------

    def _ended(self, rows: Rows, ids: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
        ended = torch.isin(ids, self.end_ids) | (rows.count >= rows.until)
        # Where every tag brings a block, a row would outgrow the memory long before its token budget.
        ended |= self.cache.lengths >= self.context
        if len(self.stop_ids):
            ended |= torch.isin(ids, self.stop_ids)
        return ended | self.stop_watch.completed(rows.ids, rows.count, ids)

    def _cut_off(self, rows: Rows, ended: Bool[Tensor, " R"]) -> Bool[Tensor, " R"]:
        """Rows that must end now as well, because enough of their group have; others are told when."""
        if self.long_tail is None:
            return ended
        where = ended.nonzero().flatten()
        lengths = dict(zip(rows.job[where].tolist(), rows.count[where].tolist(), strict=True))
        limits = {place: self._group_limit(place, lengths) for place in {self.owner[job] for job in lengths}}
        of_rows = [limits.get(self.owner[job]) for job in rows.job.tolist()]
        listed = [NEVER if limit is None else limit for limit in of_rows]
        rows.until = torch.minimum(rows.until, torch.tensor(listed, device=self.device))
        return ended | (rows.count >= rows.until)

    def _group_limit(self, place: int, now: dict[int, int] | None = None) -> int | None:
        """Most tokens of a group's rollouts, given the lengths of those that have ended before and `now`."""
        if self.long_tail is None:
            return None
        size = len(self.groups[place].rollouts)
        jobs = range(self.first[place], self.first[place] + size)
        ended = [len(self.rollouts[job].ids) for job in jobs if self.rollouts[job].stop is not None]
        ended += [length for job, length in (now or {}).items() if job in jobs]
        return self.long_tail(sorted(ended), size) if ended else None

    def _leave(
        self, rows: Rows, ids: Int[Tensor, " R"], leaving: Bool[Tensor, " R"], *, ended: bool
    ) -> tuple[Rows | None, Int[Tensor, " left"]]:
        """Notes what has become of rows, ended or pausing, and closes the ranks."""
        where = leaving.nonzero().flatten()
        chosen, full = rows.only(where), (self.cache.lengths >= self.context)[where].tolist()
        counts, until, jobs = chosen.count.tolist(), chosen.until.tolist(), chosen.job.tolist()
        widest = max(counts)
        drawn, logprobs = chosen.ids[:, :widest].tolist(), chosen.logprobs[:, :widest].tolist()
        for row, (job, count) in enumerate(zip(jobs, counts, strict=True)):
            one = Begun(
                ids=tuple(drawn[row][:count]),
                logprobs=tuple(logprobs[row][:count]),
                placed=tuple(self.placed.pop(job)),
            )
            if ended:
                stop = self._reason(one, full=full[row], capped=count >= until[row])
                one = dataclasses.replace(one, stop=stop)
            self._note(job, one)
        holes, movers, left = closing(leaving)
        self.cache.keep_rows(_order(holes, movers, left))
        rows.close(holes, movers, left)
        ids[holes] = ids[movers]
        return (rows if left else None), ids[:left]

    def _note(self, job: int, one: Begun) -> None:
        place = self.owner[job]
        self.rollouts[job] = one
        self.live[place].remove(job)
        if not self.live[place]:
            self.features.pop(place, None)
            self.ready.append(place)

    def _check_finite(self, rows: Rows) -> None:
        newest = rows.logprobs.gather(1, rows.count[:, None] - 1)[:, 0]
        for row in (~newest.isfinite()).nonzero().flatten().tolist():
            job = int(rows.job[row])
            place = self.owner[job]
            raise NonFiniteLogits(
                self.groups[place].prompt.sample.id,
                job - self.first[place],
                int(rows.count[row]),
                self.sampling.temperature,
            )

    def _reason(self, one: Begun, *, full: bool, capped: bool) -> StopReason:
        last = one.ids[-1]
        if last in self.policy.end_ids:
            return "eos"
        full = full or len(one.ids) >= self.sampling.max_tokens
        if last in self.sampling.stop_ids or not (full or capped):
            return "stop"
        # A stop string is looked at once more only if something else explains the end.
        if self.sampling.stop:
            text = self.policy.decode(text_ids(one.spans))
            if any(end in text for end in self.sampling.stop):
                return "stop"
        return "length" if full else "cut"

    # -- tokens and blocks go in --------------------------------------------------------------

    def _advance(self, rows: Rows, ids: Int[Tensor, " R"]) -> None:
        """Every row takes in its token; where the trigger fired, what is inserted as well."""
        inserts = self._inserts(rows, ids)
        # Rows that insert write their token where their chunk overwrites it: this one is a draft.
        stays = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        if inserts:
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
        if not (fired := self.triggers.fired(rows, ids)):
            return found
        where = torch.tensor(fired, device=self.device)
        jobs, counts = rows.job[where].tolist(), rows.count[where].tolist()
        drawn = rows.ids[where, : max(counts)].tolist()
        for row, job, count, sampled in zip(fired, jobs, counts, drawn, strict=True):
            # The trigger's last token has been sampled and not been taken in: it has attended to nothing.
            attended = rows.attended[row] / max(count - 1, 1) if self.intake.width else None
            prompt, made = self.groups[self.owner[job]].prompt, self.placed[job]
            if one := self.triggers.ask(prompt, sampled[:count], made, attended):
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
        place = self.owner[int(rows.job[row])]
        prompt = self.groups[place].prompt
        before, after = one.insertion.before, one.insertion.after
        tag = Text(ids=tuple(rows.ids[row, one.start if before else one.stop - 1 : one.stop].tolist()))
        first = count_tokens(before, prompt.grids)
        return Chunk(
            spans=(*before, tag, *after),
            prompt=prompt,
            features=self.features[place],
            start=start,
            asking=range(first, first + len(tag.ids)),
        )


def closing(leaving: Bool[Tensor, " R"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"], int]:
    """(holes, movers, left): the last rows that stay move into the holes of those that leave, so that the
    first `left` rows are live again and no more rows move than leave."""
    left = len(leaving) - int(leaving.sum())
    holes = leaving[:left].nonzero().flatten()
    return holes, (~leaving[left:]).nonzero().flatten() + left, left


def _order(holes: Int[Tensor, " M"], movers: Int[Tensor, " M"], left: int) -> Int[Tensor, " left"]:
    """Which row stands at each place after `closing`."""
    order = torch.arange(left, device=holes.device)
    order[holes] = movers
    return order
