"""Intervals: right as often as they say, on data where the truth is known."""

import numpy as np
import pytest
from scipy import stats

from selfsup_fastai.compare.scores import SCORES
from selfsup_fastai.compare.statistics import Estimate, estimate, holm, redrawn_images, verdict


def found(x: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
    """Of differences (seeds, images)."""
    groups = np.arange(x.shape[1]) if groups is None else groups
    weights = redrawn_images(groups)
    return estimate(x.mean(1), x @ weights.T / x.shape[1], len(np.unique(groups)))


def alarms(seeds: int, images: int, of_seeds: float, of_images: float, particular: float, gain=0.0, times=800) -> float:
    """How often a difference is found among images and seeds drawn from a world where it is `gain` on average."""
    rng, n = np.random.default_rng(images + seeds), 0
    for _ in range(times):
        x = gain + of_seeds * rng.normal(size=(seeds, 1)) + of_images * rng.normal(size=(1, images))
        low, high = found(x + particular * rng.normal(size=(seeds, images))).interval()
        n += low > 0 or high < 0
    return n / times


LIMIT = 0.05 + 2.6 * (0.05 * 0.95 / 800) ** 0.5  # of 800 at the nominal rate, in 99.5 of 100 cases


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("images", [20, 200])
@pytest.mark.parametrize(
    "world",
    [(0, 0, 1), (1, 0, 0.1), (0, 1, 0.3), (0.1, 0.7, 0.7), (0.1, 0, 1), (0.3, 0, 1), (0, 1, 0)],
    ids=["particular", "seeds", "images", "all three", "both", "more of seeds", "the same nets in all seeds"],
)
def test_false_alarms_are_as_rare_as_said(seeds, images, world):
    assert alarms(seeds, images, *world) <= LIMIT


def test_seeds_alone_would_be_far_too_sure():
    """All seeds see the same training images and the same small test set: they agree, and are off together."""
    rng, alone, both = np.random.default_rng(3), 0, 0
    for _ in range(400):
        x = rng.normal(size=(1, 50)) + 0.1 * rng.normal(size=(5, 50))
        alone += stats.ttest_1samp(x.mean(1), 0).pvalue < 0.05
        both += found(x).p < 0.05
    assert alone / 400 > 0.6
    assert both / 400 <= 0.05 + 2.6 * (0.05 * 0.95 / 400) ** 0.5


def test_images_alone_would_be_too_sure_where_seeds_differ():
    rng, alone, both = np.random.default_rng(4), 0, 0
    for _ in range(400):
        x = 0.3 * rng.normal(size=(5, 1)) + rng.normal(size=(5, 500))
        alone += stats.ttest_1samp(x.mean(0), 0).pvalue < 0.05
        both += found(x).p < 0.05
    assert alone / 400 > 0.5
    assert both / 400 <= 0.05 + 2.6 * (0.05 * 0.95 / 400) ** 0.5


def test_few_seeds_that_happen_to_agree_are_not_sure():
    """Two seeds with the same score: their scatter is 0, but redrawn images know that each is off by its own."""
    x = np.zeros((2, 20))
    x[0, :4] = x[1, 10:14] = 1.0
    assert found(x).of_seeds == 0
    low, high = found(x).interval()
    assert low < 0.2 < high
    assert high - low > 2 * 2.09 * (0.1 * 0.2 * 2 / 20) ** 0.5


def test_a_planted_gain_is_found():
    assert alarms(5, 200, 0.02, 0.3, 0.5, gain=0.15, times=100) > 0.95
    assert alarms(5, 200, 0.02, 0.3, 0.5, gain=-0.15, times=100) > 0.95


def test_false_alarms_with_real_scores_of_two_alike_nets():
    """Two nets that are right 70 % of the time: right or wrong, AUC from noisy probabilities; a small test set."""
    rng, n = np.random.default_rng(5), {"accuracy": 0, "AUC": 0}
    truth, weights = np.arange(40) % 2, redrawn_images(np.arange(40), 200)
    for _ in range(300):
        hard = rng.normal(0, 1, 40)  # some images are hard for every net
        p = 1 / (1 + np.exp(-(np.where(truth, 1, -1) + hard + rng.normal(0, 1, (2, 3, 40)))))
        for name in n:
            both = [[np.stack([1 - q, q], 1) for q in net] for net in p]
            scores = np.array([[SCORES[name](q, truth) for q in net] for net in both])
            again = np.array([[SCORES[name](q, truth, weights) for q in net] for net in both])
            n[name] += estimate(scores[0] - scores[1], again[0] - again[1], 40).p < 0.05
    assert all(count / 300 <= 0.05 + 2.6 * (0.05 * 0.95 / 300) ** 0.5 for count in n.values()), n


def test_of_many_images_it_is_students_interval_of_the_seeds():
    x = np.array([[0.1], [0.15], [0.05], [0.12]]) + np.zeros((1, 50))
    low, high = found(x).interval()
    t = stats.t.interval(0.95, 3, loc=x[:, 0].mean(), scale=stats.sem(x[:, 0]))
    assert (low, high) == pytest.approx(t)
    assert found(x).p == pytest.approx(stats.ttest_1samp(x[:, 0], 0).pvalue)


def test_of_equal_seeds_it_is_students_interval_of_the_images():
    x = np.tile(np.random.default_rng(0).normal(size=60), (3, 1))
    one, t = found(x), stats.t.interval(0.95, 59, loc=x[0].mean(), scale=stats.sem(x[0]))
    assert one.interval() == pytest.approx(t, abs=0.13 * (t[1] - t[0]))  # 400 draws: a deviation of 4 %
    assert one.p == pytest.approx(2 * stats.t.sf(abs(one.mean) / one.of_images**0.5, 59), rel=1e-6)


def test_patients_are_redrawn_whole():
    groups = np.repeat(np.arange(10), 8)
    of_patients = np.random.default_rng(0).normal(size=10)
    x = np.tile(of_patients[groups], (3, 1))
    assert found(x, groups).of_images == pytest.approx(of_patients.var(ddof=1) / 10, rel=0.25)
    assert found(x, groups).groups == 10
    assert found(x).of_images < found(x, groups).of_images / 4
    weights = redrawn_images(groups, 5)
    assert (weights.reshape(5, 10, 8) == weights[:, ::8, None]).all()
    np.testing.assert_allclose(weights.mean(1), 1)
    assert (weights > 0).all()


def test_redrawing_is_seeded():
    np.testing.assert_array_equal(redrawn_images(np.arange(9)), redrawn_images(np.arange(9)))


def test_one_seed_says_nothing():
    one = estimate(np.array([0.3]), np.full((1, 200), 0.3), 100)
    assert one.interval() == (-np.inf, np.inf)
    assert one.p == 1


def test_five_test_images_say_nothing_and_no_difference_is_none():
    assert estimate(np.ones(4), np.ones((4, 200)), 5).interval() == (-np.inf, np.inf)
    nothing = estimate(np.zeros(4), np.zeros((4, 200)), 50)
    assert (nothing.p, nothing.interval()) == (1, (0, 0))


def test_without_predictions_the_seeds_are_all_there_is():
    values = np.array([0.5, 0.6, 0.8, 0.7])
    assert estimate(values, None, 0).interval() == pytest.approx(
        stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    )


def test_holm_by_hand():
    found = holm(np.array([0.04, 0.01, 0.03]))  # 3 * .01, then 2 * .03 = .06 fails, and so does all that follows
    assert found.p == pytest.approx([0.06, 0.03, 0.06])
    assert found.confidence == pytest.approx([1 - 0.05 / 2, 1 - 0.05 / 3, 1 - 0.05 / 2])
    assert holm(np.array([0.001, 0.02])).p == pytest.approx([0.002, 0.02])
    assert holm(np.array([0.9, 0.8])).p == pytest.approx([1, 1])
    assert holm(np.array([])).p.size == 0


def test_intervals_agree_with_corrected_ps():
    rng = np.random.default_rng(0)
    for _ in range(200):
        gains = [Estimate(m, 0.7, 0.5, 0.1, 4, 30) for m in rng.normal(0, 3, rng.integers(1, 6))]
        corrected = holm(np.array([g.p for g in gains]))
        for gain, p, level in zip(gains, *corrected):
            assert (verdict(*gain.interval(level)) != "not distinguishable") == (p < 0.05)


def test_one_in_twenty_races_of_five_idle_tasks_has_a_winner():
    """The family-wise rate: five tasks that do nothing, compared with one scratch."""
    rng, n = np.random.default_rng(2), 0
    for _ in range(300):
        scratch, tasks = rng.normal(size=(3, 60)), rng.normal(size=(5, 3, 60))
        n += (holm(np.array([found(task - scratch).p for task in tasks])).p < 0.05).any()
    assert n / 300 <= 0.05 + 2.6 * (0.05 * 0.95 / 300) ** 0.5


def test_seeds_that_agree_by_chance_are_no_certainty():
    """Of 20 test images two seeds often get one more, both: without the predictions that would be p = 0."""
    agreeing = estimate(np.array([0.05, 0.05]), None, 0)
    assert (agreeing.p, agreeing.interval()) == (1, (-np.inf, np.inf))
    assert estimate(np.array([0.05, 0.06]), None, 0).interval()[0] < 0
