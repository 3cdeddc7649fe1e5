"""Draws of labels: stratified, nested, whole patients."""

import itertools

import numpy as np
import pandas as pd
import pytest

from selfsup_fastai.compare.draws import check_amounts, classes_in, draw_labels, groups_in, say_cut
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.errors import DataError
from tests.compare.labeled_images import stripes_table

CLASSES = np.repeat([0, 1, 2], [100, 40, 3])


def counts(places: np.ndarray) -> list[int]:
    return np.bincount(CLASSES[places], minlength=3).tolist()


def test_shares_keep_the_classes_shares_and_counts_are_counts():
    assert counts(draw_labels(143, 0.1, 0, CLASSES)) == [10, 4, 1]
    assert counts(draw_labels(143, 5, 0, CLASSES)) == [5, 5, 3]
    assert counts(draw_labels(143, 1.0, 0, CLASSES)) == [100, 40, 3]
    assert counts(draw_labels(143, 1, 0, CLASSES)) == [1, 1, 1]


def test_draws_are_seeded_and_nested():
    for amounts in ((0.01, 0.05, 0.3, 1.0), (1, 2, 10, 60)):
        for seed in range(5):
            draws = [set(draw_labels(143, a, seed, CLASSES)) for a in amounts]
            assert all(few < more for few, more in itertools.pairwise(draws))
    assert np.array_equal(draw_labels(143, 5, 1, CLASSES), draw_labels(143, 5, 1, CLASSES))
    assert not np.array_equal(draw_labels(143, 5, 1, CLASSES), draw_labels(143, 5, 2, CLASSES))


def test_without_classes_it_is_plain_chance():
    assert len(draw_labels(50, 0.1, 0)) == 5
    assert set(draw_labels(50, 0.1, 0)) < set(draw_labels(50, 0.3, 0))
    with pytest.raises(DataError, match="labels=5 means 5 for each class"):
        draw_labels(50, 5, 0)


def test_patients_stay_whole_and_every_class_is_there():
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 30, 143))
    for seed in range(5):
        draws = [draw_labels(143, a, seed, CLASSES, groups) for a in (0.1, 0.3, 0.6)]
        for places, share in zip(draws, (0.1, 0.3, 0.6)):
            assert set(groups[places]).isdisjoint(groups[np.setdiff1d(np.arange(143), places)])
            assert min(counts(places)) >= 1
            assert abs(len(places) / 143 - share) < 0.1
        assert set(draws[0]) <= set(draws[1]) <= set(draws[2])
        by_count = [draw_labels(143, k, seed, CLASSES, groups) for k in (1, 3, 10)]
        assert set(by_count[0]) <= set(by_count[1]) <= set(by_count[2])
        for places, k in zip(by_count, (1, 3, 10)):
            assert all(have >= min(k, there) for have, there in zip(counts(places), (100, 40, 3)))
            assert set(groups[places]).isdisjoint(groups[np.setdiff1d(np.arange(143), places)])


def test_what_is_cut_is_said(caplog, capsys):
    say_cut(CLASSES, [5, 0.1, 1.0])
    said = capsys.readouterr().err
    assert "5 labels a class: 1 of 3 classes have fewer images, at least 3." in said
    assert "0.1 of the labels: 1 of 3 classes would get none; each gets one." in said


@pytest.mark.parametrize("labels", [[0], [1.5], [-0.1], [True], ["all"], [], [0.1, 0.1]])
def test_amounts_that_make_no_sense(labels):
    with pytest.raises(DataError, match="labels"):
        check_amounts(labels)


def test_one_a_class_and_all_of_them_are_not_the_same():
    assert check_amounts([1, 1.0]) == [1, 1.0]
    assert [type(a) for a in check_amounts([*np.array([0.5]).tolist(), np.int64(3)])] == [float, int]


def test_loaders_tell_classes_and_patients(tmp_path):
    table = stripes_table(tmp_path, 12, 6).assign(patient=[f"p{i // 3}" for i in range(18)], ward=list("xy" * 9))
    dls = labeled_loaders(table, 1, 32, 4)
    assert classes_in(dls.train, "category").tolist() == [0, 1] * 6
    assert groups_in(dls.train).tolist() == np.repeat(range(4), 3).tolist()
    assert groups_in(dls.valid, "ward").tolist() == [0, 1] * 3
    with pytest.raises(DataError, match="no column 'street' is known"):
        groups_in(dls.train, "street")
    assert groups_in(labeled_loaders(table.drop(columns=["patient", "ward"]), 1, 32, 4).train) is None
    assert pd.Series(groups_in(dls.valid)).nunique() == 2
