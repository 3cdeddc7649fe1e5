"""I-JEPA: which patches are asked for, what the network may see of them, what it is compared with."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.callbacks.ema import momentum_for
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import get_encoder, load_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.masked_vit import patch_size, sincos_positions, visible_tokens
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint_embedding.ijepa import draw_blocks, found_block, numbers
from selfsup_fastai.pretext.learner import pretext_learner

PREDICTOR = {"predictor_depth": 1, "predictor_width": 32}
POOLED = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learner(encoder=None, n: int = 12, bs: int = 4, size: int = 48, parts: int = 6, **settings):
    coarse = torch.rand(n, 3, parts, parts, generator=seeded(1))
    x = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    array = (x.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=bs, num_workers=0, valid_pct=0.34)
    set_seed(0)
    encoder = encoder or create_encoder("test_vit", size=size, patch_size=8, **POOLED)
    return pretext_learner(dls, "ijepa", encoder=encoder, **{**PREDICTOR, **settings})


@pytest.fixture(scope="module")
def learn():
    return learner()


def question(learn, train: bool = False):
    x = torch.rand(3, 3, 48, 48, generator=seeded(1))
    return learn.task.make_batch(x, generator=seeded(), train=train)


# --- which patches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 6, 7, 8, 10, 14, 16])
def test_blocks_are_drawn_at_once_on_every_grid(grid):
    """The authors' loop never ends on grids of up to 6 x 6, and misses the last row and column on all."""
    generator, n, least = seeded(), grid**2, min(10, grid**2 // 20)
    asked, seen = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    for i in range(40):
        context, targets = draw_blocks((2, 16, 64)[i % 3], grid, 4, generator)
        assert context.shape == (len(targets), n) and targets.shape[1:] == (4, n)
        assert len(set(context.sum(1).tolist())) == 1 and context[0].sum() > least
        assert len(set(targets.sum(2).flatten().tolist())) == 1
        for block in targets[:2].flatten(0, 1):  # a rectangle of a size that the paper allows
            rows, columns = block.view(grid, grid).any(1), block.view(grid, grid).any(0)
            assert block.sum() == rows.sum() * columns.sum()
            sizes = {sides(grid, at) for at in np.linspace(0, 1, 2001)}
            assert (int(rows.sum()), int(columns.sum())) in sizes
        asked |= targets.any(1).any(0)
        seen |= context.any(0)
    assert asked.all() and seen.all()


def sides(grid: int, at: float) -> tuple[int, int]:
    """Of a target block, as the authors' code computes them, without their loops that keep blocks below the grid."""
    cells, ratio = max(1, int(grid**2 * (0.15 + at * 0.05) + 1e-6)), 0.75 + at * 0.75
    return tuple(min(grid, max(1, round(math.sqrt(side)))) for side in (cells * ratio, cells / ratio))


@pytest.mark.parametrize("grid", [8, 14])
def test_what_is_asked_for_is_not_in_the_context(grid):
    generator = seeded()
    for _ in range(10):
        context, targets = draw_blocks(64, grid, 4, generator)
        assert not (context.unsqueeze(1) & targets).any()


def test_where_too_little_would_be_left_fewer_targets_are_taken_away():
    """On 2 x 2 patches four targets of one patch each often cover all of them."""
    context, targets = draw_blocks(200, 2, 4, seeded())
    covered = targets.any(1).all(1)
    assert covered.any() and (context[covered] & targets[covered].any(1)).any(1).all()
    assert not (context & targets[:, 0]).any()  # the first is always taken away
    free = ~covered
    assert not (context[free] & targets[free].any(1)).any()


def test_the_context_is_cut_at_random_not_at_the_bottom():
    context = torch.cat([draw_blocks(64, 14, 4, seeded(i))[0] for i in range(20)]).float().view(-1, 14, 14)
    rows = context.mean((0, 2))
    assert rows[:2].mean().item() == pytest.approx(rows[-2:].mean().item(), rel=0.1)
    assert 0.2 < context.mean() < 0.45


def test_numbers_of_what_is_chosen():
    chosen = torch.tensor([[[0, 1, 1, 0], [1, 0, 0, 1]]]).bool()
    assert numbers(chosen).tolist() == [[[1, 2], [0, 3]]]


def test_a_batch_is_a_view_and_the_two_masks(learn):
    (x, context, targets), (again,) = question(learn)
    assert x.shape == (3, 3, 48, 48) and context.shape == (3, 36) and targets.shape == (3, 4, 36)
    assert again is targets and context.dtype == targets.dtype == torch.bool
    images = torch.rand(50, 3, 61, 47, generator=seeded(1))
    (view, *_), _ = learn.task.make_batch(images, generator=seeded(), train=False)
    torch.testing.assert_close(view.mean((2, 3)), images[:, :, 7:54].mean((2, 3)), atol=0.01, rtol=0)
    ramp = torch.linspace(0, 1, 48).expand(100, 1, 48, 48)
    (view, *_), _ = learn.task.make_batch(ramp, generator=seeded(), train=True)
    width = view[:, 0, 0, -1] - view[:, 0, 0, 0]
    assert width.min() > 0.4 and (width < 0.7).any() and (width > 0.9).any()  # cropped, none mirrored
    torch.testing.assert_close(view[:, :, 0], view[:, :, -1])  # nor recolored


# --- what the network may see -----------------------------------------------------------------------------------------


def pixels(mask: Tensor, patch: int = 8) -> Tensor:
    grid = math.isqrt(mask.shape[-1])
    return mask.view(-1, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def test_predictions_come_from_the_context_alone_each_block_by_itself(learn):
    (x, context, targets), _ = question(learn)
    net = learn.model.eval()
    with torch.no_grad():
        told, true = net(x, context, targets)
        assert told.shape == (3, 4, 36, 64) and true.shape == (3, 36, 64)
        assert not told[~targets].any() and told[targets].abs().amax(-1).min() > 0
        other = torch.where(pixels(context), x, 1 - x)
        assert torch.equal(net(other, context, targets)[0], told)
        assert (net(1 - x, context, targets)[0] - told)[targets].abs().amax(-1).min() > 1e-5
        alone = net(x, context, targets[:, 2:3])[0]
        torch.testing.assert_close(alone[:, 0], told[:, 2])


def test_predictions_differ_by_their_place_alone(learn):
    net = learner().model.eval()
    (x, context, targets), _ = question(learn)
    with torch.no_grad():
        told = net(x, context, targets)[0][0, 0][targets[0, 0]]
        assert torch.cdist(told, told)[~torch.eye(len(told), dtype=torch.bool)].min() > 1e-5
        net.positions.zero_()
        told = net(x, context, targets)[0][0, 0][targets[0, 0]]
        torch.testing.assert_close(told, told[:1].expand_as(told))


def test_the_truth_is_the_teachers_tokens_of_the_whole_image_with_mean_0_and_deviation_1(learn):
    (x, context, targets), _ = question(learn)
    net = learner().model.eval()
    with torch.no_grad():
        for p in net.teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded()))
        tokens = net.teacher.net.body.forward_features(x)
        true = net(x, context, targets)[1]
    expected = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(true, expected, atol=1e-4, rtol=1e-4)


