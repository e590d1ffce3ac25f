"""Rows of Qwen-style messages: what becomes of turns, images and videos, and what is refused how."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bad_rows import NOISE, encoded, left_out, written
from reflectvlm.data import frames as frames_module
from reflectvlm.data.frames import load_frames, qwen_frames
from reflectvlm.data.images import BadImage, ImageLimits
from reflectvlm.data.rows import BadRow, Columns, read_row
from reflectvlm.data.sources import dataset
from reflectvlm.models.item_size import item_size
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.types import Instruction, Sample, Text

COLUMNS = Columns(messages="messages")
RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ((255, 0, 0), (0, 0, 255)))
MP4 = b"\0\0\0\x18ftypisom" + bytes(40)


def user(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


def image(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image", "image": value, **more}


def gold(text: Any = "12") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


class Scripted:
    """A video reader that returns so many frames and remembers what it was asked."""

    def __init__(self, frames: int = 2) -> None:
        self.frames, self.items = frames, list[dict[str, Any]]()
        self.held = b""

    def __call__(self, item: Mapping[str, Any]) -> Sequence[Image.Image]:
        self.items.append(dict(item))
        if isinstance(item["video"], list):
            return [*item["video"], item["video"][-1]]  # an even number, as qwen-vl-utils makes it
        self.held = Path(item["video"]).read_bytes()
        return [RED, BLUE, RED, BLUE][: self.frames]


def read(*messages: Any, columns: Columns = COLUMNS, root: Path = Path("."), **row: Any) -> Sample:
    reader, limits = row.pop("frames", None), row.pop("limits", ImageLimits())
    return read_row({"messages": list(messages), **row}, "rows.jsonl:17", columns, limits, root, reader)


def refused(reason: str, match: str, *messages: Any, **row: Any) -> None:
    with pytest.raises(BadRow, match=match) as caught:
        read(*messages, **row)
    assert (caught.value.position, caught.value.reason) == ("rows.jsonl:17", reason)
    assert "\n" not in str(caught.value)


# -- turns ------------------------------------------------------------------------------------------


def test_a_row_of_messages_is_a_sample() -> None:
    """Bug: images lose their place among the texts, or the answer and other columns are lost."""
    sample = read(user("Left: ", image(RED), " right: ", image(BLUE), "?"), gold("both"), id="a", level=3)
    assert sample.question == "Left: <image> right: <image>?"
    assert [i.getpixel((0, 0)) for i in sample.images] == [(255, 0, 0), (0, 0, 255)]
    assert (sample.id, sample.answer) == ("a", "both")
    assert sample.columns == {"trace": "both", "level": 3}


def test_plain_text_as_content() -> None:
    """Bug: content is a text as often as a list."""
    sample = read({"role": "user", "content": "What?"}, gold())
    assert (sample.question, sample.images) == ("What?", ())


def test_a_row_s_own_answer_stays_the_gold_one() -> None:
    """Bug: a reward compares with the whole trace of the assistant's turn where the row gives the answer."""
    sample = read(user("What?"), gold("<think>x</think> \\boxed{12}"), answer=12)
    assert (sample.answer, sample.columns["trace"]) == ("12", "<think>x</think> \\boxed{12}")
    own = read(user("What?"), gold("12"), trace="a trace of its own")
    assert own.columns["trace"] == "a trace of its own"


def test_rows_without_an_assistant() -> None:
    """Bug: a question for RL, whose answer is a column, is refused; one without any is not."""
    assert read(user("What?"), answer="7").answer == "7"
    refused("missing answer", "no column 'answer'", user("What?"))
    nobody_grades = Columns(messages="messages", answer=None)
    assert read(user("What?"), columns=nobody_grades).answer == ""


