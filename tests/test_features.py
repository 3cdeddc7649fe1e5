"""Rows, neighbors and ranks against independent computations, on small loaders of arrays."""

import math
import random

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fastai.torch_core import TensorBase, TensorCategory, TensorImage
from fasttransform import Transform
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.features import (
    Embeddings,
    effective_rank,
    embed,
    embed_layers,
    knn_accuracy,
    knn_predict,
)
from selfsup_fastai.seeding import rng_state

SIDE = 6


def number_image(i: int) -> TensorImage:
    """An image whose every pixel says which one it is."""
    return TensorImage(torch.full((1, SIDE, SIDE), i / 100))


def loader(n=23, bs=5, shuffle=True, labels=True, tfms=(), item_tfms=(), batch_tfms=(), split=True, **kwargs) -> TfmdDL:
    pipelines = [[number_image, *tfms]] + ([[lambda i: TensorCategory(i % 3)]] if labels else [])
    dataset = Datasets(range(n), pipelines, splits=[range(n), []])
    dataset = dataset.subset(0) if split else dataset
    kwargs = {"after_item": list(item_tfms), "after_batch": list(batch_tfms), "num_workers": 0, **kwargs}
    return TfmdDL(dataset, bs=bs, shuffle=shuffle, drop_last=shuffle, device=torch.device("cpu"), **kwargs)


class Mean(nn.Module):
    """(B, C, H, W) -> (B, 2): the mean of each image, and one number that must not change it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5))
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.is_grad_enabled() or any(m.training for m in self.modules()))
        return torch.stack([x.mean(dim=(1, 2, 3)), torch.ones(len(x))], dim=1)


class Prepared(Mean):
    def prepare(self, x: Tensor) -> Tensor:
        return (x - 0.5) * 4


class Brighter(Transform):
    """Adds 5: every use of it shows."""

    def encodes(self, x: TensorImage):
        return x + 5


class BrighterInTraining(Brighter):
    split_idx = 0


def shuffled_train_loader(**kwargs) -> TfmdDL:
    return loader(batch_tfms=[Normalize.from_stats([0.3], [0.2], cuda=False)], **kwargs)


# --- embed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False])
def test_rows_are_the_images_in_order_without_normalize(split):
    x, y = embed(Mean(), shuffled_train_loader(split=split))
    torch.testing.assert_close(x[:, 0], torch.arange(23) / 100)
    assert x.dtype == torch.float32 and type(y) is Tensor and y.tolist() == [i % 3 for i in range(23)]


def test_prepare_of_the_encoder_takes_the_place_of_normalize():
    torch.testing.assert_close(
        embed(Prepared(), shuffled_train_loader()).x[:, 0], (torch.arange(23) / 100 - 0.5) * 4, atol=1e-6, rtol=0
    )


def test_no_labels_no_y_and_one_batch_or_bs_1_make_no_difference():
    assert embed(Mean(), loader(labels=False)).y is None
    for bs in (1, 23, 64):
        torch.testing.assert_close(embed(Mean(), loader(bs=bs, shuffle=False)).x[:, 0], torch.arange(23) / 100)


@pytest.mark.parametrize("where", ["tfms", "item_tfms", "batch_tfms"])
def test_augmentation_rests_and_other_transforms_run(where):
    expected = torch.arange(23) / 100
    dl = loader(**{where: [BrighterInTraining()]})
    assert dl.one_batch()[0].min() >= 5  # the transform does work in training
    torch.testing.assert_close(embed(Mean(), dl).x[:, 0], expected)
    assert dl.one_batch()[0].min() >= 5
    torch.testing.assert_close(embed(Mean(), loader(**{where: [Brighter()]})).x[:, 0], expected + 5)


def test_augmentation_rests_in_tfmd_lists_too():
    lists = TfmdLists(range(7), [number_image, BrighterInTraining()], splits=[range(7), []]).subset(0)
    dl = TfmdDL(lists, bs=3, num_workers=0)
    torch.testing.assert_close(embed(Mean(), dl).x[:, 0], torch.arange(7) / 100)
    assert dl.one_batch().min() >= 5 and lists.split_idx == 0


def test_the_loader_stays_as_it_was():
    random.seed(1)
    dl, twin = shuffled_train_loader(), None
    random.seed(1)
    twin = shuffled_train_loader()
    attributes, transforms = set(dl.__dict__), list(dl.after_batch.fs)
    embed(Mean(), dl)
    embed_layers(Layers(), dl)
    assert set(dl.__dict__) == attributes and all(a is b for a, b in zip(dl.after_batch.fs, transforms))
    assert dl.shuffle and dl.drop_last and len(dl) == 4 and dl.dataset.split_idx == 0
    for (x, y), (twin_x, twin_y) in zip(dl, twin, strict=True):
        assert torch.equal(x, twin_x) and torch.equal(y, twin_y) and x.min() < 0


def test_random_generators_stay_as_they_were():
    dl = loader(tfms=[Transform(lambda x: x + random.random() + np.random.rand() + torch.rand(1).item())])
    before = rng_state()
    embed(Mean(), dl)
    after = rng_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"][1], after["numpy"][1]) and before["numpy"][2] == after["numpy"][2]


def test_the_encoder_is_evaluated_without_gradients_and_every_mode_comes_back():
    encoder = Mean().train()
    encoder.body[0].eval()  # as a frozen part would be
    running = encoder.body[0].running_mean.clone()
    embed(encoder, loader(), device="cpu")
    assert encoder.seen == [False] * 5
    assert [m.training for m in encoder.modules()] == [True, True, False, True]
    assert torch.equal(encoder.body[0].running_mean, running)
    with pytest.raises(ZeroDivisionError):
        embed(Failing(), loader())
    failing = Failing().train()
    with pytest.raises(ZeroDivisionError):
        embed(failing, loader())
    assert failing.training


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError


def test_worker_processes_give_the_same_rows():
    x, y = embed(Mean(), loader(num_workers=2))
    torch.testing.assert_close(x[:, 0], torch.arange(23) / 100)
    assert y.tolist() == [i % 3 for i in range(23)]


def test_a_plain_fastai_loader_works():
    dl = DataLoader([(number_image(i), i) for i in range(7)], bs=3, shuffle=True)
    x, y = embed(Mean(), dl)
    torch.testing.assert_close(x[:, 0], torch.arange(7) / 100)
    assert y.tolist() == list(range(7))


class Five(Transform):
    def encodes(self, x: TensorImage):
        return x[:, None]


class ToBytes(Transform):
    def encodes(self, x: TensorImage):
        return x.byte()


def test_mistakes_say_what_to_pass_instead():
    dl = loader()
    with pytest.raises(DataError, match=r"dls\.train or dls\.valid"):
        embed(Mean(), DataLoaders(dl, dl))
    with pytest.raises(DataError, match="list"):
        embed(Mean(), [1, 2])
    with pytest.raises(TaskError, match=r"learn\.model\.encoder"):
        embed(lambda x: x, dl)
    with pytest.raises(TaskError, match=r"\(5, 1, 1, 6, 6\)"):
        embed(Mean(), loader(batch_tfms=[Five()]))
    with pytest.raises(TaskError, match="uint8"):
        embed(Mean(), loader(batch_tfms=[ToBytes()]))
    with pytest.raises(TaskError, match="create_encoder"):
        embed(nn.Conv2d(1, 2, 3), dl)
    with pytest.raises(TaskError, match="names no layers"):
        embed(Mean(), dl, layers=["layer1"])
    with pytest.raises(DataError, match="no images"):
        embed(Mean(), DataLoader([], bs=3))


# --- layers ---------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three maps: the image itself repeated over 2 channels, its 2x2 corner, and noise that knows nothing."""

    calls = 0

    def feature_maps(self, x: Tensor, layers=None) -> dict[str, Tensor]:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        maps = {
            "image": x.repeat(1, 2, 1, 1),
            "corner": x[..., :2, :2],
            "noise": torch.rand(len(x), 3, 4, 4, generator=generator),
        }
        return {name: maps[name] for name in layers or maps}


