"""The autoencoder is trained once and then stands still; the judge is trained by its loss alone, the repair by its."""

import math

import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import load_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.multi import SeveralTasks
from selfsup_fastai.pretext.predictive.spot_artifacts import SpotNet, cells_told, dropped, spotted, to_pixels

SMALL = {"autoencoder_epochs": 2, "width": 4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(n: int, side: int = 48, channels: int = 3) -> Tensor:
    """Blobs of a few pixels, (n, channels, side, side) in [0, 1]."""
    coarse = torch.rand(n, channels, 6, 6, generator=seeded(1))
    return F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


def small_net() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())


def model(width: int = 4, mean: float | None = None, seed: int = 0) -> SpotNet:
    set_seed(seed)
    encoder = create_encoder(small_net())
    encoder.mean, encoder.std = (None, None) if mean is None else ((mean,) * 3, (0.5,) * 3)
    return SpotNet(encoder, width)


def question(x: Tensor, train: bool = False, seed: int = 0, **settings):
    """The task, (images, kept) and (kept in both pictures,)."""
    task = get_task("spot_artifacts", **{**SMALL, **settings})
    return task, *task.make_batch(x, generator=seeded(seed), train=train)


def loaders(n: int = 16, bs: int = 4):
    array = (smooth(n).permute(0, 2, 3, 1) * 255).byte().numpy()
    return UnlabeledDataLoaders.from_array(array, size=None, bs=bs, valid_pct=0.25, num_workers=0)


def learner(seed: int = 0, path=None, **settings):
    set_seed(seed)
    learn = pretext_learner(loaders(), "spot_artifacts", small_net, path=path, **{**SMALL, **settings})
    learn.remove_cb(ProgressCallback)
    return learn


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- question ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "shape, side", [((48, 48), 48), ((47, 61), 48), ((50, 33), 48), ((64, 90), 64), ((17, 17), 32)]
)
def test_images_are_brought_to_whole_cells(channels, shape, side):
    x = torch.rand(5, channels, *shape, generator=seeded())
    for train in (False, True):
        _, (images, kept), (genuine,) = question(x, train=train)
        assert images.shape == (5, channels, side, side) and kept.shape == (5, 1, side // 16, side // 16)
        assert images.min() >= 0 and images.max() <= 1
        assert torch.equal(genuine[:, :1], torch.ones_like(kept)) and torch.equal(genuine[:, 1:], kept)


def test_validation_asks_about_the_same_crops_as_training_in_their_own_colors():
    x = smooth(40)
    plain = question(x, train=True, color=0)[1][0]
    assert torch.equal(question(x)[1][0], plain) and not torch.equal(question(x, train=True)[1][0], plain)
    torch.testing.assert_close(question(x, crop=1, flip=0)[1][0], x, atol=1e-6, rtol=0)


def test_three_cells_of_ten_are_kept_each_by_itself():
    x = torch.zeros(400, 1, 64, 64)
    for keep in (0.3, 0.8):
        _, (_, kept), _ = question(x, keep=keep)
        assert set(kept.unique().tolist()) == {0.0, 1.0}
        assert abs(kept.mean().item() - keep) < 4 * math.sqrt(keep * (1 - keep) / kept.numel())
        one = kept.mean((0, 1))
        assert (one - keep).abs().max() < 5 * math.sqrt(keep * (1 - keep) / 400)
    assert not torch.equal(question(x, seed=1)[1][1], question(x, seed=2)[1][1])


@pytest.mark.parametrize("keep, kept", [(1e-6, 1), (1 - 1e-6, 3)])
def test_some_cell_is_kept_and_some_is_repaired(keep, kept):
    cells = question(torch.zeros(50, 1, 32, 32), keep=keep)[1][1]
    assert (cells.sum((1, 2, 3)) == kept).all() and len(cells.flatten(1).unique(dim=0)) == 4


def test_without_augmentation_training_pictures_are_the_images():
    x = smooth(6)
    _, (images, _), _ = question(x, train=True, crop=1, flip=0, color=0)
    torch.testing.assert_close(images, x, atol=1e-5, rtol=0)
    _, (images, _), _ = question(x, train=True, crop=1, flip=1.0, color=0)
    torch.testing.assert_close(images, x.flip(-1), atol=1e-5, rtol=0)
    _, (images, _), _ = question(x, train=True)
    assert all((a - b).abs().mean() > 0.01 for a, b in zip(images, x))


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"keep": 0}, "keep is a number, above 0 and below 1; got 0"),
        ({"keep": 1}, "keep is a number, above 0 and below 1; got 1"),
        ({"autoencoder_epochs": 0}, "autoencoder_epochs is a whole number, at least 1; got 0"),
        ({"width": 1.5}, "width is a whole number, at least 1; got 1.5"),
        ({"kept_weight": -1}, "kept_weight is a number, at least 0; got -1"),
        ({"mask_weight": -1}, "mask_weight is a number, at least 0; got -1"),
        ({"crop": 0}, "crop is a number, above 0 and at most 1; got 0"),
        ({"flip": 2}, "flip is a number, at least 0 and at most 1; got 2"),
        ({"color": 3}, "color is a number, at least 0 and at most 2; got 3"),
        ({"rate": 0}, "rate is a number, above 0; got 0"),
        ({"momentum": 1}, "momentum is a number, at least 0 and below 1; got 1"),
    ],
)
def test_settings_out_of_range_are_named(setting, said):
    with pytest.raises(TaskError) as error:
        get_task("spot_artifacts", **setting)
    assert said in str(error.value)


