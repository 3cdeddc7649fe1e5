"""Vision transformers on some of their patches: against timm itself, and on pixels that must not count."""

import pytest
import timm
import torch
from torch import nn

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.masked_vit import (
    check_takes_some_patches,
    covered_tokens,
    patch_size,
    patched_side,
    set_sincos_positions,
    sincos_positions,
    takes_some_patches,
    visible_tokens,
)
from selfsup_fastai.errors import TaskError

PLAIN = [  # class token; average pooling; map pooling; positions without the class token; two and five prefix tokens
    ("test_vit", {"img_size": 64}, 1),
    ("test_vit2", {"img_size": 64}, 1),
    ("test_vit3", {"img_size": 64}, 1),
    ("deit3_small_patch16_224", {"img_size": 64, "depth": 2}, 1),
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, 2),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2}, 5),
    ("vit_base_patch16_clip_224", {"img_size": 64, "depth": 2, "embed_dim": 48}, 1),
    ("test_vit", {"img_size": 64, "class_token": False, "global_pool": "avg"}, 0),
    ("test_vit", {"dynamic_img_size": True}, 1),
    ("test_vit", {"img_size": 64, "pos_embed": "none"}, 1),
]


def body(name: str, kwargs: dict) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, **kwargs).eval()
    for p in net.parameters():  # layer scales near 0 would hide what the blocks do
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else nn.init.constant_(p, 0.5)
    return net


def images(name: str, kwargs: dict, seed: int = 0):
    side = kwargs.get("img_size", 64)
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, kwargs, prefix", PLAIN)
def test_with_all_patches_it_is_timms_own_network(name, kwargs, prefix):
    net, x = body(name, kwargs), images(name, kwargs)
    assert takes_some_patches(net)
    with torch.no_grad():
        expected = net.forward_features(x)
        n = expected.shape[1] - prefix
        everything = torch.arange(n).expand(2, n)
        torch.testing.assert_close(visible_tokens(net, x, everything), expected)
        none = torch.zeros(2, n, dtype=torch.bool)
        token = torch.full((net.embed_dim,), 9.0)
        torch.testing.assert_close(covered_tokens(net, x, none, token), expected)
        one = none.clone()
        one[:, 3] = True
        assert (covered_tokens(net, x, one, token) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name, kwargs, prefix", PLAIN)
def test_only_the_visible_patches_enter_each_with_its_place(name, kwargs, prefix):
    net, x = body(name, kwargs), images(name, kwargs)
    patch, side = patch_size(net), x.shape[-1]
    n = (side // patch) ** 2
    keep = torch.tensor([[0, 5, n - 1], [2, 3, 7]])
    hidden = torch.ones(2, n, dtype=torch.bool).scatter(1, keep, False)
    pixels = hidden.view(2, 1, side // patch, -1).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    other = torch.where(pixels, images(name, kwargs, seed=1), x)
    token = torch.ones(net.embed_dim)
    with torch.no_grad():
        out = visible_tokens(net, x, keep)
        assert out.shape == (2, prefix + 3, net.embed_dim)
        assert torch.equal(out, visible_tokens(net, other, keep))
        covered = covered_tokens(net, x, hidden, token)
        assert torch.equal(covered, covered_tokens(net, other, hidden, token))
        changed = x.clone()
        changed[:, :, :patch, :patch] += 1  # patch 0: seen in the first image, hidden in the second
        moved = (visible_tokens(net, changed, keep) - out).abs().amax((1, 2))
        assert moved[0] > 1e-4 and moved[1] == 0
        if net.pos_embed is not None:
            shuffled = visible_tokens(net, x, keep.flip(1))  # the order of `keep` says nothing, the place does
            back = torch.cat([shuffled[:, :prefix], shuffled[:, prefix:].flip(1)], 1)
            torch.testing.assert_close(back, out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_r_s16_p8_224", "vit_tiny_patch16_dinov3_qkvb", "test_vit_relpos"]
)
def test_nets_whose_patches_know_their_neighbors_are_refused(name):
    encoder = create_encoder(name)
    assert not takes_some_patches(encoder.body)
    with pytest.raises(TaskError, match=f"(?s)mae.*'vit_tiny_patch16_224'.*{name} is none"):
        check_takes_some_patches(encoder, "mae")


def test_sincos_positions_are_the_papers():
    waves = sincos_positions((2, 3), 8)
    for row in range(2):
        for column in range(3):
            expected = []
            for place in (column, row):
                for wave in (torch.sin, torch.cos):
                    expected += [wave(torch.tensor(place / 10_000 ** (i / 2))).item() for i in range(2)]
            assert waves[row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(TaskError, match="multiple of 4, not 30"):
        sincos_positions((2, 3), 30)


@pytest.mark.parametrize("name, kwargs, prefix", PLAIN[:-1])
def test_positions_are_set_for_patches_and_0_for_what_stands_before_them(name, kwargs, prefix):
    net = body(name, kwargs)
    set_sincos_positions(net)
    waves = sincos_positions(net.patch_embed.grid_size, net.embed_dim)
    before = len(net.pos_embed[0]) - len(waves)
    assert before == (0 if net.no_embed_class else prefix)
    assert torch.equal(net.pos_embed[0, before:], waves) and not net.pos_embed[0, :before].any()


def test_sides_that_patches_cover():
    assert patched_side(create_encoder("test_vit", size=40)) == 48  # made larger rather than a rim left out
    assert patched_side(create_encoder("test_vit", size=40, patch_size=8)) == 40
    any_size = create_encoder("test_vit", size=96, dynamic_img_size=True)
    any_size.size = 100
    assert patched_side(any_size) == 96
