"""The policy against the stock model's own forward, however rows are padded and batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_policy, make_prompt, score, score_batch
from reflectvlm.batch import Batch
from reflectvlm.models.freezing import freeze, part_of, trainable_table
from reflectvlm.models.loading import find_model, load_image_processor
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.spans import flatten
from reflectvlm.types import Instruction, Prompt, Sample, Spans, Text, Visual

TOLERANCE = 1e-5


def words(*ids: int) -> Text:
    return Text(ids=ids, trained=True)


def cases(policy: QwenVL) -> list[tuple[Prompt, Spans]]:
    """Prompts of unequal lengths: one image, two images, none, and one shown twice more (COPY)."""
    one, two = make_prompt(policy, 0), make_prompt(policy, 1, "<image> or <image>?", ((64, 48), (48, 48)))
    none = make_prompt(policy, 2, "One and one?", ())
    return [
        (one, (words(10, 20, 30),)),
        (two, (words(40, 50),)),
        (none, (words(60, 70, 80, 90, 100),)),
        (one, (words(11, 21), Visual(image=0), words(31, 41), Visual(image=0), words(51))),
        (two, (words(12), Visual(image=1), words(22, 32))),
    ]


def stock_logprobs(policy: QwenVL, prompt: Prompt, answer: Spans, temperature: float = 1.0) -> Tensor:
    """The stock model's own forward on ids and pixels; its own positions; log-probs of the answer's
    words with reserved ids at minus infinity."""
    row = flatten(prompt.spans + answer, prompt.grids, policy.vision)
    ids = torch.from_numpy(row.ids)[None].to(policy.device)
    shown = [prompt.patches[s.image] for s in prompt.spans + answer if isinstance(s, Visual)]
    pictures: dict[str, Tensor] = {}
    if shown:
        pictures["pixel_values"] = torch.cat([image.pixels for image in shown])
        pictures["image_grid_thw"] = torch.tensor(
            [[g.frames, g.rows * 2, g.columns * 2] for g in (i.grid for i in shown)]
        )
    pictures = {name: tensor.to(policy.device) for name, tensor in pictures.items()}
    with torch.no_grad():
        out = policy.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == policy.vision.pad).int(),
            **pictures,
        )
    logits = out.logits[0].float() / temperature
    logits[:, list(policy.reserved_ids)] = float("-inf")
    logprobs = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[torch.from_numpy(row.trained)[1:].to(policy.device)]


def largest(ours: Tensor, batch: Batch, expected: Sequence[Tensor]) -> float:
    return float((ours[batch.trained] - torch.cat(list(expected))).abs().max())


@pytest.fixture(scope="module")
def expected(exact_policy: QwenVL) -> list[Tensor]:
    return [stock_logprobs(exact_policy, prompt, answer) for prompt, answer in cases(exact_policy)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_the_stock_models(exact_policy: QwenVL, expected: list[Tensor], side: Any) -> None:
    """Everything between spans and log-probs, in one batch of unequal rows."""
    policy = dataclasses.replace(exact_policy, padding_side=side)
    batch = policy.batch(cases(policy))
    assert largest(score_batch(policy, batch).logprobs, batch, expected) < TOLERANCE


def test_scores_at_a_temperature(exact_policy: QwenVL) -> None:
    prompt, answer = cases(exact_policy)[0]
    stock = stock_logprobs(exact_policy, prompt, answer, 0.7)
    batch = exact_policy.batch([(prompt, answer)])
    assert largest(score_batch(exact_policy, batch, 0.7).logprobs, batch, [stock]) < TOLERANCE
    assert largest(score_batch(exact_policy, batch).logprobs, batch, [stock]) > 100 * TOLERANCE


def after_image(batch: Batch) -> Batch:
    """Text behind the first image one position too far."""
    first = (batch.visual >= 0).long().argmax(1)
    behind = torch.arange(batch.ids.shape[1]) > first[:, None]
    return dataclasses.replace(batch, positions=batch.positions + (behind & (batch.visual < 0)))


def rows_for_columns(batch: Batch) -> Batch:
    return dataclasses.replace(batch, positions=batch.positions[[0, 2, 1]])


def consecutive(batch: Batch) -> Batch:
    """Positions as if an image were text."""
    plain = (batch.attention.long().cumsum(1) - 1).clamp(min=0)
    return dataclasses.replace(batch, positions=plain.expand(3, -1, -1))


def swapped_features(batch: Batch) -> Batch:
    """Every visual token shows the feature of another cell or image."""
    total = sum(image.grid.tokens for image in batch.images)
    return dataclasses.replace(batch, visual=torch.where(batch.visual >= 0, (batch.visual + 5) % total, -1))


def no_features(batch: Batch) -> Batch:
    return dataclasses.replace(batch, visual=torch.full_like(batch.visual, -1))


def attended_padding(batch: Batch) -> Batch:
    """Each padded row sees one column of padding."""
    seen = batch.attention.clone()
    seen[:, :-1] |= batch.attention[:, 1:]
    return dataclasses.replace(batch, attention=seen)


def late_predictor(batch: Batch) -> Batch:
    """Each token is predicted from itself."""
    return dataclasses.replace(batch, predictor=batch.predictor + 1)


@pytest.mark.parametrize(
    "mistake",
    [
        after_image,
        rows_for_columns,
        consecutive,
        swapped_features,
        no_features,
        attended_padding,
        late_predictor,
    ],
)
def test_the_comparison_sees_mistakes(exact_policy: QwenVL, expected: list[Tensor], mistake: Any) -> None:
    """Each mistake must move a log-prob far past the tolerance, else the comparison proves nothing."""
    policy = dataclasses.replace(exact_policy, padding_side="left")
    batch = policy.batch(cases(policy))
    assert largest(score_batch(policy, mistake(batch)).logprobs, batch, expected) > 1000 * TOLERANCE


def test_reserved_ids_have_no_probability(exact_policy: QwenVL, expected: list[Tensor]) -> None:
    """With spare rows in the softmax the trainer's log-probs differ from the sampler's by a constant."""
    open_policy = dataclasses.replace(exact_policy)
    vars(open_policy)["reserved_ids"] = ()
    batch = open_policy.batch(cases(open_policy))
    assert largest(score_batch(open_policy, batch).logprobs, batch, expected) > 100 * TOLERANCE

    reserved = exact_policy.reserved_ids
    spelled = set(exact_policy.tokenizer.convert_ids_to_tokens(list(reserved))) - {None}
    assert {
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    } <= spelled
    assert len(reserved) == 5 + 2432 - 2318
    hidden = torch.randn(2, 128, dtype=torch.float64)
    assert exact_policy.logits(hidden)[:, list(reserved)].eq(float("-inf")).all()


def test_scores_do_not_depend_on_the_batch(exact_policy: QwenVL, expected: list[Tensor]) -> None:
    """Alone, in pairs, in another order, and in micro-batches: the same number each."""
    rows = cases(exact_policy)
    for order in ([3], [2, 0], [4, 3, 1]):
        batch = exact_policy.batch([rows[i] for i in order])
        ours = score_batch(exact_policy, batch).logprobs
        assert largest(ours, batch, [expected[i] for i in order]) < TOLERANCE
    for side in ("right", "left"):
        policy = dataclasses.replace(exact_policy, padding_side=side)
        whole = policy.batch(rows)
        features = policy.features(whole.images)
        for k, piece in enumerate(whole.split(torch.arange(len(whole)).split(2))):
            with torch.no_grad():
                ours = policy.score(piece, features).logprobs
            assert largest(ours, piece, expected[2 * k : 2 * k + 2]) < TOLERANCE


def test_copy_is_the_stock_model_shown_the_image_twice(exact_policy: QwenVL) -> None:
    """COPY re-uses features; the stock model encodes the image again. Showing it must matter, too."""
    prompt = make_prompt(exact_policy, 5)
    copied: Spans = (words(11, 21), Visual(image=0), words(31, 41))
    plain: Spans = (words(11, 21), words(31, 41))
    batch = exact_policy.batch([(prompt, copied)])
    assert len(batch.images) == 1
    ours = score_batch(exact_policy, batch).logprobs
    assert largest(ours, batch, [stock_logprobs(exact_policy, prompt, copied)]) < TOLERANCE
    assert largest(ours, batch, [stock_logprobs(exact_policy, prompt, plain)]) > 1000 * TOLERANCE


def test_before_sampled_predicts_from_before_the_block(exact_policy: QwenVL) -> None:
    """The token behind a late block was drawn without it; what follows was drawn with it."""
    prompt = make_prompt(exact_policy, 5)
    late: Spans = (words(11, 21), Visual(image=0, before_sampled=True), words(31, 41))
    batch = exact_policy.batch([(prompt, late)])
    ours = score_batch(exact_policy, batch).logprobs[batch.trained]
    without = stock_logprobs(exact_policy, prompt, (words(11, 21), words(31, 41)))
    with_it = stock_logprobs(exact_policy, prompt, (words(11, 21), Visual(image=0), words(31, 41)))
    assert (ours[:3] - without[:3]).abs().max() < TOLERANCE
    assert (ours[3] - with_it[3]).abs() < TOLERANCE
    assert (ours[2] - with_it[2]).abs() > 1000 * TOLERANCE


def test_rows_keep_their_own_image(exact_policy: QwenVL) -> None:
    """`repeat` beside `repeat_interleave` pairs an image with another row's question."""
    prompts = [make_prompt(exact_policy, seed) for seed in range(4)]
    answer = (words(10, 20, 30),)
    alone = [score(exact_policy, [(prompt, answer)]).logprobs[-1][-3:] for prompt in prompts]
    order = [2, 0, 3, 0, 1, 2]
    batch = exact_policy.batch([(prompts[i], answer) for i in order])
    assert len(batch.images) == 4
    together = score_batch(exact_policy, batch).logprobs[batch.trained].view(-1, 3)
    for b, i in enumerate(order):
        assert (together[b] - alone[i]).abs().max() < TOLERANCE
    for a in range(4):
        for b in range(a):
            assert (alone[a] - alone[b]).abs().max() > 1000 * TOLERANCE, "the images look alike"


