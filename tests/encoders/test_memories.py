"""Queues and banks: what enters, where, when."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from selfsup_fastai.encoders.memories import FeatureBank, FeatureQueue


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_queue_holds_the_last_rows_whatever_the_batches():
    queue, entered = FeatureQueue(7, 3), torch.empty(0, 3)
    for i, n in enumerate([3, 3, 1, 5, 7, 9, 2]):
        queue.note(2 * rows(n, i))
        queue.commit()
        entered = torch.cat([entered, rows(n, i)])
        apart = torch.cdist(entered[-7:], queue.rows).min(1)
        assert apart.values.max() < 1e-3 and len(set(apart.indices.tolist())) == len(entered[-7:])
    assert queue.entered == 30


def test_nothing_enters_before_the_step_nor_without_one():
    queue = FeatureQueue(4, 3)
    before = queue.rows.clone()
    queue.note(rows(2))
    assert torch.equal(queue.rows, before)
    queue.forget()
    queue.commit()
    assert torch.equal(queue.rows, before)
    queue.eval()
    queue.note(rows(2))
    with torch.no_grad():
        queue.train().note(rows(2))
    queue.commit()
    assert torch.equal(queue.rows, before)


def test_the_parts_of_a_step_enter_together_in_their_order():
    queue = FeatureQueue(4, 3)
    queue.note(rows(2, 1))
    queue.note(rows(2, 2))
    assert len(pickle.loads(pickle.dumps(queue))._noted) == 0
    queue.commit()
    torch.testing.assert_close(queue.rows, torch.cat([rows(2, 1), rows(2, 2)]))


def test_the_parts_of_a_step_are_remembered_at_once():
    queue, remembered = FeatureQueue(4, 3), []
    queue.remember = remembered.append
    queue.note(rows(2, 1))
    queue.note(rows(1, 2))
    queue.commit()
    queue.commit()
    assert len(remembered) == 1
    assert torch.equal(remembered[0], torch.cat([rows(2, 1), rows(1, 2)]))


def test_a_queue_is_full_when_no_random_row_is_left():
    queue = FeatureQueue(4, 3)
    for full in (False, True, True):
        queue.note(rows(2))
        queue.commit()
        assert queue.is_full == full


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_bank_mixes_the_rows_of_the_images_that_were_seen(momentum):
    bank = FeatureBank(5, 3, momentum)
    before = bank.rows.clone()
    bank.note(torch.tensor([3, 0]), 4 * rows(2))
    bank.commit()
    expected = F.normalize(momentum * before[[3, 0]] + (1 - momentum) * rows(2), dim=1)
    torch.testing.assert_close(bank.rows[[3, 0]], expected)
    assert torch.equal(bank.rows[[1, 2, 4]], before[[1, 2, 4]])
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(5))
