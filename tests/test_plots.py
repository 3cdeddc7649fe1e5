"""Curves of tables: the points and bars drawn are those worked out in another way, and looks can be told apart."""

import copy
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from scipy.stats import binomtest, t

from selfsup_fastai.downstream.schedule import Rates, planned_rates, stages
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pictures import plot_rates
from selfsup_fastai.plots import BLACK, COLORS, ShownFrame, line_styles, plot_label_curve, plot_probe, wilson

RUNS = [("scratch", 0.3, 0.4), ("simclr", 0.5, 0.7), ("mae", 0.4, 0.5)]


def label_runs(seeds: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"start": start, "labels": labels, "n_labels": n, "seed": seed, "score": at + rng.normal(0, 0.02)}
        for start, *ats in RUNS
        for at, labels, n in zip(ats, (1, 1.0), (10, 1000))
        for seed in range(seeds)
    ]
    return ShownFrame(pd.DataFrame(rows).assign(metric="accuracy"), plot=plot_label_curve)


def curve(ax, place: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) points and (n, 2) ends of the bars of a curve, as drawn."""
    container = ax.containers[place]
    points = np.column_stack(container.lines[0].get_data())
    bars = np.array([segment[:, 1] for segment in container.lines[2][0].get_segments()])
    return points.astype(float), bars


# --- tables ---------------------------------------------------------------------------------------------------------


PARTS = {
    "head": lambda f: f.head(2),
    "slice": lambda f: f[1:3],
    "mask": lambda f: f[f.score > 0.3],
    "columns": lambda f: f[["start", "n_labels", "score"]],
    "query": lambda f: f.query("start == 'mae'"),
    "sorted": lambda f: f.sort_values("score"),
    "assigned": lambda f: f.assign(start="x"),
    "reset": lambda f: f.reset_index(drop=True),
    "copied": copy.deepcopy,
    "joined": lambda f: pd.concat([f, f.assign(start="again")]),
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_of_a_table_still_draw_themselves(part):
    found = part(label_runs())
    assert type(found) is ShownFrame
    ax = found.show()
    assert len(ax.containers) == found.start.nunique()


def test_it_is_a_plain_table_otherwise(tmp_path):
    shown = label_runs()
    plain = pd.DataFrame(shown.to_dict("list"))
    assert repr(shown) == repr(plain) and shown._repr_html_() == plain._repr_html_()
    pd.testing.assert_frame_equal(pd.DataFrame(shown), plain)
    shown.to_csv(tmp_path / "a.csv")
    plain.to_csv(tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert type(shown["score"]) is pd.Series
    shown.attrs["chance"] = 0.1
    assert shown.head(3).attrs == {"chance": 0.1}


def test_a_table_that_cannot_be_drawn_says_so():
    with pytest.raises(TaskError, match="does not know how"):
        ShownFrame({"a": [1]}).show()
    with pytest.raises(TaskError, match="no column start"):
        label_runs()[["n_labels", "score"]].show()
    with pytest.raises(TaskError, match="no rows"):
        label_runs().head(0).show()
    with pytest.raises(TaskError, match=r"layer, k or shots; this one has a\."):
        plot_probe(pd.DataFrame({"a": [1]}))


# --- looks ----------------------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 has it."""
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def test_every_color_stands_out_from_white_paper():
    assert min(1.05 / (luminance(color) + 0.05) for color in (*COLORS, BLACK)) >= 3


