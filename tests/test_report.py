"""The report's data and file: what is in them, and that nothing a model wrote can get out of its place."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflectvlm.attention import token_maps
from reflectvlm.cli import main
from reflectvlm.report.heat import Heat
from reflectvlm.report.looks import as_rollout, looks_of, worth_a_look
from reflectvlm.report.page import as_script, page
from reflectvlm.report.payload import hundredths, payload, spread, starts, thin
from reflectvlm.report.reading import read_run
from reflectvlm.types import Grid, Prompt, Sample, Text, Visual
from reporting import RIGHT, WRONG, curve, picture, row, run_folder
from training import small_rl

EVIL = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "\" onload='alert(1)",
    "\u2028\u2029\x00\x1b[2J",
    "<img src=http://evil.example/x>",
    "\ud800",
]


def of(tmp_path: Path, *rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The payload of a run with these rows."""
    return payload([read_run(run_folder(tmp_path / "run", rows, **more))])


class Elements(HTMLParser):
    """All elements of a page with their attributes, and what stands in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.scripts.append(data)


# -- escaping -----------------------------------------------------------------------------------------


@given(st.recursive(st.text() | st.sampled_from(EVIL), lambda inner: st.lists(inner, max_size=3)))
def test_no_text_leaves_its_script_element(value: Any) -> None:
    """Bug: an answer with `</script>` in it runs what follows, or the page cannot be written as UTF-8."""
    text = as_script([value])
    assert json.loads(text) == [value]
    assert not set(text) & {"<", ">", "&", "\u2028", "\u2029"}
    text.encode()


def test_whatever_a_run_holds_the_page_has_the_same_elements(tmp_path: Path) -> None:
    """Bug: markup of a model, a data set, a tag, a reward's or a run's name becomes part of the page."""
    evil = "".join(EVIL[:-1])
    hostile = row(
        0, evil, evil, question=evil, answer=evil, stop=evil, parts={evil: 1.0}, images=[evil, "../x"]
    )
    folder = tmp_path / "<script>alert(1)<&'\""
    run_folder(folder, [hostile], [{"step": 1, evil: 1.0}], tag=evil, recipe={evil: evil})
    text = page(payload([read_run(folder)]))
    plain = page(of(tmp_path, row(0, "s", "t")))
    seen, expected = Elements(text), Elements(plain)
    assert [name for name, _ in seen.found] == [name for name, _ in expected.found]
    assert seen.found == expected.found  # attributes, too
    assert len(seen.scripts) == 2
    assert html.escape(folder.name) in text
    assert json.loads(seen.scripts[0])["prompts"][0][1] == evil


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    """Bug: a report that needs a network, tells somebody that it is read, or runs what got into it."""
    text = page(of(tmp_path, row(0, "s", "t"), metrics=curve(["loss"])))
    code = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(
        r"https?:|//[a-z0-9-]+\.|@import|url\(|\bfetch\b|XMLHttp|WebSocket|sendBeacon|import\(", code
    )
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|srcdoc", code
    )
    attributes = [attrs for _, attrs in Elements(text).found]
    assert {attrs["href"] for attrs in attributes if "href" in attrs} == {"data:,"}
    assert not any("src" in attrs or any(name.startswith("on") for name in attrs) for attrs in attributes)
    policy = next(attrs["content"] for attrs in attributes if "http-equiv" in attrs)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy


# -- reading ------------------------------------------------------------------------------------------


def test_a_cut_log_an_odd_row_and_an_old_run_are_read(tmp_path: Path) -> None:
    """Bug: one line that a kill has cut, or a run from before tokens were recorded, and no report."""
    old = {"step": 0, "sample": "a", "question": "q", "text": "x<back>", "reward": None, "parts": None}
    odd = row(3, "b", "yz", offsets=[5, 1], blocks=[{"after": "1"}], grids="no")
    folder = run_folder(tmp_path / "run", [old, odd, {"no": "step"}])
    with (folder / "samples.jsonl").open("ab") as file:
        file.write('{"step": 9, "text": "é'.encode()[:-1])
    run = read_run(folder)
    assert [(one.step, one.text, one.held_out, one.has_tokens) for one in run.answers] == [
        (0, "x<back>", True, False),
        (3, "yz", True, False),
    ]
    assert run.answers[1].blocks == []
    page(payload([run]))


def test_old_rows_of_an_evaluation_are_known_by_their_sample(tmp_path: Path) -> None:
    """Bug: in a run that did not say so, held-out answers after training pass for training."""
    rows = [row(step, name, "t") for step, name in ((0, "test-1"), (9, "test-1"), (9, "train-5"))]
    for one in rows:
        del one["group"]
    run = read_run(run_folder(tmp_path / "run", rows))
    assert [one.held_out for one in run.answers] == [True, True, False]


@pytest.mark.parametrize(("recipe", "tag"), [({}, "<back>"), ({"tag": "<REFLECTION>"}, "<REFLECTION>")])
def test_the_tag_is_the_recipe_s(tmp_path: Path, recipe: dict[str, Any], tag: str) -> None:
    """Bug: "no <back>" shows every answer of a run that is trained to write `<REFLECTION>`."""
    assert of(tmp_path, row(0, "a", "t"), recipe=recipe)["runs"][0]["tag"] == tag


# -- what the page is given ---------------------------------------------------------------------------


@given(st.text(max_size=30), st.data())
def test_token_starts_are_those_of_a_browser(text: str, data: st.DataObject) -> None:
    """Bug: behind the first emoji every token is coloured and told one character too far left."""
    offsets = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    told = [int(one) for one in starts(text, offsets).split()]
    units = text.encode("utf-16-le", "surrogatepass")
    at = np.cumsum(told)
    assert [units[2 * int(one) :].decode("utf-16-le", "surrogatepass") for one in at] == [
        text[one:] for one in offsets
    ]


def test_logprobs_in_hundredths() -> None:
    """Bug: a forced token that looks certain."""
    assert hundredths([-0.1, None, 0.0, -12.345]) == "10 x 0 1234"  # round half to even: 1234.5


def test_a_thinned_curve_keeps_its_spike() -> None:
    """Bug: every tenth point is shown, and the one step that exploded is not among them."""
    values = [0.0] * 10_000
    values[3_457] = 99.0
    steps, kept = thin((list(range(10_000)), values), 100)
    assert len(steps) <= 100
    assert (3_457, 99.0) in zip(steps, kept, strict=True)
    assert thin(([1, 2], [0.0, 1.0]), 100) == ([1, 2], [0.0, 1.0])


def test_of_too_many_rollouts_even_ones_and_those_with_attention_stay() -> None:
    """Bug: a long run's report shows its beginning only, or has lost the answers that were looked at."""
    assert spread(range(10), 4, {}) == [0, 2, 5, 7]
    assert spread(range(10), 4, {9: None}) == [0, 2, 5, 7, 9]
    assert spread(range(3), 4, {}) == [0, 1, 2]


