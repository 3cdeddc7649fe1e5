"""Masked autoencoders: what is hidden stays hidden, and the loss is the paper's."""

import math

import numpy as np
import pytest
import timm
import torch
from fastai.torch_core import set_seed
from safetensors.torch import load_file
from torch import Tensor

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.masked_vit import patch_size, sincos_positions
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner

DECODER = {"decoder_depth": 1, "decoder_width": 32}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, size=(48, 48), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *size, channels), dtype=np.uint8)


def learner(array: np.ndarray | None = None, encoder=None, **settings):
    array = images() if array is None else array
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0, valid_pct=0.34)
    encoder = encoder or create_encoder("test_vit", size=48, patch_size=8, n_in=array.shape[-1])
    return pretext_learner(dls, "mae", encoder, **{**DECODER, **settings})


@pytest.fixture(scope="module")
def learn():
    return learner()


def question(learn, train: bool = False):
    x = torch.rand(2, 3, 48, 48, generator=seeded(1))
    return x, *learn.task.make_batch(x, generator=seeded(), train=train)


# --- the question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, visible", [(0.75, 9), (0.6, 14), (0.9, 3), (0.5, 18), (0.05, 34)])
def test_the_share_that_is_hidden_is_exact(ratio, visible):
    learn = learner(mask_ratio=ratio)
    _, (_, hidden), (_, same) = question(learn)
    assert hidden.shape == (2, 36) and ((~hidden).sum(1) == visible).all() and hidden is same
    assert learn.task.passes == 1 - ratio and learn.model.n_visible == visible
    assert not torch.equal(hidden[0], hidden[1])


def test_the_target_is_each_patch_of_the_normalized_image_with_mean_0_and_deviation_1(learn):
    x, (seen, _), (target, _) = question(learn)
    assert torch.equal(seen, x)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (learn.encoder.mean, learn.encoder.std))
    for image, patches in zip((x.numpy().astype(np.float64) - mean) / std, target.numpy()):
        for i, patch in enumerate(patches):
            row, column = 8 * (i // 6), 8 * (i % 6)
            piece = image[:, row : row + 8, column : column + 8]
            piece = (piece - piece.mean()) / np.sqrt(piece.var(ddof=1) + 1e-6)
            np.testing.assert_allclose(patch.reshape(8, 8, 3), piece.transpose(1, 2, 0), atol=1e-4)


def test_without_normalized_patches_the_target_is_what_the_net_would_see():
    learn = learner(normalize_patches=False)
    x, _, (target, _) = question(learn)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (learn.encoder.mean, learn.encoder.std))
    first = ((x - mean) / std)[:, :, :8, 8:16].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(target[:, 1], first)


def test_a_flat_patch_asks_for_nothing(learn):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (learn.encoder.mean, learn.encoder.std))
    x = (mean + std / 2).expand(2, 3, 48, 48)  # one value as the net sees it, in all channels
    _, (target, _) = learn.task.make_batch(x, generator=seeded(), train=False)
    assert target.abs().max() < 1e-2


def test_training_crops_and_mirrors_validation_takes_the_center(learn):
    x = torch.rand(20, 3, 61, 47, generator=seeded(1))
    (view, _), _ = learn.task.make_batch(x, generator=seeded(), train=False)
    torch.testing.assert_close(view.mean((2, 3)), x[:, :, 7:54].mean((2, 3)), atol=0.01, rtol=0)
    ramp = torch.linspace(0, 1, 48).expand(200, 1, 48, 48)
    (view, _), _ = learn.task.make_batch(ramp, generator=seeded(), train=True)
    width = (view[:, 0, 0, -1] - view[:, 0, 0, 0]).abs()
    mirrored = (view[:, 0, 0, -1] < view[:, 0, 0, 0]).float().mean().item()
    assert width.min() < 0.6 and width.max() > 0.9 and abs(mirrored - 0.5) < 0.15
    (same, _), _ = get_task("mae", min_area=1, flip=0).make_batch(ramp, generator=seeded(), train=True)
    ahead = same[:, 0, 0, -1] - same[:, 0, 0, 0]
    assert ahead.min() > 0.6  # whole but for the crop's ratio, none mirrored


# --- the network ------------------------------------------------------------------------------------------------------