def test_stale_rope_deltas_do_not_matter(exact_policy: QwenVL) -> None:
    """`generate` leaves `rope_deltas` in the model; a later training forward must not see them."""
    sequence = cases(exact_policy)[0]
    before = score(exact_policy, [sequence]).logprobs
    inner = exact_policy.model.model
    stale, inner.rope_deltas = inner.rope_deltas, torch.tensor([[17]])
    try:
        assert torch.equal(score(exact_policy, [sequence]).logprobs, before)
    finally:
        inner.rope_deltas = stale


def test_answers_end_their_turn_and_hold_no_pixels(tiny_policy: QwenVL) -> None:
    (span,) = tiny_policy.answer("7<|im_start|>")
    im_start, im_end = tiny_policy.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert span.ids[-2:] == (im_start, im_end)
    assert span.trained
    with pytest.raises(ValueError, match=r"spells '<\|image_pad\|>'"):
        tiny_policy.answer("see <|image_pad|>")


def test_prompt_length_counts_visual_tokens(tiny_policy: QwenVL) -> None:
    prompt = make_prompt(tiny_policy)
    text = sum(len(span.ids) for span in prompt.spans if isinstance(span, Text))
    assert tiny_policy.prompt_length(prompt) == text + 16 + 2  # 64 / 16 = 4 x 4 cells, start and end