def test_the_system_turn_is_the_run_s_or_refused() -> None:
    """Bug: a row's own system turn is dropped without a word, and the model is trained on another prompt."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    assert read(system, user("What?"), gold()).question == "What?"
    other = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    refused(
        "another system turn",
        r"'Be brief\.', and the run's is.*columns.system=null",
        other,
        user("a"),
        gold(),
    )
    assert read(other, user("a"), gold(), columns=Columns(messages="messages", system=None)).question == "a"
    assert (
        read(other, user("a"), gold(), columns=Columns(messages="messages", system="Be brief.")).answer
        == "12"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), gold(), user("b"), gold()],
        [user("a"), user("b"), gold()],
        [gold(), user("a")],
        [gold()],
        [user("a"), {"role": "system", "content": "x"}, gold()],
    ],
)
def test_a_conversation_is_refused(messages: list[Any]) -> None:
    """Bug: the model is asked about turns that it never had, or an earlier answer is trained on as gold."""
    refused("several turns", "split the conversation into rows", *messages)


@pytest.mark.parametrize(
    ("messages", "reason", "match"),
    [
        ([], "missing messages", "holds no list of messages; the row's columns: messages"),
        (["What?"], "broken messages", "has the role 'None'"),
        (
            [{"role": "tool", "content": "x"}],
            "broken messages",
            "role 'tool'. Roles are system, user, assistant",
        ),
        ([{"role": ["user"], "content": "x"}], "broken messages", "has the role"),
        (
            [{"role": "user", "content": None}, gold()],
            "broken messages",
            "user turn has no content: it is NoneType",
        ),
        (
            [{"role": "user", "content": [7]}, gold()],
            "broken messages",
            "Part 1 of the user turn is no text, image",
        ),
        ([user({"type": ["text"], "text": "a"}), gold()], "broken messages", "Part 1 of the user turn"),
        ([user({"type": "video"}), gold()], "broken messages", "Part 1 of the user turn"),
        ([user({"type": "audio", "audio": "a.wav"}), gold()], "broken messages", "Part 1 of the user turn"),
        (
            [user({"type": "text", "text": 7}), gold()],
            "broken messages",
            "text of the user turn is of type int",
        ),
        (
            [user("a"), gold([image(RED)])],
            "image in an answer",
            "assistant turn holds a part of kind 'image'",
        ),
        ([user(""), gold()], "empty question", "empty question in column 'messages'"),
        (
            [user(image(RED, max_pixel=9)), gold()],
            "unknown key in messages",
            "Key 'max_pixel' in part 1 .*max_pixels",
        ),
        (
            [user(image(RED, max_pixels="9")), gold()],
            "broken messages",
            "max_pixels in part 1 .* a whole number from 1",
        ),
        ([user(image(RED, min_pixels=0)), gold()], "broken messages", "min_pixels in part 1"),
        (
            [user(image(RED, min_pixels=10**400)), gold()],
            "broken messages",
            "whole number from 1 to 1,000,000,000",
        ),
        ([user(image(RED, resized_width=28)), gold()], "broken messages", "do not stand together"),
        (
            [user(image(RED, min_pixels=9, max_pixels=8)), gold()],
            "broken messages",
            "min_pixels is more than max_pixels",
        ),
        ([user("a <image>", image(RED)), gold()], "markers differ from images", "placed in several ways"),
    ],
)
def test_bad_messages(messages: list[Any], reason: str, match: str) -> None:
    """Bug: a broken row stops the run, or is read as something else without a word."""
    refused(reason, match, *messages)


def test_nulls_of_a_table_are_absent(tmp_path: Path) -> None:
    """Bug: Parquet gives every part the keys of all others, null where it has none; they look like videos."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.png").write_bytes(encoded(NOISE))
    rows = [{"messages": [user("What? ", image("a.png", max_pixels=3136)), {"role": "assistant", "content": [
        {"type": "text", "text": "12"}]}]}]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    sample = dataset(tmp_path / "rows.parquet", columns=COLUMNS)[0]
    assert (sample.question, sample.answer) == ("What? <image>", "12")


def test_messages_in_a_csv_cell(tmp_path: Path) -> None:
    """Bug: a table as text holds the list as JSON, which is no list of messages."""
    cell = json.dumps([user("What?"), gold()]).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'messages,id\n"{cell}",a\n"[",b\n')
    data = dataset(tmp_path / "rows.csv", columns=COLUMNS, max_bad=0.5)
    assert [sample.question for sample in data] == ["What?"]
    assert data.report.skipped[0].reason == "broken messages"


def test_images_beside_the_messages() -> None:
    """Bug: the other common form, markers or empty parts with a list of images, is read as text alone."""
    assert len(read(user("<image>What?"), gold(), images=[RED]).images) == 1
    empty = read(user({"type": "image"}, "What?"), gold(), images=[RED])
    assert (empty.question, len(empty.images)) == ("<image>What?", 1)
    refused(
        "images twice", "in column 'images' and in the messages", user(image(RED), "a"), gold(), images=[BLUE]
    )
    refused(
        "markers differ from images", "0 images but its question has 1", user({"type": "image"}, "a"), gold()
    )
    none = Columns(messages="messages", images=None)
    assert read(user("a"), gold(), columns=none, images="x.png").columns["images"] == "x.png"


