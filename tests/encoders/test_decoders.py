"""encoders/decoders.py: from a map to a picture of exactly the size that was asked for, and able to paint one."""

import pytest
import torch

from selfsup_fastai.encoders.decoders import MapDecoder, PerPixel, map_decoder
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


@pytest.mark.parametrize("size, left", [((12, 12), 0.1), ((32, 32), 0.85)])
def test_it_learns_to_tell_eight_small_maps_apart(size, left):
    """The map alone says which picture it is, its four places what is where. With bilinear doublings 1 would be left:
    one picture for all."""
    torch.manual_seed(0)
    maps = torch.randn(8, 64, 2, 2)
    x = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4), size, mode="bilinear")
    decoder = MapDecoder(64, (2, 2), 3, size)
    opt = torch.optim.Adam(decoder.parameters(), 3e-3)
    for _ in range(60):
        loss = (decoder(maps) - x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < left * x.var(0, unbiased=False).mean()


def test_pictures_are_painted_at_the_size_of_the_images_not_of_the_network():
    encoder = create_encoder("test_vit")
    encoder.size = 64
    model = PerPixel(encoder, 3).eval()
    assert encoder.fixed_size == 160 and model.decoder.size == (64, 64)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
