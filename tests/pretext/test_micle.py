"""MICLe: pairs are of one patient, images of one patient are not told apart, the rest is SimCLR."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch import Tensor

from selfsup_fastai.callbacks.collapse import Signals
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.views import random_view
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import embed
from selfsup_fastai.losses import nt_xent
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint_embedding.micle import found_group
from selfsup_fastai.pretext.learner import pretext_learner
from tests.test_contract import tiny

STILL = {"kind": "photo", "scale": [1, 1], "ratio": [1, 1], "flip": 0, "jitter_p": 0, "grey_p": 0}
OWNERS = ["a", "b", "a", None, "c", "b", "", "a", "c", float("nan"), "d", "c"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grey_levels(n: int, channels: int = 3) -> np.ndarray:
    """Image i is all of value 10 * i."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8).reshape(-1, 1, 1, 1) * 10, (n, 16, 16, channels)).copy()


def loaders(column: str = "patient", owners=OWNERS, bs: int = 4, n_in: int = 3) -> UnlabeledDataLoaders:
    """Two halves with the same owners in both, as a careless split would have it."""
    n = len(owners)
    dls = UnlabeledDataLoaders.from_array(
        grey_levels(2 * n), size=16, bs=bs, valid_pct=0.5, num_workers=0, n_in=n_in, seed=0
    )
    for dl in dls.loaders:
        dl.facts = pd.DataFrame({column: owners})
    return dls


def learner(dls=None, **kwargs):
    set_seed(0)
    learn = pretext_learner(loaders() if dls is None else dls, "micle", tiny, **{"views": STILL, **kwargs})
    learn.remove_cb(ProgressCallback)
    return learn


def numbers(images: Tensor) -> list[int]:
    return (images.flatten(1).mean(1) * 25.5).round().int().tolist()


@pytest.mark.parametrize("by", ["patient", "study", "series"])
def test_pairs_are_of_one_owner_and_of_one_side_of_the_split(by):
    learn = learner(loaders(by), by=by)
    for dl in learn.dls.loaders:
        place = {number: i for i, number in enumerate(numbers(torch.tensor(np.stack(list(dl.dataset.items))) / 255.0))}
        seen = {}
        for _ in range(20):
            for b in dl:
                (pairs,), (row, owner) = dl.question(b)
                assert row.tolist() == list(range(len(pairs)))
                for one, other, number in zip(numbers(pairs[:, 0]), numbers(pairs[:, 1]), owner.tolist()):
                    i, j = place[one], place[other]  # both are images of this very loader
                    seen.setdefault(i, set()).add(j)
                    named = isinstance(OWNERS[i], str) and OWNERS[i] != ""
                    assert (OWNERS[i] == OWNERS[j] and (i != j or OWNERS[i] == "d")) if named else i == j
                    assert number == {"a": 0, "b": 1, "c": 2, "d": 3}.get(OWNERS[i], number)
        shuffled = dl is learn.dls.train
        assert seen[0] == {2, 7} if shuffled else len(seen[0]) == 1  # drawn anew, or the same again and again
        assert seen[10] == {10} and seen[3] == {3}


def test_the_two_views_are_draws_of_simclrs_recipes():
    x, others = torch.rand(2, 5, 3, 40, 40, generator=seeded(1))
    task, simclr, generator = get_task("micle"), get_task("simclr"), seeded(2)
    known = torch.tensor([[3.0], [1], [3], [0], [7]])
    made = task.make_batch(x, generator=seeded(2), train=True, known=known, others=others.unsqueeze(1))
    (views,), (row, owner) = made
    for i, image in enumerate((x, others)):
        assert torch.equal(views[:, i], random_view(image, simclr.recipe(i, 3, 40), generator))
    assert row.tolist() == [0, 1, 2, 3, 4] and owner.tolist() == [3, 1, 3, 0, 7]


def test_an_image_of_which_nothing_is_known_comes_in_two_views_of_its_own():
    x = torch.rand(4, 3, 40, 40, generator=seeded(1))
    (views,), targets = get_task("micle").make_batch(x, generator=seeded(2), train=False)
    (same,), _ = get_task("simclr").make_batch(x, generator=seeded(2), train=False)
    assert torch.equal(views, same) and [t.tolist() for t in targets] == [[0, 1, 2, 3]] * 2


def by_hand(pred: Tensor, owner: Tensor, temperature: float) -> Tensor:
    """(B,): each view against its partner and all views of other patients."""
    z = pred / pred.norm(dim=-1, keepdim=True)
    rows = []
    for i in range(len(z)):
        terms = []
        for v in range(2):
            partner = z[i, v] @ z[i, 1 - v] / temperature
            others = [z[j, u] @ z[i, v] / temperature for j in range(len(z)) for u in range(2) if owner[j] != owner[i]]
            terms.append(torch.stack([partner, *others]).exp().sum().log() - partner)
        rows.append(sum(terms) / 2)
    return torch.stack(rows)


