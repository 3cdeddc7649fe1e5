"""Masks: a decoder for the maps of any encoder, images of any size, and that it learns what a pixel is."""

import numpy as np
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter, RandomSplitter
from fastai.learner import load_learner
from fastai.metrics import Dice, DiceMulti, JaccardCoeff
from fastai.torch_core import TensorMask, set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILMask
from fastai.vision.data import ImageBlock, MaskBlock
from PIL import Image
from torch import nn

from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.downstream.models import DownstreamModel, head_maker, layer_groups
from selfsup_fastai.downstream.pyramid import Level, levels_of
from selfsup_fastai.downstream.targets import Target
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError, UnknownNameError

FIVE = [
    "resnet10t",
    "convnext_femto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "efficientnet_lite0",
]


def pngs(folder):
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """16 grey images of 64 x 64 pixels, a bright disc in each on dark noise."""
    folder, rng = tmp_path_factory.mktemp("discs"), np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    for i in range(16):
        y, x, r = rng.integers(16, 48), rng.integers(16, 48), rng.integers(6, 14)
        pixels = rng.integers(0, 90, (64, 64)) + 120 * ((rows - y) ** 2 + (columns - x) ** 2 < r**2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def inside(file):
    return PILMask.create((np.asarray(Image.open(file)) > 105).astype(np.uint8))


def loaders(folder, item_tfms=None, bs=4):
    data = DataBlock((ImageBlock, MaskBlock(["out", "in"])), get_items=pngs, get_y=inside, item_tfms=item_tfms)
    data.splitter = RandomSplitter(0.25, seed=1)
    return data.dataloaders(folder, bs=bs, num_workers=0, device="cpu")


def model_for(arch, n_in, n_out, size=64):
    set_seed(0)
    encoder = create_encoder(arch, n_in, size=size)
    return DownstreamModel(encoder, head_maker(Target("mask", n_out), encoder)())


@pytest.mark.parametrize("arch", FIVE)
@pytest.mark.parametrize(("n_in", "n_out", "sizes"), [(1, 2, [(64, 64), (47, 61)]), (3, 7, [(64, 64), (33, 90)])])
def test_a_class_for_each_pixel_of_images_of_any_size(arch, n_in, n_out, sizes):
    model = model_for(arch, n_in, n_out)
    for size in sizes:
        out = model.train()(torch.rand(2, n_in, *size))
        assert out.shape == (2, n_out, *size)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.head.parameters())
    groups = layer_groups(model)
    assert sum(len(g) for g in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[-1]} == {id(p) for p in model.head.parameters()}


def test_levels_are_the_deepest_of_each_scale():
    levels = levels_of(create_encoder("resnet10t"))
    assert [(level.layer, level.stride, level.times) for level in levels] == [
        ("act1", 2, 1),
        ("layer1", 4, 1),
        ("layer2", 8, 1),
        ("layer3", 16, 1),
        ("layer4", 32, 1),
    ]
    chosen = levels_of(create_encoder("resnet10t"), ["layer2", "layer4"])
    assert [level.layer for level in chosen] == ["layer2", "layer4"]
    with pytest.raises(UnknownNameError, match="Did you mean 'layer4'"):
        levels_of(create_encoder("resnet10t"), ["layer5"])


def test_maps_of_one_scale_are_laid_out():
    levels = levels_of(create_encoder("vit_tiny_patch16_224", size=64))
    assert levels == [
        Level("blocks.2", 192, 2, 8),
        Level("blocks.5", 192, 4, 4),
        Level("blocks.8", 192, 8, 2),
        Level("blocks.11", 192, 16, 1),
    ]


def test_nets_without_maps_are_refused(discs):
    import torchvision

    encoder = create_encoder(torchvision.models.vit_b_16)
    with pytest.raises(TaskError, match="gives no feature maps"):
        levels_of(encoder)


def test_an_own_net_without_strides(discs):
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
    learn = downstream_learner(loaders(discs), net)
    learn.fit(1)
    assert learn.get_preds()[0].shape == (4, 2, 64, 64)


@pytest.fixture(scope="module")
def trained(discs, tmp_path_factory):
    set_seed(0)
    learn = downstream_learner(loaders(discs), "resnet10t", metrics=[Dice(), JaccardCoeff(), DiceMulti()])
    learn.path = tmp_path_factory.mktemp("trained")
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(10)
    return learn


