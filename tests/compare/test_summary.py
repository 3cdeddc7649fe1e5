"""From runs to verdicts: paired, corrected, and in words that claim no more."""

import numpy as np
import pandas as pd
import pytest

from selfsup_fastai.compare.sentence import whole_verdict
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.compare.tables import Predictions, as_label_curve
from selfsup_fastai.errors import DataError

N = 300


def runs(gains: dict[str, list[float]], labels=(10, 1.0), seeds: int = 4, seed: int = 0, spread: float = 0.03):
    """Runs with their predictions: nets that are right as often as said; the same images are easy for all."""
    rng, rows, known = np.random.default_rng(seed), [], {}
    truth, easy = rng.integers(0, 2, N), rng.random(N)
    for i, amount in enumerate(labels):
        for s in range(seeds):
            luck = rng.normal(0, 0.1)
            for start, gain in {"scratch": [0.0] * len(labels), **gains}.items():
                right = 0.8 * easy + 0.2 * rng.random(N) < 0.6 + luck + gain[i] + rng.normal(0, spread)
                key = f"{start}{amount!r}{s}"
                known[key] = np.eye(2)[np.where(right, truth, 1 - truth)]
                row = {"start": start, "labels": amount, "n_labels": 20 if i == 0 else 400, "seed": s}
                rows.append(row | {"score": right.mean(), "metric": "accuracy", "pretrained": s, "run": key})
    table = pd.DataFrame(rows)
    table["labels"] = pd.Series([row["labels"] for row in rows], dtype=object)
    table.attrs["predictions"] = Predictions(truth, np.arange(N), known)
    return as_label_curve(table, summarize)


def test_a_row_for_each_start_and_number_of_labels():
    table = summarize(runs({"x": [0.2, 0.0], "y": [0.0, 0.0]}))
    assert list(zip(table["labels"], table["start"])) == [
        *[(10, s) for s in ("scratch", "x", "y")],
        *[(1.0, s) for s in ("scratch", "x", "y")],
    ]
    assert list(table["verdict"]) == ["", "better", *["not distinguishable"] * 1, "", *["not distinguishable"] * 2]
    first = table.iloc[1]
    own = runs({"x": [0.2, 0.0], "y": [0.0, 0.0]}).query("labels == 10").pivot(index="seed", columns="start")["score"]
    assert first["score"] == pytest.approx(own["x"].mean())
    assert first["gain"] == pytest.approx((own["x"] - own["scratch"]).mean())
    assert first["gain_low"] < first["gain"] < first["gain_high"]
    assert table.attrs["metric"] == "accuracy" and table.attrs["n_test"] == N


def test_pairs_make_gains_surer_than_scores():
    row = summarize(runs({"x": [0.2, 0.2]}, spread=0.005)).query("start == 'x'").iloc[0]
    assert row["high"] - row["low"] > 2 * (row["gain_high"] - row["gain_low"])


def test_the_family_is_one_number_of_labels_and_the_sentence_goes_by_all():
    table = summarize(runs({"x": [0.1, 0.0], "y": [0.0, 0.0]}))
    part = table[(table["labels"].map(repr) == "10") & table["p"].notna()]
    smallest = part["p"].min()
    assert part["p_corrected"].min() == pytest.approx(min(1, 2 * smallest))
    assert table["p_all"].min() == pytest.approx(min(1, 4 * table["p"].min()))


def test_one_seed_has_no_verdict():
    table = summarize(runs({"x": [0.3, 0.3]}, seeds=1))
    assert set(table["verdict"]) == {"", "not distinguishable"}
    assert np.isinf(table["gain_high"].dropna()).all()
    said = whole_verdict(table)
    assert said.startswith("On your data nothing can be said: from a single seed nobody knows what is chance.")
    assert "inf" not in said


def test_seeds_that_share_a_pretraining_run_count_as_one():
    table = runs({"x": [0.2, 0.2]}, seeds=6)
    table.loc[table["start"] == "x", "pretrained"] %= 2
    shared, own = summarize(table), summarize(runs({"x": [0.2, 0.2]}, seeds=6))
    assert (shared["gain"].dropna() - own["gain"].dropna()).abs().max() < 1e-12
    assert (shared["gain_high"] - shared["gain_low"]).max() > 2 * (own["gain_high"] - own["gain_low"]).max()