def test_what_it_cannot_do_is_said():
    with pytest.raises(TaskError, match="at least 17 pixels a side, these are 16 x 40"):
        get_task("spot_artifacts").batch(torch.zeros(2, 3, 16, 40), generator=seeded(), train=True)
    with pytest.raises(TaskError, match="spot_artifacts cannot be combined with other tasks: it trains an autoenc"):
        SeveralTasks([get_task("rotation"), get_task("spot_artifacts")])


# --- dropping and repairing -------------------------------------------------------------------------------------------


def test_dropped_cells_are_the_mean_of_their_neighborhood_and_kept_ones_stay():
    code = torch.rand(2, 5, 4, 4, generator=seeded())
    kept = (torch.rand(2, 1, 4, 4, generator=seeded(1)) < 0.4).float()
    out = dropped(code, kept)
    for b in range(2):
        for i in range(4):
            for j in range(4):
                around = code[b, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].mean((1, 2))
                expected = code[b, :, i, j] if kept[b, 0, i, j] else around
                torch.testing.assert_close(out[b, :, i, j], expected)


def test_a_repair_changes_dropped_cells_only():
    net = model()
    x, kept = torch.randn(3, 16, 12, 12, generator=seeded()), torch.zeros(3, 1, 3, 3)
    kept[:, :, 1] = 1
    at = F.interpolate(kept, (12, 12)).bool().expand_as(x)
    out = net.repairs[2](x, F.interpolate(kept, (12, 12)))
    assert torch.equal(out[at], x[at]) and (out[~at] != x[~at]).float().mean() > 0.99


def test_with_everything_kept_the_repaired_picture_is_the_decoded_one():
    net, x = model(), smooth(3)
    pictures = net(x, torch.ones(3, 1, 3, 3))[:, :, :3]
    assert torch.equal(pictures[:, 0], pictures[:, 1])
    pictures = net(x, torch.zeros(3, 1, 3, 3))[:, :, :3]
    assert (pictures[:, 0] - pictures[:, 1]).abs().mean() > 1e-3