def test_layers_are_averaged_to_the_largest_grid_that_fits():
    dl = loader(n=7, bs=3, tfms=[Transform(lambda x: x + torch.arange(36.0).view(1, 6, 6))])
    image = torch.arange(36.0).view(6, 6)
    encoder = Layers()
    found = embed_layers(encoder, dl, ["image", "corner"], max_dim=20)  # 2·3² <= 20 < 2·4²; the corner is 2 x 2
    assert encoder.calls == 3  # one pass
    assert list(found) == ["image", "corner"] and {e.x.shape[1] for e in found.values()} == {18, 4}
    grid = torch.tensor([[image[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean() for c in range(3)] for r in range(3)])
    for i, row in enumerate(found["image"].x):
        torch.testing.assert_close(row, (grid.flatten() + i / 100).repeat(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["corner"].x[3], image[:2, :2].flatten() + 0.03)
    assert torch.equal(found["corner"].y, torch.arange(7) % 3)


@pytest.mark.parametrize("max_dim, dim", [(1, 2), (2, 2), (7, 2), (8, 8), (71, 50), (72, 72), (4096, 72)])
def test_grid_sizes(max_dim, dim):
    assert embed_layers(Layers(), loader(n=3, bs=3), "image", max_dim=max_dim)["image"].x.shape == (3, dim)


def test_embed_of_layers_is_their_averages_side_by_side():
    x, _ = embed(Layers(), loader(), layers=["corner", "image"])
    torch.testing.assert_close(x, (torch.arange(23) / 100)[:, None].expand(-1, 3))


# --- neighbors ------------------------------------------------------------------------------------------------------


def by_hand(train: Embeddings, test_x: Tensor, k: int, temperature: float, n_classes: int) -> np.ndarray:
    bank, labels = train.x.numpy().astype(float), train.y.numpy()
    votes = np.zeros((len(test_x), n_classes))
    for i, q in enumerate(test_x.numpy().astype(float)):
        cosines = [float(q @ row / np.linalg.norm(q) / np.linalg.norm(row)) for row in bank]
        for j in sorted(range(len(bank)), key=lambda j: -cosines[j])[:k]:
            votes[i, labels[j]] += math.exp(cosines[j] / temperature)
    return votes / votes.sum(axis=1, keepdims=True)


def blobs(n: int, spread: float, seed: int = 0, dim: int = 8, n_classes: int = 4) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    x = torch.eye(dim)[y] + spread * torch.randn(n, dim, generator=generator)
    return Embeddings(x * (0.1 + torch.rand(n, 1, generator=generator) * 9), y)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.02)])
