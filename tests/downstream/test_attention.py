"""Where nets look: attention against a plain transcription, Grad-CAM against a hand computation, planted answers."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.downstream.attention import (
    attention_weights,
    fused_weights,
    grad_cam,
    looked_at,
    rollout,
    strengths,
)
from selfsup_fastai.downstream.models import DownstreamModel
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError


def images(n=2, side=32, n_in=3):
    return torch.rand(n, n_in, side, side, generator=torch.Generator().manual_seed(0))


def vit(**kwargs):
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch16_224", size=32, patch_size=8, depth=3, **kwargs)


# --- attention ------------------------------------------------------------------------------------------------------


def transcribed(body, x):
    """timm's ViT written out: softmax(q kᵀ / √d) of each block, by hand."""
    x = body._pos_embed(body.patch_embed(x))
    weights = []
    for block in body.blocks:
        z = block.norm1(x)
        b, n, c = z.shape
        heads = block.attn.num_heads
        q, k, v = (t.reshape(b, n, heads, c // heads).transpose(1, 2) for t in block.attn.qkv(z).chunk(3, dim=-1))
        w = torch.exp(q @ k.transpose(-2, -1) / (c // heads) ** 0.5)
        w = w / w.sum(-1, keepdim=True)
        weights.append(w)
        x = x + block.attn.proj((w @ v).transpose(1, 2).reshape(b, n, c))
        x = x + block.mlp(block.norm2(x))
    return weights


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_that_of_a_transcription(fused):
    encoder = vit().train()
    for block in encoder.body.blocks:
        block.attn.fused_attn = fused
    x = images()
    found = attention_weights(encoder, x)
    assert list(found) == ["blocks.0", "blocks.1", "blocks.2"] and encoder.training
    with torch.no_grad():
        wanted = transcribed(encoder.eval().body, x)
    for mine, theirs in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert all(block.attn.fused_attn is fused for block in encoder.body.blocks)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.modules())


@pytest.mark.parametrize("mask", [None, "bool", "bias", "causal"])
def test_weights_of_a_fused_kernel_give_what_the_kernel_gives(mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    kwargs = {
        None: {"scale": 0.7},
        "bool": {"attn_mask": torch.rand(5, 5, generator=generator) > 0.3},
        "bias": {"attn_mask": torch.randn(3, 5, 5, generator=generator)},
        "causal": {"is_causal": True},
    }[mask]
    if mask == "bool":
        kwargs["attn_mask"].fill_diagonal_(True)
    torch.testing.assert_close(fused_weights(q, k, v, **kwargs) @ v, F.scaled_dot_product_attention(q, k, v, **kwargs))


def test_torchs_own_attention_is_heard_too():
    torch.manual_seed(0)
    encoder = create_encoder(torchvision.models.vit_b_16, image_size=32).eval()
    x = images()
    found = attention_weights(encoder, x)
    assert len(found) == 12 and all(w.shape == (2, 12, 5, 5) for w in found.values())
    body = encoder.body
    with torch.no_grad():
        tokens = torch.cat([body.class_token.expand(2, -1, -1), body._process_input(x)], 1)
        z = body.encoder.layers[0].ln_1(tokens + body.encoder.pos_embedding)
        own = body.encoder.layers[0].self_attention
        q, k, _ = F.linear(z, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
        q, k = (t.reshape(2, 5, 12, 64).transpose(1, 2) for t in (q, k))
        wanted = (q @ k.transpose(-2, -1) / 8).softmax(-1)
    torch.testing.assert_close(next(iter(found.values())), wanted, atol=1e-5, rtol=1e-4)


ALL_SEE_ALL = ["deit3_small_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "cait_xxs24_224"]


@pytest.mark.parametrize("arch", [*ALL_SEE_ALL, "vit_relpos_small_patch16_224"])
def test_other_transformers(arch):
    """Registers, positions as biases or turns, a class token that comes last, or none."""
    encoder = create_encoder(arch, size=64)
    found = attention_weights(encoder, images(side=64))
    for weights in found.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        assert looked_at(encoder, weights).shape == (2, 4, 4)


@pytest.mark.parametrize("arch", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_nets_that_do_not_look_everywhere_say_so(arch):
    with pytest.raises(TaskError, match="activation"):
        attention_weights(create_encoder(arch, size=64), images(side=64))


def test_a_planted_token_is_where_the_class_token_looks():
    """Queries and keys that answer to one pattern alone: the bright patch gets all the attention."""
    encoder = vit(class_token=True)
    body = encoder.body
    with torch.no_grad():
        for p in body.parameters():
            p.zero_()
        body.patch_embed.proj.weight[0] = 1.0  # feature 0 of a token: the sum of its pixels
        body.cls_token[..., 1] = 1.0
        for block in body.blocks:
            block.norm1.weight.fill_(1.0)
            dim = body.embed_dim
            block.attn.qkv.weight[:dim:64, 1] = 30.0  # each head asks, if it is the class token
            block.attn.qkv.weight[dim : 2 * dim : 64, 0] = 1.0  # and bright patches answer
    x = torch.zeros(1, 3, 32, 32)
    x[..., 8:16, 24:] = 1.0
    for weights in attention_weights(encoder, x).values():
        seen = looked_at(encoder, weights)[0]
        assert seen.argmax().item() == 1 * 4 + 3 and seen[1, 3] > 0.9


def test_without_a_class_token_it_is_the_mean_over_all_patches():
    encoder = vit(class_token=False, global_pool="avg")
    weights = next(iter(attention_weights(encoder, images()).values()))
    assert weights.shape == (2, 3, 16, 16)
    torch.testing.assert_close(looked_at(encoder, weights).flatten(1), weights.mean(1).mean(1))


def test_rollout_by_hand():
    a = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    b = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]])  # two heads: mean [[.5 .5], [1 0]]
    first, second = rollout([a, b])
    torch.testing.assert_close(first, torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
    step = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    torch.testing.assert_close(second[0], step @ first[0])
    torch.testing.assert_close(second.sum(-1), torch.ones(1, 2))


# --- Grad-CAM -------------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
    return DownstreamModel(create_encoder(body), nn.Linear(5, 3))


@pytest.mark.parametrize("target", [None, 2])
def test_grad_cam_by_hand(target):
    model, x = small_net().train(), images(3, 10, 1)
    cams, out = grad_cam(model, x, ["1", "3"], target)
    assert model.training and all(p.grad is None for p in model.parameters()) and not x.requires_grad
    for i in range(3):
        row = x[i : i + 1]
        chosen = int(out[i].argmax()) if target is None else target
        early = model.encoder.body[:2](row).detach().requires_grad_()
        late = model.encoder.body[2:](early)
        late.retain_grad()
        score = model.head(late.mean((2, 3)))[0, chosen]
        score.backward()
        for name, a in (("1", early), ("3", late)):
            alpha = a.grad[0].mean((1, 2))
            wanted = sum(weight * channel for weight, channel in zip(alpha, a[0])).clamp(min=0)
            torch.testing.assert_close(cams[name][i], wanted.detach(), atol=1e-7, rtol=1e-4)
        assert out[i, chosen].item() == pytest.approx(score.item(), abs=1e-6)


def test_late_layer_of_a_linear_head_has_the_heads_weights():
    """After average pooling the gradient of a class is its weight / (h w): CAM (Zhou et al. 2016) is a special case."""
    model, x = small_net(), images(2, 10, 1)
    cams, _ = grad_cam(model, x, ["3"], 1)
    maps = model.encoder.body(x)
    wanted = F.relu(torch.einsum("c,bchw->bhw", model.head.weight[1], maps)) / 100
    torch.testing.assert_close(cams["3"], wanted.detach(), atol=1e-7, rtol=1e-4)


def test_the_corner_that_decides_is_where_it_peaks():
    """A net whose class 1 speaks of one corner alone (by a map of weights) and of nothing else."""

    class Corner(nn.Module):
        def forward(self, x):
            mask = torch.zeros_like(x)
            mask[..., :4, -4:] = 1
            return x * mask

    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), Corner())
    nn.init.ones_(body[0].weight)
    model = DownstreamModel(create_encoder(body), nn.Linear(1, 2))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    (cam,) = grad_cam(model, torch.ones(1, 1, 16, 16), ["2"], 1)[0].values()
    rows, columns = np.nonzero(cam[0].numpy())
    assert rows.max() <= 3 and columns.min() >= 12 and len(rows) == 16
    (other,) = grad_cam(model, torch.ones(1, 1, 16, 16), ["2"], 0)[0].values()
    assert other.max() == 0  # nothing speaks for the other class


@pytest.mark.parametrize("arch", ["resnet10t", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "convnext_atto"])
def test_grad_cam_of_every_kind_of_net_uses_the_maps_that_the_encoder_names(arch):
    torch.manual_seed(0)
    encoder = create_encoder(arch, n_in=1, size=64).eval()
    model, x = DownstreamModel(encoder, nn.Linear(encoder.num_features, 3)).eval(), images(2, 64, 1)
    model.requires_grad_(False)  # a frozen net can be explained, too
    cams, out = grad_cam(model, x, encoder.layer_names[-2:])
    torch.testing.assert_close(out, model(x))
    assert {name: m.shape for name, m in cams.items()} == {
        name: m.shape[:1] + m.shape[2:] for name, m in encoder.feature_maps(x, encoder.layer_names[-2:]).items()
    }
    if arch == "resnet10t":  # where the last map is what is pooled, CAM again
        maps = encoder.feature_map(x)
        picked = model.head.weight[out.argmax(1)]
        wanted = F.relu(torch.einsum("bc,bchw->bhw", picked, maps)) / maps[0, 0].numel()
        torch.testing.assert_close(cams["layer4"], wanted, atol=1e-6, rtol=1e-3)


def test_a_net_of_two_halves_is_explained_by_both():
    torch.manual_seed(0)
    encoder = create_encoder("resnet10t", split=True).eval()
    model, x = DownstreamModel(encoder, nn.Linear(encoder.num_features, 3)).eval(), images(2, 64)
    cams, out = grad_cam(model, x, ["layer4"])
    maps = encoder.feature_map(x)
    wanted = F.relu(torch.einsum("bc,bchw->bhw", model.head.weight[out.argmax(1)], maps)) / maps[0, 0].numel()
    torch.testing.assert_close(cams["layer4"], wanted.detach(), atol=1e-6, rtol=1e-3)


def test_masks_are_no_class():
    encoder = create_encoder("resnet10t")
    model = DownstreamModel(encoder, nn.Identity())
    model.forward = lambda x: encoder.feature_map(x)
    with pytest.raises(TaskError, match="one output an image"):
        grad_cam(model, images(), ["layer4"])


def test_strength_is_the_mean_magnitude():
    encoder, x = small_net().encoder, images(2, 10, 1)
    found = strengths(encoder, x, ["0", "3"])
    torch.testing.assert_close(found["0"], encoder.body[0](x).abs().mean(1).detach())
    assert found["0"].shape == (2, 10, 10)
