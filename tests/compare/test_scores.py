"""Scores: scikit-learn's, also with weights."""

import numpy as np
import pytest
from sklearn import metrics

from selfsup_fastai.compare.scores import SCORES, score_for
from selfsup_fastai.errors import TaskError, UnknownNameError
from selfsup_fastai.metrics import image_dice

N = 60


def example(name: str, seed: int):
    """Predictions, truth; ties among the predictions."""
    rng = np.random.default_rng(seed)
    if name in ("accuracy", "balanced accuracy", "AUC"):
        classes = 2 if seed % 2 else 4
        p = rng.dirichlet(np.ones(classes), N).round(1) + 1e-3
        return p / p.sum(1, keepdims=True), np.arange(N) % classes
    if name == "mAP":
        return rng.random((N, 3)).round(1), (rng.random((N, 3)) < 0.3).astype(int)
    return rng.normal(size=(N, 2)), rng.normal(size=(N, 2))


def sklearn_says(name: str, predicted, truth, w) -> float:
    if name == "accuracy":
        return metrics.accuracy_score(truth, predicted.argmax(1), sample_weight=w)
    if name == "balanced accuracy":
        return metrics.balanced_accuracy_score(truth, predicted.argmax(1), sample_weight=w)
    if name == "AUC" and predicted.shape[1] == 2:
        return metrics.roc_auc_score(truth, predicted[:, 1], sample_weight=w)
    if name == "AUC":
        each = [metrics.roc_auc_score(truth == c, predicted[:, c], sample_weight=w) for c in range(4)]
        if w is None:
            assert np.mean(each) == pytest.approx(metrics.roc_auc_score(truth, predicted, multi_class="ovr"))
        return float(np.mean(each))
    if name == "mAP":
        return metrics.average_precision_score(truth, predicted, sample_weight=w)
    if name == "R2":
        return metrics.r2_score(truth, predicted, sample_weight=w)
    return -metrics.mean_absolute_error(truth, predicted, sample_weight=w)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", [name for name in SCORES if name != "dice"])
def test_scores_are_scikit_learns(name, seed):
    predicted, truth = example(name, seed)
    weights = np.random.default_rng(9).exponential(size=(3, N))
    assert SCORES[name](predicted, truth) == pytest.approx(sklearn_says(name, predicted, truth, None))
    found = SCORES[name](predicted, truth, weights)
    assert found == pytest.approx([sklearn_says(name, predicted, truth, w) for w in weights])


def test_chunks_of_weights_change_nothing(monkeypatch):
    predicted, truth = example("AUC", 0)
    weights = np.random.default_rng(9).exponential(size=(7, N))
    whole = SCORES["AUC"](predicted, truth, weights)
    monkeypatch.setattr("selfsup_fastai.compare.scores._CELLS", 2 * N)
    np.testing.assert_allclose(SCORES["AUC"](predicted, truth, weights), whole)


def test_classes_that_no_test_image_has_do_not_count():
    predicted = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
    assert SCORES["balanced accuracy"](predicted, np.array([0, 1, 1])) == pytest.approx(0.75)
    assert SCORES["AUC"](predicted, np.array([0, 1, 1])) == pytest.approx(1.0)  # of classes 0 and 1, each against rest


def test_numbers_without_variance():
    truth = np.ones((4, 1))
    assert SCORES["R2"](truth, truth) == 1
    assert SCORES["R2"](truth + 1, truth) == 0


def test_dice_by_hand():
    truth = np.zeros((4, 2, 3), int)
    truth[0, 0] = 1  # three pixels, two of them found and one beside
    found = truth.copy()
    found[0, 0, 2], found[0, 1, 0] = 0, 1
    truth[1, 0, 0], found[1, 0, 0] = 2, 1  # one class missed, another seen where there is none
    found[3, 0, 0] = 1  # something where nothing is
    assert image_dice(found, truth, 3) == pytest.approx([2 * 2 / 6, 0, 1, 0])
    truth[0, 1, 0] = 255
    assert image_dice(found, truth, 3, ignored=255)[0] == pytest.approx(2 * 2 / 5)
    flat = metrics.f1_score(truth[0].ravel() == 1, (found[0] == 1).ravel())
    assert image_dice(found[:1], truth[:1], 2)[0] == pytest.approx(flat)


def test_the_score_follows_from_the_labels():
    assert score_for("category").name == "accuracy"
    assert score_for("mask").name == "dice"
    assert score_for("category", "AUC").name == "AUC"
    with pytest.raises(TaskError, match="metric='AUC' does not suit labels of the kind regression; take one of: R2"):
        score_for("regression", "AUC")
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        score_for("category", "acuracy")