def test_votes_equal_a_loop(k, temperature, monkeypatch):
    monkeypatch.setattr("selfsup_fastai.features._KNN_CELLS", 61 * 7)  # several chunks, the last one short
    train, test = blobs(61, 0.8), blobs(30, 0.8, seed=1)
    predictions, scores = knn_predict(train, test.x, k, temperature)
    expected = by_hand(train, test.x, min(k, 61), temperature, 4)
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-4)
    assert predictions.tolist() == expected.argmax(axis=1).tolist()
    assert knn_accuracy(train, test, k, temperature) == pytest.approx((expected.argmax(1) == test.y.numpy()).mean())


def test_one_neighbor_is_sklearns_and_separable_classes_are_told_apart():
    train, test = blobs(80, 0.9), blobs(50, 0.9, seed=2)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(train.x.numpy(), train.y.numpy()).predict(test.x.numpy())
    assert knn_predict(train, test.x, k=1)[0].tolist() == theirs.tolist() and (theirs != test.y.numpy()).any()
    assert knn_accuracy(blobs(80, 0.1), blobs(50, 0.1, seed=3)) == 1.0
    noise = Embeddings(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 4)
    assert knn_accuracy(noise, Embeddings(noise.x.flip(1), noise.y)) == pytest.approx(0.25, abs=0.08)


def test_a_class_that_training_never_saw_is_an_error_of_the_prediction():
    train = Embeddings(torch.eye(3), torch.tensor([0, 1, 2]))
    assert knn_accuracy(train, Embeddings(torch.eye(3), torch.tensor([0, 7, 2])), k=1) == pytest.approx(2 / 3)


def test_mistakes_with_neighbors():
    train = blobs(12, 0.1)
    with pytest.raises(TaskError, match="no labels"):
        knn_predict(Embeddings(train.x, None), train.x)
    with pytest.raises(TaskError, match="class number"):
        knn_predict(Embeddings(train.x, torch.rand(12, 2)), train.x)
    with pytest.raises(TaskError, match="k >= 1"):
        knn_predict(train, train.x, k=0)
    with pytest.raises(TaskError, match="diverged"):
        knn_predict(train, train.x * math.nan)


# --- rank -----------------------------------------------------------------------------------------------------------


def test_effective_rank_of_known_spectra():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(50, 12, generator=generator, dtype=torch.double)).Q
    v = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.double)).Q
    assert effective_rank(torch.eye(7)) == pytest.approx(7, abs=1e-4)
    assert effective_rank(3 * u.float()) == pytest.approx(12, abs=1e-3)
    assert effective_rank(torch.ones(9, 4)) == pytest.approx(1, abs=1e-4)  # not centered: a constant row has rank 1
    spectrum = torch.tensor([8.0, 4, 2, 1, 1] + [0] * 7, dtype=torch.double)
    # shares 1/2 1/4 1/8 1/16 1/16: entropy 15/8 bits
    assert effective_rank(u * spectrum @ v) == pytest.approx(2 ** (15 / 8), abs=1e-4)
    assert effective_rank(1e-3 * u * spectrum @ v) == pytest.approx(2 ** (15 / 8), abs=1e-4)


def test_effective_rank_adds_eps_to_each_share():
    p = np.array([0.75, 0.25]) + 0.01
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0])), eps=0.01) == pytest.approx(
        np.exp(-(p * np.log(p)).sum())
    )


def test_effective_rank_of_nothing():
    assert effective_rank(torch.zeros(5, 3)) == 0.0
    with pytest.raises(TaskError, match="diverged"):
        effective_rank(torch.full((5, 3), math.inf))
    with pytest.raises(TaskError, match=r"\(5,\)"):
        effective_rank(torch.zeros(5))


def test_typed_targets_become_plain_tensors():
    dl = DataLoader([(number_image(i), TensorBase(torch.tensor(i))) for i in range(4)], bs=2)
    assert type(embed(Mean(), dl).y) is Tensor