def test_gradient_reaches_student_and_predictor_but_not_the_teacher():
    learn = learner()
    b = learn.dls.one_batch()
    pred = learn.model(*b[:3])
    assert pred[0].requires_grad and not pred[1].requires_grad
    learn.loss_func(pred, b[3]).backward()
    frozen = {"encoder.body.pos_embed"}
    for name, p in learn.model.named_parameters():
        assert (p.grad is None) == (name.startswith("teacher.") or name in frozen), name


def test_a_class_token_is_seen_but_not_asked_for():
    learn = learner(create_encoder("test_vit", size=48, patch_size=8))
    (x, context, targets), _ = question(learn)
    net = learn.model.eval()
    with torch.no_grad():
        told, true = net(x, context, targets)
        assert told.shape == (3, 4, 36, 64) and true.shape == (3, 36, 64)
        seen = visible_tokens(net.encoder.body, x, numbers(context))
        assert seen.shape[1] == 1 + context[0].sum()


# --- the loss ---------------------------------------------------------------------------------------------------------


def case() -> tuple[Tensor, Tensor, Tensor]:
    told = torch.randn(3, 2, 5, 4, generator=seeded(), dtype=torch.float64) * 2
    true = torch.randn(3, 5, 4, generator=seeded(1), dtype=torch.float64)
    asked = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 1]]).bool().expand(3, 2, 5)
    return told, true, asked