def as_seen(color: str, matrix: list[list[float]]) -> np.ndarray:
    """sRGB as a color-blind person sees it: Machado, Oliveira & Fernandes 2009, severity 1."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    return np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("matrix", BLIND.values(), ids=BLIND)
def test_the_first_curves_differ_in_color_to_color_blind_people(matrix):
    """The baseline and three more. Beyond, some colors are near to others for some people: markers and lines tell."""
    seen = [as_seen(color, matrix) for color in (BLACK, *COLORS[:3])]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.2


def test_curves_differ_in_more_than_color():
    names = [*"abcdefghijklmnopqrstuvw", "scratch"]
    looks = list(line_styles(names).values())
    assert len({str(look) for look in looks}) == 24
    for one, other in itertools.combinations(looks[:7], 2):
        assert one["color"] != other["color"] and one["marker"] != other["marker"]
    for one, other in itertools.pairwise(looks):
        assert one["linestyle"] != other["linestyle"]
    assert line_styles(["a", "scratch"])["scratch"] == line_styles(["scratch", "b"])["scratch"]
    assert line_styles(["a", "zero"], baseline="zero")["zero"]["color"] == BLACK


# --- label curves ---------------------------------------------------------------------------------------------------


def test_label_curve_is_the_mean_with_students_interval():
    table = label_runs()
    ax = table.show()
    for place, (start, *_) in enumerate(RUNS):
        points, bars = curve(ax, place)
        for at, n in enumerate((10, 1000)):  # `labels` 1 and 1.0 are two things
            scores = table.score[(table.start == start) & (table.n_labels == n)]
            low, high = t.interval(0.95, len(scores) - 1, scores.mean(), scores.sem())
            assert points[at, 1] == pytest.approx(scores.mean())
            assert points[at, 0] == pytest.approx(n, rel=0.06)  # moved a little, so that bars do not hide each other
            assert bars[at] == pytest.approx([low, high])
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "accuracy"
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10", "1,000"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["simclr", "mae", "scratch"]


def test_label_curve_of_means_draws_the_intervals_it_is_given():
    means = pd.DataFrame(
        {"start": ["a", "a", "b", "b"], "n_labels": [5, 50] * 2, "score": [0.2, 0.4, 0.3, 0.35]}
    ).assign(low=[0.1, 0.3, 0.25, 0.3], high=[0.3, 0.6, 0.4, 0.45])
    ax = plot_label_curve(means)
    points, bars = curve(ax, 1)
    assert points[:, 1].tolist() == [0.3, 0.35] and bars == pytest.approx(np.array([[0.25, 0.4], [0.3, 0.45]]))


def test_one_run_has_no_interval_and_two_do_not_spoil_the_axis():
    _, bars = curve(label_runs(1).show(), 0)
    assert (bars[:, 0] == bars[:, 1]).all()
    table = pd.DataFrame({"start": "scratch", "n_labels": [10, 10, 20, 20], "score": [0.1, 0.3, 0.4, 0.41]})
    _, bars = curve(ax := plot_label_curve(table), 0)
    assert bars[0] == pytest.approx([0.2 - 1.2706, 0.2 + 1.2706], abs=1e-3)  # t with one degree of freedom
    assert ax.get_ylim()[1] < 1.2 and ax.get_ylim()[0] > -0.5


def test_it_draws_on_the_axes_that_it_is_given():
    _, axes = plt.subplots(1, 2)
    assert plot_label_curve(label_runs(), axes[1]) is axes[1] and not axes[0].containers
    assert len(plt.get_fignums()) == 1


# --- probes ---------------------------------------------------------------------------------------------------------


def probed(layers=("stem", "layer1"), scores=(0.2, 0.9), n_test=50, **columns) -> pd.DataFrame:
    table = pd.DataFrame({"layer": layers, "score": scores, "metric": "accuracy", "n_test": n_test, **columns})
    return ShownFrame(table, plot=plot_probe)


@pytest.mark.parametrize("right, n", [(0, 10), (3, 10), (10, 10), (700, 1000)])
def test_wilsons_interval_against_scipy(right, n):
    wanted = binomtest(right, n).proportion_ci(0.95, method="wilson")
    found = np.array(wilson(np.array([right / n]), np.array([n])))
    assert found == pytest.approx(np.array([[wanted.low], [wanted.high]]), abs=1e-6)


def test_layers_in_their_order_with_the_interval_of_a_share():
    ax = probed(scores=(0.2, 1.0)).show()
    points, bars = curve(ax, 0)
    assert points == pytest.approx(np.array([[0, 0.2], [1, 1.0]]))
    wanted = binomtest(10, 50).proportion_ci(0.95, method="wilson")
    assert bars[0] == pytest.approx([wanted.low, wanted.high], abs=1e-6)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["stem", "layer1"] and ax.get_legend() is None


def test_several_starts_and_the_level_of_guessing():
    both = pd.concat([probed(start="scratch"), probed(scores=(0.3, 0.95), start="simclr")])
    both.attrs["chance"] = 0.1
    ax = both.show()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["simclr", "scratch"]
    assert "guessing" in [text.get_text() for text in ax.texts] and ax.get_ylim()[0] < 0.1


def test_nets_with_other_layers_are_drawn_over_depth():
    both = pd.concat([probed(start="a"), probed(["x", "y", "z"], [0.1, 0.2, 0.3], start="b")])
    ax = both.show()
    assert curve(ax, 0)[0][:, 0] == pytest.approx([0, 1], abs=0.1)
    assert curve(ax, 1)[0][:, 0] == pytest.approx([0, 0.5, 1], abs=0.1) and "depth" in ax.get_xlabel()


def test_neighbors_and_shots_on_a_log_axis():
    ax = plot_probe(pd.DataFrame({"k": [1, 5, 200], "score": [0.1, 0.2, 0.3], "metric": "mAP"}))
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "mAP"
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "5", "200"]
    shots = pd.DataFrame({"shots": [1, 2], "score": [0.1, 0.3], "std": [0.05, 0.02], "metric": "mAP"})
    assert curve(plot_probe(shots), 0)[1] == pytest.approx(np.array([[0.05, 0.15], [0.28, 0.32]]))


def test_wilson_covers_as_it_says():
    """The true share lies in 95 % intervals about 95 % of the time, also with few images and near 1."""
    rng = np.random.default_rng(0)
    for share, n in ((0.9, 20), (0.5, 30), (0.97, 60)):
        inside = [low <= share <= high for low, high in (wilson(int(k) / n, n) for k in rng.binomial(n, share, 4000))]
        assert 0.92 < np.mean(inside) < 0.985
    assert wilson(1.0, 5)[1] == pytest.approx(1) and wilson(1.0, 5)[0] < 0.6


def test_rates_end_within_the_picture_and_stages_are_numbered():
    run = stages(3, 4)
    shapes = [dict(pct_start=0.3, div=5.0, div_final=1e5)] * len(run)
    ax = plot_rates(planned_rates(run, ["stem", "body", "head"], Rates(1e-2), shapes))
    low = ax.get_ylim()[0]
    curves = [line.get_ydata() for line in ax.lines[:3]]
    assert all(np.nanmin(curve) > low for curve in curves)
    begun = np.cumsum([0, *(stage.epochs for stage in run[:-1])])
    assert [text.xy[0] for text in ax.texts] == pytest.approx(begun)
    assert [text.get_text().split()[-1] for text in ax.texts] == [str(i + 1) for i in range(len(run))]
