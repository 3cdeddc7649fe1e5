"""Pictures of neighbors: the images shown are those embedded, and the nearest are the nearest."""

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
from selfsup_fastai.downstream.interpret import nearest_neighbors, nearest_rows
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
        assert ax.get_title() == "query" and ax.title.get_color() == "black"
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
