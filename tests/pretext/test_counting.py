"""Counting: the parts, the loss against a transcription, and its two trivial solutions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import set_seed
from torch import Tensor, nn

from selfsup_fastai.data.halving import KERNELS, halved
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.predictive.counting import counts_match

LUMA = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int, c: int = 3, h: int = 32, w: int = 32) -> Tensor:
    return torch.rand(b, c, h, w, generator=seeded(1))


def asked(x: Tensor, seed: int = 0, **settings) -> tuple[Tensor, Tensor]:
    (parts,), (other,) = get_task("counting", **settings).make_batch(x, generator=seeded(seed), train=True)
    return parts, other


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", [(32, 32), (47, 61), (33, 48)])
@pytest.mark.parametrize("channels", [1, 3])
def test_quarters_are_the_images_pixels_and_fill_it(channels, h, w):
    x = noise(6, channels, h, w)
    parts, other = asked(x, grey=0)
    half_h, half_w = h // 2, w // 2
    assert parts.shape == (6, 5, channels, half_h, half_w) and other.tolist() == [1, 2, 3, 4, 5, 0]
    top, bottom = (torch.cat([parts[:, i], parts[:, i + 1]], -1) for i in (0, 2))
    assert torch.equal(torch.cat([top, bottom], -2), x[..., : 2 * half_h, : 2 * half_w])


@pytest.mark.parametrize("name, mode", [("nearest", "nearest"), ("area", "area")])
def test_the_fifth_part_is_the_whole_at_half_its_size(name, mode):
    x = noise(4, 3, 33, 40)
    parts, _ = asked(x, grey=0, kernels=name)
    torch.testing.assert_close(parts[:, 4], F.interpolate(x[:, :, :32], scale_factor=0.5, mode=mode))


def test_kernels_are_drawn_for_each_image_all_five_alike():
    x = noise(500, 1, 16, 16)
    parts, _ = asked(x)
    alike = torch.stack([(parts[:, 4] - halved(x, torch.full((500,), k))).flatten(1).abs().amax(1) for k in range(5)])
    assert (alike.amin(0) < 1e-6).all()
    counts = alike.argmin(0).bincount(minlength=len(KERNELS))
    assert (counts - 100).abs().max() < 4 * math.sqrt(500 * 0.2 * 0.8)
    assert not torch.equal(parts[:, 4], asked(x, seed=1)[0][:, 4])


def test_two_thirds_of_the_images_are_grey_in_all_five_parts():
    x = noise(600, 3, 16, 16)
    parts, _ = asked(x, kernels="area")
    grey = (parts == parts[:, :, :1]).flatten(2).all(2)
    assert (grey.all(1) == grey.any(1)).all()
    share = grey.all(1).float().mean().item()
    assert abs(share - 2 / 3) < 4 * math.sqrt(2 / 9 / 600)
    luma = (x * LUMA).sum(1, keepdim=True)
    expected = torch.where(grey[:, :1, None, None], luma.expand_as(x), x)
    torch.testing.assert_close(parts[:, 0], expected[..., :8, :8])
    assert not (asked(x, grey=0)[0] == asked(x, grey=0)[0][:, :, :1]).flatten(2).all(2).any()
    assert (asked(x, grey=1)[0] == asked(x, grey=1)[0][:, :, :1]).all()


def named(x: Tensor, **settings) -> float:
    """Share of the last quarter of the images of which a net of two convolutions, of 9 pixels' view, trained on the
    rest, names the part that was shrunk."""
    set_seed(0)
    convs = [nn.Conv2d(1, 12, 5), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 24, 5), nn.BatchNorm2d(24), nn.ReLU()]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 1))
    optimizer, task, generator = torch.optim.Adam(net.parameters(), 5e-3), get_task("counting", **settings), seeded(3)
    n_train = len(x) * 3 // 4
    for images in [part for _ in range(8) for part in x[:n_train].split(32)]:
        (parts,), _ = task.make_batch(images, generator=generator, train=True)
        scores = net(parts.flatten(0, 1)).view(-1, 5)
        optimizer.zero_grad()
        F.cross_entropy(scores, torch.full((len(images),), 4)).backward()
        optimizer.step()
    (parts,), _ = task.make_batch(x[n_train:], generator=generator, train=False)
    with torch.no_grad():
        return (net.eval()(parts.flatten(0, 1)).view(-1, 5).argmax(1) == 4).float().mean().item()


@pytest.mark.slow
def test_the_part_that_was_shrunk_is_harder_to_name_if_its_kernel_is_drawn():
    """On images that look alike at half their size. The guard narrows the shortcut; the docstring says by how much."""
    waves = torch.fft.rfftfreq(48).square() + torch.fft.fftfreq(48).square().view(-1, 1)
    spectrum = torch.fft.rfft2(torch.randn(300, 1, 48, 48, generator=seeded())) / waves.clamp(min=1 / 48**2).sqrt()
    x = torch.fft.irfft2(spectrum)
    x = (x / x.std((2, 3), keepdim=True) / 5 + 0.5).clamp(0, 1)
    drawn = named(x)
    assert min(named(x, kernels="nearest"), named(x, kernels="area")) > drawn + 0.1


# --- loss -------------------------------------------------------------------------------------------------------------


def transcribed(phi: np.ndarray, margin: float) -> list[float]:
    values = []
    for x in range(len(phi)):
        y = (x + 1) % len(phi)
        total = sum(phi[x, j] for j in range(4))
        equal = sum((phi[x, 4] - total) ** 2)
        apart = sum((phi[y, 4] - total) ** 2)
        values.append(equal + max(0, margin - apart))
    return values


@pytest.mark.parametrize("margin", [10.0, 0.5])
def test_loss_is_the_papers(margin):
    phi = torch.rand(6, 5, 7, generator=seeded(), dtype=torch.float64)
    other = (torch.arange(6) + 1) % 6
    task = get_task("counting", margin=margin)
    expected = transcribed(phi.numpy(), margin)
    assert task.loss(phi, other, reduction="none").tolist() == pytest.approx(expected)
    assert task.loss(phi, other).item() == pytest.approx(np.mean(expected))


def test_counting_nothing_costs_the_margin_and_a_constant_more():
    other, task = torch.tensor([1, 0]), get_task("counting")
    assert task.loss(torch.zeros(2, 5, 100), other).item() == 10
    constant = torch.full((2, 5, 100), 0.1)  # 4 c - c apart from one's own and from the other: 9 c² = 9
    assert task.loss(constant, other).item() == pytest.approx(9 + (10 - 9))
    assert task.loss(10 * constant, other).item() == pytest.approx(900)
    right = torch.zeros(2, 5, 4)  # the first image has three of a kind, the second two of another
    right[0, [0, 1, 3], 0], right[0, 4, 0] = 1, 3
    right[1, 2, 1], right[1, 4, 1] = 2, 2
    assert task.loss(right, other).tolist() == 0  # apart by 9 + 4
    assert counts_match(right, other) == 1


def test_who_counts_nothing_tells_nothing_apart():
    zeros, other = torch.zeros(4, 5, 8), (torch.arange(4) + 1) % 4
    assert counts_match(zeros, other) == get_task("counting").chance() == 0.5
    zeros[0, 4] = 1  # the first image has more than its quarters, and is the other of the last
    assert counts_match(zeros, other) == (0 + 0.5 + 0.5 + 1) / 4


def test_metric_is_half_where_nothing_is_told_apart_by_chance():
    phi = torch.rand(2000, 5, 8, generator=seeded())
    phi[:, 4] = phi[:, 4] * 4  # of the size of a sum
    other = (torch.arange(2000) + 1) % 2000
    assert abs(counts_match(phi, other).item() - get_task("counting").chance()) < 4 * math.sqrt(0.25 / 2000)
    phi[:, 4] = phi[:, :4].sum(1)
    assert counts_match(phi, other) == 1
    phi[:, 4] = phi[:, 4].roll(1, 0)  # everyone has the count of the one before: the next one has mine
    assert counts_match(phi, other) == 0


def test_an_image_alone_has_the_first_term_only():
    phi, alone = torch.rand(1, 5, 8, generator=seeded()), torch.tensor([0])
    value = (phi[0, 4] - phi[0, :4].sum(0)).square().sum().item()
    assert get_task("counting").loss(phi, alone).item() == pytest.approx(value)
    assert counts_match(phi, alone) == 0.5


def test_half_precision_is_left_for_the_sums():
    phi = torch.full((2, 5, 1000), 4.0, dtype=torch.float16)
    loss = get_task("counting").loss(phi, torch.tensor([1, 0]))
    assert loss.item() == 1000 * 12**2  # more than half precision holds


# --- network ----------------------------------------------------------------------------------------------------------


def test_network_sees_each_part_alone_and_never_counts_below_zero():
    set_seed(0)
    encoder = create_encoder(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()))
    net = get_task("counting", counts=6, hidden=10).model(encoder).eval()
    parts = noise(2, 15, 8, 8).view(2, 5, 3, 8, 8)
    with torch.no_grad():
        together = net(parts)
        apart = torch.stack([net(parts[:, j : j + 1])[:, 0] for j in range(5)], 1)
    assert together.shape == (2, 5, 6) and together.min() == 0 and together.max() > 0
    torch.testing.assert_close(together, apart)


def test_settings_out_of_range():
    with pytest.raises(TaskError, match=r"got 'cubic'\. Did you mean 'bicubic'"):
        get_task("counting", kernels="cubic")
    for name in ("margin", "counts", "hidden"):
        with pytest.raises(TaskError, match=f"{name} is a .*got 0"):
            get_task("counting", **{name: 0})
    with pytest.raises(TaskError, match=r"grey is a number, at least 0 and at most 1; got 1\.5"):
        get_task("counting", grey=1.5)


def test_batches_of_one_are_refused_and_passes_are_counted():
    array = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=1, num_workers=0)
    with pytest.raises(TaskError, match="counting compares images of a batch: it needs a batch size of 2 or more"):
        pretext_learner(dls, "counting", "resnet10t")
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=2, num_workers=0)
    for arch, passes in [("vit_tiny_patch16_224", 5), ("resnet10t", 1.25)]:
        assert pretext_learner(dls, "counting", arch).task.passes == passes


def test_pictures_show_the_parts_another_image_and_both_distances():
    x = noise(2, 3, 32, 32)
    (parts,), targets = get_task("counting", grey=0).make_batch(x, generator=seeded(), train=True)
    task = get_task("counting")
    pred = torch.zeros(2, 5, 2)
    pred[0, :4, 0], pred[0, 4] = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 0.1])
    first, second = task.show((parts,), targets, pred=pred)
    assert first.get_title() == "quarters | whole | another\noff by 0.01, from another by 1  ✓"
    assert second.get_title() == "quarters | whole | another\noff by 0, from another by 1  ✓"
    pred[:, 4] = pred[:, 4].flip(0)  # each whole counted as the other should be
    assert task.show((parts,), targets, pred=pred)[0].get_title().endswith("off by 1, from another by 0.01  ✗")
    pred[:, 4] = pred[:, 4].flip(0)
    shown = torch.from_numpy(np.array(first.images[0].get_array())).permute(2, 0, 1)
    assert torch.equal(shown[:, :16, :16], parts[0, 0]) and torch.equal(shown[:, 18:34, 18:34], parts[0, 3])
    assert torch.equal(shown[:, 9:25, 38:54], parts[0, 4]) and torch.equal(shown[:, 9:25, 58:], parts[1, 4])
    alone = task.show((parts[:1],), (torch.tensor([0]),), pred=pred[:1])[0]
    assert alone.get_title() == "quarters | whole\noff by 0.01"
