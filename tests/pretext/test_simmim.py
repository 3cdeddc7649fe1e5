"""SimMIM: squares are hidden before anything is computed, and the loss is the authors'."""

import math

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor, nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.masked_vit import covered_tokens
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.generative.simmim import CoveredPatches, CoveredPixels, Painter, fitting_squares
from selfsup_fastai.pretext.learner import pretext_learner


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())


def learner(arch=tiny, size=(48, 48), channels: int = 3, **settings):
    array = np.random.default_rng(0).integers(0, 256, (6, *size, channels), dtype=np.uint8)
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0, valid_pct=0.34)
    return pretext_learner(dls, "simmim", arch, **settings)


def question(learn, side: int = 48):
    x = torch.rand(2, 3, side, side, generator=seeded(1))
    return x, *learn.task.make_batch(x, generator=seeded(), train=False)


# --- the squares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, step, expected",
    [
        (192, 1, (192, 32)),  # the paper's
        (192, 16, (192, 32)),
        (224, 16, (224, 32)),  # the authors' ViT
        (64, 1, (64, 8)),
        (64, 16, (64, 16)),
        (48, 16, (48, 16)),
        (176, 16, (176, 16)),  # 11 x 11 patches: no larger squares cover them
        (28, 1, (28, 4)),
        (47, 1, (42, 7)),  # a prime: resized to fit
    ],
)
def test_squares_are_a_sixth_of_the_side_or_what_covers_it(side, step, expected):
    assert fitting_squares(side, 6, step) == expected


@pytest.mark.parametrize("side", range(12, 230))
def test_squares_always_cover_the_image(side):
    image, square = fitting_squares(side, 6)
    assert image % square == 0 and side - 6 < image <= side and 4 <= image // square <= 9


@pytest.mark.parametrize("ratio, hidden", [(0.6, 22), (0.5, 18), (0.01, 1), (0.99, 35)])
def test_squares_are_hidden_whole_and_their_share_is_rounded_up(ratio, hidden):
    x, (seen, mask), (_, same) = question(learner(mask_ratio=ratio))
    assert torch.equal(seen, x) and mask is same and mask.shape == (2, 1, 48, 48) and mask.dtype == torch.bool
    cells = mask.view(2, 6, 8, 6, 8).float().mean((2, 4))
    assert set(cells.flatten().tolist()) <= {0.0, 1.0} and (cells.flatten(1).sum(1) == hidden).all()
    assert not torch.equal(mask[0], mask[1])


def test_the_target_is_the_normalized_image():
    learn = learner()
    x, _, (target, _) = question(learn)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (learn.encoder.mean, learn.encoder.std))
    torch.testing.assert_close(target, (x - mean) / std)
    torch.testing.assert_close(learn.task.decode(target), x)


# --- the networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [tiny, "resnet10t", "test_vit"])
def test_the_network_cannot_peek(arch):
    learn = learner(arch, (64, 64))
    net = learn.model.eval()
    assert type(net) is (CoveredPatches if arch == "test_vit" else CoveredPixels)
    x, (_, hidden), (target, _) = question(learn, 64)
    with torch.no_grad():
        answer = net(x, hidden)
        assert answer.shape == target.shape
        assert torch.equal(net(torch.where(hidden, 1 - x, x), hidden), answer)
        assert not torch.equal(net(torch.where(hidden, x, 1 - x), hidden), answer)
        assert not torch.equal(net(x, hidden.roll(1, 0)), answer)


def test_a_convnet_gets_the_learned_color_and_a_linear_head_paints_each_place_of_its_map():
    learn = learner(tiny)
    net, (x, (_, hidden), _) = learn.model.eval(), question(learn)
    with torch.no_grad():
        net.color.copy_(torch.tensor([0.1, -2.0, 3.0]).view(3, 1, 1))
        covered = x.clone()
        for image, gone in zip(covered, hidden[:, 0]):
            image[:, gone] = net.color.flatten().unsqueeze(1)
        maps = net.encoder.feature_map(covered)  # (2, 16, 12, 12): each place paints 4 x 4 pixels
        conv = net.paint.layers[0]
        place = conv.weight[:, :, 0, 0] @ maps[1, :, 2, 5] + conv.bias
        torch.testing.assert_close(net(x, hidden)[1, :, 8:12, 20:24], place.view(3, 4, 4))


