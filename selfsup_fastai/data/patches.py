"""Images as grids of square patches, and which of them are hidden."""

import torch
from torch import Tensor


def to_patches(
    x: Tensor,  # (B, C, H, W), H and W multiples of `size`
    size: int,  # Pixels a side
) -> Tensor:  # (B, N, size * size * C): row by row; in a patch pixel by pixel, the channels of a pixel together
    """An image as a row of patches."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // size) * (w // size), size * size * c)


def from_patches(
    patches: Tensor,  # (B, N, size * size * C) as `to_patches` makes them
    size: int,  # Pixels a side
    image: tuple[int, int],  # Height and width of the image
) -> Tensor:  # (B, C, H, W)
    """The image that `to_patches` cut up."""
    b, (h, w) = len(patches), image
    x = patches.reshape(b, h // size, w // size, size, size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


def enlarged(
    cells: Tensor,  # (B, h * w), one value for each cell of a grid
    grid: tuple[int, int],  # h and w
    size: int,  # Pixels a side of a cell
) -> Tensor:  # (B, 1, h * size, w * size)
    """The value of each cell at each of its pixels."""
    cells = cells.unflatten(1, grid).unsqueeze(1)
    return cells.repeat_interleave(size, 2).repeat_interleave(size, 3)


def random_cells(
    b: int,  # Images
    n: int,  # Cells of each
    hidden: int,  # How many of them to hide
    generator: torch.Generator,
) -> Tensor:  # (B, n) bool, True where hidden
    """Exactly `hidden` random cells of every image: those in which uniform noise is highest."""
    noise = torch.rand(b, n, generator=generator, device=generator.device)
    return noise.argsort(1).argsort(1) >= n - hidden


def windows(
    x: Tensor,  # (B, C, H, W)
    rows: Tensor,  # (B, N, C or 1, h) int64: of each window, and channel, the rows of pixels it is made of
    columns: Tensor,  # (B, N, C or 1, w)
) -> Tensor:  # (B, N, C, h, w)
    """N windows cut out of each image, without interpolation."""
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, 1, -1, 1, 1)
    return x[image, channel, rows.unsqueeze(-1), columns.unsqueeze(-2)]


def random_tiles(
    x: Tensor,  # (B, C, S, S)
    size: int,  # Side of a tile, S // 3 at most
    generator: torch.Generator,
    reach: int = 0,  # Channels of a tile are shifted by up to so many pixels each
) -> Tensor:  # (B, 9, C, size, size), row by row
    """A tile at a random place in each cell of a 3 x 3 grid, without interpolation."""
    (b, c, side, _), cell = x.shape, x.shape[-1] // 3
    corner = torch.randint(cell - size + 1, (2, b, 9, 1), generator=generator, device=x.device)
    grid = torch.arange(9, device=x.device).view(1, 9, 1)
    corner = corner + torch.stack([grid // 3, grid % 3]) * cell
    apart = torch.randint(-reach, reach + 1, (2, b, 9, c), generator=generator, device=x.device)
    start = (corner + apart).clamp(0, side - size)  # (2, B, 9, C)
    rows, columns = start[..., None] + torch.arange(size, device=x.device)  # (B, 9, C, size) each
    return windows(x, rows, columns)


def boxes_mask(
    starts: tuple[Tensor, Tensor],  # (B, N) whole numbers each: first row and first column of N boxes in every image
    lengths: tuple[Tensor, Tensor],  # (B, N) each: their heights and widths; a box of height 0 is none
    size: tuple[int, int],  # Height and width of the images
) -> Tensor:  # (B, 1, height, width) bool
    """Whether a pixel lies in one of an image's boxes."""
    spans = []
    for start, length, side in zip(starts, lengths, size):
        at, start = torch.arange(side, device=start.device), start.unsqueeze(-1)
        spans.append((at >= start) & (at < start + length.unsqueeze(-1)))  # (B, N, side)
    return (spans[0].unsqueeze(-1) & spans[1].unsqueeze(-2)).any(1, keepdim=True)