def test_the_network_cannot_peek(learn):
    x, (_, hidden), _ = question(learn)
    net = learn.model.eval()
    pixels = hidden.view(2, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        answer = net(x, hidden)
        assert answer.shape == (2, 36, 192)
        assert torch.equal(net(torch.where(pixels, 1 - x, x), hidden), answer)
        assert (net(torch.where(pixels, x, 1 - x), hidden) - answer).abs().min(-1).values.max() > 1e-4


def test_every_answer_has_its_place():
    """With the same visible patches elsewhere the same token stands elsewhere: order comes from positions alone."""
    net = learner().model.eval()
    hidden = torch.ones(1, 36, dtype=torch.bool)
    hidden[0, :9] = False
    with torch.no_grad():
        answer = net(torch.rand(1, 3, 48, 48, generator=seeded()), hidden)[0]
        assert torch.cdist(answer, answer)[~torch.eye(36, dtype=torch.bool)].min() > 1e-4
        net.positions.zero_()
        answer = net(torch.rand(1, 3, 48, 48, generator=seeded()), hidden)[0]
        torch.testing.assert_close(answer[9:], answer[9:10].expand(27, -1))  # hidden ones are all alike now


def test_positions_are_sines_kept_fixed_and_saved_under_timms_name(tmp_path):
    learn = learner()
    waves = sincos_positions((6, 6), 64)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    assert torch.equal(learn.encoder.body.pos_embed[0, 1:], waves) and not learn.encoder.body.pos_embed[0, 0].any()
    plain = timm.create_model("test_vit", num_classes=0, img_size=48, patch_size=8)
    plain.load_state_dict(load_file(learn.save_encoder(tmp_path / "mae")), strict=True)
    assert torch.equal(plain.pos_embed, learn.encoder.body.pos_embed)
    again = learner(encoder=learn.encoder)
    assert not again.encoder.body.pos_embed.requires_grad


def test_positions_of_ones_own_are_learned():
    own = create_encoder("test_vit", size=48, patch_size=8)
    learn = learner(encoder=own, fixed_positions=False)
    assert torch.equal(learn.encoder.body.pos_embed, own.body.pos_embed)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    assert not torch.equal(learn.encoder.body.pos_embed, own.body.pos_embed)


@pytest.mark.parametrize("earlier", ["simclr", "published weights"])
def test_a_net_from_an_earlier_round_keeps_its_positions_frozen(earlier):
    own = create_encoder("test_vit", size=48, patch_size=8)
    own.lineage = [{"task": earlier}]
    learn = learner(encoder=own)
    assert torch.equal(learn.encoder.body.pos_embed, own.body.pos_embed)
    assert not learn.encoder.body.pos_embed.requires_grad


# --- the loss ---------------------------------------------------------------------------------------------------------


def case(b: int = 3, n: int = 8, d: int = 12):
    pred, target = torch.randn(2, b, n, d, generator=seeded(), dtype=torch.float64)
    hidden = torch.zeros(b, n, dtype=torch.bool)
    hidden[:, [1, 2, 4, 5, 7]] = True
    return pred.float(), target.float(), hidden


def test_the_loss_is_the_mean_over_hidden_patches_of_their_mean_squared_error():
    pred, target, hidden = case()
    task, rows = get_task("mae"), []
    for p, t, h in zip(pred.tolist(), target.tolist(), hidden.tolist()):
        errors = [sum((a - b) ** 2 for a, b in zip(u, v)) / len(u) for u, v, gone in zip(p, t, h) if gone]
        rows.append(sum(errors) / len(errors))
    assert task.loss(pred, target, hidden, reduction="none").tolist() == pytest.approx(rows, rel=1e-5)
    assert task.loss(pred, target, hidden).item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_visible_patches_do_not_count():
    pred, target, hidden = case()
    pred.requires_grad_(True)
    task = get_task("mae")
    loss = task.loss(pred, target, hidden)
    loss.backward()
    assert (pred.grad[~hidden] == 0).all() and (pred.grad[hidden] != 0).all()
    assert task.loss(pred, torch.where(hidden.unsqueeze(-1), target, target + 5), hidden) == loss
    assert task.loss(pred, torch.where(hidden.unsqueeze(-1), target + 5, target), hidden) > loss + 1


def test_the_right_answer_has_loss_0_and_the_mean_has_loss_1(learn):
    _, _, (target, hidden) = question(learn)
    (metric,) = learn.task.metrics
    assert learn.task.loss(target, target, hidden) == 0 and metric(target, target, hidden) == 1
    nothing = torch.zeros_like(target)
    assert learn.task.loss(nothing, target, hidden).item() == pytest.approx(1, abs=0.01)  # (191 / 192)
    assert metric(nothing, target, hidden) == learn.task.chance() == 0
    half = metric(target / 2, torch.where(hidden.unsqueeze(-1), target, 100), hidden).item()
    assert half == pytest.approx(0.75)  # a quarter of the variance is left


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalize_patches", [True, False])
def test_pictures_show_what_is_seen_what_is_painted_and_the_image(channels, normalize_patches):
    learn = learner(images(channels=channels), normalize_patches=normalize_patches)
    x = torch.rand(2, channels, 48, 48, generator=seeded(1))
    inputs, targets = learn.task.make_batch(x, generator=seeded(), train=False)

    def panels(ax, n: int) -> list[Tensor]:
        picture = torch.from_numpy(np.array(ax.images[0].get_array())).float()
        picture = picture.unsqueeze(-1) if picture.ndim == 2 else picture
        return [picture[:, i * 50 : i * 50 + 48].permute(2, 0, 1) for i in range(n)]

    pixels = inputs[1].view(2, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for i, ax in enumerate(learn.task.show(inputs, targets)):
        seen, whole = panels(ax, 2)
        torch.testing.assert_close(whole, x[i])
        gone = pixels[i].expand_as(seen)
        torch.testing.assert_close(seen[~gone], x[i][~gone])
        assert seen[gone].unique().tolist() == pytest.approx([0.5, 0.7])  # a checkerboard
    for i, ax in enumerate(learn.task.show(inputs, targets, pred=targets[0])):  # the right answer paints the image
        _, painted, whole = panels(ax, 3)
        torch.testing.assert_close(painted, x[i], atol=1e-4, rtol=0)
        assert ax.get_title().endswith("whole, 0 % off")
    wrong = learn.task.painted(*inputs, pred=-targets[0])
    hidden = pixels.expand_as(x)
    torch.testing.assert_close(wrong[~hidden], x[~hidden])
    assert (wrong[hidden] - x[hidden]).abs().mean() > 0.1


# --- what suits -------------------------------------------------------------------------------------------------------


def test_too_few_patches_are_named_with_a_net_of_smaller_ones(capsys):
    with pytest.raises(TaskError, match=r"of 1 patches of 16 .* size=16, patch_size=2\) makes smaller ones"):
        learner(images(size=(16, 16)), create_encoder("test_vit", size=16))
    learner(encoder=create_encoder("test_vit", size=48))
    said = capsys.readouterr().err
    assert "9 patches of 16 pixels are few" in said
    assert "arch=create_encoder('test_vit', size=48, patch_size=6)" in said
    learn = learner(encoder=create_encoder("test_vit", size=48, patch_size=6))  # as it says
    assert "few" not in capsys.readouterr().err and learn.dls.one_batch()[1].shape == (4, 64)


@pytest.mark.parametrize("size, patch", [(40, 4), (48, 8), (128, 16)])
def test_small_images_get_smaller_patches_unless_a_net_is_named(size, patch, capsys):
    dls = UnlabeledDataLoaders.from_array(images(size=(size, size)), size=None, bs=4, num_workers=0, valid_pct=0.34)
    assert patch_size(pretext_learner(dls, "mae", **DECODER).encoder.body) == patch
    assert patch_size(pretext_learner(dls, ["rotation", "mae"], mae=DECODER).encoder.body) == patch
    assert "few" not in capsys.readouterr().err
    assert patch_size(pretext_learner(dls, "mae", "test_vit", **DECODER).encoder.body) == 16


def test_other_nets_are_refused():
    with pytest.raises(TaskError, match=r"plain vision transformer .* resnet10t is none"):
        learner(encoder=create_encoder("resnet10t"))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"mask_ratio": 1}, "mask_ratio is a number, above 0 and below 1"),
        ({"decoder_width": 30}, "multiple of 4 and of the 4 heads; got 30"),
        ({"decoder_width": 132, "decoder_heads": 8}, "of the 8 heads; got 132"),
        ({"decoder_depth": 0}, "decoder_depth is a whole number, at least 1"),
        ({"min_area": 0}, "min_area is a number, above 0"),
        ({"flip": 2}, "flip is a number"),
        ({"normalize_patches": "no"}, "normalize_patches is True or False, got 'no'"),
        ({"fixed_positions": 0}, "fixed_positions is True or False, got 0"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("mae", **settings)


def test_before_a_net_is_known_patches_are_a_fourteenth_of_the_side():
    (x, hidden), (target, _) = get_task("mae").make_batch(torch.rand(2, 3, 60, 70), generator=seeded(), train=True)
    assert x.shape == (2, 3, 60, 60) and hidden.shape == (2, 225) and target.shape == (2, 225, 48)
    assert math.isclose(hidden.float().mean().item(), 0.75, abs_tol=0.01)
