"""Maps of embeddings: planted clusters are apart, the same seed draws the same, no thumbnail hides another."""

import importlib.util
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import Datasets
from fastai.torch_core import TensorCategory, TensorImage
from matplotlib.colors import to_hex
from matplotlib.offsetbox import AnnotationBbox
from sklearn.decomposition import PCA
from torch import nn

from selfsup_fastai.downstream.embedding import apart, class_looks, embedding_map, flattened
from selfsup_fastai.encoders.checkpoint import save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.seeding import rng_state

N = 40
HAS_UMAP = importlib.util.find_spec("umap") is not None


def image(i: int) -> TensorImage:
    """Red or blue, with noise."""
    pixels = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(i)) * 0.3
    pixels[2 * (i % 2)] += 0.7
    return TensorImage(pixels)


def loader(label=None, n=N):
    labels = [[label]] if label else []
    data = Datasets(range(n), [[image], *labels], splits=[range(n), []])
    return data.dataloaders(bs=16, num_workers=0, device=torch.device("cpu")).train


class Colors(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def points(ax) -> np.ndarray:
    return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])


@pytest.mark.parametrize("kind", ["pca", "tsne"])
def test_planted_clusters_are_apart(kind):
    x = np.random.default_rng(0).normal(size=(N, 20))
    x[::2] += 5
    at, names = flattened(x, kind, seed=0)
    again, _ = flattened(x, kind, seed=0)
    assert at.shape == (N, 2) and (at == again).all() and len(names) == 2
    one, other = at[::2], at[1::2]
    within = max(np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (one, other))
    assert np.linalg.norm(one.mean(0) - other.mean(0)) > 2 * within


def test_pca_is_scikits_and_its_axes_say_how_much_they_show():
    x = np.random.default_rng(0).normal(size=(30, 5)) * [5, 3, 1, 1, 1]
    at, names = flattened(x, "pca", 0)
    pca = PCA(2, svd_solver="full").fit(x)
    assert at == pytest.approx(pca.transform(x))
    assert names[0] == f"component 1 ({pca.explained_variance_ratio_[0]:.0%} of the variance)"
    at, names = flattened(x[:, :1], "pca", 0)  # one feature: all on a line
    assert (at[:, 1] == 0).all() and names[1] == ""


@pytest.mark.skipif(HAS_UMAP, reason="umap-learn is installed")
def test_umap_says_what_to_install():
    with pytest.raises(TaskError, match="umap-learn"):
        embedding_map(Colors(), loader(), kind="umap")


@pytest.mark.skipif(not HAS_UMAP, reason="umap-learn is not installed")
def test_umap_draws():
    assert len(points(embedding_map(Colors(), loader(), kind="umap", thumbnails=0))) == N


def test_classes_have_a_color_and_a_marker_each():
    dl, before = loader(lambda i: TensorCategory(i % 2)), rng_state()
    ax = embedding_map(Colors(), dl, thumbnails=0)
    after = rng_state()
    assert before["python"] == after["python"] and torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"][1], after["numpy"][1])
    one, other = ax.collections
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["class 0", "class 1"]
    assert not np.array_equal(one.get_facecolor(), other.get_facecolor())
    assert not np.array_equal(one.get_paths()[0].vertices, other.get_paths()[0].vertices)
    assert np.sign(one.get_offsets()[:, 0]).std() == 0 and len(one.get_offsets()) == N // 2
    assert one.get_offsets()[0, 0] * other.get_offsets()[0, 0] < 0


def test_unlabeled_numbers_and_columns():
    assert len(points(embedding_map(Colors(), loader(), thumbnails=0))) == N
    ax = embedding_map(Colors(), loader(), color_by=np.linspace(0, 1, N), thumbnails=0)
    assert len(ax.figure.axes) == 2  # with a bar of colors
    dl = loader()
    dl.facts = pd.DataFrame({"site": ["here", "there"] * (N // 2)})
    ax = embedding_map(Colors(), dl, color_by="site", thumbnails=0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["here", "there"]
    with pytest.raises(DataError, match=r"'city'.* it has facts site"):
        embedding_map(Colors(), dl, color_by="city")
    with pytest.raises(DataError, match="3 values, and there are 40"):
        embedding_map(Colors(), dl, color_by=[1, 2, 3])
    with pytest.raises(DataError, match="at least three"):
        embedding_map(Colors(), loader(n=2))


def test_a_saved_encoder_is_read(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("resnet10t")
    file = save_encoder(encoder, tmp_path / "a")
    one, other = (points(embedding_map(source, loader(), thumbnails=0)) for source in (encoder, file))
    assert one == pytest.approx(other)


def test_many_classes_keep_their_looks_and_the_rare_ones_are_grey():
    ax = embedding_map(Colors(), loader(), color_by=[f"c{min(i, 20):02d}" for i in range(N)], thumbnails=0)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(names) == 13 and names[-1] == "9 others"
    looks = list(class_looks(names[:-1]).values())
    assert len({(look["color"], look["marker"]) for look in looks}) == len(looks)
    assert len({look["color"] for look in looks[:8]}) == len({look["marker"] for look in looks[:8]}) == 8


def test_thumbnails_have_the_color_and_the_marker_of_their_class():
    ax = embedding_map(Colors(), loader(lambda i: TensorCategory(i % 2)), thumbnails=12)
    looks = class_looks(["class 0", "class 1"])
    pinned = [child for child in ax.get_children() if isinstance(child, AnnotationBbox)]
    assert len(pinned) == len(ax.lines) > 1
    for box, corner in zip(pinned, ax.lines):
        red, _, blue = box.offsetbox.get_data().mean((0, 1))
        look = looks["class 0" if red > blue else "class 1"]
        assert to_hex(box.patch.get_edgecolor()) == look["color"].lower()
        assert (corner.get_marker(), corner.get_color()) == (look["marker"], look["color"])


@pytest.mark.parametrize("n", [3, 40])
def test_thumbnails_are_the_images_and_do_not_hide_each_other(n):
    ax = embedding_map(Colors(), loader(lambda i: TensorCategory(i % 2), n), thumbnails=12)
    ax.figure.canvas.draw()
    pinned = [child for child in ax.get_children() if isinstance(child, AnnotationBbox)]
    assert 1 <= len(pinned) <= 12
    boxes = [p.get_window_extent(ax.figure.canvas.get_renderer()) for p in pinned]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    pictures = {image(i).permute(1, 2, 0).numpy().round(5).tobytes() for i in range(n)}
    assert all(p.offsetbox.get_data().round(5).tobytes() in pictures for p in pinned)


def test_apart_takes_as_many_as_have_room():
    places = np.array([[0, 0], [1, 0], [10, 0], [10.5, 3], [30, 30]])
    chosen = apart(places, side=4, most=9, seed=0)
    assert len(chosen) == 3 and 4 in chosen
    assert len(apart(places, side=4, most=2, seed=0)) == 2 and apart(places, 4, 0, 0) == []
    assert apart(places, side=0.5, most=9, seed=0) == np.random.default_rng(0).permutation(5).tolist()