def test_the_loss_is_smooth_l1_where_it_is_asked_for():
    told, true, asked = case()
    plain, ours = (told.clone().requires_grad_() for _ in range(2))
    rows = []
    for i in range(3):
        terms = []
        for block in range(2):
            for patch in range(5):
                for d in range(4) if asked[i, block, patch] else ():
                    error = (plain[i, block, patch, d] - true[i, patch, d]).abs()
                    terms.append(0.5 * error**2 if error < 1 else error - 0.5)
        rows.append(sum(terms) / len(terms))
    task = get_task("ijepa")
    loss = task.loss((ours, true), asked)
    loss.backward()
    (sum(rows) / 3).backward()
    torch.testing.assert_close(loss, sum(rows) / 3)
    torch.testing.assert_close(ours.grad, plain.grad)
    torch.testing.assert_close(task.loss((ours, true), asked, reduction="none"), torch.stack(rows))


def test_decoded_is_the_cosine_where_it_was_asked_for():
    told, true, asked = case()
    told = told * asked.unsqueeze(-1)
    found = get_task("ijepa").activation((told, true))
    for i in range(3):
        for patch, blocks in enumerate([[], [0], [0, 1], [], [1]]):
            each = [F.cosine_similarity(told[i, block, patch], true[i, patch], dim=0).item() for block in blocks]
            assert found[i, patch].item() == pytest.approx(sum(each) / len(each) if each else 0)


def test_the_metric_tells_images_apart_not_places():
    b, n, d = 6, 5, 32
    true = F.layer_norm(torch.randn(b, n, d, generator=seeded()), (d,))
    asked = torch.zeros(b, 2, n, dtype=torch.bool)
    asked[:, 0, :2] = asked[:, 1, 2:4] = True
    told = true.unsqueeze(1) * asked.unsqueeze(-1)
    assert found_block((told, true), asked) == 1
    assert found_block((told.roll(1, 0), true), asked) == 0
    half = told.clone()
    half[:, 0] = half[:, 0].roll(1, 0)
    assert found_block((half, true), asked) == 0.5
    place = true.mean(0).expand(b, n, d).unsqueeze(1) * asked.unsqueeze(-1)  # knows the place, nothing of the image
    assert found_block((place, true), asked) == pytest.approx(1 / b)
    collapsed = true[:1, :1].expand(b, n, d)
    assert found_block((collapsed.unsqueeze(1) * asked.unsqueeze(-1), collapsed), asked) == pytest.approx(1 / b)
    assert found_block((told[:1], true[:1]), asked[:1]) == 0


# --- teacher and encoder ----------------------------------------------------------------------------------------------


def test_the_momentum_rises_along_a_line():
    learn, seen = learner(), []

    class Keep(Callback):
        order = 11

        def after_step(self):
            seen.append(self.learn.ema_teacher.momentum())

    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 1e-3, cbs=Keep())
    assert seen[0] == momentum_for(8) and len(seen) == 8
    assert np.diff(seen) == pytest.approx([(1 - seen[0]) / 8] * 7)
    assert all(a < b for a, b in pairwise(seen))


@pytest.mark.parametrize("kwargs", [{}, POOLED])
def test_the_teachers_encoder_is_kept_and_pools_patches(kwargs, tmp_path):
    learn = learner(create_encoder("test_vit", size=48, patch_size=8, **kwargs))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
    teacher = learn.model.teacher.net
    assert learn.encoder is teacher is get_encoder(learn) and learn.model.encoder is not teacher
    saved = load_encoder(learn.save_encoder(tmp_path / "ijepa")).eval()
    x = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        tokens = teacher.eval().body.forward_features(x)[:, teacher.body.num_prefix_tokens :]
        torch.testing.assert_close(teacher(x), tokens.mean(1))
        torch.testing.assert_close(saved(x), teacher(x))
        assert (learn.model.encoder.eval()(x) - teacher(x)).abs().max() > 1e-4


