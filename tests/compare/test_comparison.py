"""The result: kept in a folder and read again."""

import json
from dataclasses import FrozenInstanceError

import numpy as np
import pandas as pd
import pytest

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.errors import DataError
from tests.compare.test_summary import runs


def made(tmp_path) -> Comparison:
    table = runs({"x": [0.2, 0.0]})
    race = pd.DataFrame({"task": ["x", "y"], "rung": 0, "score": [0.5, np.nan], "reason": ["", "failed"]})
    found = {"seeds": np.int64(4), "loss": float("nan"), "labels": [10, 1.0]}
    encoders = {"x": [tmp_path / "kept" / "encoders" / "x.safetensors", tmp_path / "elsewhere.safetensors"]}
    return Comparison("It helped.", table, summarize(table), race, settings=found, encoders=encoders)


def test_a_comparison_comes_back_as_it_was(tmp_path):
    one = made(tmp_path)
    again = Comparison.load(one.save(tmp_path / "kept"))
    assert again.verdict == one.verdict and str(again) == "Comparison(It helped.)"
    pd.testing.assert_frame_equal(
        pd.DataFrame(again.summary), pd.DataFrame(one.summary), check_dtype=False, check_frame_type=False
    )
    assert [type(v) for v in again.runs["labels"]] == [type(v) for v in one.runs["labels"]]
    assert again.summary.attrs == dict(one.summary.attrs.items())
    assert again.race["reason"].tolist() == ["", "failed"]
    assert again.settings == {"seeds": 4, "loss": None, "labels": [10, 1.0]}
    assert again.encoders["x"] == one.encoders["x"]
    assert again.probes is None
    again.show()


def test_the_folder_may_be_moved(tmp_path):
    made(tmp_path).save(tmp_path / "kept").rename(tmp_path / "moved")
    assert Comparison.load(tmp_path / "moved").encoders["x"][0] == tmp_path / "moved/encoders/x.safetensors"
    written = json.loads((tmp_path / "moved/comparison.json").read_text())
    assert written["encoders"]["x"][0] == "encoders/x.safetensors"


def test_tables_of_an_earlier_comparison_do_not_stay(tmp_path):
    made(tmp_path).save(tmp_path)
    Comparison("Without labels nobody can say.").save(tmp_path)
    assert Comparison.load(tmp_path).runs is None
    with pytest.raises(DataError, match="Without labels there are no curves"):
        Comparison.load(tmp_path).show()


def test_what_is_no_comparison(tmp_path):
    with pytest.raises(DataError, match="no whole comparison"):
        Comparison.load(tmp_path)
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(DataError, match="no whole comparison"):
        Comparison.load(tmp_path)


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Comparison("x").verdict = "y"
