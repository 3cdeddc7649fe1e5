"""Linear models on features against scikit-learn's, and that strengths are chosen on what was held out."""

import numpy as np
import pytest
from sklearn import linear_model
from sklearn.metrics import average_precision_score, r2_score
from sklearn.model_selection import GridSearchCV

from selfsup_fastai.downstream.linear_models import (
    DEFAULT_STRENGTH,
    GRID,
    OneVsRest,
    Ridge,
    Softmax,
    chosen_strength,
    fitted,
    folds_of,
    in_own_span,
    mean_precision,
    score_of,
)
from selfsup_fastai.errors import TaskError


def classes(n=120, dim=30, seed=0):
    """Three classes that overlap."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return rng.normal(size=(n, dim)) + 0.5 * np.eye(3, dim)[y], y


@pytest.mark.parametrize("C", [1e-3, 0.1, 10])
def test_several_labels_are_a_logistic_regression_each(C):
    x, y = classes()
    labels = np.column_stack([y == 0, y != 1, np.ones(len(y)), np.zeros(len(y))]).astype(float)
    found = OneVsRest().fit(x, labels, 100).fit(x, labels, C).predict(x)  # from another start
    for i in (0, 1):
        alone = linear_model.LogisticRegression(C=C, tol=1e-6, max_iter=1000).fit(x, labels[:, i])
        assert found[:, i] == pytest.approx(alone.decision_function(x), abs=5e-3)
    assert (found[:, 2] > 1e300).all() and (found[:, 3] < -1e300).all()  # all, and none: nothing to learn


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("C", [1e-4, 1.0])
def test_ridge_is_scikits(n, C):
    rng = np.random.default_rng(1)
    x, y = rng.normal(2, 3, (n, 50)), rng.normal(1, 1, (n, 2))
    x[:, 7] = x[:, 3]
    mine = Ridge().fit(x, y, 5.0).fit(x, y, C)
    theirs = linear_model.Ridge(alpha=1 / C).fit(x, y)
    new = rng.normal(2, 3, (9, 50))
    assert mine.predict(new) == pytest.approx(theirs.predict(new), abs=1e-8)


@pytest.mark.parametrize("kind", ["category", "multicategory", "regression"])
def test_fewer_coordinates_change_no_prediction(kind):
    x, y = classes(n=24, dim=100)
    other, _ = classes(n=50, dim=100, seed=1)
    y = {"category": y, "multicategory": np.eye(3)[y], "regression": y[:, None].astype(float)}[kind]
    few, few_other = in_own_span(x, other)
    assert few.shape == (24, 24) and few_other.shape == (50, 24)
    whole, turned = fitted(kind, "a", x, y, 0.1).predict(other), fitted(kind, "a", few, y, 0.1).predict(few_other)
    assert turned == pytest.approx(whole, abs=2e-2 if kind == "multicategory" else 1e-8)
    assert in_own_span(*classes(40, 30)[:1] * 2)[0].shape == (40, 30)


def test_the_strength_is_that_of_a_grid_search():
    x, y = classes()
    folds = folds_of("category", y, None, seed=0)
    search = GridSearchCV(linear_model.LogisticRegression(max_iter=1000), {"C": GRID}, cv=folds).fit(x, y)
    mine = chosen_strength("category", x, y, folds)
    scores = dict(zip(GRID, search.cv_results_["mean_test_score"]))
    assert scores[mine] == pytest.approx(max(scores.values()), abs=0.01)
    assert mine < max(GRID) and 0.4 < max(scores.values()) < 0.95  # the choice matters


def test_noise_is_held_down_and_what_is_certain_is_not():
    rng = np.random.default_rng(0)
    x, clear = rng.normal(size=(300, 40)), rng.normal(size=(300, 1))
    y = x @ rng.normal(size=(40, 1))
    folds = folds_of("regression", y, None, 0)
    assert chosen_strength("regression", x, y, folds) >= 10
    assert chosen_strength("regression", x, clear, folds) <= 1e-3


def test_all_strengths_are_tried_while_none_is_better_than_guessing():
    """Scores 0.5 0.4 0.3 0.6: the fall at first is no reason to stop; two worse ones after a rise are."""

    def chosen(scores):
        tried = iter(scores)

        class Scripted:
            def fit(self, *_, **__):
                return self

            def predict(self, _x):
                right = round(next(tried) * 10)
                return np.array([1] * right + [0] * (10 - right))

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(chosen_strength.__globals__["MODELS"], "category", Scripted)
            folds = [(np.arange(10), np.arange(10))]
            found = chosen_strength("category", np.zeros((10, 1)), np.ones(10, int), folds, grid=[1, 2, 3, 4, 5, 6])
        return found, len(list(tried))

    assert chosen([0.5, 0.4, 0.3, 0.6, 0.6, 0.6]) == (4, 0)
    assert chosen([0.5, 0.7, 0.6, 0.6, 0.9, 0.9]) == (2, 2)
    assert chosen([0.5] * 6) == (1, 0)


# --- what is held out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts, n", [([20, 20], 5), ([3, 9], 3), ([2, 7], 2), ([1, 6, 6], 5), ([600, 500], 3)])
def test_as_many_folds_as_the_smallest_class_allows(counts, n):
    y = np.repeat(range(len(counts)), counts)
    folds = folds_of("category", y, None, 0)
    assert len(folds) == n
    assert sorted(np.concatenate([out for _, out in folds])) == list(range(len(y)))
    for rows, out in folds:
        assert not set(rows) & set(out) and len(rows) + len(out) == len(y)
        for c, count in enumerate(counts):
            if count > 1:
                assert c in y[rows] and c in y[out]


def test_with_one_image_a_class_the_strength_is_the_default():
    assert folds_of("category", np.arange(5), None, 0) == []
    assert chosen_strength("category", np.eye(5), np.arange(5), []) == DEFAULT_STRENGTH == 0.01


@pytest.mark.parametrize("kind", ["category", "regression"])
def test_a_patient_is_held_out_as_a_whole(kind):
    groups = np.repeat(np.arange(12), 5)
    y = groups % 3
    folds = folds_of(kind, y if kind == "category" else y[:, None], groups, 0)
    assert len(folds) == (4 if kind == "category" else 5)  # four patients a class
    for rows, out in folds:
        assert not set(groups[rows]) & set(groups[out])
    assert folds_of("category", np.repeat([0, 1], 5), np.repeat(["a", "b"], 5), 0) == []


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    assert score_of("category", np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == 0.75
    y = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]])
    scores = np.array([[0.9, 0, 0, 0.1], [0.8, 0, 0, 0.2], [0.7, 0, 0, 0.3], [0.1, 0, 0, 0.4]])
    # ranked +-+-: precisions 1, 2/3; ranked -+-+: 1/2, 2/4. All have label 1, none has label 2: left out
    assert mean_precision(scores, y) == pytest.approx(((1 + 2 / 3) / 2 + (1 / 2 + 2 / 4) / 2) / 2)
    assert mean_precision(scores[:, :1], y[:, :1]) == average_precision_score(y[:, 0], scores[:, 0])
    with pytest.raises(TaskError, match="nothing can be ranked"):
        mean_precision(scores[:, 1:3], y[:, 1:3])
    values, guess = np.array([[1.0], [2], [4]]), np.array([[1.5], [2], [3]])
    assert score_of("regression", guess, values) == pytest.approx(r2_score(values, guess))


def test_a_fit_that_does_not_converge_is_said_and_not_warned_about(monkeypatch, capsys):
    monkeypatch.setattr("selfsup_fastai.downstream.linear_models.STEPS", 1)
    x, y = classes()
    fitted("category", "corner", x, y, 1.0)
    assert "the fit on corner had not converged after 1 steps" in capsys.readouterr().err
    chosen_strength("category", x, y, folds_of("category", y, None, 0))
    assert capsys.readouterr().err == ""


def test_foreign_warnings_are_not_swallowed(monkeypatch):
    def loud(self, *_args, **_kwargs):
        import warnings

        warnings.warn("something else", UserWarning, stacklevel=1)
        return self

    monkeypatch.setattr(Softmax, "fit", loud)
    with pytest.warns(UserWarning, match="something else"):
        fitted("category", "a", np.zeros((2, 1)), np.array([0, 1]), 1.0)