def test_no_difference_at_all_is_not_called_the_largest():
    table = runs({"x": [0.0, 0.0]})
    scores = table[table["start"] == "scratch"].set_index(["n_labels", "seed"])
    mine = table["start"] == "x"
    same = scores.loc[list(zip(table.loc[mine, "n_labels"], table.loc[mine, "seed"]))]
    table.loc[mine, ["score", "run"]] = same[["score", "run"]].to_numpy()
    said = whole_verdict(summarize(table))
    assert said.endswith("distinguishable from training from scratch. There is no difference: all came to the same.")


def test_a_single_pretraining_run_is_named():
    """The interval says nothing of what another pretraining run would have come to."""
    table = runs({"x": [0.3, 0.3]})
    assert "one pretraining run" not in whole_verdict(summarize(table))
    table.loc[table["start"] == "x", "pretrained"] = 0
    said = whole_verdict(summarize(table))
    assert "pretraining helped" in said and "Behind x there is one pretraining run" in said


def test_without_predictions_it_says_so(capsys):
    table = runs({"x": [0.2, 0.2]})
    table.attrs = {}
    found = summarize(table)
    assert "intervals cover the seeds, not the test images" in capsys.readouterr().err
    assert not found.attrs["images"]


def test_sentences():
    helped = whole_verdict(summarize(runs({"simclr": [0.25, 0.0], "rotation": [0.0, 0.0]}, seeds=6)))
    assert helped.startswith("On your data pretraining helped: simclr, with 20 labeled images (10 a class) ")
    assert "more of 100 test images named rightly (95 % interval +" in helped
    assert helped.endswith("With all 400 labeled images no difference can be told from chance.")
    nothing = whole_verdict(summarize(runs({"simclr": [0.0, 0.0], "rotation": [0.0, 0.0]})))
    assert nothing.startswith("On your data, no task is distinguishable from training from scratch. The largest")
    harm = whole_verdict(summarize(runs({"simclr": [-0.3, -0.3]}, seeds=6)))
    assert harm.startswith("On your data, simclr is not distinguishable from") or "is worse than" in harm
    assert "simclr is worse than training from scratch: with" in harm and "less of 100 test images" in harm


def test_an_interval_as_wide_as_all_scores_is_no_interval():
    few, more = (whole_verdict(summarize(runs({"x": [0.05, 0.0]}, seeds=seeds))) for seeds in (2, 6))
    assert "(how much of that is chance, so few seeds cannot tell)" in few and "interval" not in few
    assert "take more of them" in few
    assert "% interval" in more


def test_what_is_no_task_is_told_apart():
    table = summarize(runs({"simclr": [0.0, 0.0], "published weights": [0.3, 0.3]}, seeds=6))
    said = whole_verdict(table, ["simclr"])
    assert said.startswith("On your data, simclr is not distinguishable from training from scratch.")
    assert " published weights helped: with " in said


def test_a_gain_among_few_comparisons_is_a_hint_among_many():
    table = summarize(runs({"simclr": [0.0, 0.0]}))
    row = (table["start"] == "simclr") & (table["labels"].map(repr) == "10")
    table.loc[row, ["gain", "gain_low", "gain_high", "p", "p_corrected"]] = 0.05, 0.001, 0.1, 0.045, 0.045
    table.loc[row, ["p_all", "all_low", "all_high", "verdict"]] = 0.09, -0.01, 0.11, "better"
    said = whole_verdict(table)
    assert said.startswith(
        "On your data there is a hint, no more: simclr, with 20 labeled images (10 a class) 5.0 more"
    )
    assert "2 comparisons were made" in said and "interval -1.0 to +11.0" in said


def test_curves_are_drawn_with_these_intervals():
    table = runs({"x": [0.2, 0.0]})
    ax = table.show()
    bars = ax.containers[0][2][0].get_segments()
    expected = summarize(table).query("start == 'scratch'")
    assert bars[0][:, 1] == pytest.approx(expected.iloc[0][["low", "high"]].astype(float))


def test_tables_that_are_no_runs():
    with pytest.raises(DataError, match="columns missing: start"):
        summarize(pd.DataFrame({"score": [1.0]}))
    with pytest.raises(DataError, match="No run starts from 'zero'; there are scratch, x"):
        summarize(runs({"x": [0.0, 0.0]}), baseline="zero")
    twice = pd.concat([runs({"x": [0.0, 0.0]})] * 2)
    with pytest.raises(DataError, match="two runs of one start"):
        summarize(twice)
