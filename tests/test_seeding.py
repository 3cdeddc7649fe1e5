"""seeding.py: states come back, items do not depend on one another."""

import random

import numpy as np
import torch

from selfsup_fastai.seeding import preserved_rng, rng_state, seeded_item, set_rng_state


def draw() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_state_comes_back():
    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_looking_leaves_no_trace():
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    with preserved_rng():
        draw()
    assert draw() == expected


def test_items_are_seeded_one_by_one():
    def value(seed, index):
        with seeded_item(seed, index):
            return random.random()

    outside = random.getstate()
    assert value(1, 2) == value(1, 2)
    assert len({value(seed, index) for seed in range(5) for index in range(5)}) == 25
    assert random.getstate() == outside
