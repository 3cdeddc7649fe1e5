"""seeding.py: states come back, items do not depend on one another."""

import random

import numpy as np
import torch

from selfsup_fastai.data.draws import draw_views
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.seeding import Generator, host_of, preserved_rng, rng_state, seeded_item, set_rng_state


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


def test_on_the_cpu_a_generator_is_its_own_host():
    generator, plain = Generator("cpu", 5), torch.Generator().manual_seed(5)
    assert host_of(generator) is generator and host_of(plain) is plain
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=plain))
    assert generator.initial_seed() == 5


def test_views_are_drawn_from_the_host():
    drawn = []
    for seed in (1, 2):
        generator = Generator("cpu", seed)
        generator.host = torch.Generator().manual_seed(7)  # as on a GPU
        drawn.append(draw_views(Recipe(), (4, 3, 32, 32), generator))
        assert torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())
    assert torch.equal(drawn[0].boxes, drawn[1].boxes) and torch.equal(drawn[0].jitter, drawn[1].jitter)