def test_discs_are_found_and_scored(trained):
    """fastai's metrics, worked out again from the predictions."""
    probabilities, masks, decoded = trained.get_preds(with_decoded=True)
    probabilities, masks, decoded = (t.as_subclass(torch.Tensor) for t in (probabilities, masks, decoded))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4, 64, 64))
    assert torch.equal(decoded, probabilities.argmax(1))
    pred, true = decoded.bool(), masks.bool()
    both, either = (pred & true).sum().item(), (pred | true).sum().item()
    dice, jaccard = 2 * both / (both + either), both / either
    back = 2 * (~pred & ~true).sum().item() / ((~pred).sum() + (~true).sum()).item()
    assert list(trained.validate()[1:]) == pytest.approx([dice, jaccard, (dice + back) / 2])
    assert dice > 0.9
    assert trained.model.encoder.in_chans == 1  # grey files stay grey


def test_the_decoder_is_the_last_group_and_trained_first(trained):
    plan = trained.fine_tune_plan(4)
    assert plan["trained"].iloc[0] == "head" and plan["parameters"].iloc[0] == sum(
        p.numel() for p in trained.model.head.parameters()
    )


def test_predict_show_and_export(trained, discs):
    from matplotlib import pyplot as plt

    file = trained.dls.valid_ds.items[0]
    mask, numbers, probabilities = trained.predict(file)
    assert isinstance(mask, TensorMask) and mask.shape == (64, 64)
    assert torch.equal(probabilities.argmax(0), numbers.as_subclass(torch.Tensor))
    torch.testing.assert_close(probabilities, trained.get_preds()[0][0].as_subclass(torch.Tensor))
    trained.show_results(max_n=2, shuffle=False)
    drawn = [np.asarray(image.get_array()) for ax in plt.gcf().axes for image in ax.get_images()]
    masks = [a for a in drawn if set(np.unique(a)) <= {0, 1}]
    assert len(masks) == 4 and np.array_equal(masks[0], np.asarray(inside(file)))
    assert np.array_equal(masks[1], np.asarray(numbers))
    plt.close("all")
    trained.dls.show_batch(max_n=2)
    trained.export("masks.pkl")
    again = load_learner(trained.path / "masks.pkl")
    torch.testing.assert_close(again.predict(file)[2], probabilities)


def test_frozen_norms_hold_still_under_a_decoder(discs):
    learn = downstream_learner(loaders(discs), "resnet10t")
    norm = learn.model.encoder.body.bn1
    before = norm.running_mean.clone()
    with learn.no_bar(), learn.no_logging(), learn._norm_policy("eval") as cbs:
        learn.freeze()
        learn.fit(1, cbs=cbs)
    assert torch.equal(norm.running_mean, before)


def test_images_of_odd_sizes(discs):
    learn = downstream_learner(loaders(discs, Resize((37, 51)), bs=2), "resnet10t", metrics=DiceMulti())
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1)
    assert learn.predict(pngs(discs)[0])[2].shape == (2, 37, 51)


@pytest.mark.slow
def test_white_blood_cells(shared_data):
    """Nucleus and cytoplasm of 300 photographs, 64 px, ten epochs from scratch."""
    root = shared_data("wbc_seg_1")
    learn = cells(root)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(6)
    preds, masks = (t.as_subclass(torch.Tensor) for t in learn.get_preds())
    most = torch.full_like(masks, int(masks.flatten().bincount().argmax()))
    assert mean_dice(preds.argmax(1), masks) == pytest.approx(learn.recorder.values[-1][-1], abs=1e-4)
    assert mean_dice(preds.argmax(1), masks) > 0.85
    assert mean_dice(most, masks) < 0.35


def mean_dice(pred, true):
    """Of the three classes, pixels of all images together."""
    pairs = [((pred == c), (true == c)) for c in range(3)]
    return float(np.mean([2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in pairs]))


def cells(root):
    masks = {f.stem: f for f in root.rglob("*.png") if "mask" in str(f.relative_to(root)).lower()}
    images = [f for f in sorted(root.rglob("*.png")) if "mask" not in str(f.relative_to(root)).lower()]
    assert len(images) == 300

    def coded(file):
        values = np.asarray(PILMask.create(masks[file.stem]))
        return PILMask.create(np.searchsorted([0, 128, 255], values).astype(np.uint8))

    blocks = (ImageBlock, MaskBlock(["background", "cytoplasm", "nucleus"]))
    data = DataBlock(blocks, get_y=coded, item_tfms=Resize(64), splitter=IndexSplitter(range(0, 300, 5)))
    set_seed(0)
    dls = data.dataloaders(images, bs=16, num_workers=0, device="cpu")
    return downstream_learner(dls, "resnet10t", metrics=DiceMulti())
