"""`Generator`: a model is used as it was trained, and an answer that is streamed is the answer."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import reflectvlm.rollout.decoding
from fixtures import favour, make_policy, make_sample, noise_image
from reflectvlm.generator import GREEDY, Generator, read_images
from reflectvlm.models.carried import carry
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.protocols import Reattention
from reflectvlm.reattention import Implicit, VisualCopy, VisualRoute
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.types import Instruction, Rollout, Sample, SamplingParams, Visual

SPECIAL = "<|box_start|>"
COPY = VisualCopy(trigger=SPECIAL, limit=2)
ASKED = Instruction(text="Look twice.")
DRAWN = SamplingParams(max_tokens=16)
PAGE = noise_image(3)
QUESTION = "Which page is it?"


def trained(reattention: Reattention | None = COPY, instruction: Instruction | None = ASKED) -> QwenVL:
    """A random policy that often asks for the image, and says so in its config."""
    policy = favour(make_policy(), [SPECIAL], 4)
    carry(policy.model.config, reattention, instruction)
    return policy


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    return trained()


@pytest.fixture(scope="module")
def folder(policy: QwenVL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    policy.save(path)
    return path


def content(rollout: Rollout) -> Any:
    return rollout.spans, rollout.text, rollout.stop


def test_a_saved_model_is_used_as_it_was_trained(folder: Path) -> None:
    """A model that was trained with COPY and answers without it is another model than the one reported."""
    generator = Generator.load(folder, sampling=DRAWN, seed=6, device="cpu")
    assert generator.reattention == COPY
    assert generator.instruction == ASKED
    rollout = generator.answer(PAGE, QUESTION)
    sample = Sample(id="question", question=QUESTION, answer="", images=(PAGE,))
    prompt = generator.policy.prompt(sample, ASKED)
    engine = InProcessEngine(policy=generator.policy)
    ((expected,),) = engine.generate([prompt], 1, DRAWN, COPY, seed=6)
    assert content(rollout) == content(expected)
    assert rollout.prompt.spans == prompt.spans
    assert rollout.insertions, "nothing was inserted, so this proved nothing"


def test_what_is_given_wins(policy: QwenVL) -> None:
    """An ablation that silently runs with the trained setting."""
    other = Generator(policy, VisualRoute(trigger=SPECIAL, m=25), sampling=DRAWN, seed=6)
    assert other.instruction == ASKED
    blocks = other.answer(PAGE, QUESTION).insertions
    assert {len(block.keep or ()) for block in blocks} == {4}  # a quarter of the 16 tokens of 64 x 64
    plain = Generator(policy, Implicit(), Instruction(), sampling=DRAWN, seed=6)
    assert plain.answer(PAGE, QUESTION).insertions == ()
    assert plain.instruction == Instruction()


def test_a_model_that_carries_nothing() -> None:
    """A base model must answer too, with nothing inserted and nothing asked beside the question."""
    generator = Generator.load("tiny", device="cpu")
    assert (generator.reattention, generator.instruction) == (Implicit(), Instruction())
    assert generator.sampling == GREEDY
    half = Generator(trained(None), sampling=DRAWN)
    assert (half.reattention, half.instruction) == (Implicit(), ASKED)


def test_a_broken_config_is_not_asked_when_both_are_given() -> None:
    """The error about a broken config advises to give both: that must then work."""
    broken = make_policy()
    broken.model.config.reflectvlm = {"reattention": "copy"}
    assert Generator(broken, COPY, ASKED).reattention == COPY
    with pytest.raises(ValueError, match=r"reflectvlm.reattention is 'copy'"):
        Generator(broken, COPY)


# -- streaming ------------------------------------------------------------------------------------


def parts(pieces: Iterable[str | Visual | Rollout]) -> tuple[str, list[Visual], Rollout]:
    found = list(pieces)
    assert isinstance(found[-1], Rollout)
    assert "" not in found
    texts = [piece for piece in found if isinstance(piece, str)]
    return "".join(texts), [piece for piece in found if isinstance(piece, Visual)], found[-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_streamed_answer_is_the_answer(policy: QwenVL, seed: int) -> None:
    """A character shown twice or never, a block that is not shown, another draw than `answer` makes. At
    this temperature half of the bytes are no valid UTF-8."""
    sampling = SamplingParams(max_tokens=40, temperature=3)
    generator = Generator(policy, sampling=sampling, seed=seed)
    text, blocks, rollout = parts(generator.stream(PAGE, QUESTION))
    assert text == rollout.text
    assert tuple(blocks) == rollout.insertions
    assert content(rollout) == content(generator.answer(PAGE, QUESTION))


def test_characters_of_several_tokens_are_shown_whole(
    policy: QwenVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replacement character on the terminal where a letter of two tokens is half done; a block of a
    plain-text tag shown away from its tag."""
    said = "naïve 日本 €<back>漢🙂 end"
    ids = [*policy.tokenizer.encode(said, add_special_tokens=False), policy.end_ids[0]]
    assert any(policy.decode([i]) == "\ufffd" for i in ids), "no token is part of a character"
    left = iter(ids)

    def next_id(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([next(left)]), logits.new_zeros(1)

    monkeypatch.setattr(reflectvlm.rollout.decoding, "draw", next_id)
    copy = VisualCopy(trigger="<back>")
    shown = list(Generator(policy, copy, sampling=SamplingParams(max_tokens=99)).stream(PAGE, QUESTION))
    assert "".join(piece for piece in shown if isinstance(piece, str)) == said
    assert not any("\ufffd" in piece for piece in shown if isinstance(piece, str))
    (place,) = [i for i, piece in enumerate(shown) if isinstance(piece, Visual)]
    assert "" not in shown
    assert "".join(map(str, shown[:place])) == "naïve 日本 €<back>"
    assert shown[place] == Visual(image=0)


def test_an_engine_that_cannot_stream(policy: QwenVL) -> None:
    """An AttributeError from inside tells nobody that `answer` works."""

    def replay(policy: QwenVL) -> ScriptedEngine:
        return ScriptedEngine(policy=policy, texts=["7"])

    generator = Generator(policy, engine=replay)
    assert generator.answer(PAGE, QUESTION).text == "7"
    with pytest.raises(
        ValueError, match=r"ScriptedEngine cannot tell an answer as it comes: .* Call `answer`"
    ):
        list(generator.stream(PAGE, QUESTION))


# -- many rows ------------------------------------------------------------------------------------


def test_answers_come_in_order_however_they_are_batched(policy: QwenVL) -> None:
    """An answer under another row's id; a batch whose rows are lost at its end."""
    rows = [make_sample(i, f"Page {i}?") for i in range(5)]
    generator = Generator(policy, sampling=SamplingParams(max_tokens=8, temperature=0))
    alone = [content(generator.answers([row], batch=1).__next__()) for row in rows]
    for batch in (1, 2, 5, 16):
        found = list(generator.answers(iter(rows), batch=batch))
        assert [rollout.prompt.sample.id for rollout in found] == [row.id for row in rows]
        assert [text for _, text, _ in map(content, found)] == [text for _, text, _ in alone]
    assert list(generator.answers([])) == []


def test_equal_rows_in_two_batches_are_drawn_apart(policy: QwenVL) -> None:
    """One set of random numbers for every batch: answers to equal questions would all agree."""
    rows = [make_sample(0)] * 4
    first = [r.text for r in Generator(policy, sampling=DRAWN).answers(rows, batch=2)]
    assert len({*first}) == 4
    assert first == [r.text for r in Generator(policy, sampling=DRAWN).answers(rows, batch=2)]
    assert first != [r.text for r in Generator(policy, sampling=DRAWN, seed=1).answers(rows, batch=2)]


# -- what a user gives ----------------------------------------------------------------------------


def test_images_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that only works from one folder, or a list taken for one image."""
    (tmp_path / "in").mkdir()
    PAGE.save(tmp_path / "page.png")
    file = io.BytesIO()
    PAGE.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    kinds = ["../page.png", Path("../page.png"), str(tmp_path / "page.png"), "~/page.png", file.getvalue()]
    for kind in (*kinds, PAGE, url):
        (image,) = read_images(kind)
        assert image.tobytes() == PAGE.tobytes()
    assert [image.size for image in read_images(kinds)] == [(64, 64)] * 5
    assert read_images(None) == read_images([]) == ()


def test_without_an_image_and_with_two(policy: QwenVL) -> None:
    """COPY has nothing to show without an image, and shows both of two."""
    generator = Generator(policy, sampling=DRAWN, seed=6)
    assert generator.answer(None, QUESTION).insertions == ()
    both = generator.answer([PAGE, Image.new("RGB", (32, 32))], "Is <image> like <image>?")
    assert [block.image for block in both.insertions][:2] == [0, 1]


@pytest.mark.parametrize(
    ("images", "question", "says"),
    [
        (None, " ", "neither an image nor a question. Give at least one"),
        ([], "", "neither an image nor a question"),
        (PAGE, "<image> and <image>", "says <image> 2 times, but there are 1 images"),
        ("nope.png", "a", r"Image 'nope.png' does not exist. Check the path; it is taken from "),
        (b"GIF", "a", "Image of 3 bytes is not an image"),
        (7, "a", "Image of type int is not something an image can be read from"),
    ],
)
def test_questions_that_cannot_be_asked(policy: QwenVL, images: Any, question: str, says: str) -> None:
    """A wrong path answered blindly, or an error from deep inside of Pillow."""
    with pytest.raises(ValueError, match=says):
        Generator(policy).answer(images, question)


def test_settings_that_are_no_settings(policy: QwenVL) -> None:
    """A name or a class in place of an object fails at the first trigger only, or never."""
    for wrong in ("copy", VisualCopy):
        with pytest.raises(ValueError, match=r"reattention is .*\. Give an object with trigger, probe"):
            Generator(policy, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"instruction is 'boxed'\. Give an object"):
        Generator(policy, instruction="boxed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch is 0. It must be at least 1"):
        list(Generator(policy).answers([], batch=0))
    with pytest.raises(ValueError, match=r"device is 'warp', which cannot be used here .* or give cpu"):
        Generator.load("tiny", device="warp")
    with pytest.raises(FileNotFoundError, match=r"No model folder at './nope'"):
        Generator.load(os.path.join(".", "nope"), device="cpu")


def test_a_rollout_shows_itself(policy: QwenVL) -> None:
    """A notebook shows the answer and which tokens were shown again, and no empty gold answer."""
    rollout = Generator(policy, VisualRoute(trigger=SPECIAL, limit=1), sampling=DRAWN, seed=6).answer(
        PAGE, QUESTION
    )
    page = rollout._repr_html_()
    assert "⟦image 0: 8 of 16 tokens⟧" in page
    assert "chosen tokens" in page
    assert "<b>Answer</b>" not in page
