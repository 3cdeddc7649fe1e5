"""Probes: what is planted in a layer is found there, scores are those of other computations, and nothing changes."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.data.core import DataLoaders, Datasets
from fastai.torch_core import TensorCategory, TensorImage, TensorMultiCategory
from fastai.vision.core import TensorPoint
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.downstream import few_shots, probes
from selfsup_fastai.downstream.probes import knn_probe, linear_probe, svm_probe
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.plots import ShownFrame
from selfsup_fastai.seeding import rng_state

SIDE, N, N_TEST = 8, 120, 60


def halves(i: int) -> tuple[int, int]:
    """Whether the left and the right half of image i are bright."""
    return i % 2, i // 2 % 2


def image(i: int) -> TensorImage:
    noise = torch.rand(1, SIDE, SIDE, generator=torch.Generator().manual_seed(i)) - 0.5
    left, right = halves(i)
    noise[..., : SIDE // 2] += left
    noise[..., SIDE // 2 :] += right
    return TensorImage(noise * 0.2 + 0.4)


def alike(i: int) -> TensorCategory:
    """Whether both halves are alike: no weighted sum of the pixels says so."""
    left, right = halves(i)
    return TensorCategory(int(left == right))


def both(i: int) -> TensorMultiCategory:
    return TensorMultiCategory(torch.tensor(halves(i)).float())


def product(i: int) -> torch.Tensor:
    left, right = halves(i)
    return torch.tensor((left - 0.5) * (right - 0.5))


def loaders(label=alike, n=N, n_test=N_TEST, **kwargs) -> DataLoaders:
    data = Datasets(range(n + n_test), [[image], [label]], splits=[range(n), range(n, n + n_test)])
    return data.dataloaders(bs=16, num_workers=0, device=torch.device("cpu"), **kwargs)


class Pixels(nn.Conv2d):
    """The pixels as they are."""

    def __init__(self):
        super().__init__(1, 1, 1)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class Products(nn.Module):
    """The left half times the right one."""

    def forward(self, x):
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * right, right * left], dim=-1)


class Noise(nn.Module):
    """Differs from image to image and says nothing."""

    def forward(self, x):
        return torch.cos(1e4 * x)


def net() -> nn.Module:
    return nn.Sequential(Pixels(), Products(), Noise())


# --- linear ---------------------------------------------------------------------------------------------------------


def test_the_label_is_found_in_the_layer_where_it_is_planted():
    table = linear_probe(net(), loaders())
    assert isinstance(table, ShownFrame) and table.layer.tolist() == ["0", "1", "2"]
    assert table.columns.tolist() == ["layer", "dim", "C", "score", "metric", "n_test"]
    assert (table.dim == SIDE * SIDE).all() and (table.n_test == N_TEST).all() and set(table.metric) == {"accuracy"}
    scores = table.set_index("layer").score
    assert scores["1"] > 0.95 and scores["0"] < 0.7 and scores["2"] < 0.7
    assert table.attrs["chance"] == 0.5
    assert linear_probe(net(), loaders(), layers="1", max_dim=4).dim.tolist() == [4]
    assert [text.get_text() for text in table.show().get_xticklabels()] == ["0", "1", "2"]


def test_the_score_is_scikits_on_standardized_features():
    table = linear_probe(net(), loaders(), layers=["0", "1"], C=0.3)
    pixels = torch.stack([image(i) for i in range(N + N_TEST)]).double().numpy()
    mean, std = pixels[:N].mean(), pixels[:N].std()
    pixels = (pixels - mean) / std
    left, right = np.split(pixels, 2, axis=-1)
    y = np.array([int(alike(i)) for i in range(N + N_TEST)])
    for x, score in zip((pixels, np.concatenate([left * right] * 2, -1)), table.score):
        x = x.reshape(len(x), -1)
        scaler = StandardScaler().fit(x[:N])
        model = LogisticRegression(C=0.3, max_iter=1000).fit(scaler.transform(x[:N]), y[:N])
        assert model.score(scaler.transform(x[N:]), y[N:]) == pytest.approx(score, abs=1 / N_TEST)
    assert table.C.tolist() == [0.3, 0.3]


def test_test_labels_choose_nothing():
    def shuffled(i):
        return alike(i) if i < N else TensorCategory(i * 7 % 3 % 2)

    one, other = linear_probe(net(), loaders()), linear_probe(net(), loaders(shuffled))
    assert one.C.tolist() == other.C.tolist() and one.score.tolist() != other.score.tolist()


def test_several_labels_and_numbers():
    table = linear_probe(net(), loaders(both)).set_index("layer")
    assert set(table.metric) == {"mAP"} and table.score["0"] > 0.95 and table.score["2"] < 0.75
    assert table.attrs["chance"] == pytest.approx(0.5)
    table = linear_probe(net(), loaders(product)).set_index("layer")
    assert set(table.metric) == {"R2"} and table.score["1"] > 0.9 and table.score["0"] < 0.2
    points = linear_probe(net(), loaders(lambda i: TensorPoint(torch.tensor([halves(i)]).float()))).set_index("layer")
    assert points.score["0"] > 0.9


def test_patients_are_kept_together_where_the_loader_knows_them(monkeypatch, tmp_path):
    rows = []
    for i in range(24):
        file = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)).save(file)
        rows.append({"file": file, "label": "ab"[i % 2], "is_valid": i >= 20, "patient": f"p{i // 4}"})
    seen = []
    real = probes.folds_of
    monkeypatch.setattr(probes, "folds_of", lambda *args: seen.append(args) or real(*args))
    linear_probe(net(), labeled_loaders(pd.DataFrame(rows), 1, 8, 4, cache=False))
    groups = seen[0][2]
    assert len(groups) == 20 and [len(set(groups[i : i + 4])) for i in range(0, 20, 4)] == [1] * 5
    assert len(set(groups)) == 5
    linear_probe(net(), labeled_loaders(pd.DataFrame(rows).drop(columns="patient"), 1, 8, 4, cache=False))
    assert seen[1][2] is None
    dls = loaders(n=20)
    dls.train.facts = pd.DataFrame({"patient": [f"p{i // 5}" for i in range(20)]})  # fastai's own loader
    linear_probe(net(), dls)
    assert len(set(seen[2][2])) == 4


@pytest.mark.parametrize("label, n", [(alike, 2), (alike, 3), (alike, 10), (both, 4), (product, 4)])
def test_few_images(label, n):
    table = linear_probe(net(), loaders(label, n=n, n_test=8))
    assert len(table) == 3 and np.isfinite(table.score).all()
    if n == 2:
        assert (table.C == 0.01).all()


# --- neighbors ------------------------------------------------------------------------------------------------------


def features() -> np.ndarray:
    """What `net` gives, pooled: one number an image is no direction, so the net of these tests gives four."""
    pixels = torch.stack([image(i) for i in range(N + N_TEST)])
    pixels = (pixels - pixels[:N].mean()) / pixels[:N].double().std(correction=0).float()
    return nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1).double().numpy()


class Corners(nn.Module):
    """(B, 1, H, W) -> (B, 4)"""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.mark.parametrize("label", [alike, both, product])
def test_neighbors_by_a_loop(label):
    x = features()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.stack([np.eye(2)[int(alike(i))] if label is alike else np.atleast_1d(label(i)) for i in range(N + N_TEST)])
    means = []
    for q in x[N:]:
        cosines = x[:N] @ q
        nearest = np.argsort(-cosines)[:5]
        weights = np.exp(cosines[nearest] / 0.07)
        means.append((weights[:, None] * y[nearest]).sum(0) / weights.sum())
    means, kind = np.array(means), {alike: "category", both: "multicategory", product: "regression"}[label]
    wanted = means.argmax(1) if label is alike else means
    score = probes.score_of(kind, wanted, y[N:].argmax(1) if label is alike else y[N:])
    table = knn_probe(Corners(), loaders(label), k=5)
    assert table.score[0] == pytest.approx(score, abs=0.02) and score > 0.85
    assert table.metric[0] == {alike: "accuracy", both: "mAP", product: "R2"}[label]


def test_k_is_cut_to_the_images():
    table = knn_probe(Corners(), loaders(n=12), k=(1, 5, 20, 200))
    assert table.k.tolist() == [1, 5, 12] and table.columns.tolist() == ["k", "score", "metric", "n_test"]
    assert table.show().get_xscale() == "log"


def test_where_nothing_is_said_not_nearly_all_vote():
    for n, wanted in ((12, [1]), (48, [1, 5]), (180, [1, 5, 20])):  # two classes of six, ...
        assert knn_probe(Corners(), loaders(n=n)).k.tolist() == wanted


# --- shots ----------------------------------------------------------------------------------------------------------


def test_with_all_images_a_draw_is_scikits_machine():
    table = svm_probe(Corners(), loaders(lambda i: TensorCategory(halves(i)[0])), shots=(4, 60), draws=3)
    x = features()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.arange(N + N_TEST) % 2
    scores = {LinearSVC(C=C, loss="squared_hinge").fit(x[:N], y[:N]).score(x[N:], y[N:]) for C in few_shots.COSTS}
    assert table["std"][1] == pytest.approx(0) and min(scores) <= table.score[1] <= max(scores)
    assert table.shots.tolist() == [4, 60] and table.draws.tolist() == [3, 3] and table.score[1] > 0.95


def test_shots_are_drawn_a_class(monkeypatch):
    fits = []
    real = few_shots._machine

    def machine(cost, weights=None):
        made = real(cost, weights)
        fit = made.fit
        made.fit = lambda x, y: fits.append((np.bincount(y.astype(int)).tolist(), cost, weights)) or fit(x, y)
        return made

    monkeypatch.setattr(few_shots, "_machine", machine)
    three = loaders(lambda i: TensorCategory(i % 3))
    svm_probe(Corners(), three, shots=1, draws=2)
    assert fits == [([1, 1, 1], 1.0, None)] * 2  # nothing can be held out: the documented cost
    fits.clear()
    svm_probe(Corners(), three, shots=6, draws=1)
    assert [counts for counts, _, _ in fits[:-1]] == [[4, 4, 4]] * 3 * len(few_shots.COSTS)
    assert fits[-1][0] == [6, 6, 6]
    fits.clear()
    labels = loaders(lambda i: TensorMultiCategory(torch.tensor([i % 2, i % 3 == 0, i % 5 == 0]).float()))
    svm_probe(Corners(), labels, shots=1, draws=1)
    assert fits == [([2, 1], 1.0, {0: 1, 1: 2})] * 3  # k with the label, (labels - 1) k without


def test_draws_differ_and_their_deviation_is_reported(monkeypatch):
    given = iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(probes, "classes_score", lambda *_: next(given))
    table = svm_probe(Corners(), loaders(), shots=2, draws=3)
    assert table.score[0] == pytest.approx(0.6) and table["std"][0] == pytest.approx(0.1)
    table.show()


def test_more_shots_than_images_are_left_out_and_said(capsys):
    table = svm_probe(Corners(), loaders(n=12), shots=(1, 4, 96), draws=2)
    assert table.shots.tolist() == [1, 4] and "smallest class has 6" in capsys.readouterr().err
    with pytest.raises(TaskError, match="smallest class has 6 training images, and 7"):
        svm_probe(Corners(), loaders(n=12), shots=7)
    with pytest.raises(TaskError, match="numbers"):
        svm_probe(Corners(), loaders(product))


# --- all ------------------------------------------------------------------------------------------------------------


PROBES = {"linear": linear_probe, "knn": knn_probe, "svm": lambda *a: svm_probe(*a, shots=(1, 2), draws=2)}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_nothing_changes(probe):
    dls, encoder = loaders(), create_encoder(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    encoder.train()
    encoder.body[1].eval()
    marks = [set(vars(dl)) for dl in dls.loaders]
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    before = rng_state()
    probe(encoder, dls)
    after = rng_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"][1], after["numpy"][1]) and before["numpy"][2] == after["numpy"][2]
    assert encoder.mean is None and [m.training for m in encoder.body] == [True, False, True]
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    assert [set(vars(dl)) for dl in dls.loaders] == marks and dls.train.shuffle


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_a_name_is_an_untrained_net_and_the_seed_counts(probe):
    one, again = probe("resnet10t", loaders(n=20, n_test=20)), probe("resnet10t", loaders(n=20, n_test=20))
    pd.testing.assert_frame_equal(one, again)


def test_mistakes_say_what_to_do():
    with pytest.raises(DataError, match=r"dls\.valid is empty"):
        linear_probe(net(), loaders(n_test=0))
    with pytest.raises(TaskError, match="one label"):
        linear_probe(net(), loaders(lambda i: TensorCategory(1)))
    with pytest.raises(DataError, match="without labels"):
        linear_probe(net(), Datasets(range(9), [[image]], splits=[range(6), range(6, 9)]).dataloaders(bs=2))
    with pytest.raises(TaskError, match="C is a number, above 0"):
        linear_probe(net(), loaders(), C=0)
    with pytest.raises(TaskError, match="k is a whole number"):
        knn_probe(net(), loaders(), k=0)
    with pytest.raises(TaskError, match="not finite"):
        linear_probe(net(), loaders(lambda i: torch.tensor(float("nan"))))
    with pytest.raises(ValueError, match="layer of Sequential called 'x'"):
        linear_probe(net(), loaders(), layers="x")


ARCHS = ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
ARCHS = [*ARCHS, torchvision.models.resnet18, torchvision.models.vit_b_16]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten grey images, dark or bright, in fastai's own loaders (which open them as color)."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 100, (32, 32)) + 155 * (i % 2)
        file = folder / ["dark", "bright"][i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: a if isinstance(a, str) else f"torchvision {a.__name__}")
def test_every_kind_of_net_on_ten_images(arch, photos):
    dls = ImageDataLoaders.from_folder(photos, valid_pct=0.4, seed=0, bs=4, num_workers=0, device="cpu")
    kwargs = {"image_size": 32} if arch is torchvision.models.vit_b_16 else {}
    size = 32 if "vit" in str(arch) else 64
    encoder = create_encoder(arch, n_in=3 if kwargs else 1, size=size, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = linear_probe(encoder, dls, max_dim=256)
    assert table.layer.tolist() == (encoder.layer_names or ["features"])
    assert table.score.max() == 1.0 and (table.n_test == 4).all()
    assert knn_probe(encoder, dls).k.tolist() == [1]  # there are six images to train with
