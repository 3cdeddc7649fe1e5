"""encoders/decoders.py: from a map to a picture of exactly the size that was asked for, and able to paint one."""

import pytest
import torch

from selfsup_fastai.encoders.decoders import map_decoder
from selfsup_fastai.encoders.encoder import create_encoder


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("image, size", [((64, 64), None), ((64, 64), (16, 16)), ((47, 61), None)])
def test_the_size_asked_for_comes_out(arch, image, size):
    encoder = create_encoder(arch, size=64).eval()
    decoder = map_decoder(encoder, 5, image, size).eval()
    with torch.no_grad():
        out = decoder(encoder.feature_map(torch.rand(2, 3, *image)))
    assert out.shape == (2, 5, *(size or image))
    assert encoder.map_shape(image) == encoder.feature_map(torch.rand(1, 3, *image)).shape[1:]


def test_it_learns_to_paint_one_image():
    torch.manual_seed(0)
    encoder = create_encoder("resnet10t", size=32)
    decoder = map_decoder(encoder, 3, (32, 32))
    x = torch.rand(1, 3, 4, 4)
    x = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear").repeat(2, 1, 1, 1)
    opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for _ in range(100):
        loss = (decoder(encoder.feature_map(x)) - x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.1 * x.var()