def test_a_question_stands_once_and_both_runs_share_it(tmp_path: Path) -> None:
    """Bug: two runs cannot be compared by question, or a long question is repeated a thousand times."""
    one = read_run(run_folder(tmp_path / "a", [row(0, "s", WRONG, right=False), row(9, "s", RIGHT)]))
    two = read_run(run_folder(tmp_path / "b", [row(0, "t", RIGHT), row(0, "s", RIGHT)]))
    made = payload([one, two])
    assert [prompt[0] for prompt in made["prompts"]] == ["s", "t"]
    assert [run["answers"]["prompt"] for run in made["runs"]] == [[0, 0], [1, 0]]


def test_pictures_come_from_the_run_s_own_folder_and_nowhere_else(tmp_path: Path) -> None:
    """Bug: a digest with a path in it puts a file of this machine into a page that is passed on."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    digest = picture(tmp_path / "pics")
    rows = [row(0, "s", "t", images=[digest]), row(0, "u", "t", images=["../../secret", "f" * 64])]
    run = run_folder(tmp_path / "run", rows)
    (tmp_path / "pics" / "sample_images").rename(run / "sample_images")
    made = payload([read_run(run)])
    assert [one[:22] for one in made["images"]] == ["data:image/png;base64,", "", ""]


def test_pictures_stop_at_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two thousand photographs make a page that no browser opens."""
    from reflectvlm.report import payload as module

    run = run_folder(tmp_path / "run", [])
    digests = [picture(run, color) for color in ("red", "blue", "green")]
    size = (run / "sample_images" / f"{digests[0]}.png").stat().st_size
    monkeypatch.setattr(module, "MOST_BYTES", size + 20)
    (run / "samples.jsonl").write_text(json.dumps(row(0, "s", "t", images=digests)) + "\n")
    made = payload([read_run(run)])
    assert [bool(one) for one in made["images"]] == [True, False, False]
    assert made["imagesLeftOut"] == 2


def test_the_table_is_the_run_s_own(tmp_path: Path) -> None:
    """Bug: a report whose result differs from the table that the run printed."""
    summary = {"before": {"accuracy": 0.25, "reward": 0.3}, "after": {"accuracy": 0.5, "reward": 0.6}}
    made = of(tmp_path, summary=summary)
    assert made["runs"][0]["table"] == [["accuracy", "25.0%", "50.0%", "+25.0 pp"]]
    assert made["runs"][0]["finished"]


