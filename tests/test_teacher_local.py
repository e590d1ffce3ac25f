"""A policy as a teacher: a tiny random one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reflectvlm.curate.calls import Calls
from reflectvlm.curate.teachers import teacher
from reflectvlm.curate.teachers.local import LocalTeacher
from reflectvlm.curate.teachers.reasons import reason_of
from reflectvlm.curate.types import Request, Teacher
from reflectvlm.generator import Generator
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Instruction, SamplingParams

PAGE = Image.new("RGB", (64, 64), "red")


def local(policy: QwenVL, **options: Any) -> LocalTeacher:
    return LocalTeacher(path="random", load=lambda _: Generator(policy), **options)


def ask(text: str, **options: Any) -> Request:
    return Request(**{"row": "1", "purpose": "answer", "text": text, "max_tokens": 6, **options})


def whole(teacher: LocalTeacher, request: Request) -> str:
    """What was said, also where it was cut: a random policy hardly ever ends."""
    (said,) = teacher([request])
    return said.text if said.text is not None else said.why


def test_it_says_what_the_policy_says(tiny_policy: QwenVL) -> None:
    """Bug: the image, the system turn or the budget of the request does not reach the policy."""
    asked = ask("What is this?", images=(PAGE,), system="Be brief.", max_tokens=5)
    (said,) = local(tiny_policy)([asked])
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    generator = Generator(tiny_policy, instruction=Instruction(system="Be brief."), sampling=sampling)
    rollout = generator.answer(PAGE, "What is this?")
    assert said.prompt_tokens == tiny_policy.prompt_length(rollout.prompt)
    assert said.tokens == len(rollout.sampled_ids)
    assert rollout.truncated
    assert (reason_of(said), said.why) == ("cut", f"cut: at 5 tokens: {rollout.text[-80:]!r}")
    for change in ({"images": ()}, {"system": None}, {"text": "Who is this?"}):
        other = Request(**{"row": "1", "purpose": "answer", "text": asked.text, "images": (PAGE,),
                           "system": "Be brief.", "max_tokens": 5, **change})  # fmt: skip
        assert local(tiny_policy)([other])[0].prompt_tokens != said.prompt_tokens or change.get("text")


def test_what_is_drawn_depends_on_the_request_alone(tiny_policy: QwenVL) -> None:
    """Bug: a resumed run, which asks in other company, draws other answers; or all answers to a question are
    the same one."""
    asked = [ask("a", temperature=1.0, number=number) for number in range(4)]
    asked += [ask("b"), ask("c", temperature=0.7, max_tokens=3)]
    alone = [whole(local(tiny_policy), one) for one in asked]
    together = [said.text or said.why for said in local(tiny_policy)(asked[::-1])][::-1]
    assert together == alone
    assert len({*alone[:4]}) == 4
    assert whole(local(tiny_policy, seed=1), asked[0]) != alone[0]
    assert whole(local(tiny_policy, seed=1), asked[4]) == alone[4]  # greedy


def test_a_row_without_its_image_is_that_rows_matter(tiny_policy: QwenVL, tmp_path: Path) -> None:
    """Bug: one missing file ends the work, or shifts the replies by one."""
    asked = [ask("a"), ask("b", images=("no.png",), root=tmp_path), ask("c")]
    found = local(tiny_policy)(asked)
    assert [reason_of(said) for said in found] == ["cut", "image", "cut"]
    assert found[2].why == whole(local(tiny_policy), asked[2])


def test_calls_ask_it_in_batches(tiny_policy: QwenVL) -> None:
    """Bug: a policy is asked one by one, by several threads at a time."""
    sizes: list[int] = []

    class Watched:
        concurrency, batch, name = 1, 3, "watched"

        def __call__(self, requests: Any, /) -> Any:
            sizes.append(len(requests))
            return made(requests)

    made = local(tiny_policy, batch=3)
    assert isinstance(made, Teacher)
    assert made.batch == 3
    Calls(Watched())([ask(text) for text in "abcdefg"])
    assert sizes == [3, 3, 1]


def test_its_name_is_that_of_its_weights(tmp_path: Path) -> None:
    """Bug: a model that was trained on gets the replies of its former self."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = LocalTeacher(path=str(tmp_path)).name
    assert re.fullmatch("local [0-9a-f]{16}", before)
    assert LocalTeacher(path=str(tmp_path), batch=2, device="cpu").name == before
    assert (
        LocalTeacher(path=str(tmp_path), max_pixels=9, seed=1).name
        == f'{before} {{"max_pixels": 9, "seed": 1}}'
    )
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert LocalTeacher(path=str(tmp_path)).name != before
    assert LocalTeacher(path="org/model").name == "local org/model"


def test_words_name_it() -> None:
    """Bug: a setting of the policy is dropped."""
    made = teacher("local:runs/a,b/model,batch=4,max_pixels=200704,top_p=0.9")
    assert isinstance(made, LocalTeacher)
    assert (made.path, made.batch, made.max_pixels, made.top_p) == ("runs/a,b/model", 4, 200704, 0.9)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"path": ""}, "LocalTeacher.path is empty"),
        ({"path": "tiny", "batch": 0}, "LocalTeacher.batch is 0. It must be at least 1"),
        ({"path": "tiny", "top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], match: str) -> None:
    """Bug: a model is loaded for minutes before a setting is refused."""
    with pytest.raises(ValueError, match=match):
        LocalTeacher(**settings)