@pytest.mark.parametrize("size, patch", [(40, 4), (48, 8), (128, 16)])
def test_small_images_get_smaller_patches_and_no_class_token(size, patch):
    array = np.random.default_rng(0).integers(0, 256, (6, size, size, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0, valid_pct=0.34)
    body = pretext_learner(dls, "ijepa", **PREDICTOR).encoder.body
    assert patch_size(body) == patch and body.cls_token is None and body.num_prefix_tokens == 0
    assert torch.equal(body.pos_embed[0], sincos_positions(body.patch_embed.grid_size, 192))
    assert not body.pos_embed.requires_grad


def test_a_net_from_an_earlier_round_keeps_its_positions():
    own = create_encoder("test_vit", size=48, patch_size=8)
    own.lineage = [{"task": "mae"}]
    learn = learner(own)
    assert torch.equal(learn.encoder.body.pos_embed, own.body.pos_embed)
    assert not learn.model.encoder.body.pos_embed.requires_grad


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_show_context_blocks_and_how_near_the_answer_came(learn):
    (x, context, targets), (known,) = question(learn)

    def panels(ax, n: int) -> list[Tensor]:
        picture = torch.from_numpy(np.array(ax.images[0].get_array())).float()
        return [picture[:, i * 50 : i * 50 + 48].permute(2, 0, 1) for i in range(n)]

    pred = torch.linspace(0, 1, 36).expand(3, 36)
    for i, ax in enumerate(learn.task.show((x, context, targets), (known,), pred=pred)):
        seen, asked, found = panels(ax, 3)
        visible = pixels(context[i : i + 1])[0].expand(3, -1, -1)
        torch.testing.assert_close(seen[visible], x[i][visible])
        assert seen[~visible].unique().tolist() == pytest.approx([0.5, 0.7])  # a checkerboard
        wanted = pixels(targets[i].any(0)[None])[0].expand(3, -1, -1)
        same = (asked == x[i]) | (asked == 1)  # but for white rims
        assert same[wanted].all() and (asked[wanted] != 1).float().mean() > 0.3
        torch.testing.assert_close(asked[~wanted], (0.3 * x[i] + 0.6)[~wanted])
        cosines = pred[i].view(6, 6).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(3, -1, -1)
        torch.testing.assert_close(found[wanted], cosines[wanted])
        mean = pred[i][targets[i].any(0)].mean()
        assert ax.get_title() == f"seen | asked for | found, cosine {mean:.2f}"
    assert learn.task.show((x, context, targets), (known,))[0].get_title() == "seen | asked for"


# --- what suits -------------------------------------------------------------------------------------------------------


def test_other_nets_and_too_few_patches_are_refused(capsys):
    with pytest.raises(TaskError, match=r"plain vision transformer .* resnet10t is none"):
        learner(create_encoder("resnet10t"))
    with pytest.raises(TaskError, match=r"of 1 patches of 16 .* size=16, patch_size=2\) makes smaller ones"):
        learner(create_encoder("test_vit", size=16), size=16)
    learner(create_encoder("test_vit", size=48))
    assert "9 patches of 16 pixels are few" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"blocks": 0}, "blocks is a whole number, at least 1"),
        ({"predictor_width": 30}, "multiple of 4 and of the 4 heads; got 30"),
        ({"predictor_depth": 0}, "predictor_depth is a whole number, at least 1"),
        ({"predictor_heads": 0}, "predictor_heads is a whole number, at least 1"),
        ({"momentum": -0.1}, "momentum is a number, at least 0"),
        ({"min_area": 0}, "min_area is a number, above 0"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("ijepa", **settings)


def test_before_a_net_is_known_patches_are_a_fourteenth_of_the_side():
    (x, context, _), _ = get_task("ijepa").make_batch(torch.rand(2, 3, 60, 70), generator=seeded(), train=True)
    assert x.shape == (2, 3, 60, 60) and context.shape == (2, 225)


def test_a_short_run_finds_more_blocks():
    learn = learner(n=48, bs=32, parts=2, min_area=0.9)
    same = learn.dls.train.new(shuffle=False)
    with learn.no_bar(), learn.no_logging():
        before = learn.validate(dl=same)[1]
        learn.fit(60, 3e-3)
        assert learn.validate(dl=same)[1] > max(before, 1 / 31) + 0.05
