"""Figures and tables over many answers: how sure a mean is, of how many answers, and where a bar begins."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from reflectvlm.attention.figures_maps import UNIT, layer_maps_figure, layers_said, maps_figure
from reflectvlm.attention.figures_means import hallucination_figure, length_figure, parts_figure
from reflectvlm.attention.hallucination import Caption, by_length
from reflectvlm.attention.maps import Heat
from reflectvlm.attention.readings import by_part, by_step
from reflectvlm.attention.removing import Removed
from reflectvlm.attention.splice import Spliced
from reflectvlm.attention.spread import (
    curves_over_seeds,
    over_seeds,
    parts_over_seeds,
    ratio_error,
    reach,
    what_reaches,
)
from reflectvlm.attention_rows import Looked
from reflectvlm.attention_tables import tables
from test_attention_shares import reading

READ = [reading([0.1, 0.3, 0.2], [0, 0, 1]), reading([0.4, 0.6], [0, 1]), reading([0.9], [-1])]


# -- how sure a mean is ---------------------------------------------------------------------------


def test_errors_of_means_over_answers_by_hand() -> None:
    """Bug: the spread of answers for the error of their mean, or tokens of one answer taken for many
    answers."""
    before = by_part(READ)["before"]
    # Means of the two answers 0.2 and 0.4: deviation 0.2 / sqrt(2), error 0.2 / 2.
    assert (before["answers"], before["visual"], before["visual_se"]) == pytest.approx((2, 0.3, 0.1))
    assert "visual_se" not in by_part(READ[:1])["before"]
    first, second = by_step(READ, width=2)
    # Sums 0.4, 1.0, 0.9 over 2, 2, 1 tokens: mean 0.46, residues -0.52, 0.08, 0.44.
    error = np.sqrt(3 / 2 * (0.52**2 + 0.08**2 + 0.44**2)) / 5
    assert (first["visual"], first["visual_se"]) == pytest.approx((0.46, error))
    assert second["answers"] == 1
    assert "visual_se" not in second


def test_an_error_of_equal_counts_is_that_of_a_mean() -> None:
    """Bug: an error that differs from the usual one where both are defined."""
    values = [0.1, 0.4, 0.4, 0.7]
    usual = np.std(values, ddof=1) / 2
    assert ratio_error(values, [1] * 4) == pytest.approx(usual)
    assert ratio_error([3 * value for value in values], [3] * 4) == pytest.approx(usual)
    assert ratio_error([1], [2]) is None
    assert ratio_error([0, 0], [0, 0]) is None


def test_errors_of_hallucination_are_over_captions() -> None:
    """Bug: mentions of one caption taken for independent."""
    captions = [
        Caption(text="cat dog", objects={"cat"}),
        Caption(text="cat cow", objects={"cat", "cow"}),
    ]
    (row,) = by_length(captions, str.split, [9])
    assert (row.answers, row.captions, row.there) == (2, 0, 3)
    # Wrong 1 and 0 of 2 and 2: rate 1/4, residues 1/2 and -1/2; sqrt(2 * (1/4 + 1/4)) / 4.
    assert row.chair_i_se == pytest.approx(0.25)
    assert row.recall_se == pytest.approx(0)
    assert by_length(captions[:1], str.split, [9])[0].chair_i_se is None


def test_seeds_are_put_together_by_hand() -> None:
    """Bug: the error over answers of one seed for the spread over seeds, or counts that are averaged."""
    one = {"from": 0.0, "to": 8.0, "answers": 4.0, "visual": 0.2, "visual_se": 9.0, "lift": 1.0}
    two = {"from": 0.0, "to": 6.0, "answers": 6.0, "visual": 0.4, "visual_se": 9.0, "lift": None}
    made = over_seeds([one, two])
    spread = pytest.approx(0.2 / np.sqrt(2))
    assert made == {
        "from": 0, "to": 8, "answers": 10, "visual": pytest.approx(0.3), "visual_sd": spread, "lift": 1.0
    }  # fmt: skip
    assert over_seeds([one]) == one
    assert reach(made, "visual") == spread
    assert reach(one, "visual") == pytest.approx(1.96 * 9)
    assert reach(one, "lift") is None
    assert what_reaches([made]) == "± standard deviation over seeds"
    assert what_reaches([made, one]).startswith("± standard deviation over seeds, of one seed 95 %")
    assert what_reaches([{"visual": 0.2, "visual_se": None}]) == "one answer, no spread"
    assert len(curves_over_seeds([[one, one], [two]])) == 1
    assert parts_over_seeds([{"all": one, "inside": one}, {"all": two}])["inside"] == one


# -- what is drawn --------------------------------------------------------------------------------


def texts(figure: Figure) -> str:
    """All that is written on it."""
    found = [figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)]
    legends = [axes.get_legend() for axes in figure.axes] + list(figure.legends)
    found += [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    found += [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join(found)


def lifted(lift: float) -> dict[str, dict[str, float]]:
    return {"all": {"answers": 7.0, "visual": 0.2, "visual_se": 0.01, "lift": lift, "lift_se": 0.05}}


def test_bars_over_chance_start_at_chance() -> None:
    """Bug: a bar from 0 to 0.97 looks like much attention where there is less than by chance."""
    figure = parts_figure({"a": lifted(1.5), "b": lifted(0.9)}, "title")
    plain, over = figure.axes
    assert [bar.get_y() for bar in plain.patches] == [0, 0]  # type: ignore[attr-defined]
    spans = [sorted((bar.get_y(), bar.get_y() + bar.get_height())) for bar in over.patches]  # type: ignore[attr-defined]
    assert spans == [pytest.approx([1, 1.5]), pytest.approx([0.9, 1])]
    assert "chance" in [text.get_text() for text in over.texts]
    assert any(list(line.get_ydata()) == [1, 1] for line in over.lines)
    assert over.get_ylim()[0] <= 0.8
    assert over.get_ylim()[1] >= 1.2


def test_figures_say_how_many_answers_and_what_the_bars_are() -> None:
    """Bug: a figure of three answers that looks like one of three hundred."""
    drawn = parts_figure({"way": by_part(READ)}, "title")
    said = texts(drawn)
    assert "way\nn = 3; before 2, inside 2" in said
    assert "error bars: 95 % (± 1.96 standard errors over answers)" in said
    (bars,) = [one for one in drawn.axes[0].collections if hasattr(one, "get_segments")]
    low, high = sorted(point[1] for point in bars.get_segments()[0])
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.1, 0.3 + 1.96 * 0.1))
    assert "n = 3; no tagged region" in texts(parts_figure({"way": by_part(READ[2:] * 3)}, "title"))
    seeds = parts_over_seeds([by_part(READ), by_part(READ[:2])])
    assert "error bars: ± standard deviation over seeds" in texts(parts_figure({"way": seeds}, "title"))


def test_curves_have_bands_and_numbers() -> None:
    """Bug: a curve of a few answers is empty, or stands there as if it were exact."""
    rows = by_step(READ, width=2)
    figure = length_figure({"way": rows}, "title")
    assert "way, n = 3" in texts(figure)
    assert "bands: 95 %" in texts(figure)
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([0.46])  # one answer has more than two tokens
    band = next(one for one in figure.axes[0].collections if isinstance(one, PolyCollection))
    heights = band.get_paths()[0].vertices[:, 1]
    half = 1.96 * rows[0]["visual_se"]
    assert (min(heights), max(heights)) == pytest.approx((0.46 - half, 0.46 + half))
    captions = [Caption(text="cat dog", objects={"cat"}), Caption(text="cat", objects={"cat"})]
    said = [dataclasses.asdict(row) for row in by_length(captions, str.split, [1, 2])]
    figure = hallucination_figure({"way": said}, "title")
    assert "way, n = 2" in texts(figure)
    assert "bands: 95 %" in texts(figure)
    assert all(len(axes.collections) == 1 for axes in figure.axes)


def test_a_heat_map_has_one_unit() -> None:
    """Bug: thousandths in the cells, fractions on the scale and in the title, and nothing says of what."""
    maps = np.array([[[0.01, 0.02]], [[0.03, 0.0]]])
    heat = Heat(look="look back", shown="prompt", image=0, layers=(4, 5), maps=maps)
    page = Image.new("RGB", (20, 10))
    figure = maps_figure([heat], [page], "Which digit?")
    said = texts(figure)
    # Means over layers: 0.02 and 0.01.
    for words in ("prompt: 3.0 %, all patches", "2.0", "1.0", f"{UNIT}, mean over heads and layers 4 to 5"):
        assert words in said
    (drawn,) = figure.axes[1].images
    assert np.asarray(drawn.get_array()) == pytest.approx(np.array([[2.0, 1.0]]))
    (scale,) = [axes for axes in figure.axes if axes.get_ylabel()]
    assert scale.get_ylabel() == UNIT
    assert scale.get_ylim() == pytest.approx((0, 2.0))
    each = layer_maps_figure([heat], "Which digit?")
    assert f"{UNIT}, in each layer, mean over heads" in texts(each)
    assert np.asarray(each.axes[1].images[0].get_array()) == pytest.approx(np.array([[3.0, 0.0]]))
    (scale,) = [axes for axes in each.axes if axes.get_ylabel() == UNIT]
    assert scale.get_ylim() == pytest.approx((0, 3.0))
    assert [layers_said(one) for one in ((3,), (0, 1, 2), (0, 2, 35))] == [
        "layer 3", "layers 0 to 2", "layers 0, 2, 35"
    ]  # fmt: skip


# -- what is printed ------------------------------------------------------------------------------


def test_every_rate_is_printed_with_its_number() -> None:
    """Bug: "wrong readings repaired 0.50" of two rows and of two hundred alike."""
    removed = [
        Removed(id=str(n), asked={"answer": 2.0 + n}, other={"answer": 1.0}, tokens={"answer": 4}, region="x")
        for n in range(2)
    ]
    spliced = [Spliced(id=str(n), repaired=n < 1, kept=True, wrong_text="", right_text="") for n in range(4)]
    looked = Looked(name="copy", reattention="", readings=READ, removed=removed, spliced=spliced)
    attention, greyed, begun = tables(
        [looked, dataclasses.replace(looked, name="none", removed=(), spliced=())]
    )
    # Whole answers: 0.2, 0.5, 0.9; deviation 0.3512, error 0.2028, times 1.96.
    assert attention.rows[0] == (
        "copy",
        "0.300 ± 0.196 (n 2)",
        "0.400 ± 0.392 (n 2)",
        "–",
        "0.533 ± 0.397 (n 3)",
    )
    # Gaps 1 and 2: error 0.5.
    assert greyed.rows == [("copy", "answer", "2", "2.50", "1.00", "1.50 ± 0.98")]
    assert begun.rows == [("copy", "1 of 4 (25 %)", "4 of 4 (100 %)"), ("none", "–", "–")]
    assert len(tables([dataclasses.replace(looked, removed=(), spliced=())])) == 1