def test_a_bad_row_is_left_out_by_name(tmp_path: Path) -> None:
    """Bug: one broken row of messages ends the run, or is left out uncounted."""
    rows = [{"messages": [user(f"q{n}"), gold()]} for n in (1, 2, 3)]
    rows[1]["messages"] = [user("q2"), gold(), user("more")]
    path = written(tmp_path / "rows.jsonl", *rows)
    left_out(path, "several turns", r"rows\.jsonl:2: The turns are user, assistant, user", columns=COLUMNS)


def test_the_recipe_s_choice_of_data_reads_them(tmp_path: Path) -> None:
    """Bug: `data=messages` names a key that the reader does not have."""
    from reflectvlm.config import compose

    values = compose("lookback_sft_7b", ("data=messages", "data.path=x.jsonl")).values["data"]
    path = written(tmp_path / "rows.jsonl", {"messages": [user("q"), gold()]})
    settings = {key: value for key, value in values.items() if key not in ("_target_", "path")}
    assert dataset(path, **settings)[0].columns == {"trace": "12"}


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1).filter(str.strip)


@given(st.lists(st.one_of(PLAIN, st.just(None)), min_size=1, max_size=5).filter(any))
def test_the_prompt_is_what_the_chat_template_makes_of_the_messages(
    tiny_policy: QwenVL, parts: list[str | None]
) -> None:
    """Bug: a blank, a line break or an order that is ours and not the model's. The oracle is the stock
    template on the messages themselves."""
    content = [image(RED) if part is None else {"type": "text", "text": part} for part in parts]
    message = {"role": "user", "content": content}
    sample = read(message, gold())
    prompt = tiny_policy.prompt(sample, Instruction())
    found = [i for span in prompt.spans for i in (span.ids if isinstance(span, Text) else tiny_policy.vision)]
    rendered = tiny_policy.tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )
    assert tiny_policy.decode(found) == rendered


WORDS = st.sampled_from(
    ["role", "user", "content", "type", "text", "image", "image_url", "video", "a.png", "<image>", "fps"]
)
ANY = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        WORDS,
        st.text(max_size=5),
        st.binary(max_size=3),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)
CONTENT = ANY | st.lists(st.dictionaries(WORDS, ANY, min_size=1, max_size=4), max_size=3)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT}),
    max_size=3,
)


@given(TURNS | ANY)
def test_whatever_stands_there_is_a_sample_or_a_bad_row(messages: Any) -> None:
    """Bug: a value nobody thought of raises something that ends the run."""
    row = {"messages": messages, "answer": "a"}
    said = "a sample"
    try:
        read_row(row, "rows.jsonl:17", COLUMNS, ImageLimits(urls=False), Path("/none"), Scripted())
    except BadRow as bad:
        said = str(bad)
    assert len(said.splitlines()) == 1


# -- images -----------------------------------------------------------------------------------------


def test_every_way_to_name_an_image(tmp_path: Path) -> None:
    """Bug: one of Qwen's ways to name an image is not read, or reads other pixels."""
    data = encoded(NOISE)
    (tmp_path / "a b.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    ways = [
        image("a b.png"),
        image(f"file://{tmp_path}/a b.png"),
        image("file://a b.png"),
        image(f"data:image;base64,{text}"),
        image(f"data:image/png;base64,{text}"),
        {"image": "a b.png"},
        {"type": "image_url", "image_url": "a b.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}},
        image(NOISE),
    ]
    for way in ways:
        (found,) = read(user(way, "a"), gold(), root=tmp_path).images
        assert np.array_equal(np.asarray(found), np.asarray(NOISE)), way


def test_an_image_of_a_message_is_as_confined_as_any(tmp_path: Path) -> None:
    """Bug: `file://` or a web address of a row opens what a plain path may not."""
    root = tmp_path / "rows"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(NOISE))
    for value in (
        f"file://{tmp_path}/secret.png",
        "file://../secret.png",
        "FILE://../secret.png",
        "../secret.png",
    ):
        refused("image outside root", "leaves the folder", user(image(value), "a"), gold(), root=root)
    off = ImageLimits(urls=False)
    for value in ("http://127.0.0.1:1/a.png", "HTTPS://127.0.0.1:1/a.png"):
        refused("unreachable image", "switched off", user(image(value), "a"), gold(), limits=off)
    for value in ("ftp://host/a.png", "s3://bucket/a.png", "gopher://host/a"):
        refused("unsupported image", "uses the scheme", user(image(value), "a"), gold())
    refused("missing image", "'no.png' does not exist", user(image("no.png"), "a"), gold(), root=root)


