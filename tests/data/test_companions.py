"""Companions: who comes with whom, that nobody crosses the split, and that every road gives the same pixels."""

import pickle
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Flip, RandomResizedCrop
from fasttransform import Pipeline
from PIL import Image

from selfsup_fastai.data.companions import DrawnCompanions, FixedCompanions, TensorCompanion
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.loader import IndexedDL, TensorIndex, ToChannels, derive_loaders
from selfsup_fastai.errors import DataError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images
from tests.test_contract import tiny

GROUPS = np.array([3, 0, 3, 1, 0, 3, 0, 0])


# ---- who comes with whom


def test_a_drawn_companion_is_another_image_of_the_group_each_equally_often():
    drawn = DrawnCompanions(GROUPS)
    each = np.concatenate([drawn.of(range(8), seed) for seed in range(3000)], 1)
    assert drawn.n == 1 and each.shape == (8, 3000)
    for i, row in enumerate(each):
        others = [j for j in range(8) if GROUPS[j] == GROUPS[i] and j != i] or [i]
        counts = Counter(row.tolist())
        assert set(counts) == set(others)
        assert all(abs(n / 3000 - 1 / len(others)) < 0.04 for n in counts.values())


def test_a_draw_depends_on_pass_and_image_alone():
    drawn = DrawnCompanions(GROUPS)
    whole = drawn.of(range(8), 5)
    assert np.array_equal(drawn.of([6, 2, 6], 5), whole[[6, 2, 6]])
    assert np.array_equal(DrawnCompanions(GROUPS + 4).of(range(8), 5), whole)  # names of groups say nothing
    assert any(not np.array_equal(drawn.of(range(8), seed), whole) for seed in range(5))


def test_fixed_companions_are_those_of_the_table():
    places = np.array([[0, 0], [0, 2], [1, 1]])
    assert FixedCompanions(places).n == 2
    assert FixedCompanions(places).of([2, 1], 7).tolist() == [[1, 1], [0, 2]]


# ---- the loader


