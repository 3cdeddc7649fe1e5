"""data/colors.py: color taken away so that it cannot give an answer away."""

import pytest
import torch
from torch import Tensor

from selfsup_fastai.data.colors import FRINGES, grey, some_grey, without_fringes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_share_of_the_images_becomes_grey_and_the_rest_stays():
    x = torch.rand(500, 3, 4, 4, generator=seeded())
    out = some_grey(x, 0.3, seeded(1))
    same, made = (out == x).flatten(1).all(1), (out == grey(x)).flatten(1).all(1)
    assert (same ^ made).all() and abs(made.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 500) ** 0.5
    for nothing, p in ((x, 0), (x[:, :1], 0.3)):
        generator = seeded(1)
        assert some_grey(nothing, p, generator) is nothing
        assert torch.equal(generator.get_state(), seeded(1).get_state())


def moved(patches: Tensor, axis: Tensor) -> Tensor:
    """Patches with something of their own in a direction of color."""
    return patches + 0.1 * torch.rand(patches.shape[:2], generator=seeded(9))[..., None, None, None] * axis.view(
        3, 1, 1
    )


def test_one_channel_a_patch_is_left_or_all_but_green_against_magenta():
    x = torch.rand(40, 9, 3, 5, 5, generator=seeded())
    dropped = without_fringes(x, "drop", seeded(1))
    kept = (dropped == x).flatten(3).all(3)
    assert (kept.sum(2) == 1).all() and (kept.float().mean((0, 1)) - 1 / 3).abs().max() < 0.1
    rest = dropped[~kept]
    assert rest.abs().max() <= 0.5 / 255 and rest.std() > 0.25 / 255
    magenta, other = torch.tensor([-1.0, 2, -1]), torch.tensor([1.0, 0, -1])
    projected = without_fringes(x, "project", seeded())
    torch.testing.assert_close(without_fringes(moved(x, magenta), "project", seeded()), projected)
    torch.testing.assert_close(without_fringes(moved(x, other), "project", seeded()), moved(projected, other))
    assert without_fringes(x, "keep", seeded()) is x


@pytest.mark.parametrize("how", FRINGES)
def test_one_channel_has_no_fringes(how):
    x = torch.rand(2, 9, 1, 5, 5)
    assert without_fringes(x, how, seeded()) is x