def test_a_vision_transformer_gets_a_token_for_each_hidden_patch():
    learn = learner("test_vit", (64, 64))
    net, (x, (_, hidden), _) = learn.model.eval(), question(learn, 64)
    patches = torch.tensor([[bool(gone[16 * (i // 4), 16 * (i % 4)]) for i in range(16)] for gone in hidden[:, 0]])
    assert (patches.sum(1) == 10).all()  # of 16, 60 % rounded up
    with torch.no_grad():
        tokens = covered_tokens(net.encoder.body, x, patches, net.token)[:, 1:]
        conv = net.paint.layers[0]
        sixth = conv.weight[:, :, 0, 0] @ tokens[0, 6] + conv.bias
        torch.testing.assert_close(net(x, hidden)[0, :, 16:32, 32:48], sixth.view(3, 16, 16), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side, cells", [(48, 12), (47, 12), (42, 2), (64, 1)])
def test_the_head_covers_the_image(side, cells):
    out = Painter(5, cells, 3, side)(torch.rand(2, 5, cells, cells))
    assert out.shape == (2, 3, side, side)


@pytest.mark.parametrize("size", [(47, 61), (61, 47), (28, 28)])
def test_odd_sizes_are_resized_to_what_squares_cover(size):
    learn = learner("resnet10t", size, channels=1)
    image, hidden, target, _ = learn.dls.one_batch()
    side = {28: 28}.get(min(size), 42)
    assert image.shape == target.shape == (4, 1, side, side) and hidden.shape == image.shape
    assert learn.model(image, hidden).shape == image.shape


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_hidden_pixels_by_their_number_and_the_channels():
    pred, target = torch.randn(2, 3, 2, 6, 6, generator=seeded())
    hidden = torch.zeros(3, 1, 6, 6, dtype=torch.bool)
    hidden[0, 0, :3], hidden[1, 0, 2:5], hidden[2, 0, :, 1:4] = True, True, True
    total, count, rows = 0.0, 0, []
    for p, t, m in zip(pred.tolist(), target.tolist(), hidden[:, 0].tolist()):
        own = [abs(p[c][i][j] - t[c][i][j]) for c in range(2) for i in range(6) for j in range(6) if m[i][j]]
        total, count, rows = total + sum(own), count + len(own) // 2, [*rows, sum(own) / len(own)]
    task = get_task("simmim")
    assert task.loss(pred, target, hidden).item() == pytest.approx(total / (count + 1e-5) / 2, rel=1e-5)
    assert task.loss(pred, target, hidden, reduction="none").tolist() == pytest.approx(rows, rel=1e-5)


def test_visible_pixels_do_not_count():
    _, _, (target, hidden) = question(learner())
    task = get_task("simmim")
    pred = torch.randn(target.shape, generator=seeded()).requires_grad_(True)
    loss = task.loss(pred, target, hidden)
    loss.backward()
    everywhere = hidden.expand_as(pred)
    assert (pred.grad[~everywhere] == 0).all() and (pred.grad[everywhere] != 0).all()
    assert task.loss(pred, torch.where(hidden, target, target + 5), hidden) == loss


def test_the_right_answer_has_loss_0_and_explains_everything():
    learn = learner()
    _, _, (target, hidden) = question(learn)
    (metric,) = learn.task.metrics
    assert learn.task.loss(target, target, hidden) == 0 and metric(target, target, hidden) == 1
    assert metric(torch.zeros_like(target), target, hidden) == learn.task.chance() == 0
    assert metric(target / 2, torch.where(hidden, target, 100), hidden).item() == pytest.approx(0.75)


# --- pictures, settings -----------------------------------------------------------------------------------------------


def test_pictures_show_what_is_seen_what_is_painted_and_the_image():
    learn = learner()
    x, inputs, targets = question(learn)
    hidden = inputs[1]

    def panels(ax, n: int) -> list[Tensor]:
        picture = torch.from_numpy(np.array(ax.images[0].get_array())).float()
        return [picture[:, i * 50 : i * 50 + 48].permute(2, 0, 1) for i in range(n)]

    for i, ax in enumerate(learn.task.show(inputs, targets)):
        seen, whole = panels(ax, 2)
        torch.testing.assert_close(whole, x[i])
        gone = hidden[i].expand_as(seen)
        torch.testing.assert_close(seen[~gone], x[i][~gone])
        assert seen[gone].unique().tolist() == pytest.approx([0.5, 0.7])  # a checkerboard
    for i, ax in enumerate(learn.task.show(inputs, targets, pred=1 - x)):
        _, painted, whole = panels(ax, 3)
        torch.testing.assert_close(painted, torch.where(hidden[i], 1 - x[i], x[i]))
        off = (1 - 2 * x[i])[hidden[i].expand(3, -1, -1)].abs().mean().item()
        assert ax.get_title() == f"seen | painted | whole, {100 * off:.0f} % off"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"mask_ratio": 0}, "mask_ratio is a number, above 0 and below 1"),
        ({"squares": 1}, "squares is a whole number, at least 2 and at most 16"),
        ({"min_area": 1.5}, "min_area is a number, at most 1 and above 0|min_area is a number, above 0 and at most 1"),
        ({"flip": -1}, "flip is a number"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("simmim", **settings)


def test_before_a_net_is_known_the_images_size_decides():
    (x, hidden), _ = get_task("simmim").make_batch(torch.rand(2, 1, 96, 120), generator=seeded(), train=True)
    assert x.shape == (2, 1, 96, 96)
    assert hidden.view(2, 6, 16, 6, 16)[:, :, 0, :, 0].flatten(1).sum(1).tolist() == [math.ceil(0.6 * 36)] * 2
