"""Patches against slices taken by hand; which cells are hidden."""

import pytest
import torch

from selfsup_fastai.data.patches import boxes_mask, enlarged, from_patches, random_cells, to_patches, windows


def test_a_patch_is_the_slice_of_the_image_at_its_row_and_column():
    x = torch.rand(2, 3, 12, 20)
    patches = to_patches(x, 4)
    assert patches.shape == (2, 15, 48)
    for i in range(15):
        row, column = 4 * (i // 5), 4 * (i % 5)
        piece = x[:, :, row : row + 4, column : column + 4]
        assert torch.equal(patches[:, i].view(2, 4, 4, 3), piece.permute(0, 2, 3, 1))


@pytest.mark.parametrize("channels, size, h, w", [(1, 4, 8, 12), (3, 7, 14, 7), (2, 1, 3, 5)])
def test_the_image_comes_back(channels, size, h, w):
    x = torch.rand(2, channels, h, w)
    assert torch.equal(from_patches(to_patches(x, size), size, (h, w)), x)


def test_cells_become_their_pixels_in_the_order_of_the_patches():
    cells = torch.arange(6).view(1, 6)
    pixels = enlarged(cells, (2, 3), 4)
    assert pixels.shape == (1, 1, 8, 12)
    assert torch.equal(to_patches(pixels, 4), cells.unsqueeze(-1).expand(1, 6, 16))


@pytest.mark.parametrize("n, hidden", [(16, 12), (9, 1), (9, 8), (4, 4), (4, 0)])
def test_exactly_so_many_cells_of_each_image_are_hidden(n, hidden):
    cells = random_cells(50, n, hidden, torch.Generator().manual_seed(0))
    assert cells.dtype == torch.bool and cells.shape == (50, n) and (cells.sum(1) == hidden).all()


def test_every_cell_is_hidden_equally_often_and_every_image_differs():
    cells = random_cells(2000, 9, 3, torch.Generator().manual_seed(0))
    assert (cells.float().mean(0) - 1 / 3).abs().max() < 4 * (2 / 9 / 2000) ** 0.5
    assert len({tuple(row) for row in cells.tolist()}) == 84  # 3 of 9: every choice occurs


def test_windows_are_slices_of_each_image_and_channel():
    x = torch.rand(2, 3, 12, 20)
    top, left = torch.randint(0, 8, (2, 2, 5, 3), generator=torch.Generator().manual_seed(0))
    out = windows(x, top[..., None] + torch.arange(4), left[..., None] + torch.arange(5))
    assert out.shape == (2, 5, 3, 4, 5)
    for b in range(2):
        for n in range(5):
            for c in range(3):
                r, k = top[b, n, c], left[b, n, c]
                assert torch.equal(out[b, n, c], x[b, c, r : r + 4, k : k + 5])
    alike = windows(x, top[:, :, :1, None] + torch.arange(4), left[:, :, :1, None] + torch.arange(5))
    assert torch.equal(alike[1, 2], x[1, :, top[1, 2, 0] : top[1, 2, 0] + 4, left[1, 2, 0] : left[1, 2, 0] + 5])


def test_boxes_together_are_a_mask_and_those_without_a_side_are_none():
    generator = torch.Generator().manual_seed(0)
    top, left, height, width = (torch.randint(0, most, (20, 3), generator=generator) for most in (12, 9, 5, 6))
    found = boxes_mask((top, left), (height, width), (15, 14))
    assert found.shape == (20, 1, 15, 14) and found.dtype == torch.bool
    for i in range(20):
        expected = torch.zeros(15, 14, dtype=torch.bool)
        for t, r, h, w in zip(*(x[i].tolist() for x in (top, left, height, width))):
            expected[t : t + h, r : r + w] = True
        assert torch.equal(found[i, 0], expected)
