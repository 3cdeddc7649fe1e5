"""`PretextTransform` and `PretextDL`: where the question is asked, what it is drawn from, and how it is shown again."""

import pickle
import random

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Brightness, Flip
from fastai.vision.core import PILImage
from torch import Tensor

from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.pretext.base import PerView, PretextTask, per_image
from selfsup_fastai.pretext.loader import PretextDL, PretextTransform
from selfsup_fastai.seeding import VALID_SEED

ARRAY = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3), dtype=np.uint8)
STATS = ((0.2, 0.4, 0.6), (0.5, 0.25, 0.125))


class Drawn(PretextTask):
    """Which number was drawn? The question is the image itself."""

    name = "drawn"
    n_targets = 2
    paper = "nobody 2000"

    def make_batch(self, x, *, generator, train, idx=None):
        number = torch.rand(len(x), generator=generator, device=x.device)
        return (x.unsqueeze(1),), (number, torch.full((len(x),), train))

    def model(self, encoder):
        return PerView(encoder, torch.nn.Identity())

    def loss(self, pred, number, train, reduction="mean"):
        return per_image(pred.mean((1, 2)) - number, reduction)


class Needy(Drawn):
    """Which image is it?"""

    name = "needy"
    needs = ("index",)


def loaders(*batch_tfms, dl_type=PretextDL, n: int = 20, labels: bool = False, **kwargs) -> DataLoaders:
    tfms = [[PILImage.create], [lambda image: 7]] if labels else [[PILImage.create]]
    datasets = Datasets(list(ARRAY[:n]), tfms=tfms, splits=(range(n - 8), range(n - 8, n)))
    after_batch = [IntToFloatTensor(), *batch_tfms]
    kwargs = {"bs": 4, "num_workers": 0, "after_item": [ToTensor()], **kwargs}
    return datasets.dataloaders(dl_type=dl_type, after_batch=after_batch, **kwargs)


def numbers(dl) -> Tensor:
    return torch.cat([b[1] for b in dl])


def names_of(dl) -> list[str]:
    return [type(t).__name__ for t in dl.after_batch.fs]


def plain(n: range) -> Tensor:
    return torch.tensor(ARRAY[list(n)]).permute(0, 3, 1, 2).float() / 255


# --- where it stands --------------------------------------------------------------------------------------------------


def test_the_question_comes_after_augmentation_and_before_normalize():
    order = [Normalize.from_stats(*STATS), PretextTransform(Drawn()), Brightness(p=1.0), Flip(p=1.0)]
    dl = loaders(*order).train
    names = names_of(dl)
    assert names[0] == "IntToFloatTensor" and names[-2:] == ["PretextTransform", "Normalize"] and len(names) == 5


def test_what_the_task_sees_is_in_unit_range_and_what_the_network_sees_is_normalized():
    dl = loaders(Normalize.from_stats(*STATS), PretextTransform(Drawn())).valid
    image, number, train = dl.one_batch()
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in STATS)
    assert isinstance(image, TensorImage) and type(number) is type(train) is Tensor
    torch.testing.assert_close(image[:, 0].as_subclass(Tensor), (plain(range(12, 16)) - mean) / std)
    (shown,), (same_number, _) = dl.question((image, number, train))
    torch.testing.assert_close(shown[:, 0], plain(range(12, 16)), atol=1e-6, rtol=0)
    assert type(shown) is Tensor and torch.equal(number, same_number)


def test_only_the_training_split_is_asked_with_augmentation():
    dls = loaders(PretextTransform(Drawn()))
    assert all(b[2].all() for b in dls.train) and not any(b[2].any() for b in dls.valid)
    assert all(b[2].all() for b in dls.train.new(shuffle=False))


def test_labels_are_dropped_and_n_inp_is_the_tasks():
    dls = loaders(PretextTransform(Drawn()), labels=True)
    assert dls.n_inp == 1 and len(dls.one_batch()) == 3
    inputs, targets = dls.show_batch(show=False)
    assert (len(inputs), len(targets)) == (1, 2)


def test_batch_transforms_may_also_be_given_to_the_loaders():
    dls = loaders(batch_tfms=[PretextTransform(Drawn()), Normalize.from_stats(*STATS)])
    for dl in dls.loaders:
        assert names_of(dl) == ["IntToFloatTensor", "PretextTransform", "Normalize"]
    datasets = Datasets(list(ARRAY), tfms=[[PILImage.create]], splits=(range(12), range(12, 20)))
    settings = {"bs": 4, "num_workers": 0, "after_item": [ToTensor()], "dl_type": PretextDL}
    dls = datasets.dataloaders(batch_tfms=[IntToFloatTensor(), PretextTransform(Drawn())], **settings)
    assert [len(b) for b in dls.valid] == [3, 3]