class WithCompanions(IndexedDL):
    """An `IndexedDL` that brings the next image of the dataset and the one after that along."""

    with_index = True

    @property
    def companions(self):
        n = len(self.dataset)
        return FixedCompanions((np.arange(n)[:, None] + [1, 2]) % n)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 color PNGs of 40 x 52: a window of 40 x 40 has thirteen places in each."""
    return write_images(tmp_path_factory.mktemp("wide"), 24, (40, 52))


def loaders(folder, cache=True, workers=0, device="cpu", **kwargs) -> UnlabeledDataLoaders:
    set_seed(3)
    settings = {"size": 40, "bs": 5, "valid_pct": 0.25, "num_workers": workers, "device": device, **kwargs}
    return UnlabeledDataLoaders.from_folder(folder, cache=cache, **settings)


def batches(dls) -> list:
    set_seed(4)
    dls = derive_loaders(dls, dl_type=WithCompanions)
    return [*dls.train, *dls.valid]


def same(a: list, b: list) -> bool:
    kinds = [[type(t) for t in batch] for batch in a] == [[type(t) for t in batch] for batch in b]
    return kinds and len(a) == len(b) and all(torch.equal(t, u) for x, y in zip(a, b) for t, u in zip(x, y))


def test_every_road_gives_the_same_batches(folder):
    fast = loaders(folder)
    assert derive_loaders(fast, dl_type=WithCompanions).train.is_fast
    expected = batches(fast)
    assert [len(b) for b in expected] == [4] * 5
    assert [type(t) for t in expected[0]][1:] == [TensorCompanion, TensorCompanion, TensorIndex]
    for settings in ({"cache": False}, {"cache": False, "workers": 2}, {"cache": "ram"}):
        slow = loaders(folder, **settings)
        assert derive_loaders(slow, dl_type=WithCompanions).train.is_fast == (settings["cache"] == "ram")
        assert same(batches(slow), expected)


def test_companions_are_what_the_table_says_cut_where_the_image_is_cut(folder):
    dls = derive_loaders(loaders(folder), dl_type=WithCompanions)
    shifts = set()
    for dl in dls.loaders:
        whole = np.stack([np.asarray(Image.open(f)) for f in dl.dataset.items])
        for x, first, second, index in dl:
            for i, s in enumerate(index.tolist()):
                window = round_to_bytes(x[i])
                (left,) = [k for k in range(13) if np.array_equal(whole[s][:, k : k + 40], window)]
                shifts.add((dl is dls.train, left))
                for companion, place in zip((first, second), (s + 1, s + 2)):
                    expected = whole[place % len(whole)][:, left : left + 40]
                    assert np.array_equal(round_to_bytes(companion[i]), expected)
    assert {left for train, left in shifts if not train} == {6} and len(shifts) > 6


def round_to_bytes(x) -> np.ndarray:
    return (x.as_subclass(torch.Tensor).permute(1, 2, 0) * 255).round().byte().numpy()


def test_random_item_transforms_do_the_same_to_an_image_and_its_companions(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8)[None, :, None], (60, 1, 3))
    for i in range(12):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    dls = loaders(tmp_path, size=None, item_tfms=RandomResizedCrop(32))
    drawn = []
    for x, first, second, _ in batches(dls):
        assert (x == first.as_subclass(type(x))).all() and (x == second.as_subclass(type(x))).all()
        drawn.append(x)
    assert not torch.equal(drawn[0], drawn[1])


def test_batch_transforms_of_the_user_treat_both_alike(folder):
    plain, flipped = batches(loaders(folder)), batches(loaders(folder, batch_tfms=Flip(p=1.0)))
    for b, f in zip(plain[:3], flipped[:3]):
        for image, mirrored in zip(b[:3], f[:3]):
            assert (image.flip(-1) - mirrored).abs().mean() < 2e-3
    (x, first, second, _), *_ = batches(loaders(folder, n_in=3, batch_tfms=ToChannels(1)))
    assert {t.shape[1] for t in (x, first, second)} == {1}
    torch.testing.assert_close(first, batches_of_one(plain[0][1]), atol=1e-6, rtol=0)


def batches_of_one(x):
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def test_loaders_without_companions_have_none_in_their_batches(folder):
    (x,) = loaders(folder).train.one_batch()
    assert x.shape == (5, 3, 40, 40)


# ---- facts


def with_facts(n: int = 24) -> tuple[UnlabeledDataLoaders, np.ndarray]:
    array = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=16, bs=4, valid_pct=0.25, num_workers=0)
    valid = dls.items_df["is_valid"].to_numpy()
    for dl, rows in zip(dls.loaders, (~valid, valid)):
        dl.facts = pd.DataFrame({"patient": np.arange(n) // 2})[rows]
    return dls, valid


def test_a_table_hands_its_other_columns_on(folder):
    names = sorted(f.name for f in folder.iterdir())
    table = pd.DataFrame(
        {"patient": [f"p{i // 3}" for i in range(24)], "name": names, "width": -1}, index=range(50, 74)
    )
    table.loc[53, "name"] = "gone.png"
    dls = UnlabeledDataLoaders.from_df(table, folder, fn_col="name", size=40, num_workers=0, valid_pct=0.5)
    assert len(dls.items_df) == 23 and set(dls.items_df["width"]) == {52}  # what was measured counts
    for file, patient in zip(dls.items_df["file"], dls.items_df["patient"]):
        assert patient == f"p{int(file.stem) // 3}"
    for dl in dls.loaders:
        assert list(dl.facts.columns) == ["patient"]
        assert list(dl.facts["patient"]) == [f"p{int(f.stem) // 3}" for f in dl.dataset.items]
    assert loaders(folder).train.facts is None
    only = UnlabeledDataLoaders.from_df(table.iloc[4:, [1]], folder, size=40, num_workers=0)
    assert only.train.facts is None and "patient" not in only.items_df


def test_facts_follow_their_images_and_no_others():
    dls, valid = with_facts()
    patients = {id(item): owner for item, owner in zip(dls.train.dataset.items, dls.train.facts["patient"])}
    some = dls.valid.over(dls.train, [5, 0, 3])
    for dl in (dls.train.new(shuffle=False), some, derive_loaders(dls).train, derive_loaders(dls, n_in=1).train):
        assert [patients[id(item)] for item in dl.dataset.items] == list(dl.facts["patient"])
    assert len(some.facts) == 3
    assert list(derive_loaders(dls).valid.facts["patient"]) == (np.arange(24) // 2)[valid].tolist()
    assert dls.test_dl(list(dls.train.dataset.items[:3])).facts is None
    assert dls.train.new(dls.valid.dataset).facts is None
    assert dls.new_empty().train.facts is None
    again = pickle.loads(pickle.dumps(dls.train))
    assert list(again.facts["patient"]) == list(dls.train.facts["patient"])


def test_fastais_own_loaders_may_be_given_facts():
    dls, _ = with_facts()
    tfms = {"after_item": list(dls.train.after_item.fs), "after_batch": Pipeline([IntToFloatTensor()])}
    plain = [TfmdDL(dl.dataset, bs=4, num_workers=0, **tfms) for dl in dls.loaders]
    for dl, own in zip(plain, dls.loaders):
        dl.facts = own.facts
    derived = derive_loaders(type(dls)(*plain), dl_type=IndexedDL)
    assert derived.train.facts is dls.train.facts and derived.valid.facts is dls.valid.facts


def test_facts_of_other_images_are_refused():
    dls, _ = with_facts()
    dls.train.facts = dls.train.facts.iloc[1:]
    with pytest.raises(DataError, match="18 images and 17 rows of facts"):
        learn = pretext_learner(dls, "micle", tiny)
        learn.dls.train.one_batch()


def test_companions_never_cross_the_split_and_validation_repeats():
    dls, _ = with_facts()
    learn = pretext_learner(dls, "micle", tiny, views={"scale": [1, 1], "ratio": [1, 1], "flip": 0, "jitter_p": 0})
    for dl in learn.dls.loaders:
        owners, companions = dl.facts["patient"].to_numpy(), dl.companions
        for seed in range(5):
            places = companions.of(range(len(owners)), seed)
            assert places.max() < len(dl.dataset) and (owners[places[:, 0]] == owners).all()
    assert same(list(learn.dls.valid), list(learn.dls.valid))


def test_companions_are_images_to_fastai():
    assert issubclass(TensorCompanion, TensorImage)
