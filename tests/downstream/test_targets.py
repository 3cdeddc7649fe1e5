"""What labels ask for: kinds told apart, wrong masks and points refused, points in the right pixels."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import TensorMask, set_seed
from fastai.vision.augment import Resize, ResizeMethod
from fastai.vision.core import PILMask, TensorPoint
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, ImageDataLoaders, MaskBlock, PointBlock
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from selfsup_fastai.data.blocks import Cover
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.downstream.points import PointHead, centers
from selfsup_fastai.downstream.targets import KINDS, Target, _looked_at, in_words, kind_of, target_of
from selfsup_fastai.errors import DataError, TaskError


def pngs(folder):
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """24 grey images of 48 x 40 pixels, a bright square of 9 in each; and the centers of the squares by name."""
    folder, places, rng = tmp_path_factory.mktemp("squares"), {}, np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 60, (40, 48), dtype=np.uint8)
        x, y = int(rng.integers(6, 42)), int(rng.integers(6, 34))
        pixels[y - 4 : y + 5, x - 4 : x + 5] = 230
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        places[f"{i:02d}"] = (x + 0.5, y + 0.5)
    return folder, places


def loaders(folder, block, get_y, bs=8, item_tfms=None, n_inp=1, valid_pct=0.25):
    blocks = (ImageBlock, *block) if isinstance(block, tuple) else (ImageBlock, block)
    data = DataBlock(blocks, get_items=pngs, get_y=get_y, item_tfms=item_tfms, n_inp=n_inp)
    data.splitter = RandomSplitter(valid_pct, seed=1)
    return data.dataloaders(folder, bs=bs, num_workers=0, device="cpu")


def bright(file, values=(0, 1)):
    low, high = values
    return PILMask.create(np.where(np.asarray(Image.open(file)) > 127, high, low).astype("uint8"))


@pytest.mark.parametrize(
    ("block", "get_y", "target"),
    [
        (CategoryBlock, lambda f: "ab"[int(f.stem) % 2], Target("category", 2, ("a", "b"))),
        (MultiCategoryBlock, lambda f: ["x", "yz"[int(f.stem) % 2]], Target("multicategory", 3, ("x", "y", "z"))),
        (RegressionBlock, lambda f: 0.5, Target("regression", 1)),
        (RegressionBlock(3), lambda f: [0.5, 1.0, 2.0], Target("regression", 3)),
        (PointBlock, lambda f: torch.tensor([[1.0, 2], [3, 4], [5, 6]]), Target("points", 6)),
        (MaskBlock(["no", "yes"]), bright, Target("mask", 2, ("no", "yes"))),
        (MaskBlock(np.array(["no", "yes", "other"])), bright, Target("mask", 3, ("no", "yes", "other"))),
        (MaskBlock, bright, Target("mask", 2)),
    ],
)
def test_kinds_outputs_and_names(squares, block, get_y, target):
    assert target_of(loaders(squares[0], block, get_y)) == target


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        (1, "category"),
        (torch.tensor(1), "category"),
        (np.int64(1), "category"),
        (0.5, "regression"),
        (np.float32(0.5), "regression"),
        (torch.tensor([0.5, 1.0]), "regression"),
        (torch.zeros(4, 4, dtype=torch.long), "mask"),
        (TensorMask(torch.zeros(4, 4)), "mask"),
        (TensorPoint(torch.zeros(3, 2)), "points"),
    ],
)
def test_labels_of_plain_datasets(label, kind):
    items = [(torch.rand(3, 4, 4), label)] * 4
    assert kind_of(DataLoaders.from_dsets(items, items, bs=2, num_workers=0, device="cpu")) == kind


@pytest.mark.parametrize("label", ["text", torch.tensor([1, 2]), {"a": 1}, torch.zeros(3, 4, 4)])
def test_labels_that_nothing_predicts(label):
    items = [(torch.rand(3, 4, 4), label)] * 4
    with pytest.raises(TaskError, match=f"of the kind {type(label).__name__}; categories"):
        kind_of(DataLoaders.from_dsets(items, items, bs=2, num_workers=0, device="cpu"))


def test_the_loss_is_fastais_own_and_the_users_wins(squares):
    masks = loaders(squares[0], MaskBlock(["no", "yes"]), bright)
    loss = downstream_learner(masks, "resnet10t").loss_func
    assert isinstance(loss, CrossEntropyLossFlat) and loss.axis == 1
    own = CrossEntropyLossFlat(axis=1, weight=torch.tensor([1.0, 5.0]))
    assert downstream_learner(masks, "resnet10t", loss_func=own).loss_func is own
    assert isinstance(KINDS["multicategory"].loss(), BCEWithLogitsLossFlat)


def test_boxes_are_for_detectors(squares):
    boxes = loaders(squares[0], (BBoxBlock, BBoxLblBlock), [lambda f: [[1, 2, 9, 9]], lambda f: ["square"]])
    with pytest.raises(TaskError, match=r"boxes.*detection_backbone\(encoder\)"):
        downstream_learner(boxes, "resnet10t")


@pytest.mark.parametrize("codes", [["no", "yes"], None])
def test_masks_of_0_and_255_are_refused_with_what_to_do(squares, codes):
    """The remedy in the message works as it stands."""
    dls = loaders(squares[0], MaskBlock(codes), lambda f: bright(f, (0, 255)))
    with pytest.raises(DataError, match=r"Masks hold the values 0, 255; expected .*get_y=lambda file: ") as error:
        downstream_learner(dls, "resnet10t")
    remedy = str(error.value).partition("get_y=")[2].partition(". loss_func")[0]
    names = {"np": np, "PILMask": PILMask, "mask_of": lambda f: np.asarray(bright(f, (0, 255)))}
    assert target_of(loaders(squares[0], MaskBlock(codes), eval(remedy, names))).n_out == 2


def test_a_value_that_the_loss_leaves_out_may_be_there(squares):
    dls = loaders(squares[0], MaskBlock(["no", "yes"]), lambda f: bright(f, (int(f.stem) % 2, 255)))
    loss = CrossEntropyLossFlat(axis=1, ignore_index=255)
    learn = downstream_learner(dls, "resnet10t", loss_func=loss)
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()


def test_many_values_point_to_a_spoiled_mask(squares):
    with pytest.raises(DataError, match=r"0, 1, 2, 3, 4, 5, 6, 7, \.\.\.; expected 0 to 1.*write masks as PNG"):
        target_of(loaders(squares[0], MaskBlock(["no", "yes"]), lambda f: PILMask.create(f)))
    with pytest.raises(DataError, match="Masks hold the values 0; expected"):
        target_of(loaders(squares[0], MaskBlock, lambda f: bright(f, (0, 0))))


def test_a_value_that_was_not_looked_at_is_named_in_training(squares, monkeypatch):
    monkeypatch.setattr(_looked_at, "__defaults__", (2,))
    rare = set()
    dls = loaders(squares[0], MaskBlock(["no", "yes"]), lambda f: bright(f, (0, 7 if f.stem in rare else 1)))
    rare |= {f.stem for f in dls.train_ds.items[5:8]}
    learn = downstream_learner(dls, "resnet10t")
    with pytest.raises(DataError, match="A mask holds the value 7; expected 0 to 1"):
        learn.fit(1)


def test_masks_of_another_shape_are_refused(squares):
    dls = loaders(squares[0], MaskBlock(["no", "yes"]), lambda f: PILMask.create(np.zeros((48, 40), "uint8")))
    with pytest.raises(DataError, match="An image of 48 x 40 pixels has a mask of 40 x 48"):
        downstream_learner(dls, "resnet10t")
    half = loaders(squares[0], MaskBlock(["a", "b"]), lambda f: PILMask.create(np.zeros((20, 24), "uint8")))
    with pytest.raises(DataError, match="a mask of 24 x 20"):
        target_of(half)
    resized = loaders(
        squares[0], MaskBlock(["a", "b"]), lambda f: PILMask.create(np.zeros((20, 24), "uint8")), item_tfms=Resize(32)
    )
    assert target_of(resized).n_out == 2  # half as large, but of the same shape: both are resized


def test_points_must_be_as_many_and_numbers(squares):
    some = loaders(squares[0], PointBlock, lambda f: torch.rand(1 + int(f.stem) % 2, 2), bs=1)
    with pytest.raises(TaskError, match="as many points, in the same order; there are 1 to 2"):
        downstream_learner(some, "resnet10t")
    missing = loaders(squares[0], PointBlock, lambda f: torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(DataError, match="not finite"):
        downstream_learner(missing, "resnet10t")
    good = loaders(squares[0], PointBlock, lambda f: torch.tensor([[1.0, 2.0]]))
    with pytest.raises(TaskError, match="n_out is 4, but 1 points have 2 coordinates"):
        downstream_learner(good, "resnet10t", n_out=4)


def test_votes_of_places_by_hand():
    assert centers(1, 2).tolist() == [[[-0.5, 0.5]], [[0.0, 0.0]]]
    head = PointHead(4, 1)
    nn.init.zeros_(head.weights.weight)
    nn.init.zeros_(head.votes.weight)
    nn.init.zeros_(head.votes.bias)
    assert torch.allclose(head(torch.rand(2, 4, 3, 5)), torch.zeros(2, 2), atol=1e-6)  # all places alike: the middle
    head.votes.bias.data[:] = torch.tensor([0.25, -0.5])
    assert torch.allclose(head(torch.rand(1, 4, 3, 5)), torch.tensor([[0.25, -0.5]]), atol=1e-6)
    nn.init.zeros_(head.votes.bias)
    head.weights.weight.data[0, 0] = 50.0
    features = torch.zeros(1, 4, 2, 2)
    features[0, 0, 1, 0] = 5.0  # the place below left is seen alone
    assert torch.allclose(head(features), torch.tensor([[-0.5, 0.5]]), atol=1e-3)


def near(points, place, pixels):
    return np.abs(np.asarray(points, dtype=float).reshape(-1) - np.array(place)).max() < pixels


@pytest.fixture(scope="module")
def found(squares):
    """A learner that has seen 22 squares often enough to find them, on images that are squeezed to 64 x 64."""
    folder, places = squares
    set_seed(0)
    tfm = Resize(64, ResizeMethod.Squish)
    dls = loaders(folder, PointBlock, lambda f: torch.tensor([places[f.stem]]), item_tfms=tfm, valid_pct=0.1)
    learn = downstream_learner(dls, "resnet10t")
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(80, 3e-3)
    return learn


def test_points_are_found_in_pixels_of_the_original(squares, found):
    _, places = squares
    files = list(found.dls.train_ds.items)[:6]
    for file in files:
        points, _, scaled = found.predict(file)
        assert isinstance(points, TensorPoint) and points.shape == (1, 2)
        assert near(points, places[file.stem], 2.0)
        assert torch.allclose(torch.Tensor(points), (scaled.view(1, 2) + 1) / 2 * torch.tensor([48.0, 40.0]), atol=1e-4)
    image, points, *_ = found.predict(files[0], with_input=True)  # in pixels of that input
    x, y = places[files[0].stem]
    assert image.shape[-2:] == (64, 64) and near(points, (x * 64 / 48, y * 64 / 40), 3.5)


def test_the_saved_model_finds_them_too(squares, found, tmp_path):
    from selfsup_fastai.downstream.saving import load_trained

    file = found.dls.train_ds.items[0]
    model = load_trained(found.save_model(tmp_path / "points"))
    points = model.predict_batch(model.open(file)[None])[0, 0]
    x, y = squares[1][file.stem]
    assert near(points, (x * 64 / 48, y * 64 / 40), 3.5)


def test_results_are_drawn_where_they_are(found):
    found.show_results(ds_idx=0, max_n=2, shuffle=False)
    b = found.dls[0].new(shuffle=False).one_batch()
    true = (b[1].as_subclass(torch.Tensor) + 1) * 32
    drawn = [ax.collections[0].get_offsets() for ax in plt.gcf().axes]
    for i in range(2):
        assert np.allclose(drawn[2 * i], true[i], atol=1e-3)  # targets left, predictions right
        assert np.abs(np.asarray(drawn[2 * i + 1]) - np.asarray(true[i])).max() < 3.5
    plt.close("all")
    found.dls.show_batch(max_n=2)
    assert all(len(ax.collections) == 1 for ax in plt.gcf().axes)


def seen_bright(dls):
    """Per image of a training batch: the points, and the middle of what is bright, both in pixels."""
    x, y = dls.train.one_batch()
    middles = []
    for image in x.as_subclass(torch.Tensor).mean(1):
        rows, columns = (image > 0.5).nonzero().float().T
        middles.append((columns.mean() + 0.5, rows.mean() + 0.5))
    size = torch.tensor(x.shape[:1:-1])
    return (y.as_subclass(torch.Tensor)[:, 0] + 1) / 2 * size, torch.tensor(middles)


@pytest.mark.parametrize("tfm", [None, Cover((64, 64)), Cover((80, 90)), Resize(64, ResizeMethod.Squish)])
def test_points_move_with_the_pixels(squares, tfm):
    folder, places = squares
    inner = {name: place for name, place in places.items() if 14 < place[0] < 34}
    dls = loaders(folder, PointBlock, lambda f: torch.tensor([places[f.stem]]), item_tfms=tfm, bs=4)
    wanted = [f for f in dls.train_ds.items if f.stem in inner][:4]
    dls = DataLoaders(dls.train.new(dls.train_ds.__class__(wanted, tfms=[tl.tfms for tl in dls.train_ds.tls])))
    points, middles = seen_bright(dls)
    assert torch.allclose(points, middles, atol=1.0)


def test_cover_takes_mask_and_points_along():
    """An image that is its own mask: the same window of both, the mask's values unmixed."""
    pixels = np.zeros((40, 100), np.uint8)
    pixels[10:20, 30:45] = 255
    from fastai.vision.core import PILImage

    image, mask = PILImage.create(np.stack([pixels] * 3, 2)), PILMask.create(pixels)
    point = TensorPoint(torch.tensor([[37.5, 15.0]]) * 2 / torch.tensor([100.0, 40.0]) - 1, img_size=(100, 40))
    cover = Cover((30, 30))
    for split_idx in (0, 0, 0, 1):
        seen, seen_mask, seen_point = cover((image, mask, point), split_idx=split_idx)
        assert seen.size == seen_mask.size == (30, 30)
        values = np.asarray(seen_mask)
        assert set(np.unique(values)) <= {0, 255}
        assert np.abs((np.asarray(seen)[..., 0] > 127).astype(int) - (values > 127)).mean() < 0.03
        x, y = (seen_point.as_subclass(torch.Tensor)[0] + 1) * 15
        rows, columns = np.nonzero(values)
        if len(rows) > 80:  # the whole block is in the window
            assert abs(columns.mean() + 0.5 - x) < 1 and abs(rows.mean() + 0.5 - y) < 1


