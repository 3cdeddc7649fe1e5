"""Encoders under torchvision's detectors: the maps they ask for, pixels as the encoder wants them, and training."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from selfsup_fastai.downstream.detection import detection_backbone, detector_kwargs
from selfsup_fastai.encoders.checkpoint import save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.inputs import to_input
from selfsup_fastai.errors import SelfsupError, TaskError

FIVE = ["resnet10t", "convnext_femto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_lite0"]


@pytest.mark.parametrize("arch", FIVE)
@pytest.mark.parametrize("n_in", [1, 3])
def test_five_maps_of_halving_size(arch, n_in):
    backbone = detection_backbone(arch, out_channels=32, n_in=n_in, size=64).eval()
    maps = backbone(torch.rand(2, n_in, 64, 64))
    assert isinstance(maps, OrderedDict) and list(maps) == ["0", "1", "2", "3", "pool"]
    assert [tuple(m.shape) for m in maps.values()] == [(2, 32, s, s) for s in (16, 8, 4, 2, 1)]
    assert backbone.out_channels == 32


@pytest.mark.parametrize("arch", FIVE)
def test_detectors_train_and_find(arch):
    backbone = detection_backbone(arch, out_channels=32, n_in=1, size=64)
    images = [torch.rand(1, 60, 50), torch.rand(1, 48, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 5, 30, 33]]), "labels": torch.tensor([1])}] * 2
    for make in (FasterRCNN, RetinaNet):
        detector = make(backbone, num_classes=2, min_size=64, max_size=64, **detector_kwargs(backbone))
        losses = detector.train()(images, targets)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert all(p.grad is not None for p in backbone.fpn.parameters())
        found = detector.eval()(images)
        assert len(found) == 2 and found[0]["boxes"].shape[1] == 4


@pytest.mark.parametrize("size", [72, 100, 150])
def test_the_size_of_pretraining_need_not_divide_by_32(size):
    backbone = detection_backbone(create_encoder("resnet10t", size=size), out_channels=16)
    assert [level.stride for level in backbone.levels] == [4, 8, 16, 32]


def test_chosen_layers():
    backbone = detection_backbone("resnet10t", layers=["layer2", "layer4"])
    assert {k: m.shape[-1] for k, m in backbone(torch.rand(1, 3, 64, 64)).items()} == {"0": 8, "1": 2, "pool": 1}
    with pytest.raises(SelfsupError, match="Did you mean 'layer4'"):
        detection_backbone("resnet10t", layers=["layer5"])


def test_pixels_are_standardized_once_as_the_card_says(tmp_path):
    encoder = create_encoder("resnet10t", 1)
    encoder.mean, encoder.std = (0.3,), (0.2,)
    backbone = detection_backbone(save_encoder(encoder, tmp_path / "grey", task="rotation"))
    detector = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64, **detector_kwargs(backbone))
    x = torch.rand(1, 64, 64)
    seen = detector.transform([x])[0].tensors
    torch.testing.assert_close(seen, (x[None] - 0.3) / 0.2)
    torch.testing.assert_close(seen, backbone.encoder.prepare(x[None]))
    assert detector_kwargs(encoder) == detector_kwargs(backbone) == {"image_mean": [0.3], "image_std": [0.2]}


@pytest.mark.parametrize(("kind", "n_in"), [("L", 1), ("lab", 3), ("sobel", 2)])
def test_an_encoder_that_eats_lightness_is_given_it(kind, n_in):
    encoder = create_encoder("resnet10t", n_in)
    encoder.eat(kind)
    backbone = detection_backbone(encoder).eval()
    detector = FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64, **detector_kwargs(backbone)).eval()
    x, seen = torch.rand(3, 64, 64), []
    backbone.encoder.body.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    backbone.encoder.body.conv1.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    detector([x])
    wanted = (to_input(x[None], kind) - 0.5) / torch.tensor(encoder.std).view(1, -1, 1, 1)
    torch.testing.assert_close(seen[0], wanted)


def test_batch_norms_of_a_trained_encoder_hold_still():
    for lineage, still in (([{"task": "rotation"}], True), ([], False)):
        encoder = create_encoder("resnet10t")
        encoder.lineage = lineage
        backbone = detection_backbone(encoder).train()
        before = backbone.encoder.body.bn1.running_mean.clone()
        backbone(torch.rand(2, 3, 64, 64))
        assert torch.equal(before, backbone.encoder.body.bn1.running_mean) == still
        assert backbone.encoder.body.bn1.weight.requires_grad
        assert encoder.body.bn1.num_batches_tracked == 0  # the given one is copied


def test_what_cannot_be_a_backbone():
    backbone = detection_backbone("vit_tiny_patch16_224", size=64)
    with pytest.raises(TaskError, match=r"64 x 64 pixels only, got 96 x 64\. .*detector_kwargs"):
        backbone(torch.rand(1, 3, 96, 64))
    with pytest.raises(TaskError, match="times smaller than images"):
        detection_backbone("vit_small_patch14_dinov2", img_size=70)
    with pytest.raises(TaskError, match="n_in: for new networks alone"):
        detection_backbone(create_encoder("resnet10t"), n_in=1)
    with pytest.raises(TaskError, match="times smaller than images"):
        detection_backbone(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)))


def nuclei(root, n, side=128):
    """The middle of `n` grey images, and boxes around the nuclei in it."""
    images, targets = [], []
    for file in sorted(root.rglob("images/*.png")):
        with Image.open(file) as image, Image.open(file.parents[1] / "labels" / file.name) as mask:
            if min(image.size) < 2 * side:
                continue
            cut, labels = np.asarray(image.convert("L"))[:side, :side], np.asarray(mask)[:side, :side]
        boxes = []
        for i in np.unique(labels[labels > 0]):
            rows, columns = np.nonzero(labels == i)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        boxes = [b for b in boxes if b[2] - b[0] > 5 and b[3] - b[1] > 5]
        if 3 <= len(boxes) <= 30 and cut.mean() < 80:
            images.append(torch.from_numpy(cut.copy())[None].float() / 255)
            boxes = torch.tensor(np.array(boxes)).float()
            targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)})
        if len(images) == n:
            break
    return images, targets


def recall(detector, images, targets):
    """Share of the boxes that one of as many best guesses meets with an IoU of 0.5."""
    met, total = 0, 0
    detector.eval()
    with torch.no_grad():
        for found, target in zip(detector(images), targets):
            n = len(target["boxes"])
            best = found["boxes"][found["scores"].argsort(descending=True)[:n]]
            met += int((box_iou(target["boxes"], best) >= 0.5).any(1).sum()) if len(best) else 0
            total += n
    return met / total


@pytest.mark.slow
def test_it_learns_to_find_nuclei(shared_data):
    images, targets = nuclei(shared_data("nuclei_dsb2018"), 20)
    assert len(images) == 20
    torch.manual_seed(0)
    backbone = detection_backbone("resnet10t", out_channels=64, n_in=1)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5)
    detector = FasterRCNN(
        backbone, num_classes=2, min_size=128, rpn_anchor_generator=anchors, **detector_kwargs(backbone)
    )
    test = slice(14, 20)
    before = recall(detector, images[test], targets[test])
    opt = torch.optim.AdamW(detector.parameters(), 1e-3)
    history = []
    for _epoch in range(14):
        detector.train()
        order = torch.randperm(14).tolist()
        for i in range(0, 14, 2):
            batch = order[i : i + 2]
            loss = sum(detector([images[k] for k in batch], [targets[k] for k in batch]).values())
            opt.zero_grad()
            loss.backward()
            opt.step()
            history.append(loss.item())
    after = recall(detector, images[test], targets[test])
    assert np.mean(history[-7:]) < 0.7 * np.mean(history[:7])
    assert before < 0.1
    assert after > before + 0.3
