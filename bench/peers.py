"""The same work done with other libraries: batches of files, SimCLR's views, and training by SimCLR, BYOL, rotation."""

import os
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import default_device
from fastai.vision.augment import Resize
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from kornia import augmentation
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, SimCLRTransform
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

WORKERS = 0, os.cpu_count()
JITTER = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)


class Opened(Dataset):
    """Image files, opened as RGB and transformed."""

    def __init__(self, files: list[Path], tfm: Callable[[Image.Image], Tensor | list[Tensor]]):
        self.files, self.tfm = files, tfm

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor | list[Tensor]:
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
    return fastai_loaders(files, size, bs, workers, Normalize.from_stats(*imagenet_stats)).train


def fastai_loaders(files: list[Path], size: int, bs: int, workers: int, batch_tfms=None) -> ImageDataLoaders:
    """fastai's own loaders: resized, cut at random, on the device. All images are there to train, all of one class."""
    settings = dict(valid_pct=0.0, bs=bs, num_workers=workers, item_tfms=Resize(size), batch_tfms=batch_tfms)
    return ImageDataLoaders.from_lists(".", files, ["image"] * len(files), **settings)


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


class LightlySimCLR(nn.Module):
    """lightly's head and loss of SimCLR on a net: two views of each image to the loss.

    As in its examples: the views go through one after the other, the hidden layer is as wide as the net's features. The
    head has a batch norm on the projections, too.
    """

    def __init__(self, net: nn.Module, n_features: int, temperature: float):
        super().__init__()
        self.backbone, self.criterion = net, NTXentLoss(temperature)
        self.projection_head = SimCLRProjectionHead(n_features, n_features, 128)

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.criterion(*(self.projection_head(self.backbone(x)) for x in (x0, x1)))


class LightlyBYOL(nn.Module):
    """lightly's heads and loss of BYOL on a net: two views of each image to the loss.

    As in its examples: widths of 1,024 and 256, and the teacher follows before each step. Its momentum goes to 1 along
    half a cosine, here step by step and not epoch by epoch.
    """

    def __init__(self, net: nn.Module, n_features: int, momentum: float, steps: int):
        super().__init__()
        self.backbone, self.criterion = net, NegativeCosineSimilarity()
        self.projection_head = BYOLProjectionHead(n_features, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum, self.projection_head_momentum = deepcopy(net), deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.momentum, self.steps, self.step = momentum, steps, 0

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        self.follow()
        p0, p1 = (self.prediction_head(self.projection_head(self.backbone(x))) for x in (x0, x1))
        with torch.no_grad():
            z0, z1 = (self.projection_head_momentum(self.backbone_momentum(x)) for x in (x0, x1))
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    def follow(self) -> None:
        """The teacher's step."""
        momentum = cosine_schedule(self.step, self.steps, self.momentum, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        self.step += 1


def lightly_simclr_views(size: int) -> Callable[[Image.Image], list[Tensor]]:
    """Two views as the paper has them on CIFAR, normalized by ImageNet's statistics."""
    return SimCLRTransform(input_size=size, cj_strength=0.5, gaussian_blur=0.0)


def lightly_byol_views(size: int) -> Callable[[Image.Image], list[Tensor]]:
    """The paper's two views without blur, normalized by ImageNet's statistics."""
    makers = BYOLView1Transform, BYOLView2Transform
    return BYOLTransform(*(make(input_size=size, gaussian_blur=0.0) for make in makers))


def lightly_default_views(method: str, size: int) -> Callable[[Image.Image], list[Tensor]]:
    """lightly's transform of a method as its documentation makes it: blur and all, normalized by ImageNet's statistics.

    The number of pixels is the only setting.
    """
    if method == "simclr":
        return SimCLRTransform(input_size=size)
    return BYOLTransform(*(make(input_size=size) for make in (BYOLView1Transform, BYOLView2Transform)))


LIGHTLY = {"simclr": (LightlySimCLR, lightly_simclr_views), "byol": (LightlyBYOL, lightly_byol_views)}
LIGHTLY_STATS = tuple(tuple(IMAGENET_NORMALIZE[name]) for name in ("mean", "std"))


def lightly_batches(views: Callable, files: list[Path], bs: int, workers: int) -> DataLoader:
    """Batches of two views of image files, in random order, on the CPU; whole batches only."""
    return _loader(Opened(files, views), bs, workers, shuffle=True, drop_last=True)


def lightly_steps(net: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable) -> Iterator[None]:
    """An epoch in plain PyTorch, step by step."""
    net.train()
    for views in batches:
        loss = net(*(x.to(default_device(), non_blocking=True) for x in views))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


class TwoViews(Callback):
    """In plain fastai, two views of each image instead of the image; the model says the loss, so no class matters."""

    def __init__(self, size: int):
        self.view = nn.Sequential(kornia_view(size), augmentation.Normalize(*map(torch.tensor, imagenet_stats)))

    def before_batch(self):
        (x,) = self.xb
        x = x.as_subclass(Tensor)
        self.learn.xb = self.view(x), self.view(x)


class FourTurns(Callback):
    """In plain fastai, each image in its four quarter turns, and the number of each turn instead of a class."""

    def before_batch(self):
        (x,) = self.xb
        self.learn.xb = (torch.cat([torch.rot90(x, k, (-2, -1)) for k in range(4)]),)
        self.learn.yb = (torch.arange(4, device=x.device).repeat_interleave(len(x)),)


def fastai_learner(method: str, net: nn.Module, n_features: int, dls: ImageDataLoaders, **settings) -> Learner:
    """What people write who train with plain fastai: its loaders, a callback that makes the question, its learner.

    `net` with lightly's heads and loss for SimCLR and BYOL (`settings` are theirs), with a linear layer for rotation.
    """
    if method == "rotation":
        model = nn.Sequential(net, nn.Linear(n_features, 4))
        return Learner(dls, model, CrossEntropyLossFlat(), cbs=FourTurns())
    make, _ = LIGHTLY[method]
    (height, _) = dls.one_batch()[0].shape[-2:]
    return Learner(dls, make(net, n_features, **settings), lambda loss, _: loss, cbs=TwoViews(height))


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