def test_images_of_different_sizes_are_squeezed_whole(tmp_path, capsys):
    for i in range(8):
        Image.fromarray(np.full((32 + i, 40), 9, np.uint8)).save(tmp_path / f"{i}.png")
    dls = loaders(tmp_path, PointBlock, lambda f: torch.tensor([[10.0, 8.0]]), bs=2)
    learn = downstream_learner(dls, "resnet10t")
    x, y = learn.dls.train.one_batch()
    assert x.shape[-2:] == (128, 128) and "resized from different sizes to 128 px" in capsys.readouterr().err
    assert torch.allclose(y[..., 0].as_subclass(torch.Tensor), torch.tensor(-0.5))  # 10 of 40 pixels
    dls = loaders(tmp_path, MaskBlock(["a", "b"]), lambda f: PILMask.create(np.asarray(Image.open(f)) // 9), bs=2)
    x, y = downstream_learner(dls, "resnet10t").dls.train.one_batch()
    assert x.shape[-2:] == y.shape[-2:] == (128, 128) and bool((y == 1).all())


def test_numbers_from_a_table(squares):
    frame = pd.DataFrame({"name": [f.name for f in pngs(squares[0])]})
    frame["x"], frame["y"] = zip(*squares[1].values())
    dls = ImageDataLoaders.from_df(
        frame, squares[0], label_col=["x", "y"], y_block=RegressionBlock, valid_pct=0.25, bs=4, num_workers=0
    )
    learn = downstream_learner(dls, "resnet10t")
    assert learn.target == Target("regression", 2)
    learn.fit(1)
    words, _, values = learn.predict(squares[0] / frame["name"][0])
    assert list(words) == pytest.approx(values.tolist())
    learn.show_results(max_n=2, shuffle=False)
    true, values = learn.get_preds()[1], learn.get_preds()[0]
    expected = ["\n".join("; ".join(f"{v:.3g}" for v in row[i].tolist()) for row in (true, values)) for i in range(2)]
    assert [ax.get_title() for ax in plt.gcf().axes if ax.get_title()] == expected


def test_several_labels_are_shown(squares):
    dls = loaders(squares[0], MultiCategoryBlock, lambda f: ["x", "yz"[int(f.stem) % 2]])
    learn = downstream_learner(dls, "resnet10t")
    learn.show_results(max_n=2, shuffle=False)
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
    names = [f"x; {'yz'[int(f.stem) % 2]}" for f in learn.dls.valid_ds.items[:2]]
    said = ["; ".join(n for n, p in zip("xyz", row) if p > 0.5) or "-" for row in learn.get_preds()[0][:2]]
    assert titles == [f"{name}\n{pred}" for name, pred in zip(names, said)]
    assert in_words([]) == "-" and in_words(0.123456) == "0.123"
