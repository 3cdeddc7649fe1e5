"""compare.py: draws, intervals and verdicts."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from selfsup_fastai.compare import compare_encoders, label_draws, mean_interval, summarize
from selfsup_fastai.errors import DataError
from tests.conftest import write_images


def test_label_draws_are_balanced_distinct_and_seeded():
    labels = pd.Series(list("ab" * 20 + "c" * 7))
    draws = label_draws(labels, 5, 4, seed=1)
    for rows in draws:
        assert labels.iloc[rows].value_counts().to_dict() == {"a": 5, "b": 5, "c": 5}
        assert len(set(rows)) == 15
    assert not np.array_equal(draws[0], draws[1])
    assert all(np.array_equal(a, b) for a, b in zip(draws, label_draws(labels, 5, 4, seed=1)))
    with pytest.raises(DataError, match="'c' has 7 images, 8 a class"):
        label_draws(labels, 8, 1)


def test_mean_interval_is_students():
    values = pd.Series([0.5, 0.6, 0.8, 0.7])
    mean, half = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert mean == pytest.approx(0.65)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert mean_interval(values[:1])[1] == float("inf")


def test_a_net_without_skill_is_not_distinguishable():
    """The null test: the same accuracies in another order must not become a gain."""
    rng = np.random.default_rng(0)
    false_alarms = 0
    for _ in range(400):
        a, b = rng.normal(0.5, 0.05, (2, 5))
        runs = pd.DataFrame(
            {"start": ["scratch"] * 5 + ["x"] * 5, "draw": [*range(5)] * 2, "accuracy": [*a, *b], "knn": 0}
        )
        false_alarms += summarize(runs).loc["x", "verdict"] != "not distinguishable"
    assert 6 <= false_alarms <= 36  # 5 % of 400 is 20, four standard errors are 17


def test_summary_pairs_the_draws():
    accuracy = {"scratch": [0.3, 0.5, 0.7], "x": [0.4, 0.61, 0.79]}  # draws differ widely, the gain hardly
    runs = pd.DataFrame(
        [
            {"start": s, "draw": d, "accuracy": a, "knn": 0.2}
            for s, values in accuracy.items()
            for d, a in enumerate(values)
        ]
    )
    table = summarize(runs)
    assert table.loc["x", "gain"] == pytest.approx(0.1)
    assert table.loc["x", "gain ±"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)
    assert table.loc["x", "verdict"] == "better"
    assert table.loc["scratch", "±"] > 0.4
    assert pd.isna(table.loc["scratch", "gain"])


@pytest.fixture
def two_classes(tmp_path):
    """Bright and dark images, 12 of each: a table (file, label)."""
    rows = []
    for label, seed in (("a", 1), ("b", 2)):
        folder = write_images(tmp_path / label, 12, (32, 32), seed=seed)
        rows += [{"file": file, "label": label} for file in sorted(folder.glob("*.png"))]
    return pd.DataFrame(rows)


def test_compare_encoders_gives_a_row_a_run_and_repeats(two_classes):
    train, test = two_classes.iloc[::2], two_classes.iloc[1::2]
    kwargs = dict(per_class=3, draws=2, epochs=2, size=32, bs=4)
    runs = compare_encoders({"scratch": "resnet10t"}, train.reset_index(drop=True), test, **kwargs)
    assert list(runs["draw"]) == [0, 1]
    assert set(runs["accuracy"] * 12 % 1) <= {0.0} or runs["accuracy"].mul(12).round(4).mod(1).eq(0).all()
    again = compare_encoders({"scratch": "resnet10t"}, train.reset_index(drop=True), test, **kwargs)
    pd.testing.assert_frame_equal(runs, again)