def test_none_or_two_questions_are_refused():
    for tfms, n in [((), 0), ((PretextTransform(Drawn()), PretextTransform("rotation")), 2)]:
        with pytest.raises(TaskError, match=f"one PretextTransform among its batch_tfms, this one has {n}"):
            loaders(*tfms).train.task


def test_integer_images_are_refused():
    datasets = Datasets(list(ARRAY), tfms=[[PILImage.create]], splits=(range(12), range(12, 20)))
    question = [PretextTransform(Drawn())]
    dl = PretextDL(datasets.train, bs=4, num_workers=0, after_item=[ToTensor()], after_batch=question)
    with pytest.raises(DataError, match=r"torch\.uint8\. Add IntToFloatTensor"):
        dl.one_batch()


def test_a_plain_loader_cannot_ask():
    with pytest.raises(TaskError, match="draws as its loader says: make the loaders with dl_type=PretextDL"):
        loaders(PretextTransform(Drawn()), dl_type=TfmdDL).valid.one_batch()


# --- what it draws from -----------------------------------------------------------------------------------------------


def test_validation_draws_the_same_numbers_on_every_pass():
    dl = loaders(PretextTransform(Drawn())).valid
    expected = torch.rand(4, generator=torch.Generator().manual_seed(VALID_SEED))
    first = numbers(dl)
    assert torch.equal(first[:4], expected) and not torch.equal(first[4:], expected)
    assert torch.equal(numbers(dl), first)
    next(iter(dl))  # a pass that is broken off
    assert torch.equal(numbers(dl), first)
    assert torch.equal(dl.one_batch()[1], expected)


def test_training_draws_new_numbers_on_every_pass_fixed_by_the_seed():
    def passes() -> list[Tensor]:
        set_seed(5)
        dl = loaders(PretextTransform(Drawn())).train
        return [numbers(dl) for _ in range(3)]

    first = passes()
    assert len(torch.cat(first).unique()) == 36
    assert all(torch.equal(a, b) for a, b in zip(first, passes()))


def test_global_generators_neither_matter_nor_move():
    dl = loaders(PretextTransform(Drawn())).train
    state = dl.rng.getstate()
    before = random.getstate()
    first = numbers(dl)
    dl.rng.setstate(state)
    assert random.getstate() == before
    set_seed(99)
    assert torch.equal(numbers(dl), first)


def test_a_look_at_one_loader_leaves_the_draws_of_another():
    shared = PretextTransform(Drawn())
    dls = loaders(shared)
    undisturbed = numbers(dls.valid)
    got = []
    for b in dls.valid:
        got.append(b[1])
        dls.train.one_batch()
        dls.valid.new(shuffle=True).one_batch()
    assert torch.equal(torch.cat(got), undisturbed)
    transforms = {id(dl.transform) for dl in (*dls.loaders, dls.train.new())}
    assert len(transforms) == 3 and id(shared) not in transforms


def test_a_pickled_loader_asks_the_same():
    dls = loaders(PretextTransform(Drawn()))
    first = numbers(dls.valid)
    loaded = pickle.loads(pickle.dumps(dls.valid))
    assert torch.equal(numbers(loaded), first) and loaded.task.name == "drawn"
    assert "Drawn()" in repr(dls.train.transform)


# --- what it shows ----------------------------------------------------------------------------------------------------


def test_pictures_are_the_images_before_normalize():
    dl = loaders(Normalize.from_stats(*STATS), PretextTransform(Drawn())).valid
    for b in (None, dl.one_batch()):
        axes = dl.show_batch(b, max_n=3)
        assert len(axes) == 3
        for ax, image, number in zip(axes, ARRAY[12:], dl.one_batch()[1]):
            np.testing.assert_allclose(ax.images[0].get_array(), image / 255, atol=1e-6)
            assert ax.get_title() == f"{number.item():.3g}"
    results = dl.show_results(dl.one_batch(), torch.tensor([1, 2, 3, 4]), ctxs=axes)
    assert results == axes and [ax.get_title()[-1] for ax in results] == ["1", "2", "3"]


def test_unique_asks_about_the_first_image_only():
    dl = loaders(PretextTransform(Drawn())).train
    (images,), (number, _) = dl.show_batch(unique=True, max_n=5, show=False)
    assert all(torch.equal(image[0], plain(range(1))[0]) for image in images)
    assert len(number.unique()) == 5
