"""The same work done with other libraries: batches of files, and SimCLR's views."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from fastai.data.transforms import Normalize
from fastai.torch_core import default_device
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from kornia import augmentation
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

WORKERS = 0, os.cpu_count()
JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


class Opened(Dataset):
    """Image files, opened as RGB and transformed."""

    def __init__(self, files: list[Path], tfm: Callable[[Image.Image], Tensor]):
        self.files, self.tfm = files, tfm

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self.files[i]) as image:
            return self.tfm(image.convert("RGB"))


class Twice(Dataset):
    """Two views of each image."""

    def __init__(self, images: list, two_views: Callable):
        self.images, self.two_views = images, two_views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.two_views(self.images[i])


def fastai_batches(files: list[Path], size: int, bs: int, workers: int) -> Iterable:
    """Batches of fastai's own loaders: resized, cut at random, normalized, on the device."""
    tfms = dict(item_tfms=Resize(size), batch_tfms=Normalize.from_stats(*imagenet_stats))
    settings = dict(valid_pct=0.0, bs=bs, num_workers=workers)
    return ImageDataLoaders.from_lists(".", files, ["image"] * len(files), **settings, **tfms).train


def torchvision_batches(files: list[Path], size: int, bs: int, workers: int) -> DataLoader:
    """Batches of torch's loader with torchvision's transforms: resized, cut at random, normalized, on the CPU."""
    steps = [transforms.Resize(size), transforms.RandomCrop(size), transforms.ToTensor()]
    tfm = transforms.Compose([*steps, transforms.Normalize(*imagenet_stats)])
    return _loader(Opened(files, tfm), bs, workers, shuffle=True, drop_last=True)


def lightly_views(images: list[Image.Image], size: int, bs: int, workers: int) -> DataLoader:
    """lightly's SimCLR views of PIL images; its blur is Pillow's, without a kernel of a given size."""
    return _loader(Twice(images, SimCLRTransform(input_size=size, normalize=None)), bs, workers)


def torchvision_views(images: list[Tensor], size: int, bs: int, workers: int) -> DataLoader:
    """torchvision's v2 on each uint8 image by itself: on a batch it draws once for all images."""
    blur = v2.GaussianBlur(_kernel(size), (0.1, 2.0))
    steps = [v2.RandomResizedCrop(size, scale=(0.08, 1.0)), v2.RandomHorizontalFlip()]
    steps += [v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.8), v2.RandomGrayscale(p=0.2)]
    view = v2.Compose([*steps, v2.RandomApply([blur], p=0.5), v2.ToDtype(torch.float32, scale=True)])
    return _loader(Twice(images, _Pair(view)), bs, workers)


def kornia_view(size: int) -> nn.Module:
    """kornia's augmentations of a batch of float images.

    Each image draws its own numbers, but the order of the color operations is one for the batch. Crops by resampling:
    faster than by slicing.
    """
    return nn.Sequential(
        augmentation.RandomResizedCrop((size, size), scale=(0.08, 1.0), cropping_mode="resample"),
        augmentation.RandomHorizontalFlip(),
        augmentation.ColorJitter(**JITTER, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        augmentation.RandomGaussianBlur((_kernel(size),) * 2, (0.1, 2.0), p=0.5),
    )


class _Pair:
    """Two draws of one transform."""

    def __init__(self, view: Callable):
        self.view = view

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [self.view(image), self.view(image)]


def _kernel(size: int) -> int:
    """A tenth of the side, made odd."""
    return size // 10 // 2 * 2 + 1


def _loader(data: Dataset, bs: int, workers: int, **kwargs) -> DataLoader:
    """Workers, once started, stay: their start is no part of an epoch."""
    pin = default_device().type == "cuda"
    return DataLoader(data, bs, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin, **kwargs)