def test_there_is_a_repair_layer_at_each_scale_of_the_decoder():
    net, x = model(width=3).eval(), smooth(2)
    kept = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 0, 0]]).expand(2, 1, 3, 3)
    y, sides = dropped(net.autoencoder.encode(x), kept), []
    for repair, layer in zip(net.repairs, net.autoencoder.decoder, strict=True):
        mask = kept.repeat_interleave(y.shape[-1] // 3, 2).repeat_interleave(y.shape[-1] // 3, 3)
        sides.append(tuple(y.shape[1:3]))
        y = layer(y + (1 - mask) * repair.layers(torch.cat([y, mask], 1)))
    assert sides == [(48, 3), (24, 6), (12, 12), (6, 24), (3, 48)]
    torch.testing.assert_close(net(x, kept)[:, 1, :3], (torch.tanh(y) + 1) / 2)


def test_paper_widths():
    net = SpotNet(create_encoder(small_net()), get_task("spot_artifacts").width)
    assert net.autoencoder.encode(torch.zeros(1, 3, 96, 96)).shape == (1, 512, 6, 6)
    convs = [m for m in net.autoencoder.encoder.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        (32, 3, 1),
        (64, 2, 2),
        (128, 2, 2),
        (256, 2, 2),
        (512, 2, 2),
    ]


# --- two players ------------------------------------------------------------------------------------------------------


def test_real_is_the_decoded_picture_and_not_the_photo():
    net, x = model(mean=0.3).eval(), smooth(4)
    kept = question(x)[1][1]
    pred = net(x, kept)
    decoded = to_pixels(net.autoencoder.decoder(net.autoencoder.encoder(2 * x - 1)))
    assert torch.equal(pred[:, 0, :3], decoded) and (decoded - x).abs().mean() > 0.05
    features = net.encoder.feature_map((decoded - 0.3) / 0.5)
    verdict = net.judge.real(features.mean((2, 3)))[:, 0]
    torch.testing.assert_close(pred[:, 0, 4], verdict.view(-1, 1, 1).expand(4, 48, 48), atol=1e-5, rtol=1e-4)
    where = net.judge.kept(features)[:, 0].repeat_interleave(4, 1).repeat_interleave(4, 2)  # 12 x 12 -> 48 x 48
    torch.testing.assert_close(pred[:, 0, 5], where, atol=1e-5, rtol=1e-4)


def test_the_judge_sees_both_pictures_in_one_batch_and_its_statistics_move_once():
    net, (_, (x, kept), _) = model(), question(smooth(4))
    twin = model()
    pred = net(x, kept)
    seen = []
    twin.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    twin.judge(pred[:, :, :3].detach())
    assert same(weights(net.encoder), twin.encoder)
    assert int(net.encoder.body[1].num_batches_tracked) == 1
    torch.testing.assert_close(pred[:, :, -3], pred[:, :, -1])  # the rival is judged by the same judge


def test_each_player_is_moved_by_its_own_loss_alone():
    net = model()
    task, (x, kept), targets = question(smooth(4))
    judge, repairs = dict(net.judge.named_parameters()), dict(net.repairs.named_parameters())

    def gradients(weights_of_planes) -> tuple[dict, dict]:
        net.zero_grad()
        pred = net(x, kept)
        (pred * weights_of_planes).sum().backward()
        touched = [{n for n, p in params.items() if p.grad is not None and p.grad.any()} for params in (judge, repairs)]
        assert all(p.grad is None for p in net.autoencoder.parameters())
        return touched

    planes = torch.randn(4, 2, 7, 48, 48, generator=seeded())
    verdicts = torch.zeros(7, 1, 1).index_fill_(0, torch.tensor([4, 5]), 1)
    rival_and_pixels = 1 - verdicts
    of_judge, of_repairs = gradients(planes * verdicts)
    assert "real.weight" in of_judge and "encoder.body.0.weight" in of_judge and not of_repairs
    of_judge, of_repairs = gradients(planes * rival_and_pixels)
    assert not of_judge and {n.split(".")[0] for n in of_repairs} == set("01234")
    net.zero_grad()
    task.loss(net(x, kept), *targets).backward()
    assert all(p.grad is not None for p in [*judge.values(), *repairs.values()])


def test_one_step_pulls_the_players_apart():
    """The sum of both losses moves each as its own loss would have: gradients are compared with two separate passes."""
    net = model()
    task, (x, kept), targets = question(smooth(4))
    start = weights(net)
    net.zero_grad()
    task.loss(net(x, kept), *targets).backward()
    together = {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}

    def formula():
        net.load_state_dict(start)
        net.zero_grad()
        code = net.autoencoder.encode(x)
        pictures = torch.stack([net.autoencoder.decode(code), net.repaired(code, kept)], 1)
        real, where = net.judge(pictures)
        logits, is_real = real[..., 0, 0], torch.tensor([1.0, 0.0]).expand(4, 2)
        mask = targets[0].repeat_interleave(16, 2).repeat_interleave(16, 3)
        judge = F.binary_cross_entropy_with_logits(logits, is_real)
        judge = judge + 0.1 * F.binary_cross_entropy_with_logits(where, mask)
        error = (((2 * pictures[:, 1] - 1) - (2 * x - 1)) ** 2).mean(1)
        at = mask[:, 1]
        error = ((error * at).sum((1, 2)) / at.sum((1, 2))).mean()
        return judge, F.binary_cross_entropy_with_logits(logits, 1 - is_real) + 30 * error

    for at, part in enumerate((net.judge, net.repairs)):
        formula()[at].backward()
        prefix = ("judge.", "repairs.")[at]
        for name, p in part.named_parameters():
            torch.testing.assert_close(together[prefix + name], p.grad, atol=1e-5, rtol=1e-3)


def test_repairs_look_the_same_in_training_and_in_validation():
    """The judge learns on what the repair layers make in training and is validated on what they make then."""
    net, (_, (x, kept), _) = model(), question(smooth(4))
    for _ in range(3):
        net(torch.rand(4, 3, 48, 48, generator=seeded(9)), kept)
    assert torch.equal(net.train()(x, kept)[:, :, :3], net.eval()(x, kept)[:, :, :3])


def test_both_players_take_small_steps_without_much_momentum():
    learn, seen = learner(), []
    learn.model.autoencoder.is_trained.fill_(True)
    learn.create_opt()
    step = learn.opt.step

    def watched(*args, **kwargs):
        seen.append((learn.opt.hypers[0]["lr"], learn.opt.hypers[0]["mom"]))
        return step(*args, **kwargs)

    learn.opt.step = watched
    learn.fit_one_cycle(2, 3e-3)
    rates, momenta = zip(*seen)
    assert rates == pytest.approx([0.1 * rate for rate in learn.recorder.lrs]) and max(rates) > 2e-4
    assert set(momenta) == {0.5}


# --- loss, metric -----------------------------------------------------------------------------------------------------


def log1pexp(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_loss_is_what_the_paper_says():
    task, (x, kept), (genuine,) = question(smooth(3), mask_weight=0.2, kept_weight=7.0)
    kept[2] = genuine[2, 1] = 0  # nothing is kept: no error to be had
    with torch.no_grad():
        pred = model()(x, kept)
    pred[:, :, 4:] = torch.randn(3, 2, 3, 1, 1, generator=seeded(2))
    pred[:, :, 5] = torch.randn(3, 2, 48, 48, generator=seeded(4))
    rows = []
    for i in range(3):
        real, rival = pred[i, :, 4, 0, 0].tolist(), pred[i, :, 6, 0, 0].tolist()
        verdict = (log1pexp(-real[0]) + log1pexp(real[1])) / 2
        fooled = (log1pexp(rival[0]) + log1pexp(-rival[1])) / 2
        where, squares, repaired = 0.0, [], 2 * pred[i, 1, :3] - 1
        for v in range(2):
            for r in range(48):
                for c in range(48):
                    z, truth = float(pred[i, v, 5, r, c]), float(genuine[i, v, r // 16, c // 16])
                    where += log1pexp(-z if truth else z) / (2 * 48 * 48)
                    if v == 1 and truth:
                        squares.append(((repaired[:, r, c] - (2 * x[i, :, r, c] - 1)) ** 2).mean())
        rows.append(verdict + 0.2 * where + fooled + 7 * (float(np.mean(squares)) if squares else 0))
    assert task.loss(pred, genuine, reduction="none").tolist() == pytest.approx(rows, rel=1e-4)
    assert task.loss(pred, genuine).item() == pytest.approx(sum(rows) / 3, rel=1e-4)


def test_on_a_coarser_map_the_cells_are_averaged():
    """The cross-entropy at pixels is that at the map's places, where the target is the share of kept cells."""
    task, _, (genuine,) = question(torch.zeros(2, 3, 64, 64), mask_weight=1, kept_weight=0)
    where = torch.randn(2, 2, 2, 2, generator=seeded(5))
    pred = torch.zeros(2, 2, 7, 64, 64)
    pred[:, :, 5] = F.interpolate(where, (64, 64), mode="nearest-exact")
    expected = F.binary_cross_entropy_with_logits(where, F.avg_pool2d(genuine, 2)) + 2 * math.log(2)
    assert task.loss(pred, genuine).item() == pytest.approx(expected.item(), rel=1e-5)


def test_pictures_are_counted_each_by_itself():
    pred = torch.rand(2, 2, 7, 16, 16, generator=seeded())
    pred[:, :, 4] = torch.tensor([[2.0, -1.0], [-0.5, -0.1]]).view(2, 2, 1, 1)
    right, of = spotted(pred, None)
    assert (int(right), int(of)) == (3, 4)
    probabilities = get_task("spot_artifacts").activation(pred)
    assert torch.equal(probabilities[:, :, :4], pred[:, :, :4])
    torch.testing.assert_close(probabilities[:, :, 4:], pred[:, :, 4:].sigmoid())


def test_cells_are_compared_in_pairs_within_a_repaired_picture():
    pred, genuine = torch.randn(5, 2, 7, 48, 48, generator=seeded()), torch.ones(5, 2, 3, 3)
    genuine[:, 1] = question(torch.zeros(5, 1, 48, 48))[1][1][:, 0]
    pred[0, 1, 5] = 1.0  # all alike: half of the pairs
    told, pairs = 0.0, 0
    for i in range(5):
        believed = [
            (pred[i, 1, 5, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].mean(), r, c) for r, c in np.ndindex(3, 3)
        ]
        for a, r, c in believed:
            for b, s, d in believed:
                if genuine[i, 1, r, c] and not genuine[i, 1, s, d]:
                    pairs, told = pairs + 1, told + (1.0 if a > b else 0.5 if a == b else 0.0)
    right, of = cells_told(pred, genuine)
    assert (float(right), int(of)) == (told, pairs)
    task = get_task("spot_artifacts")
    cells, pictures = task.metrics
    assert (cells.name, pictures.name) == ("cells_told", "spotted") and task.chance() == 0.5
    pred[:] = 0
    assert cells(pred, genuine) == 0.5  # chance
    pred[:, :, 5] = genuine.repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert cells(pred, genuine) == 1


# --- the first stage --------------------------------------------------------------------------------------------------


def test_the_autoencoder_is_trained_once_before_everything_else(capsys, tmp_path):
    learn = learner(path=tmp_path)
    part = learn.model.autoencoder
    before = weights(part)
    learn.validate()
    learn.get_preds()
    learn.show_results()
    assert same(before, part) and not part.is_trained
    learn.fit(1)
    assert part.is_trained and not any(torch.equal(p, before[n]) for n, p in part.named_parameters())
    assert capsys.readouterr().err.count("First the autoencoder is trained: 2 epochs.") == 1
    after = weights(part)
    learn.fit_one_cycle(1, 1e-2)
    learn.unfreeze()
    learn.fit(1, 1e-2)
    learn.save("here")
    assert same(after, part)
    other = learner(seed=1, path=tmp_path)
    other.load("here")
    other.fit(1, 1e-2)
    assert same(after, other.model.autoencoder)
    assert "trained first" not in capsys.readouterr().err


def test_the_learning_rate_finder_finds_it_trained_and_leaves_it_so(capsys, tmp_path):
    learn = learner(path=tmp_path)
    learn.lr_find(num_it=6, show_plot=False)
    after = weights(learn.model.autoencoder)
    assert after["is_trained"]
    learn.fit(1)
    assert same(after, learn.model.autoencoder)
    assert capsys.readouterr().err.count("First the autoencoder") == 1


def test_it_stays_in_evaluation_mode_and_out_of_the_optimizer():
    learn = learner()
    learn.fit(1)
    part = learn.model.autoencoder
    learn.model.train()
    assert not any(m.training for m in part.modules()) and learn.model.judge.training
    moved = {id(p) for group in learn.opt.param_lists for p in group}
    assert not any(id(p) in moved or p.requires_grad or p.grad is not None for p in part.parameters())
    assert {id(p) for p in learn.model.judge.parameters()} <= moved


def test_the_first_stage_learns_to_decode():
    learn = learner(autoencoder_epochs=12, crop=1, color=0)
    learn.train_first.step_size = 1e-2  # for a short test; the task's own is the paper's
    part, x = learn.model.autoencoder, smooth(8)
    before = part.own_loss(x, None).item()
    learn.fit(1)
    assert part.own_loss(x, None).item() < 0.85 * before


def test_the_first_stage_leaves_the_draws_of_the_second_as_they_are():
    def drawn(stages: bool) -> Tensor:
        learn = learner()
        if not stages:
            learn.model.autoencoder.is_trained.fill_(True)
        seen = []
        learn.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].as_subclass(Tensor).clone()))
        learn.fit(2)
        return torch.stack(seen), learn.model.autoencoder

    (with_stage, trained), (without, _) = drawn(True), drawn(False)
    assert torch.equal(with_stage, without)
    assert same(weights(trained), drawn(True)[1])


def test_a_stage_that_breaks_off_is_done_again():
    learn = learner()
    part = learn.model.autoencoder
    with pytest.raises(KeyboardInterrupt), part.learning():
        assert part.training and all(p.requires_grad for p in part.parameters())
        raise KeyboardInterrupt
    assert not part.is_trained and not part.training and not any(p.requires_grad for p in part.parameters())


# --- product, pictures ------------------------------------------------------------------------------------------------


def test_the_encoder_that_is_saved_is_the_discriminator(tmp_path):
    learn = learner()
    learn.fit(1, 1e-2)
    saved = load_encoder(learn.save_encoder(tmp_path / "encoder"), module=small_net())
    judge = learn.model.judge.encoder
    assert learn.encoder is judge and same(weights(saved), judge)
    keys = set(learn.model.state_dict())
    assert not any(key.startswith("encoder.") for key in keys)  # kept once


def test_pictures_show_what_is_dropped_and_what_the_network_makes_of_it():
    learn = learner()
    learn.fit(1)
    dl = learn.dls.valid
    b = dl.one_batch()
    (x, kept), _ = dl.question(b)
    for ax, image, cells in zip(dl.show_batch(b), x, kept):
        shown = torch.tensor(np.array(ax.images[0].get_array())).permute(2, 0, 1)
        assert shown.shape == (3, 48, 98) and torch.equal(shown[:, :, :48], image)
        mask = F.interpolate(cells[None], (48, 48))[0].bool().expand(3, 48, 48)
        assert torch.equal(shown[:, :, 50:][mask], image[mask])
        assert sorted(set(shown[:, :, 50:][~mask].tolist())) == pytest.approx([0.5, 0.7])  # a checkerboard
        assert ax.get_title() == f"photo | kept, {cells.mean():.0%}"
    answers = learn.get_preds(dl=[b], with_decoded=True)[2]
    answers[0, :, 4], answers[1, :, 4] = torch.tensor([0.9, 0.2]).view(2, 1, 1), torch.tensor([0.9, 0.6]).view(2, 1, 1)
    answers[1, 1, 5] = torch.linspace(0, 1, 48)  # the left half is believed to be repaired
    axes = dl.show_results(b, answers)
    assert [ax.get_title() for ax in axes[:2]] == [
        "kept | decoded, called real | repaired, called repaired | found  ✓",
        "kept | decoded, called real | repaired, called real | found  ✗",
    ]
    shown = torch.tensor(np.array(axes[1].images[0].get_array())).permute(2, 0, 1)
    assert torch.equal(shown[:, :, 50:98], answers[1, 0, :3]) and torch.equal(shown[:, :, 100:148], answers[1, 1, :3])
    assert sorted(set(shown[:, :, 150:174].flatten().tolist())) == pytest.approx([0.5, 0.7])
    assert torch.equal(shown[:, :, 174:], answers[1, 1, :3, :, 24:])