GRPO = {"rubric": {"_target_": "look_back_rubric", "layout": {"_target_": "reflectvlm.tags.grpo"}}}
QWEN = {"rubric": {"_target_": "reflectvlm.rewards.reflection.brpo_rubric"}}
OWN = {"rubric": {"rewards": {"format": {"layout": {"_target_": "mine.layout"}}}}}


@pytest.mark.parametrize(
    ("recipe", "rate", "note"),
    [
        (
            GRPO,
            0.0,
            "as a whole, <think>…</think> \\boxed{…}, which its reward asks for. None is; accuracy is",
        ),
        (GRPO, 0.5, "as a whole, <think>…</think> \\boxed{…}, which its reward asks for."),
        (QWEN, 1.0, "<CONCLUSION>…</CONCLUSION>, <REFLECTION> anywhere behind the first, which its reward"),
        (OWN, 1.0, "in the layout that its reward asks for (Settings, rubric)"),
        (GRPO, None, "its reward asks for no layout, so there is none to be valid."),
    ],
)
def test_a_layout_is_the_run_s_own(
    tmp_path: Path, recipe: dict[str, Any], rate: float | None, note: str
) -> None:
    """Bug: "valid layout 0 %" of plain GRPO beside Look-Back's 100 % reads like a failure to look back."""
    rates = {} if rate is None else {"layout_rate": rate}
    summary = {"before": {"accuracy": 0.2, **rates}, "after": {"accuracy": 0.5, **rates}}
    made = of(tmp_path, summary=summary, recipe=recipe)["runs"][0]
    assert note in made["notes"]["valid layout"]
    assert ("None is" in made["notes"]["valid layout"]) == (rate == 0)
    assert [row[0] for row in made["table"]] == ["accuracy", *["valid layout"] * (rate is not None)]


def test_without_a_table_there_is_no_note(tmp_path: Path) -> None:
    """Bug: a note about a row that is not there."""
    assert of(tmp_path, row(0, "s", "t"))["runs"][0]["notes"] == {}


def test_every_curve_has_one_panel(tmp_path: Path) -> None:
    """Bug: a metric that is in no group is not shown, or accuracy is shown twice under two names."""
    keys = ["loss", "reward", "reward/accuracy", "accuracy", "reward/style", "kl", "brand_new", "time/step"]
    panels = of(tmp_path, metrics=curve(keys))["panels"]
    shown = [panel["key"] for panel in panels]
    assert sorted(shown) == sorted(set(keys) - {"reward/accuracy"})
    assert {panel["key"]: panel["group"] for panel in panels}["brand_new"] == "More"
    assert next(panel["title"] for panel in panels if panel["key"] == "reward/style") == "reward: style"


# -- attention ----------------------------------------------------------------------------------------


def test_heat_in_eight_bits() -> None:
    """Bug: a token that looks at the image a little is drawn as if it did not look at all."""
    weights = np.array([[0.001, 0.004], [0.0, 0.0], [0.5, 0.1]])
    heat = Heat.of(weights, Grid(1, 1, 2))
    # 0.001 / 0.004 * 255 = 63.75 and 0.1 / 0.5 * 255 = 51
    assert list(heat.levels) == [64, 255, 0, 0, 255, 51]
    assert heat.peaks == pytest.approx((0.004, 0.0, 0.5))
    assert heat.shares == pytest.approx((0.005, 0.0, 0.6))
    with pytest.raises(ValueError, match="5 levels and 1 shares for 1 tokens of 2 x 2 cells"):
        Heat(image=0, rows=2, columns=2, levels=b"12345", peaks=(1.0,), shares=(1.0,))


def test_wrong_answers_of_the_last_evaluation_are_looked_at_first(tmp_path: Path) -> None:
    """Bug: the attention of answers that the finished model never gave."""
    rows = [
        row(0, "a", WRONG, right=False),
        row(9, "b", RIGHT),
        row(9, "a", WRONG, right=False),
        row(9, "c", WRONG, right=False, group=8),
    ]
    run = read_run(run_folder(tmp_path / "run", rows))
    assert worth_a_look(run.answers, 9) == [2, 1]
    assert worth_a_look(run.answers, 1) == [2]