def test_a_part_s_own_size() -> None:
    """Bug: the row's limits are read and not used. 1000 x 500 under 100,000 pixels: sides shrink by
    sqrt(500,000 / 100,000) = 2.236 to 447 and 223, and down to multiples of 28: 420 x 196."""
    wide = Image.new("RGB", (1000, 500))
    assert read(user(image(wide, max_pixels=100_000), "a"), gold()).images[0].size == (420, 196)
    assert read(user(image(wide, resized_height=50, resized_width=90), "a"), gold()).images[0].size == (
        84,
        56,
    )
    assert read(user(image(wide), "a"), gold()).images[0].size == (1000, 500)
    narrow = image(wide, resized_height=28, resized_width=28_000)
    refused("image too narrow", "must be smaller than 200", user(narrow, "a"), gold())


def test_a_part_s_size_is_that_of_qwen_vl_utils() -> None:
    """Bug: rows are resized by another rule than where they came from."""
    qwen = pytest.importorskip("qwen_vl_utils", reason="the extra needs torchvision", exc_type=ImportError)
    for wish in (
        {"max_pixels": 100_000},
        {"min_pixels": 10**6},
        {"resized_height": 99, "resized_width": 500},
        {},
    ):
        made = qwen.fetch_image({"image": Image.new("RGB", (1000, 500)), **wish})
        assert item_size(1000, 500, wish) == made.size


# -- videos -----------------------------------------------------------------------------------------


def video(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "video", "video": value, **more}


def test_a_video_becomes_images_in_its_place(tmp_path: Path) -> None:
    """Bug: markers and frames differ in number, or frames stand elsewhere than the video."""
    (tmp_path / "clip.mp4").write_bytes(MP4)
    reader = Scripted(frames=3)
    sample = read(
        user("Before ", video("clip.mp4", fps=1.0, max_pixels=9000), " after ", image(BLUE)), gold(),
        root=tmp_path, frames=reader,
    )  # fmt: skip
    assert sample.question == "Before <image><image><image> after <image>"
    assert [i.getpixel((0, 0))[0] for i in sample.images] == [255, 0, 255, 0]
    (item,) = reader.items
    assert reader.held == MP4
    assert {k: v for k, v in item.items() if k != "video"} == {
        "fps": 1.0, "max_pixels": 9000, "max_frames": 64, "min_frames": 4,
    }  # fmt: skip
    assert not Path(item["video"]).exists()  # the copy it was given is gone


def test_frames_as_a_list(tmp_path: Path) -> None:
    """Bug: an odd number of frames shows the last one twice."""
    (tmp_path / "1.png").write_bytes(encoded(RED))
    reader = Scripted()
    sample = read(user(video(["1.png", BLUE, RED]), "a"), gold(), root=tmp_path, frames=reader)
    assert [i.getpixel((0, 0))[0] for i in sample.images] == [255, 0, 255]
    (item,) = reader.items
    assert all(isinstance(frame, Image.Image) for frame in item["video"])  # no path ever reaches the package
    refused(
        "image outside root", "leaves the folder", user(video(["../1.png"]), "a"), gold(),
        root=tmp_path, frames=reader,
    )  # fmt: skip
    refused("missing video", "is an empty list", user(video([]), "a"), gold(), frames=reader)
    unequal = user(video([RED, NOISE.resize((9, 9))]), "a")
    refused("unequal frames", "frames of 2 sizes", unequal, gold(), frames=reader)


def test_frames_are_limited(tmp_path: Path) -> None:
    """Bug: one row's video takes the memory of the run."""
    (tmp_path / "clip.mp4").write_bytes(MP4)
    limits = ImageLimits(max_frames=2)
    more = {"root": tmp_path, "limits": limits, "frames": Scripted(4)}
    refused(
        "too many frames", "asks for 3 frames and 2", user(video("clip.mp4", nframes=3), "a"), gold(), **more
    )
    refused("too many frames", "for 3 frames and 2", user(video([RED] * 3), "a"), gold(), **more)
    refused("too many frames", "for 4 frames and 2", user(video("clip.mp4"), "a"), gold(), **more)
    reader = Scripted(2)
    read(user(video("clip.mp4", max_frames=9), "a"), gold(), root=tmp_path, limits=limits, frames=reader)
    assert (reader.items[0]["max_frames"], reader.items[0]["min_frames"]) == (2, 2)
    small = ImageLimits(max_video_bytes=20)
    refused(
        "video too large", "more than 20 bytes.*ImageLimits.max_video_bytes", user(video("clip.mp4"), "a"),
        gold(), root=tmp_path, limits=small, frames=reader,
    )  # fmt: skip


