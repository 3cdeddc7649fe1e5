"""Loaders where several processes train: each has its part of every batch."""

from itertools import chain

import numpy as np
import pytest
from fastai.torch_core import set_seed

from selfsup_fastai.data import loader as module
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.loader import fit_batch_size, none_left_out
from selfsup_fastai.errors import DataError
from selfsup_fastai.pretext.learner import pretext_learner


def loaders(monkeypatch, rank: int, of: int, bs: int, n: int = 40, n_valid: int = 11):
    """The two loaders of one of several processes, with the place of each image along."""
    monkeypatch.setattr(module, "n_processes", lambda: of)
    monkeypatch.setattr(module, "rank", lambda: rank)
    set_seed(5)
    array = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=8, bs=bs, valid_pct=n_valid / n, num_workers=0)
    for i, dl in enumerate(dls.loaders):
        dl.with_index = True
        if of > 1:
            dl.take_part(training=i == 0)
    return dls.loaders


def places(dl) -> list[list[int]]:
    found = [b[-1].tolist() for b in dl]
    assert len(found) == len(dl)
    return found


def flat(lists) -> list:
    return list(chain.from_iterable(lists))


@pytest.mark.parametrize("of, bs", [(2, 4), (3, 3), (4, 2), (5, 5)])
def test_parts_together_are_the_batches_of_one_process(of, bs, monkeypatch):
    train, valid = ([places(loaders(monkeypatch, rank, of, bs)[side]) for rank in range(of)] for side in range(2))
    whole, _ = loaders(monkeypatch, 0, 1, bs * of)
    assert whole.bs == bs * of
    assert [flat(parts) for parts in zip(*train)] == places(whole)
    assert {len(batch) for part in train for batch in part} == {bs}
    assert sorted(flat(flat(valid))) == list(range(11))  # each once
    for parts in zip(*valid, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) >= 1


def test_another_pass_is_another_order_and_the_same_for_all(monkeypatch):
    (one, _), (other, _) = (loaders(monkeypatch, rank, 2, 4) for rank in range(2))
    first, second = places(one), places(one)
    places(other)
    assert first != second and not set(flat(second)) & set(flat(places(other)))


@pytest.mark.parametrize("of", [2, 3, 7])
def test_no_process_is_left_without_validation_images(of, monkeypatch):
    monkeypatch.setattr(module, "n_processes", lambda: of)
    for n in range(of, 60):
        for bs in range(1, 12):
            size = none_left_out(n, bs)
            last = n % (size * of) or size * of
            assert last >= (2 * of if n >= 2 * of else of)
            if (n % (bs * of) or bs * of) >= 2 * of:  # a size that suits stays
                assert size == bs
    with pytest.raises(DataError, match=f"{of} processes need as many validation images, there are {of - 1}"):
        none_left_out(of - 1, 4)


def test_the_batch_size_is_cut_to_the_share_of_each(monkeypatch, capsys):
    monkeypatch.setattr(module, "n_processes", lambda: 4)
    assert fit_batch_size(16, 64) == 16
    assert fit_batch_size(64, 42) == 10
    assert "there are no more training images for each process" in capsys.readouterr().err
    assert fit_batch_size(16, 4 * 23) == 11
    assert "an epoch then takes 88 of 92 training images" in capsys.readouterr().err
    with pytest.raises(DataError, match="3 training images are too few for 4 processes"):
        fit_batch_size(1, 3)


def test_processes_draw_different_questions_about_different_images(monkeypatch):
    dls = UnlabeledDataLoaders.from_array(np.zeros((20, 16, 16, 3), np.uint8) + 100, size=16, bs=4, num_workers=0)
    learn = pretext_learner(dls, "rotation", "resnet10t", turns="one")
    turns = []
    for part in ((0, 2), (1, 2), (1, 2), None):
        dl = learn.dls.train.new()
        dl.part, dl.rng = part, module.random.Random(7)
        turns.append([b[1].flatten().tolist() for b in dl][:2])
    assert turns[1] == turns[2] and turns[0] != turns[1]
    assert learn.dls.train.part is None  # one process