@pytest.mark.parametrize("owner", [[0, 1, 0, 2, 0], [0, 1, 2, 3, 4], [7, 7, 7, 7, 7], [5, 5, 1, 1, 5]])
def test_loss_and_gradient_are_those_of_the_formula(owner):
    owner, task = torch.tensor(owner), get_task("micle", temperature=0.3)
    pred = torch.randn(5, 2, 6, generator=seeded(2), dtype=torch.float64).requires_grad_()
    target = torch.arange(5)
    rows = task.loss(pred, target, owner, reduction="none")
    torch.testing.assert_close(rows, by_hand(pred, owner, 0.3))
    loss = task.loss(pred, target, owner)
    torch.testing.assert_close(loss, rows.mean())
    (expected,) = torch.autograd.grad(by_hand(pred, owner, 0.3).mean(), pred)
    (gradient,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(gradient, expected)
    if len(owner.unique()) == 5:
        torch.testing.assert_close(loss, nt_xent(pred[:, 0], pred[:, 1], 0.3))
    if len(owner.unique()) == 1:
        assert loss.item() == pytest.approx(0, abs=1e-9)  # there is nobody to be told from


def test_found_is_any_image_of_the_same_patient():
    eye, owner = torch.eye(4), torch.tensor([0, 1, 0, 2])
    target = torch.arange(4)
    swapped = torch.stack([eye, eye[[2, 1, 0, 3]]], 1)  # 0 and 2 find each other
    assert found_group(swapped, target, owner) == 1
    assert found_group(torch.stack([eye, eye[[1, 0, 2, 3]]], 1), target, owner) == 0.5
    assert found_group(swapped[:1], target[:1], owner[:1]) == 0


def test_one_image_alone_has_nobody_to_be_told_from():
    task, pred = get_task("micle"), torch.randn(1, 2, 6, generator=seeded())
    with torch.no_grad():
        assert task.loss(pred, torch.zeros(1).long(), torch.zeros(1).long()).item() == 0


def test_what_is_missing_is_named(capsys):
    dls = loaders()
    with pytest.raises(TaskError, match=r"know which images are of one study, the facts 'study'; study missing here.*"):
        learner(dls, by="study")
    for dl in dls.loaders:
        dl.facts = None
    with pytest.raises(TaskError, match=r"'patient'; no facts are known of these images. DICOM files bring.*from_df"):
        learner(dls)
    with pytest.raises(TaskError, match=r"images of two or more, and all 12 training images are of one. Take simclr"):
        learner(loaders(owners=["a"] * 12))
    with pytest.raises(TaskError, match="'patient', 'study' or 'series'; got 'person'"):
        get_task("micle", by="person")
    with pytest.raises(TaskError, match="micle cannot be combined with other tasks: it shows another image"):
        get_task("micle+rotation")
    capsys.readouterr()
    learner()
    assert "micle: 8 of 12 training images have another of the same patient." in capsys.readouterr().err
    learner(loaders(owners=list("abcdefghijkl")))
    assert "no patient has two training images: with views of one image only, it is simclr" in capsys.readouterr().err
    learner(loaders(owners=list("aabbccddeeff")))
    assert "training images have" not in capsys.readouterr().err


def test_pictures_say_what_the_two_have_in_common():
    learn = learner(loaders("study"), by="study")
    assert {ax.get_title() for ax in learn.show_batch()} == {"one study"}
    learn.fit(1)
    b = learn.dls.valid.one_batch()
    decoded = learn.get_preds(dl=[b], with_decoded=True)[2]
    assert [ax.get_title() for ax in learn.dls.valid.show_results(b, decoded)] == [f"cosine {v:.2f}" for v in decoded]


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path):
    """Pairs are drawn by pass and image, so that they come again as they would have."""

    class Killed(Exception):
        pass

    class Killer(Callback):
        order = 95

        def after_batch(self):
            if self.training and self.train_iter == 5:
                raise Killed("killed")

    def fitted(*cbs):
        set_seed(3, reproducible=True)
        learn = learner(views=None)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(3, 1e-2, cbs=list(cbs))
        return learn

    whole = fitted()
    with pytest.raises(Killed):
        fitted(Resume(tmp_path / "state", 0), Killer())
    again = fitted(Resume(tmp_path / "state", 0))
    states = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_looks_at_embeddings_works_beside_it():
    learn, signals = learner(), Signals(n=16)
    learn.fit(1, cbs=signals)
    assert len(signals.history) == 1 and np.isfinite(signals.history.to_numpy(float)).all()
    assert embed(learn.encoder, learn.dls.train.plain).x.shape == (12, 16)
    mixed = learner(consistency=0.5, views=None)
    mixed.fit(1)
    assert "consistency" in mixed.recorder.metric_names and np.isfinite(mixed.recorder.losses).all()


def test_no_owner_travels_with_what_is_exported(tmp_path):
    owners = [f"secret{i // 2}" for i in range(12)]
    learn = learner(loaders(owners=owners), path=tmp_path)
    learn.fit(1)
    learn.export("learner.pkl")
    raw = (tmp_path / "learner.pkl").read_bytes() + learn.save_encoder(tmp_path / "encoder").read_bytes()
    assert b"micle" in raw and b"secret" not in raw
