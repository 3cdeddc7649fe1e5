"""What holds for every pretext task: a line in TASKS is enough to be tested here.

`Numbered` stands for the tasks that need an index, `Paired` for those with two inputs.
"""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize, RandomSplitter, get_image_files
from fastai.learner import load_learner
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Flip, RandomResizedCrop, Resize, aug_transforms
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fastcore.foundation import L
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.data.blocks import UnlabeledBlock
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import load_encoder, read_card
from selfsup_fastai.encoders.heads import linear_head
from selfsup_fastai.errors import DataError, TaskError, UnknownNameError
from selfsup_fastai.pretext import TASKS, get_task, task_class
from selfsup_fastai.pretext.base import PerView, PretextTask, per_image
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.loader import PretextDL, PretextTransform
from selfsup_fastai.seeding import VALID_SEED

SMALL = {
    "jigsaw": {"n_permutations": 8},
    "counting": {"counts": 32, "hidden": 64},
    "exemplar": {"contrast": 1.2, "power": 1.2, "factor": 1.1, "offset": 0.02},
    "relative_position": {"color": "keep", "shrink": 0, "patch_features": 32, "hidden": 32},
    "aet": {"transform": "affine", "turn": 20},
    "mae": {"mask_ratio": 0.5, "min_area": 0.9, "flip": 0, "decoder_depth": 1, "decoder_width": 32},
    "simmim": {"mask_ratio": 0.3, "min_area": 0.9, "flip": 0},
    "spot_artifacts": {
        "autoencoder_epochs": 2,
        "width": 4,
        "keep": 0.6,
        "mask_weight": 10,
        "kept_weight": 3,
        "rate": 1,
    },
    "autoencoder": {"error": "squared"},
    "models_genesis": {"curve": 0, "paint": 0},
    "npid": {"temperature": 0.5, "dim": 16, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "pirl": {"temperature": 0.5, "dim": 16, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "dicom_tags": {"min_area": 0.9, "window": 0.1},
    "slice_order": {"weight": 3.0, "min_area": 0.9, "hidden": 64},
    "micle": {"temperature": 0.5, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "moco": {"temperature": 0.7, "dim": 16, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "mocov3": {"dim": 16, "hidden": 32, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "simclr": {"temperature": 0.5, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "nnclr": {"temperature": 0.5, "dim": 16, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "byol": {"dim": 16, "hidden": 32, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "simsiam": {"dim": 32, "bottleneck": 8, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "barlow_twins": {"dim": 16, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "vicreg": {"dim": 16, "views": {"strength": 0.2, "scale": [0.5, 1.0]}},
    "dino": {
        "n_small": 2,
        "border": 0.5,
        "prototypes": 32,
        "center_momentum": 0,
        "hidden": 32,
        "dim": 16,
        "views": {"strength": 0.2},
    },
    "ijepa": {"predictor_depth": 1, "predictor_width": 32, "min_area": 0.9},
    "deep_cluster": {"clusters": 4, "every": 20, "sobel": False, "views": {"scale": [0.5, 1.0]}},
    "nat": {"dim": 16, "sobel": False, "views": {"scale": [0.5, 1.0]}},
    "swav": {"n_small": 2, "border": 0.5, "frozen_epochs": 0, "views": {"strength": 0.2}},
}  # settings with which a task can learn something in twenty steps
ARCH: dict[str, str] = {"mae": "test_vit", "ijepa": "test_vit"}  # of tasks for which `tiny` will not do
FROZEN = {
    "mae": ["body.pos_embed"],
    "ijepa": ["body.pos_embed"],
    "mocov3": ["body.patch_embed.proj.weight", "body.patch_embed.proj.bias"],
}  # what a paper keeps fixed in its encoder
FILLED = ("moco",)  # of which the loss is against a queue that starts with random directions, far from everything
CENTERED = ("dino",)  # of which the loss is against a running average that starts at 0


class Numbered(PretextTask):
    """Which image of the data set is this?"""

    name = "numbered"
    paper = "nobody 2000"
    needs = ("index",)

    def setup(self, dls, encoder):
        self.n = len(dls.train_ds)

    def make_batch(self, x, *, generator, train, idx=None):
        return (x.unsqueeze(1),), (idx.unsqueeze(1),)

    def model(self, encoder):
        return PerView(encoder, linear_head(encoder.num_features, self.n))

    def loss(self, pred, target, reduction="mean"):
        return per_image(F.cross_entropy(pred.transpose(1, 2), target, reduction="none"), reduction)


class Paired(PretextTask):
    """Is the second picture the negative of the first?

    Two inputs, of which Normalize may touch the first.
    """

    name = "paired"
    paper = "nobody 2000"
    n_inp = 2
    normalized = (True, False)
    passes = 2

    def make_batch(self, x, *, generator, train, idx=None):
        negative = torch.randint(2, (len(x),), generator=generator, device=x.device)
        second = torch.where(negative.bool().view(-1, 1, 1, 1), 1 - x, x)
        return (x, second.unsqueeze(1)), (negative,)

    def model(self, encoder):
        return Pair(encoder)

    def loss(self, pred, target, reduction="mean"):
        return per_image(F.cross_entropy(pred, target, reduction="none"), reduction)


class Pair(nn.Module):
    """(B, C, H, W) and (B, 1, C, H, W) -> (B, 2)."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, linear_head(2 * encoder.num_features, 2)

    def forward(self, first, second):
        return self.head(torch.cat([self.encoder(first), self.encoder(second[:, 0])], 1))


CASES = [*TASKS, Numbered, Paired]


def need_channels(task, channels: int) -> None:
    """Skip what a task says it cannot do."""
    if isinstance(task, str) and channels not in task_class(task).channels:
        pytest.skip(f"{task} takes images of {task_class(task).channels} channels")


def tiny() -> nn.Module:
    """A network of two layers: what is tested here is not the encoder."""
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())


def pictures(n: int, size: tuple[int, int] = (40, 40), channels: int = 3, seed: int = 0) -> np.ndarray:
    """Variations of one scene, (n, H, W, C) of uint8: it has an up, and parts that differ."""
    rng = np.random.default_rng(seed)
    scene, own = rng.integers(0, 256, (5, 5, channels)), rng.integers(0, 256, (n, 5, 5, channels))
    coarse = (0.6 * scene + 0.4 * own).astype(np.uint8)
    images = [Image.fromarray(c if channels == 3 else c[..., 0]) for c in coarse]
    return np.stack([np.asarray(i.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, -1) for i in images])


def siblings(n: int) -> np.ndarray:
    """Pictures of which `facts` are true: two of one patient are alike but for a band, brighter from place to place."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (n, 8, 8, 3))[np.arange(n) // 2 * 2]
    coarse[:, 3:6] = 36 * (np.arange(n) % 8)[:, None, None, None]
    return np.stack([np.asarray(Image.fromarray(c.astype(np.uint8)).resize((40, 40))) for c in coarse])


def loaders(array: np.ndarray, bs: int = 4, valid_pct: float = 0.25, **kwargs) -> UnlabeledDataLoaders:
    kwargs = {"size": None, "num_workers": 0, **kwargs}
    return UnlabeledDataLoaders.from_array(array, bs=bs, valid_pct=valid_pct, **kwargs)


def learner(task, dls=None, seed: int = 0, **kwargs):
    set_seed(seed)
    kwargs = kwargs if "encoder" in kwargs else {"arch": ARCH.get(task, tiny), **kwargs}
    dls = loaders(pictures(32)) if dls is None else dls
    give_facts(task, dls)
    settings = SMALL.get(task, {}) if isinstance(task, str) else {}
    return without_bar(pretext_learner(dls, task, **settings, **kwargs))


def give_facts(task, dls) -> None:
    """To loaders that have none, for tasks that ask for such: pairs of one patient, volumes of eight slices."""
    if task is not None and "facts" in get_task(task).needs:
        for dl in dls.loaders:
            if vars(dl).get("facts") is None:
                dl.facts = facts(len(dl.dataset))


def facts(n: int) -> pd.DataFrame:
    """Of n images."""
    at = np.arange(n)
    owner = at // 2
    tags = {"modality": np.array(["CT", "MR"])[owner % 2], "view": np.array(["PA", "", "LL"])[owner % 3]}
    return pd.DataFrame({"patient": owner, "volume": at // 8, "place": at % 8, **tags})


def without_bar(learn):
    learn.remove_cb(ProgressCallback)
    return learn


def plain(array: np.ndarray) -> Tensor:
    """What a task is given: (B, C, H, W) in [0, 1]."""
    return torch.tensor(array).permute(0, 3, 1, 2).float() / 255


def items(dl) -> np.ndarray:
    return np.stack(list(dl.dataset.items)).reshape(len(dl.dataset), *dl.dataset.items[0].shape[:2], -1)


def ask(learn, x: Tensor, seed: int, bs: int, train: bool, new: bool = False):
    """The questions about images `x` in batches of `bs`, as (inputs, targets), computed without any loader.

    `new`: nothing is known of the images; else `facts` of as many as there are.
    """
    generator, task = torch.Generator().manual_seed(seed), learn.task
    known = task.known(facts(len(x))) if "facts" in task.needs and not new else None
    companions = None if new else task.companions(facts(len(x)))
    for index in torch.arange(len(x)).split(bs):
        others = None if companions is None else x[companions.of(index.tolist(), seed)]
        extras = task.wanted(known if known is None else known[index], others)
        yield task.make_batch(x[index], generator=generator, train=train, idx=index, **extras)


def parts(pred) -> tuple[Tensor, ...]:
    """The tensors that a prediction is made of."""
    return pred if isinstance(pred, tuple) else (pred,)


def same_parts(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))


def as_fed(inputs, learn) -> list[Tensor]:
    """The inputs of a question as the network gets them: normalized where that is due."""
    return [standardize(x, learn) if due else x for x, due in zip(inputs, learn.task.normalized, strict=True)]


def standardize(x: Tensor, learn) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (learn.encoder.mean, learn.encoder.std))
    return (x - mean) / std


def assert_question(b, inputs, targets, learn) -> None:
    """A batch of a loader is the question `inputs`, normalized where that is due, with the answer `targets`."""
    n_inp = learn.task.n_inp
    assert len(b) == n_inp + len(targets) and len(targets) > 0
    for got, expected, due in zip(b[:n_inp], as_fed(inputs, learn), learn.task.normalized, strict=True):
        assert isinstance(got, TensorImage) == due
        torch.testing.assert_close(got.as_subclass(Tensor), expected, atol=2e-6, rtol=0)
    for got, target in zip(b[n_inp:], targets):
        assert not isinstance(got, TensorImage)
        assert same(got.as_subclass(Tensor), target)


def same(got: Tensor, target: Tensor) -> bool:
    """Equal; computed numbers may differ in the last bits, which depend on where in the memory an image lies."""
    if not target.is_floating_point():
        return torch.equal(got, target)
    return got.shape == target.shape and torch.allclose(got, target, atol=1e-5 * max(1, target.abs().max()), rtol=0)


def flat(learn) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def movable(learn) -> Tensor:
    """What the optimizer moves: without parts that are frozen, which may be trained before everything else."""
    return torch.cat([p.detach().flatten() for p in learn.model.parameters() if p.requires_grad])


def same_batches(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(t, u) for x, y in zip(a, b) for t, u in zip(x, y))


# --- the batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels, size", [(3, (40, 40)), (1, (40, 40)), (3, (47, 61))])
@pytest.mark.parametrize("task", CASES)
def test_batches_are_the_tasks_own_question(task, channels, size):
    need_channels(task, channels)
    learn = learner(task, loaders(pictures(32, size, channels)))
    for dl, train in [(learn.dls.valid, False), (learn.dls.train.new(get_idxs=lambda: range(24)), True)]:
        batches, x = list(dl), plain(items(dl))
        assert dl.pass_seed != VALID_SEED if train else dl.pass_seed == VALID_SEED
        questions = list(ask(learn, x, dl.pass_seed, 4, train))
        assert len(batches) == len(questions) == len(x) // 4
        for b, (inputs, targets) in zip(batches, questions):
            assert {len(t) for t in (*inputs, *targets)} == {4}
            assert {len(part) for part in parts(learn.model(*b[: learn.dls.n_inp]))} == {4}
            pred = learn.model(*b[: learn.dls.n_inp])
            assert {len(t) for t in (pred if isinstance(pred, tuple) else (pred,))} == {4}
            assert_question(b, inputs, targets, learn)


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_are_those_of_the_training_images(channels):
    learn = learner("rotation", loaders(pictures(32, channels=channels)))
    x = items(learn.dls.train) / 255.0
    np.testing.assert_allclose(learn.encoder.mean, x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(learn.encoder.std, x.std((0, 1, 2)), rtol=1e-5)
    assert learn.encoder.in_chans == channels and learn.encoder.size == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_index_is_the_images_place_in_its_data_set(workers):
    learn = learner(Numbered, loaders(pictures(32), num_workers=workers))
    for dl, shuffled in [(learn.dls.train, True), (learn.dls.valid, False)]:
        batches = list(dl)
        x, index = (torch.cat([b[i] for b in batches]).as_subclass(Tensor) for i in range(2))
        torch.testing.assert_close(x[:, 0], standardize(plain(items(dl)), learn)[index[:, 0]], atol=2e-6, rtol=0)
        assert sorted(index[:, 0].tolist()) == list(range(len(dl.dataset)))
        assert (index[:, 0].diff() != 1).any() == shuffled


# --- verbs of the learner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ds_idx", [0, 1])
@pytest.mark.parametrize("task", CASES)
def test_get_preds_gives_one_row_an_image_in_order(task, ds_idx):
    learn = learner(task, loaders(pictures(30), valid_pct=0.3))  # 21 and 9 images in batches of 4: the last has 1
    learn.fit(1)
    dl = learn.dls[ds_idx]
    x = plain(items(dl))
    with_all = {"ds_idx": ds_idx, "with_input": True, "with_decoded": True, "with_loss": True}
    inputs, preds, targets, decoded, losses = learn.get_preds(**with_all)
    targets = targets if isinstance(targets, tuple) else (targets,)
    assert len(x) == (21, 9)[ds_idx] and {len(t) for t in (*parts(preds), *targets, decoded)} == {len(x)}
    assert losses.shape == (len(x),)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    assert len(inputs) == learn.task.n_inp
    at = 0
    for images, expected in ask(learn, x, VALID_SEED, dl.bs, train=ds_idx == 0):
        rows = slice(at, at + len(expected[0]))
        at += len(expected[0])
        images = as_fed(images, learn)
        for got, image in zip(inputs, images, strict=True):
            torch.testing.assert_close(got[rows].as_subclass(Tensor), image, atol=2e-6, rtol=0)
        assert all(same(got[rows], target) for got, target in zip(targets, expected, strict=True))
        with torch.no_grad():
            raw = learn.model.eval()(*images)
            own = tuple(part[rows] for part in parts(preds))
            torch.testing.assert_close(own, parts(learn.task.activation(raw)), atol=1e-5, rtol=1e-4)
            own = own if isinstance(preds, tuple) else own[0]
            torch.testing.assert_close(decoded[rows], learn.task.decode(own), atol=1e-5, rtol=1e-4)
            loss = learn.task.loss(raw, *expected, reduction="none")
            torch.testing.assert_close(losses[rows], loss, atol=1e-5, rtol=1e-4)
            mean = learn.task.loss(raw, *expected)
            assert mean.shape == () and mean.item() == pytest.approx(loss.mean().item(), abs=1e-5)
    if ds_idx == 1:
        assert learn.validate()[0] == pytest.approx(losses.mean().item(), abs=1e-5)


@pytest.mark.parametrize("task", CASES)
def test_show_batch_and_show_results_draw_a_picture_for_each_image(task):
    learn = learner(task)
    inputs, targets = learn.show_batch(show=False)
    assert inputs[0].shape[0] == targets[0].shape[0] == 4 and type(inputs[0]) is Tensor
    if learn.task.normalized[0]:  # shown as it was before Normalize
        assert inputs[0].min() >= -1e-5 and inputs[0].max() <= 1 + 1e-5
    axes = learn.show_batch()
    assert len(axes) == 4 and len(learn.show_batch(max_n=2)) == 2
    assert len(learn.show_batch(unique=True, max_n=3)) == 3
    learn.dls.valid.show_results(learn.dls.valid.one_batch(), learn.get_preds(with_decoded=True)[2], ctxs=axes)
    for ax in axes:
        first, last = (ax.images[i].get_array() for i in (0, -1))
        assert len(ax.images) == 2 and ax.get_title() and first.min() >= 0 and last.max() <= 1
        assert np.ptp(first) > 0.1 and np.ptp(last) > 0.1
    learn.show_results(max_n=3)


def test_a_question_about_one_image_again_and_again():
    learn = learner("jigsaw")
    (tiles,), (order,) = learn.show_batch(unique=True, max_n=5, show=False)
    assert len(tiles) == 5 and len(order.unique()) > 1
    (one,), _ = learner(Numbered).show_batch(unique=True, max_n=5, show=False)
    assert all(torch.equal(one[0], image) for image in one)


@pytest.mark.parametrize("task", CASES)
def test_validation_repeats_whatever_came_before(task):
    learn = learner(task)
    before = list(learn.dls.valid)
    assert learn.validate() == learn.validate()
    learn.show_batch(unique=True)
    learn.dls.train.one_batch()
    learn.fit(1)
    torch.rand(3)
    assert same_batches(list(learn.dls.valid), before)
    values = learn.validate()
    learn.dls.train.one_batch()
    assert learn.validate() == values


@pytest.mark.parametrize("task", CASES)
def test_every_epoch_draws_anew(task):
    learn = learner(task)
    first, second = list(learn.dls.train), list(learn.dls.train)
    assert not torch.equal(first[0][0], second[0][0])  # another order
    if task in TASKS:
        fixed = learn.dls.train.new(get_idxs=lambda: range(24))
        first, second = list(fixed), list(fixed)
        assert all(not torch.equal(a[0], b[0]) for a, b in zip(first, second))  # other questions about the same images


@pytest.mark.parametrize("task", CASES)
def test_a_seed_fixes_the_weights_bit_for_bit(task):
    def trained(seed: int) -> Tensor:
        set_seed(seed)
        dls = loaders(pictures(32), size=33, item_tfms=RandomResizedCrop(33), batch_tfms=aug_transforms(size=33))
        learn = learner(task, dls, seed=seed)
        learn.fit_one_cycle(2, 1e-2)
        return flat(learn)

    first = trained(1)
    assert torch.equal(first, trained(1))
    assert not torch.equal(first, trained(2))


@pytest.mark.parametrize("task", CASES)
def test_two_workers_ask_what_none_asks(task):
    def batches(workers: int) -> list:
        set_seed(3)
        dls = loaders(pictures(16), size=33, item_tfms=RandomResizedCrop(33), num_workers=workers)
        learn = learner(task, dls)
        return [*learn.dls.train, *learn.dls.valid]

    none, two = batches(0), batches(2)
    assert len(none) == 4 and same_batches(none, two)


@pytest.mark.parametrize("task", CASES)
def test_lr_find_and_one_cycle_run_and_the_finder_leaves_no_trace(task, tmp_path):
    learn = learner(task, path=tmp_path)
    before = movable(learn)
    assert 1e-8 < learn.lr_find(num_it=12, show_plot=False).valley < 10
    assert torch.equal(movable(learn), before)
    assert (learn.epochs_done, learn.images_seen) == (0, 0)
    learn.fit_one_cycle(2, 1e-3)
    assert len(learn.recorder.losses) == 12 and np.isfinite(learn.recorder.values).all()
    learn.validate()
    learn.get_preds()
    assert learn.epochs_done == 2 and learn.images_seen == pytest.approx(2 * 24 * learn.task.passes)


@pytest.mark.parametrize("n", [5, 40, 65])
@pytest.mark.parametrize("task", CASES)
def test_an_epoch_moves_the_weights_however_few_the_images(task, n):
    learn = learner(task, loaders(pictures(n), bs=64, valid_pct=0.02))
    before = flat(learn)
    learn.fit(1, 1e-2)
    assert len(learn.dls.valid_ds) == 1 and learn.dls.train.bs == n - 1
    moved = flat(learn) - before
    assert torch.isfinite(moved).all() and (moved != 0).float().mean() > 0.9


@pytest.mark.parametrize("task", CASES)
def test_gradient_reaches_every_parameter_of_the_encoder(task):
    learn = learner(task)
    b = learn.dls.train.one_batch()
    learn.loss_func(learn.model(*b[: learn.dls.n_inp]), *b[learn.dls.n_inp :]).backward()
    biases_before_norm = (".0.bias", ".3.bias")  # which the norm takes away again
    for name, p in learn.model.encoder.named_parameters():  # the one that is trained
        if name in FROZEN.get(task, ()):
            assert not p.requires_grad
            continue
        assert p.requires_grad and p.grad is not None
        assert name.endswith(biases_before_norm) or (p.grad != 0).any(), name


@pytest.mark.parametrize("task", TASKS)
def test_what_lies_behind_the_last_map_is_trained_or_named(task, capsys):
    """This net has half of its parameters there. They get a gradient unless the task says that it trains maps only."""
    if ARCH.get(task):
        pytest.skip(f"{task} does not take convnets")
    learn = learner(task, loaders(pictures(6), bs=4), arch="mobilenetv3_small_050")
    b = learn.dls.train.one_batch()
    learn.loss_func(learn.model(*b[: learn.dls.n_inp]), *b[learn.dls.n_inp :]).backward()
    missed = [name for name, p in learn.model.encoder.named_parameters() if p.grad is None]
    said = f"of mobilenetv3_small_050 lies behind its last map, where {task} does not train it"
    if learn.task.by_map:
        assert missed == learn.encoder.behind_map() and {name.split(".")[-2] for name in missed} == {"conv_head"}
        assert f"52% {said}" in capsys.readouterr().err
    else:
        assert not missed and said not in capsys.readouterr().err


@pytest.mark.parametrize("task", CASES)
def test_twenty_steps_lower_the_loss(task):
    dls = loaders(siblings(33) if "facts" in get_task(task).needs else pictures(33), bs=32, valid_pct=0.02)
    for dl, valid in zip(dls.loaders, (False, True)):
        dl.facts = facts(33)[dls.items_df["is_valid"] == valid]
    learn = learner(task, dls)
    same_question = learn.dls.train.new(shuffle=False)
    if task in FILLED:
        learn.fit(1, 0.0)
    before = learn.validate(dl=same_question)[0]
    learn.fit(20, 1e-2)
    assert len(learn.recorder.losses) == 20
    if task in CENTERED:
        assert learn.recorder.losses[-1] < learn.recorder.losses[4] - 0.05
        return
    assert learn.validate(dl=same_question)[0] < before - min(0.05, before / 5)  # squared errors start below 0.05


@pytest.mark.parametrize("channels, size", [(1, (40, 40)), (3, (40, 40)), (1, (47, 61)), (3, (61, 47))])
@pytest.mark.parametrize("task", CASES)
def test_batches_of_two_of_any_shape_train(task, channels, size):
    need_channels(task, channels)
    learn = learner(task, loaders(pictures(8, size, channels), bs=2))
    before = flat(learn)
    learn.fit(1, 1e-2)
    assert len(learn.recorder.losses) == 3 and torch.isfinite(flat(learn)).all()
    assert not torch.equal(flat(learn), before)
    assert {len(part) for part in parts(learn.get_preds()[0])} == {2}


@pytest.mark.parametrize("task", TASKS)
def test_a_vision_transformer_takes_a_step(task):
    learn = learner(task, loaders(pictures(6, (48, 48)), bs=4), arch="vit_tiny_patch16_224")
    assert learn.encoder.fixed_size == 48
    before = {name: p.detach().clone() for name, p in learn.encoder.named_parameters()}
    learn.fit(1, 1e-3)
    unmoved = [name for name, p in learn.encoder.named_parameters() if torch.equal(p, before[name])]
    assert len(learn.recorder.losses) == 1 and unmoved == FROZEN.get(task, [])


# --- one image, files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CASES)
def test_predict_asks_about_one_image_as_validation_does(task, color_folder):
    file = sorted(color_folder.iterdir())[7]
    pixels = np.asarray(Image.open(file))
    learn = learner(task)
    learn.fit(1)
    ((images, expected),) = ask(learn, plain(pixels[None]), VALID_SEED, 1, train=False, new=True)
    with torch.no_grad():
        pred = learn.task.activation(learn.model.eval()(*as_fed(images, learn)))
    for item in (file, str(file), pixels, Image.open(file)):
        answer = learn.predict(item)
        for got, image in zip(answer.inputs, images, strict=True):
            torch.testing.assert_close(got, image, atol=1e-5, rtol=0)
        assert all(same(got, target) for got, target in zip(answer.targets, expected, strict=True))
        torch.testing.assert_close(answer.pred, pred, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(answer.decoded, learn.task.decode(pred), atol=1e-5, rtol=1e-4)
    (ax,) = answer.show()
    assert len(ax.images) == 1 and ax.get_title()


@pytest.mark.parametrize("task", CASES)
def test_exported_learner_predicts_the_same(task, tmp_path):
    learn = learner(task, path=tmp_path)
    learn.fit(1)
    new = list(pictures(6, seed=5))
    expected = learn.get_preds(dl=learn.dls.test_dl(new))
    learn.export("learner.pkl")
    loaded = without_bar(load_learner(tmp_path / "learner.pkl"))
    again = loaded.get_preds(dl=loaded.dls.test_dl(new))
    for got, want in zip(L(again).concat(), L(expected).concat(), strict=True):
        assert len(got) == 6 and torch.equal(got, want)
    assert loaded.task.settings() == learn.task.settings()
    torch.testing.assert_close(loaded.predict(new[2]).pred, learn.predict(new[2]).pred)
    learn.fit(1)  # the exported one goes on


@pytest.mark.parametrize("task", CASES)
def test_saved_learner_is_loaded_as_it_was(task, tmp_path):
    learn = learner(task, path=tmp_path)
    learn.fit(1, 1e-2)
    values, preds = learn.validate(), learn.get_preds()[0]
    learn.save("here")
    learn.fit(1, 1e-1)
    assert not same_parts(learn.get_preds()[0], preds)
    learn.load("here")
    assert learn.validate() == values and same_parts(learn.get_preds()[0], preds)
    assert {f.name for f in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize("task", CASES)
def test_saved_encoder_gives_equal_features_and_tells_its_story(task, tmp_path):
    dls = loaders(pictures(32))
    learn = learner(task, dls)
    learn.fit(2, 1e-2)
    learn.fit(1, 1e-2)
    last = dict(zip(learn.recorder.metric_names[1:], learn.final_record))
    learn.show_results()  # the numbers of what comes after the last epoch are not the card's
    file = learn.save_encoder(tmp_path / "encoder")
    encoder, x = load_encoder(file, module=tiny()), torch.rand(3, learn.encoder.in_chans, 40, 40)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), learn.encoder.eval()(x))
    card = read_card(file)
    assert card["task"] == learn.task.name and card["settings"] == learn.task.settings() and card["epochs"] == 3
    assert card["images"] == round(3 * 24 * learn.task.passes)
    assert card["data"]["images"] == [24, 8]
    assert {"train_loss", "valid_loss", *(m.__name__ for m in learn.task.metrics)} <= set(last)
    assert card["metrics"] == {name: value for name, value in last.items() if value is not None}
    assert card["lineage"] == [{k: card[k] for k in ("task", "settings", "epochs", "images", "data")}]
    np.testing.assert_allclose(card["mean"], learn.encoder.mean)


def test_rotation_counts_four_images_for_each(tmp_path):
    learn = learner("rotation")
    learn.fit(2)
    assert read_card(learn.save_encoder(tmp_path / "encoder"))["images"] == 4 * 24 * 2


def test_card_and_learner_hold_no_file_name(color_folder, tmp_path):
    dls = UnlabeledDataLoaders.from_folder(color_folder, size=32, bs=16, num_workers=0)
    learn = learner("rotation", dls, arch="resnet10t", path=tmp_path)
    learn.fit(1)
    raw = learn.save_encoder(tmp_path / "encoder").read_bytes()
    learn.export("learner.pkl")
    raw += (tmp_path / "learner.pkl").read_bytes()
    assert b"rotation" in raw
    for name in (color_folder.name, str(color_folder), ".png", "0007"):
        assert name.encode() not in raw, name


def test_the_data_print_tells_data_sets_apart_but_not_runs():
    prints = [learner("rotation", loaders(pictures(32, seed=s)))._card()["data"]["print"] for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_a_further_round_goes_on_from_the_weights_and_lists_both_rounds(tmp_path):
    first = learner("rotation")
    first.fit(1)
    weights = deepcopy(first.encoder.state_dict())
    saved = first.save_encoder(tmp_path / "one")
    for encoder in (first, load_encoder(saved, module=tiny())):
        second = learner("simclr", encoder=encoder)
        assert all(torch.equal(v, weights[k]) for k, v in second.encoder.state_dict().items())
        assert (second.encoder.mean, second.encoder.std) == (first.encoder.mean, first.encoder.std)
        second.fit(1, 1e-2)
        lineage = read_card(second.save_encoder(tmp_path / "two"))["lineage"]
        assert [(r["task"], r["epochs"], r["images"]) for r in lineage] == [("rotation", 1, 96), ("simclr", 1, 48)]
    assert all(torch.equal(v, weights[k]) for k, v in first.encoder.state_dict().items())  # it keeps its own
    assert [r["task"] for r in read_card(first.save_encoder(tmp_path / "one"))["lineage"]] == ["rotation"]


# --- the source -------------------------------------------------------------------------------------------------------


def labeled_loaders(folder, **kwargs) -> ImageDataLoaders:
    kwargs = {
        "item_tfms": RandomResizedCrop(36),
        "batch_tfms": [*aug_transforms(), Normalize.from_stats(*imagenet_stats)],
        **kwargs,
    }
    settings = {"valid_pct": 0.25, "seed": 1, "bs": 8, "num_workers": 0}
    return ImageDataLoaders.from_name_func(
        folder, get_image_files(folder), lambda f: str(int(f[:4]) % 3), **settings, **kwargs
    )


def snapshot(dls) -> list:
    """Everything a loader and its transforms hold, printed."""
    pipelines = [getattr(dl, name) for dl in dls.loaders for name in ("after_item", "before_batch", "after_batch")]
    pipelines += [tl.tfms for dl in dls.loaders for tl in dl.dataset.tls]
    state = [(type(t).__name__, {k: repr(v) for k, v in vars(t).items()}) for p in pipelines for t in p.fs]
    return [*state, *(sorted(vars(dl)) for dl in dls.loaders), *(dl.rng.getstate() for dl in dls.loaders)]


@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize("labeled", [False, True])
def test_the_source_stays_as_it_was(task, labeled, color_folder):
    set_seed(0)
    dls = labeled_loaders(color_folder) if labeled else loaders(pictures(32), batch_tfms=aug_transforms())
    give_facts(task, dls)
    first = {}
    for dl in dls.loaders:
        state, _ = dl.rng.getstate(), set_seed(1)
        first[dl] = dl.one_batch()
        dl.rng.setstate(state)
    before = snapshot(dls)
    learn = learner(task, dls)
    assert snapshot(dls) == before  # fastai's transforms keep their last draw, so this is looked at before any training
    learn.fit(1)
    for dl in dls.loaders:
        set_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(dl.one_batch(), first[dl])) and len(first[dl]) == 1 + labeled


def test_labels_are_neither_used_nor_computed_and_that_is_said_once(color_folder, capsys):
    calls = []

    def label(file):
        calls.append(file)
        return "ab"[int(file.stem) % 2]

    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=get_image_files,
        get_y=label,
        splitter=RandomSplitter(seed=1),
        item_tfms=Resize(32),
    )
    dls = block.dataloaders(color_folder, bs=16, num_workers=0)
    assert calls
    calls.clear()
    learn = learner("rotation", dls)
    learn.fit(1)
    learn.get_preds()
    assert not calls and capsys.readouterr().err.count("labels are not used") == 1
    learner("rotation")
    assert "labels" not in capsys.readouterr().err


# --- loaders made by hand ---------------------------------------------------------------------------------------------


def test_a_data_block_asks_the_question_and_the_learner_picks_it_up(color_folder):
    block = DataBlock(UnlabeledBlock, get_items=get_image_files, splitter=RandomSplitter(seed=1), item_tfms=Resize(32))
    dls = block.dataloaders(
        color_folder, dl_type=PretextDL, batch_tfms=[PretextTransform("rotation", turns="one")], bs=8, num_workers=0
    )
    x, y = dls.one_batch()
    assert x.shape == (8, 1, 3, 32, 32) and y.shape == (8, 1)
    assert len(dls.show_batch()) == 8
    learn = learner(None, dls)
    assert learn.task is learn.dls.train.task and learn.task.turns == "one"
    assert sum(isinstance(t, PretextTransform) for t in learn.dls.train.after_batch.fs) == 1
    learn.fit(1)
    learn.show_results()
    other = learner("simclr", dls)  # a name given counts more
    assert other.task.name == "simclr" and other.dls.one_batch()[0].shape == (8, 2, 3, 32, 32)
    with pytest.raises(TaskError, match="crop"):
        pretext_learner(dls, crop=0.5)


def test_labeled_image_loaders_with_a_pretext_transform(color_folder):
    dls = labeled_loaders(
        color_folder,
        dl_type=PretextDL,
        batch_tfms=[PretextTransform("rotation"), *aug_transforms(), Normalize.from_stats(*imagenet_stats)],
    )
    x, y = dls.valid.one_batch()
    assert x.shape == (8, 4, 3, 36, 36) and torch.equal(y, torch.arange(4).expand(8, 4))
    (image,), _ = dls.valid.question((x, y))  # Normalize came after the question, on the image alone
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in imagenet_stats)
    torch.testing.assert_close(image, x.as_subclass(Tensor) * std + mean)
    assert -1e-5 < image.min() < 0.3 and 0.7 < image.max() < 1 + 1e-5
    learn = learner(None, dls)
    assert learn.task.name == "rotation" and len(learn.show_batch()) == 8
    learn.fit(1)
    assert np.isfinite(learn.recorder.values).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_users_augmentation_stays_and_normalize_is_replaced(task, color_folder):
    learn = learner(
        task,
        labeled_loaders(
            color_folder, batch_tfms=[Flip(p=1.0), Normalize.from_stats(*imagenet_stats)], item_tfms=Resize(40)
        ),
    )
    train, valid = learn.dls.loaders
    for dl in learn.dls.loaders:
        (normalize,) = (t for t in dl.after_batch.fs if isinstance(t, Normalize))
        np.testing.assert_allclose(normalize.mean.flatten(), learn.encoder.mean, rtol=1e-6)
    for dl, flipped in [(train.new(get_idxs=lambda: range(8), num_workers=0), True), (valid, False)]:
        b = dl.one_batch()
        x = plain(np.stack([np.asarray(Image.open(f)) for f in dl.dataset.items[:8]]))
        ((inputs, targets),) = ask(learn, x.flip(-1) if flipped else x, dl.pass_seed, 8, train=flipped)
        for got, want in zip((*dl.question(b)[0], *b[learn.dls.n_inp :]), (*inputs, *targets), strict=True):
            if want.is_floating_point():  # fastai flips by interpolation
                assert (got - want).abs().mean() < 2e-3 * max(1, want.abs().max())
            else:
                assert torch.equal(got, want)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, side", [("jigsaw", 24), ("rotation", 7), ("simclr", 7)])
def test_images_too_small_are_named(task, side):
    with pytest.raises(TaskError, match=rf"{task} needs images of at least \d+ pixels a side, these are {side} x 50"):
        learner(task, loaders(pictures(8, (side, 50))))


def test_wrong_names_are_answered_with_the_right_ones():
    dls = loaders(pictures(8))
    with pytest.raises(UnknownNameError, match=r"'rotaton'.*Did you mean 'rotation'"):
        pretext_learner(dls, "rotaton")
    with pytest.raises(TaskError, match="rotation has no setting 'turn'; it has turns, crop, flip"):
        pretext_learner(dls, "rotation", turn="one")
    with pytest.raises(TaskError, match="'all' or 'one'; got 'two'"):
        pretext_learner(dls, "rotation", turns="two")
    with pytest.raises(TaskError, match=r"pretext_learner\(dls, 'rotation'\).*jigsaw.*simclr"):
        pretext_learner(dls)


@pytest.mark.parametrize("source", [None, "images", [1, 2], Image.new("L", (8, 8))])
def test_what_is_no_loaders_is_refused(source):
    with pytest.raises(DataError, match=rf"Expected DataLoaders, got {type(source).__name__}"):
        pretext_learner(source, "rotation")


def test_one_image_a_batch_is_too_few_to_tell_apart():
    with pytest.raises(TaskError, match="batch size of 2 or more"):
        learner("simclr", loaders(pictures(8), bs=1))
