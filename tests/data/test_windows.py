"""Windows and quantiles against the formulas of the standard, written out."""

import numpy as np
import pytest

from selfsup_fastai.data.windows import (
    WINDOWS,
    as_limits,
    as_window,
    between,
    linear,
    linear_exact,
    quantiles,
    sigmoid,
    table,
)
from selfsup_fastai.errors import DataError, UnknownNameError


@pytest.mark.parametrize(("width", "center"), [(4096, 2048), (100, 50), (2, 0), (1500, -600), (1, 10)])
def test_linear_is_the_formula_of_the_standard(width, center):
    """PS3.3 C.11.2.1.2.1: three cases for each value."""
    values = np.arange(-2000, 5000, 1, np.float32)

    def at(x):
        if x <= center - 0.5 - (width - 1) / 2:
            return 0
        if x > center - 0.5 + (width - 1) / 2:
            return 1
        return (x - (center - 0.5)) / (width - 1) + 0.5

    np.testing.assert_allclose(between(values, *linear(width, center)), [at(x) for x in values], atol=2e-6)


def test_linear_exact_is_the_formula_of_the_standard():
    values = np.array([-100, 0, 25, 50, 75, 100, 300], np.float32)
    np.testing.assert_allclose(between(values, *linear_exact(100, 50)), [0, 0, 0.25, 0.5, 0.75, 1, 1])


def test_sigmoid_is_the_formula_of_the_standard():
    values = np.array([-1e6, 0, 25, 50, 1e6], np.float32)
    steep = [1 / (1 + np.exp(-4 * (x - 50) / 100)) for x in (0, 25, 50)]
    np.testing.assert_allclose(sigmoid(values, 100, 50), [0, *steep, 1], atol=1e-6)


def test_between_computes_in_the_memory_it_is_given():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    want = np.clip((values - 2) / 8, 0, 1)
    out = np.zeros((3, 4, 3), np.float32)
    between(values, 2, 10, scratch=np.empty_like(values), out=out[..., 1])
    np.testing.assert_allclose(out[..., 1], want, atol=1e-7)
    assert not out[..., 0].any()
    assert between(values, 2, 10, scratch=values) is values
    np.testing.assert_allclose(values, want, atol=1e-7)


def test_between_keeps_small_differences_of_large_values():
    values = np.float32([16_000_000, 16_000_001, 16_000_004])
    np.testing.assert_allclose(between(values, 16_000_000, 16_000_004), [0, 0.25, 1])


def test_table_ends_where_its_entries_do():
    entries = np.uint16([10, 20, 30])
    assert table(np.int16([-9, 4, 5, 6, 7, 99]), entries, 5).tolist() == [10, 10, 10, 20, 30, 30]
    assert table(np.float32([5.4, 5.6]), entries, 5).tolist() == [10, 20]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "f4"])
def test_quantiles_are_numpys(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0 if dtype[0] == "u" else -100, 120, (50, 41)).astype(dtype)
    mask = rng.random(values.shape) < 0.3
    q = np.linspace(0, 1, 23)
    np.testing.assert_allclose(quantiles(values, q), np.quantile(values.astype(float), q), atol=1e-9)
    np.testing.assert_allclose(quantiles(values, q, mask), np.quantile(values[~mask].astype(float), q), atol=1e-9)
    assert quantiles(np.full((3, 3), 7, dtype), [0, 0.5, 1]).tolist() == [7, 7, 7]


def test_window_settings_have_one_form():
    assert as_window(None) is None
    assert as_window("file") == "file"
    assert as_window("lung") == ((1500, -600),) == as_window((1500, -600)) == as_window([1500, -600])
    assert as_window(["lung", (400, 40), "bone"]) == (WINDOWS["lung"], (400, 40), WINDOWS["bone"])
    assert as_limits([0, 1.5]) == (0, 1.5)
    assert as_limits(None) is None


@pytest.mark.parametrize(
    "window", [5, (0, 10), (1, 10), ("a", 1), (1, 2, 3, 4), ["lung", "bone"], (np.nan, 1), (100, np.inf), (True, 4)]
)
def test_window_that_makes_no_sense_is_refused(window):
    with pytest.raises((DataError, UnknownNameError), match="window"):
        as_window(window)


def test_unknown_window_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'lung'"):
        as_window("lungs")


@pytest.mark.parametrize("limits", [5, (1, 1), (2, 1), (0, np.nan), ("a", "b"), (1, 2, 3)])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(DataError, match="low below high"):
        as_limits(limits)
