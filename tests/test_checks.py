"""Settings that make no sense are refused with what arrived and what was expected."""

import numpy as np
import pytest

from selfsup_fastai.checks import check_choice, check_flag, check_number
from selfsup_fastai.errors import TaskError


@pytest.mark.parametrize(
    "limits, good, bad, said",
    [
        (
            {"least": 0, "most": 0.5},
            (0, 0.5, np.float32(0.25)),
            (-0.01, 0.51, True),
            "number, at least 0 and at most 0.5;",
        ),
        ({"above": 0}, (1e-9, 10**9), (0, float("inf")), "is a number, above 0;"),
        ({"least": 0, "below": 1}, (0, 0.999), (1,), "number, at least 0 and below 1;"),
        (
            {"least": 2, "most": 10_000, "whole": True},
            (2, np.int64(10_000)),
            (1, 10_001, 2.0, 2.5, True),
            "is a whole number, at least 2 and at most 10,000;",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(limits, good, bad, said):
    for value in good:
        check_number("share", value, **limits)
    for value in (*bad, "abc", None, float("nan"), [1], "0"):
        with pytest.raises(TaskError, match=said) as error:
            check_number("share", value, **limits)
        assert str(error.value).startswith("share is a ") and str(error.value).endswith(f"; got {value!r}.")


def test_flags_are_true_or_false_and_nothing_that_counts_as_such():
    check_flag("color", True)
    check_flag("color", False)
    for value in (1, 0, "no", None):
        with pytest.raises(TaskError, match=f"^color is True or False, got {value!r}"):
            check_flag("color", value)


def test_choices_are_listed_and_the_nearest_is_named():
    check_choice("border", "gray", ("gray", "reflect"))
    check_choice("skip", None, ("first", None))
    with pytest.raises(TaskError, match=r"last is True, False or None; got 'yes'\."):
        check_choice("last", "yes", (True, False, None))
    with pytest.raises(TaskError, match=r"^border is 'gray' or 'reflect'; got 'grey'\. Did you mean 'gray'\?$"):
        check_choice("border", "grey", ("gray", "reflect"))
