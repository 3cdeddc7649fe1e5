"""Pictures of what was learned: images shown are those embedded, the nearest the nearest, maps lie where they do."""

import numpy as np
import pytest
import torch
from fastai.data.core import Datasets, TfmdDL
from fastai.torch_core import TensorImage
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.attention import grad_cam, strengths
from selfsup_fastai.downstream.interpret import attention_map, nearest_neighbors, nearest_rows
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import DataError, TaskError, UnknownNameError
from selfsup_fastai.features import embedded_images
from selfsup_fastai.pictures import RIGHT, WRONG
from selfsup_fastai.seeding import rng_state

N = 10


class Corners(nn.Module):
    """(B, 3, H, W) -> (B, 12): the mean color of each quarter, so that another crop has other features."""

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images 32 pixels high and 48 wide in two classes, of which every column is different."""
    base, rng = tmp_path_factory.mktemp("wide"), np.random.default_rng(0)
    for i in range(N):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 12, 3), dtype=np.uint8))
        file = base / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        coarse.resize((48, 32), Image.Resampling.BICUBIC).save(file)
    return base


def center(file):
    """(32, 32, 3) in [0, 1]"""
    with Image.open(file) as image:
        return np.asarray(image.crop((8, 0, 40, 32)), dtype=np.float32) / 255


def corners(pixels):
    return np.stack([pixels[y : y + 16, x : x + 16].mean((0, 1)) for y in (0, 16) for x in (0, 16)]).T.flatten()


def neighbors(features, row, k):
    """(row, cosine) of the k nearest others, by a loop."""
    cosines = []
    for other, z in enumerate(features):
        if other != row:
            cosines.append((features[row] @ z / np.linalg.norm(features[row]) / np.linalg.norm(z), other))
    return [(other, cosine) for cosine, other in sorted(cosines, reverse=True)[:k]]


def shown(ax):
    return np.asarray(ax.images[0].get_array())


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
def test_the_images_shown_are_those_embedded_and_labels_mark_right_and_wrong(folder, kind):
    kwargs = dict(valid_pct=0.2, seed=1, bs=4, num_workers=0, device="cpu")
    if kind == "labeled":
        dl = ImageDataLoaders.from_folder(folder, item_tfms=Resize(32), **kwargs).train
    else:
        dl = UnlabeledDataLoaders.from_folder(folder, size=32, **kwargs).train
    files, state = list(dl.dataset.items), rng_state()
    pictures = [center(f) for f in files]
    features = np.stack([corners(p) for p in pictures])
    axes = iter(nearest_neighbors(Corners(), dl, queries=3, k=2))
    for row in (0, 3, 7):
        ax = next(axes)
        named = f"query: {files[row].parent.name}" if kind == "labeled" else "query"
        assert ax.get_title() == named and ax.title.get_color() == "black"
        assert shown(ax) == pytest.approx(pictures[row], abs=1e-6)
        for other, cosine in neighbors(features, row, 2):
            ax = next(axes)
            assert shown(ax) == pytest.approx(pictures[other], abs=1e-6)
            same = files[other].parent == files[row].parent
            mark, color = ("  ✓", RIGHT) if same else ("  ✗", WRONG)
            if kind == "unlabeled":
                mark, color = "", "#000000"
            assert ax.get_title() == f"{cosine:.2f}{mark}" and to_hex(ax.title.get_color()).upper() == color
    assert next(axes, None) is None
    assert torch.equal(rng_state()["torch"], state["torch"]) and rng_state()["python"] == state["python"]
    assert dl.dataset.split_idx == 0 and dl.shuffle and "get_idxs" not in vars(dl)


def test_both_marks_occur_in_the_labeled_case(folder):
    dl = ImageDataLoaders.from_folder(folder, item_tfms=Resize(32), valid_pct=0.2, seed=1, bs=4, num_workers=0).train
    titles = " ".join(ax.get_title() for ax in nearest_neighbors(Corners(), dl, queries=3, k=2))
    assert "✓" in titles and "✗" in titles


def test_numbers_as_labels_mark_nothing_and_few_images_make_short_rows():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dataset = Datasets(range(3), [[lambda i: TensorImage(images[i])], [lambda i: torch.tensor(i / 2)]])
    axes = nearest_neighbors(Corners(), TfmdDL(dataset, bs=2, num_workers=0, device=torch.device("cpu")))
    assert len(axes) == 9  # three queries, the other two beside each
    assert not any(mark in ax.get_title() for ax in axes for mark in "✓✗")
    assert shown(axes[3]) == pytest.approx(images[1].permute(1, 2, 0).numpy(), abs=1e-6)


def test_nearest_rows_against_a_loop():
    x = np.random.default_rng(2).normal(size=(30, 5)).astype(np.float32)
    got = nearest_rows(torch.from_numpy(x), [4, 0, 29], 6)
    assert got.tolist() == [[other for other, _ in neighbors(x, row, 6)] for row in (4, 0, 29)]


# --- where it looks -------------------------------------------------------------------------------------------------


def heat(ax):
    return np.asarray(ax.images[1].get_array())


def photos(n=2, side=64):
    return list(torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)))


def test_a_row_an_image_and_a_column_a_layer():
    encoder = create_encoder("resnet10t")
    axes = attention_map(encoder, photos(), layer=["layer4", "layer2"])
    assert [ax.get_title() for ax in axes] == ["", "layer2", "layer4"] * 2
    assert shown(axes[3]) == pytest.approx(photos()[1].permute(1, 2, 0).numpy())
    wanted = strengths(encoder, encoder.prepare(photos()[1][None]), ["layer4"])["layer4"]
    wanted = nn.functional.interpolate(wanted[None], (64, 64), mode="bilinear")[0, 0]
    assert heat(axes[5]) == pytest.approx(((wanted - wanted.min()) / (wanted.max() - wanted.min())).numpy(), abs=1e-4)
    assert np.asarray(axes[5].images[0].get_array()) == pytest.approx(photos()[1].mean(0).numpy())
    assert len(attention_map(encoder, photos(1))) == 1 + 5
    titles = [ax.get_title() for ax in attention_map(encoder, photos(1))]
    assert titles == ["", "act1", "layer1", "layer2", "layer3", "layer4"]  # none is left out


def test_auto_is_what_suits_the_net(folder):
    dls = ImageDataLoaders.from_folder(folder, item_tfms=Resize(32), valid_pct=0.2, seed=1, bs=4, num_workers=0)
    learn = downstream_learner(dls, "resnet10t")
    axes = attention_map(learn, learn.dls.valid, layer="layer4", n=2)
    assert len(axes) == 4 and axes[1].get_title() == "layer4"
    image = embedded_images(learn.dls.valid, [0])[0]
    maps, out = grad_cam(learn.model, learn.encoder.prepare(image[None]), ["layer4"])
    best = int(out.argmax())
    true = learn.dls.valid.dataset.items[0].parent.name
    assert axes[0].get_title() == f"predicted: {learn.dls.vocab[best]} ({out.softmax(1)[0, best]:.0%})\ntrue: {true}"
    wanted = nn.functional.interpolate(maps["layer4"][None], (32, 32), mode="bilinear")[0, 0]
    wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min()).clamp(min=1e-12)
    assert heat(axes[1]) == pytest.approx(wanted.numpy(), abs=1e-4)
    attention_map(learn, image, target="b")
    vit = create_encoder("vit_tiny_patch16_224", size=64, depth=2)
    titles = [ax.get_title() for ax in attention_map(vit, photos(1))]
    assert titles == ["", "blocks.0", "blocks.1"]
    rolled = attention_map(vit, photos(1), kind="rollout")
    plain = attention_map(vit, photos(1), kind="attention")
    assert heat(rolled[1]) == pytest.approx(heat(plain[1]), abs=1e-4)  # the first layer, up to itself and scale
    assert heat(rolled[2]) != pytest.approx(heat(plain[2]), abs=1e-4)


def test_nothing_changes_when_it_is_drawn(folder):
    dls = ImageDataLoaders.from_folder(folder, item_tfms=Resize(32), valid_pct=0.2, seed=1, bs=4, num_workers=0)
    learn = downstream_learner(dls, "resnet10t")
    learn.model.train()
    before, state = {k: v.clone() for k, v in learn.model.state_dict().items()}, rng_state()
    for kind in ("gradcam", "activation"):
        attention_map(learn, learn.dls.train, kind=kind)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and learn.model.training
    assert all(p.grad is None for p in learn.model.parameters())
    assert torch.equal(rng_state()["torch"], state["torch"]) and rng_state()["python"] == state["python"]


def test_mistakes_say_what_to_do():
    encoder = create_encoder("resnet10t")
    with pytest.raises(TaskError, match="downstream_learner"):
        attention_map(encoder, photos(), kind="gradcam")
    with pytest.raises(TaskError, match="attend to each other"):
        attention_map(encoder, photos(), kind="attention")
    with pytest.raises(UnknownNameError, match="layer3"):
        attention_map(encoder, photos(), layer="layer33")
    with pytest.raises(TaskError, match="gradcam"):
        attention_map(encoder, photos(), kind="cam")
    for wrong in ("a.png", [np.zeros((3, 8, 8))], [], torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(DataError, match="floats in"):
            attention_map(encoder, wrong)