def test_a_video_is_as_confined_as_an_image(tmp_path: Path) -> None:
    """Bug: a video library is handed any path or address; or a playlist that names other files."""
    root = tmp_path / "rows"
    root.mkdir()
    (tmp_path / "secret.mp4").write_bytes(MP4)
    (root / "list.mp4").write_bytes(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (root / "concat.mp4").write_bytes(b"ffconcat version 1.0\nfile /etc/passwd\n")
    reader = Scripted()
    more = {"root": root, "frames": reader, "limits": ImageLimits(urls=False)}
    for value in ("../secret.mp4", f"file://{tmp_path}/secret.mp4", str(tmp_path / "secret.mp4")):
        refused("video outside root", "leaves the folder", user(video(value), "a"), gold(), **more)
    refused("unreachable video", "switched off", user(video("http://127.0.0.1:1/a.mp4"), "a"), gold(), **more)
    for value in ("rtsp://host/a", "concat:a|b", "no.mp4"):
        reason = "unsupported video" if "://" in value else "missing video"
        refused(reason, "Video", user(video(value), "a"), gold(), **more)
    for value in ("list.mp4", "concat.mp4"):
        refused(
            "not a video", "not a video of a known kind. Give MP4", user(video(value), "a"), gold(), **more
        )
    assert reader.items == []


def test_a_video_that_cannot_be_decoded(tmp_path: Path) -> None:
    """Bug: whatever a decoder raises ends the run, or its message breaks the log."""
    (tmp_path / "clip.mp4").write_bytes(MP4)

    def broken(item: Mapping[str, Any]) -> Sequence[Image.Image]:
        raise OSError(f"moov atom not found\n{item['video']}")

    def twice(item: Mapping[str, Any]) -> Sequence[Image.Image]:
        try:
            return broken(item)
        except OSError:
            raise AttributeError("no attribute 'read_video'")  # noqa: B904 - as the package falls back

    asked = user(video("clip.mp4"), "a")
    for reader in (broken, twice):
        match = r"Video 'clip.mp4' cannot be decoded \(moov atom not found\)"
        refused("broken video", match, asked, gold(), root=tmp_path, frames=reader)
    refused("empty video", "has no frames", asked, gold(), root=tmp_path, frames=Scripted(0))


def test_fps_and_nframes_disagree() -> None:
    """Bug: qwen-vl-utils stops at an assertion without a word."""
    refused("broken messages", "fps and nframes", user(video([RED], fps=1, nframes=2), "a"), gold())


def test_without_the_extra_only_videos_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a missing package stops rows that need none, or is told by an import error."""
    (tmp_path / "clip.mp4").write_bytes(MP4)
    monkeypatch.setattr(frames_module, "find_spec", lambda _: None)
    assert len(read(user(image(RED), "a"), gold()).images) == 1
    for value in ("clip.mp4", [RED]):
        refused(
            "video without qwen-vl-utils",
            r"rows\.jsonl:17: Video in the row needs qwen-vl-utils\. Install the extra: pip install "
            r"'reflectvlm\[qwen-vl-utils\]'\.$",
            user(video(value), "a"), gold(), root=tmp_path,
        )  # fmt: skip
    monkeypatch.setattr(frames_module, "find_spec", lambda name: name == "qwen_vl_utils" or None)
    refused(
        "video without decoder",
        "needs torchcodec or decord",
        user(video("clip.mp4"), "a"),
        gold(),
        root=tmp_path,
    )


def test_a_torchvision_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: qwen-vl-utils is there and torchvision is not, or was built for another torch."""
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)
    with pytest.raises(BadImage, match=r"cannot be imported .*Install a torchvision that fits"):
        qwen_frames({"video": [RED]})


def test_the_package_itself(tmp_path: Path) -> None:
    """Bug: keys, value range or channel order are not those of qwen-vl-utils."""
    pytest.importorskip("qwen_vl_utils", reason="the extra needs torchvision", exc_type=ImportError)
    found = load_frames(
        [RED, BLUE, RED], {"min_pixels": 28 * 28, "max_pixels": 112 * 112}, tmp_path, ImageLimits()
    )
    assert [frame.getpixel((9, 9)) for frame in found] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert {frame.size[0] % 28 for frame in found} == {0}
