"""The report of a set: what people read before they train on it."""

from __future__ import annotations

from reflectvlm.curate.curation_report import Curated, histogram, report, report_markdown, spread
from reflectvlm.curate.types import Look, Question, Trace

BACK = "<think>a b c</think> <back>d e</back> <think>f</think> \\boxed{7}"
PLAIN = "<think>a b c</think> \\boxed{7}"


def trace(text: str, look: Look) -> Trace:
    return Trace(
        question=Question(id="q", question="?", answer="7"),
        text=text,
        method="semantic_back",
        look=look,
        kept="a b c",
    )


def values() -> dict[str, object]:
    return report(
        Curated(
            traces=[trace(BACK, "confirmed"), trace(BACK, "corrected"), trace(PLAIN, "unneeded")],
            dropped=[
                ("plan", "pass rate too low"),
                ("layout", "no \\boxed{}"),
                ("plan", "pass rate too low"),
            ],
            asked=6,
            shares={"corrected": 0.5, "confirmed": 0.25, "unneeded": 0.25},
            about={"method": "semantic_back", "rates": [0.0, 0.55, 1.0, None]},
        )
    )


def test_counts_are_of_what_there_is() -> None:
    """Bug: kept and dropped do not add up, or shares are of the questions instead of the rows."""
    found = values()
    assert found["rows"] == 3
    assert found["dropped"] == {
        "plan": {"all": 2, "reasons": {"pass rate too low": 2}},
        "layout": {"all": 1, "reasons": {"no \\boxed{}": 1}},
    }
    assert found["shares"]["corrected"] == {"wanted": 0.5, "reached": 0.3333}  # type: ignore[index]
    assert found["repeated_lines"] == 2


def test_where_the_look_begins_is_a_share_of_the_text() -> None:
    """Bug: positions are characters, which say nothing beside traces of other lengths. `<back>` begins at
    character 21 of 64: 0.33; a trace without a look has no position."""
    assert len(BACK) == 64
    assert BACK.index("<back>") == 21
    assert values()["look_begins_at"] == [0, 0, 0, 2, 0, 0, 0, 0, 0, 0]


def test_pass_rates_fall_into_tenths() -> None:
    """Bug: a rate of 1 is lost, or 0.7 falls below itself by rounding."""
    assert values()["pass_rates"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert histogram([0.7, 0.1 * 3])[7] == 1
    assert histogram([0.1 * 3])[3] == 1


def test_spreads_are_of_the_sorted_numbers() -> None:
    """Bug: the order of the rows decides the median."""
    assert spread([9, 1, 5]) == {"least": 1, "tenth": 1, "median": 5, "ninth": 9, "most": 9}
    assert spread([]) == {}


def test_people_can_read_it() -> None:
    """Bug: markdown with a broken table, or without the reasons."""
    text = report_markdown(values())
    assert text.startswith("# 3 rows from 6 questions, semantic_back")
    for said in ("plan: pass rate too low", "| corrected |", "33.3%", "Where the second look begins"):
        assert said in text
