"""The in-process rollout engine: prompts -> groups of rollouts, on the policy's own weights.

One step of `_Decoding._step`, for all live rows at once:

    draw a token -> rows that end leave -> everybody takes in its token ->
    rows whose trigger fired take in their block and, around it, their tag

A prompt is prefilled once and its cache copied to its group; vision features are computed once per
image. Rows leave when they end and waiting prompts take their place. Nothing is padded: every row
has its own length in the cache, so a row may take in a block while its neighbours do not.

Left out here: CUDA graphs and partial rollouts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reflectvlm.models.attention import AttentionWatch
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.rollout.cache import SlotCache
from reflectvlm.rollout.looking import image_look
from reflectvlm.rollout.placing import (
    AnswerState,
    Placed,
    answer_spans,
    checked,
    end,
    special_id,
    tag_length,
    text_ids,
)
from reflectvlm.rollout.rows import Rows
from reflectvlm.rollout.sampling import draw, uniforms
from reflectvlm.rollout.watch import TextWatch
from reflectvlm.spans import count_tokens, flatten
from reflectvlm.types import Prompt, Rollout, SamplingParams, Spans, StopReason, Text, Visual


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
        decoding = self._decoding(prompts, n, sampling, reattention, seed)
        for _ in decoding.steps(max(self.max_rows, n)):
            pass
        done = decoding.done
        return [tuple(done[p * n + m] for m in range(n)) for p in range(len(prompts))]

    def stream(
        self, prompt: Prompt, sampling: SamplingParams, reattention: Reattention, *, seed: int = 0
    ) -> Iterator[str | Visual | Rollout]:
        """One rollout as it comes: pieces of its text and inserted blocks in their order, and at the end the
        rollout. Of a tag of several tokens with a block in front, what came before its last token has been
        told already when the block is."""
        decoding = self._decoding([prompt], 1, sampling, reattention, seed)
        shown, blocks = "", 0
        for rows in decoding.steps(1):
            if rows is None:
                break
            spans = decoding.spans(rows, 0)
            for place, block in [(at, span) for at, span in enumerate(spans) if isinstance(span, Visual)][
                blocks:
            ]:
                before = self.policy.decode(text_ids(spans[:place]))
                yield before[len(shown) :]
                yield block
                shown, blocks = max(shown, before, key=len), blocks + 1
            text = self.policy.decode(text_ids(spans))
            if not text.endswith("\ufffd"):  # else a character of several tokens is not complete yet
                yield text[len(shown) :]
                shown = text
        rollout = decoding.done[0]
        yield rollout.text[len(shown) :]
        yield rollout

    def _decoding(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingParams,
        reattention: Reattention,
        seed: int,
    ) -> _Decoding:
        self.policy.module.eval()
        return _Decoding(
            policy=self.policy,
            prompts=prompts,
            n=n,
            sampling=sampling,
            reattention=reattention,
            seed=seed,
            stop_watch=self._watch(tuple(sampling.stop)),
            trigger_watch=self._trigger_watch(reattention.trigger),
            trigger_id=special_id(self.policy, reattention.trigger),
        )

    def _trigger_watch(self, trigger: str | None) -> TextWatch:
        plain = trigger is not None and special_id(self.policy, trigger) is None
        return self._watch((str(trigger),) if plain else ())

    def _watch(self, texts: tuple[str, ...]) -> TextWatch:
        if texts not in self._watches:
            policy = self.policy
            vocabulary = policy.model.lm_head.weight.shape[0] if texts else 1
            self._watches[texts] = TextWatch.create(texts, policy.decode, vocabulary, policy.device)
        return self._watches[texts]


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
        trigger_id: int | None,
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
        self.placed: dict[int, list[Placed]] = {}
        self.done: dict[int, Rollout] = {}
        # ROUTE asks what the answer has attended to in its prompt.
        self.watched = 0
        if reattention.probe is not None and prompts:
            self.watched = max(count_tokens(prompt.spans, prompt.grids) for prompt in prompts)
        # Only a tag of several tokens is ever taken back; it has at most one token per byte.
        plain = self.watched and trigger_id is None
        self.remembered = len(str(reattention.trigger).encode()) if plain else 0

    def steps(self, max_rows: int) -> Iterator[Rows | None]:
        """One token of every live row at a time; yields the rows that are left, None if none is."""
        rows: Rows | None = None
        while self.waiting or rows is not None:
            rows = self._step(rows, max_rows)
            yield rows

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
        ended = self._ended(rows, ids)
        if bool(ended.any()):
            rows, ids = self._leave(rows, ids, ended)
        if rows is not None:
            self._advance(rows, ids)
        return rows

    def spans(self, rows: Rows, row: int) -> Spans:
        """The answer of a live row so far."""
        job, count = int(rows.job[row]), int(rows.count[row])
        ids, logprobs = rows.ids[row, :count].tolist(), rows.logprobs[row, :count].tolist()
        return answer_spans(ids, logprobs, self.placed.get(job, []))

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
            attended=hidden.new_zeros(len(jobs), self.watched, dtype=torch.float32),
            recent=hidden.new_zeros(len(jobs), self.remembered, self.watched, dtype=torch.float32),
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
        hidden, position, _ = self._take_in(
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
        spans = self.spans(rows, row)
        ended = ids[-1] in self.policy.end_ids
        # A stop string is looked at once more only if nothing else explains the end.
        stop: StopReason = "eos" if ended else "stop"
        if not ended and count >= self.sampling.max_tokens and ids[-1] not in self.sampling.stop_ids:
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
        one = torch.ones(len(rows), dtype=torch.long, device=self.device)
        # Rows that insert write their token where their chunk overwrites it: this one is a draft.
        one[list(inserts)] = 0
        watch = self._attention_watch(one[:, None] > 0)
        mask = self.cache.extend(None, torch.ones_like(one))
        text = torch.full_like(ids, -1)
        rows.hidden = self._forward(
            ids[:, None],
            rows.position[None, :, None].expand(3, -1, 1),
            text[:, None],
            self._no_features(),
            mask,
            watch,
        )[:, 0]
        self.cache.commit(None, one)
        rows.position = rows.position + one
        if watch is not None:
            rows.attended += watch.total
            rows.recent = torch.cat([rows.recent, watch.total[:, None]], 1)[:, 1:]
        if inserts:
            self._insert(rows, inserts)

    def _inserts(self, rows: Rows, ids: Int[Tensor, " R"]) -> dict[int, Placed]:
        """What goes into the rows whose trigger has just fired."""
        if self.reattention.trigger is None:
            return {}
        special = self.trigger_id is not None
        fired = (
            torch.eq(ids, self.trigger_id)
            if self.trigger_id is not None
            else self.trigger_watch.completed(rows.ids, rows.count, ids)
        )
        found: dict[int, Placed] = {}
        for row in fired.nonzero().flatten().tolist():
            job, count = int(rows.job[row]), int(rows.count[row])
            made = self.placed.setdefault(job, [])
            sampled = rows.ids[row, :count].tolist()
            prompt = self.prompts[job // self.n]
            # The trigger's last token has been sampled and not been taken in: it has attended to nothing.
            attended = rows.attended[row] / max(count - 1, 1)
            state = AnswerState(
                prompt=prompt,
                sampled=sampled,
                insertions=tuple(one.insertion for one in made),
                special=special,
                placed=tuple(made),
                policy=self.policy,
                look=image_look(self.policy, prompt, attended) if self.watched else None,
            )
            length = 1 if special else tag_length(self.policy, sampled, str(self.reattention.trigger))
            if count - length < end(made):  # it shares a token with a tag that has a block already
                continue
            if not (insertion := checked(self.reattention(state))):
                continue
            made.append(Placed(start=count - length, stop=count, insertion=insertion))
            found[row] = made[-1]
        return found

    def _insert(self, rows: Rows, inserts: dict[int, Placed]) -> None:
        """Takes in each row's tag with what goes around it. Of a tag of several tokens with a block in
        front, all but the last are in the cache already and are taken back first."""
        where = torch.tensor(list(inserts), device=self.device)
        chunks: list[tuple[Spans, tuple[Tensor, ...]]] = []
        back: list[int] = []
        asking: list[range] = []
        for row, one in inserts.items():
            before, after = one.insertion.before, one.insertion.after
            start = one.start if before else one.stop - 1
            tag = Text(ids=tuple(rows.ids[row, start : one.stop].tolist()))
            prompt = int(rows.job[row]) // self.n
            chunks.append(((*before, tag, *after), self.features[prompt]))
            back.append(one.stop - 1 - start)
            first = count_tokens(before, self.prompts[prompt].grids)
            asking.append(range(first, first + len(tag.ids)))
            if self.watched and back[-1]:
                # The newest summand is this step's draft, which counted as nothing.
                rows.attended[row] -= rows.recent[row, -1 - back[-1] : -1].sum(0)
        rewound = torch.tensor(back, device=self.device)
        self.cache.commit(where, -rewound)
        rows.hidden[where], rows.position[where], attended = self._take_in(
            where,
            chunks,
            [self.prompts[int(rows.job[row]) // self.n] for row in inserts],
            rows.position[where] - rewound,
            asking,
        )
        if attended is not None:
            rows.attended[where] += attended

    def _take_in(
        self,
        where: Int[Tensor, " R"],
        chunks: Sequence[tuple[Spans, tuple[Tensor, ...]]],
        prompts: Sequence[Prompt],
        start: Int[Tensor, " R"],
        asking: Sequence[range] = (),
    ) -> tuple[Float[Tensor, "R D"], Int[Tensor, " R"], Float[Tensor, "R W"] | None]:
        """Runs one chunk of spans per row behind what the row holds; returns each chunk's last hidden
        state, the position that follows it, and what its tokens `asking[r]` attended to."""
        flat = [
            flatten(spans, prompt.grids, self.policy.vision, start=int(at))
            for (spans, _), prompt, at in zip(chunks, prompts, start.tolist(), strict=True)
        ]
        lengths = [len(row) for row in flat]
        shape = (len(flat), max(lengths))
        ids = np.full(shape, self.policy.pad_id)
        visual = np.full(shape, -1)
        positions = np.zeros((3, *shape), dtype=np.int64)
        features: list[Tensor] = []
        total = 0
        for r, (row, (_, images)) in enumerate(zip(flat, chunks, strict=True)):
            first = np.cumsum([total, *(len(image) for image in images)])
            ids[r, : len(row)], positions[:, r, : len(row)] = row.ids, row.positions
            visual[r, : len(row)] = np.where(row.image < 0, -1, first[row.image] + row.cell)
            features += images
            total = int(first[-1])
        counts = torch.tensor(lengths, device=self.device)
        mask = self.cache.extend(where, counts)
        stacked = torch.cat(features) if features else self._no_features()
        watch = (
            self._attention_watch(_marked(shape, asking, self.device)) if asking and self.watched else None
        )
        hidden = self._forward(
            torch.from_numpy(ids).to(self.device),
            torch.from_numpy(positions).to(self.device),
            torch.from_numpy(visual).to(self.device),
            stacked,
            mask,
            watch,
        )
        self.cache.commit(where, counts)
        last = hidden[torch.arange(len(flat), device=self.device), counts - 1]
        following = torch.tensor([row.next_position for row in flat], device=self.device)
        return last, following, None if watch is None else watch.total

    def _attention_watch(self, queries: Bool[Tensor, "R T"]) -> AttentionWatch | None:
        probe = self.reattention.probe
        if probe is None or not self.watched:
            return None
        return AttentionWatch(probe=probe, queries=queries, width=self.watched)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        visual: Tensor,
        features: Tensor,
        mask: Tensor,
        watch: AttentionWatch | None,
    ) -> Float[Tensor, "R T D"]:
        return self.policy.hidden(
            self.policy.embed(ids, visual, features), positions, mask, self.cache, watch=watch
        )

    def _no_features(self) -> Float[Tensor, "0 D"]:
        return self.policy.features(())


def _marked(shape: tuple[int, int], tokens: Sequence[range], device: torch.device) -> Bool[Tensor, "R T"]:
    """True at these tokens of each row."""
    marked = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, places in enumerate(tokens):
        marked[row, places.start : places.stop] = True
    return marked