@pytest.mark.parametrize("parts", [("vision",), ("vision", "projector"), ("language",)])
def test_freezing(parts: tuple[Any, ...]) -> None:
    """A switch that freezes nothing: the tower drifts and nobody is told."""
    policy = make_policy()
    freeze(policy.model, parts)
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (part_of(name) not in parts), name
    for part, total, trains in trainable_table(policy.model):
        assert total > 0
        assert trains == (0 if part in parts else total)


def test_freezing_refuses_nonsense(tiny_policy: QwenVL) -> None:
    with pytest.raises(ValueError, match=r"freeze_parts is 'vision'\. It is a list: \[vision\]"):
        freeze(tiny_policy.model, "vision")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Cannot freeze \['tower'\]"):
        freeze(tiny_policy.model, ("tower",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(tiny_policy.model, ("vision", "projector", "language"))


def test_save_and_load(tmp_path: Path) -> None:
    """A saved policy is a stock folder: loading it gives the same scores, prompts and limits."""
    folder = str(tiny_folder(tmp_path / "first", seed=3))
    policy = load_policy(folder, freeze_parts=("vision",))
    prompt = make_prompt(policy)
    before = score(policy, [(prompt, (words(10, 20),))]).logprobs
    policy.save(tmp_path / "second")
    again = load_policy(str(tmp_path / "second"))
    assert torch.equal(score(again, [(make_prompt(again), (words(10, 20),))]).logprobs, before)
    assert all(parameter.requires_grad for parameter in again.module.parameters())
    frozen = [name for name, p in policy.model.named_parameters() if not p.requires_grad]
    assert frozen
    assert all(part_of(name) == "vision" for name in frozen)


def test_loading_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No model folder at '\./nowhere'"):
        find_model("./nowhere")
    folder = str(tiny_folder(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="min_pixels=4096 is more than max_pixels=1024"):
        load_image_processor(folder, 4096, 1024)


def test_pixel_limits_hold_for_every_image(tmp_path: Path) -> None:
    """A guard for one small image must not resize the next ones."""
    folder = str(tiny_folder(tmp_path / "tiny"))
    policy = load_policy(folder, min_pixels=32 * 32, max_pixels=64 * 64)
    sizes = ((128, 128), (16, 16), (64, 32), (64, 64))
    prompt = make_prompt(policy, sizes=sizes)
    # 128 shrinks to 64, 16 grows to 32; cells are 16 x 16.
    assert [grid.tokens for grid in prompt.grids] == [16, 4, 8, 16]


def test_a_sample_without_images_has_no_features(tiny_policy: QwenVL) -> None:
    prompt = tiny_policy.prompt(Sample(id="t", question="1?", answer="1"), Instruction())
    assert prompt.patches == ()
    assert tiny_policy.features(()).shape == (0, 128)