def test_a_recorded_answer_becomes_the_rollout_it_was(tmp_path: Path) -> None:
    """Bug: attention of a sequence in which blocks or forced tokens stand elsewhere than they did."""
    block = {"after": 2, "image": 0, "keep": [1], "before_sampled": True}
    recorded = row(
        0, "s", "abcd", ids=[1, 2, 3, 4, 5], logprobs=[-1.0, -2.0, None, -4.0, -5.0], blocks=[block]
    )
    (answer,) = read_run(run_folder(tmp_path / "run", [recorded])).answers
    prompt = Prompt(sample=Sample(id="s", question="", answer=""), spans=())
    assert as_rollout(answer, prompt).spans == (
        Text(ids=(1, 2), trained=True, logprobs=(-1.0, -2.0)),
        Visual(image=0, keep=(1,), before_sampled=True),
        Text(ids=(3,)),
        Text(ids=(4, 5), trained=True, logprobs=(-4.0, -5.0)),
    )


def test_a_trained_run_tells_where_its_answers_looked(tmp_path: Path) -> None:
    """Bug: heat maps of another image, another model, or of tokens that are one off."""
    trainer = small_rl(tmp_path, steps=1, evaluation=None, output={"save_every": 0})
    folder = trainer.run().folder
    data = {"_target_": "reflectvlm.data.digits.Digits", "split": "test", "size": 3}
    node = {"_target_": "reflectvlm.train.evaluate.Evaluation", "data": data, "max_tokens": 4}
    (folder / "recipe.yaml").write_text(json.dumps({"test": node}))
    run = read_run(folder)
    made = looks_of(run, 9)
    _, groups = trainer.evaluate(trainer.test)
    rollouts = {group.rollouts[0].prompt.sample.id: group.rollouts[0] for group in groups}
    assert len(made) == 3
    for place, heat in made.items():
        answer = run.answers[place]
        rollout = rollouts[answer.sample]
        assert (answer.step, tuple(answer.ids)) == (1, rollout.sampled_ids)
        maps = token_maps(trainer.policy, rollout).reshape(len(answer.ids), -1)
        levels = np.frombuffer(heat.levels, np.uint8).reshape(maps.shape)
        # A level is a 255th of the token's peak, so rounding moves a weight by half of that.
        assert np.abs(levels / 255 * maps.max(1, keepdims=True) - maps).max() <= maps.max() / 509
        assert heat.shares == pytest.approx(maps.sum(1), rel=1e-5)
    assert {one.stem for one in (folder / "sample_images").iterdir()} >= set(run.answers[0].images)


# -- the command --------------------------------------------------------------------------------------


def test_the_command_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a report somewhere else than said, or half of one where an older one stood."""
    run = run_folder(tmp_path / "run", [row(0, "s", "t")], curve(["loss"]))
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["report", f"run={run}", f"against={run}", f"out={tmp_path / 'both.html'}"]) == 0
    assert "2 answers" in capsys.readouterr().out
    assert sorted(one.name for one in tmp_path.iterdir()) == ["both.html", "run"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "report needs the folder of a run"),
        (["none"], "'none' does not exist. Did you mean 'nono'?"),
        (["empty"], "'empty' is no run's folder: it has none of metrics.jsonl"),
        (
            ["nono", "empty"],
            "got 'nono' and 'empty'. Two runs beside each other: against=RUN2",
        ),
        (["nono", "againt=empty"], "report has no key 'againt'. Did you mean against?"),
        (["nono", "--open"], "there are no dashes"),
        (["nono", "out=empty"], "out is 'empty'. Give the name of a file in a folder that exists"),
        (["nono", "out="], "out is empty. Give out=VALUE, or leave it out."),
        (["nono", "out=x.pdf"], "out is 'x.pdf'. The report is HTML: give a name that ends in .html"),
        (["nono", "attention=-1"], "attention is -1. It must be a whole number"),
        (["nono", "attention=many"], "attention is 'many'. It must be a whole number"),
        (["nono", "attention=2"], "the run is not finished. Leave attention out until it is"),
        (["bare", "attention=2"], "bare holds no answers of held-out rows, which attention=N looks at"),
        (["old", "attention=2"], "The answers of old were recorded without their tokens, as in runs from"),
        (["old", "attention=2"], "reflectvlm attention model=old/model data=ROWS"),
        (["long", "attention=2"], "of an answer with more than 8,192 tokens only the text is kept"),
    ],
)
def test_what_a_user_wrote_wrong_is_one_line(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bug: a traceback, or a report of nothing."""
    monkeypatch.chdir(tmp_path)
    run_folder(Path("nono"), [row(0, "s", "t")])
    run_folder(Path("bare"), [])
    bare = {"ids": [], "offsets": [], "logprobs": []}
    old = row(0, "s", "t")
    run_folder(Path("old"), [{key: value for key, value in old.items() if key not in bare}])
    run_folder(Path("long"), [row(0, "s", "t", **bare), row(1, "u", "t", group=8)])
    Path("empty").mkdir()
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
