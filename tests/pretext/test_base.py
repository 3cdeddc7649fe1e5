"""What the base does for every task: checks, types, settings, a default picture; and the table of tasks."""

import pickle

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import DataError, TaskError, UnknownNameError
from selfsup_fastai.pretext import TASKS, get_task, list_tasks, task_class
from selfsup_fastai.pretext.base import PerView, PretextLoss, PretextTask, per_image
from selfsup_fastai.pretext.predictive.rotation import Rotation
from tests.pretext.small_runs import learner


class Doubled(PretextTask):
    """What is twice the image?

    Two inputs, of which Normalize may touch the first.
    """

    name = "doubled"
    paper = "nobody 2000"
    n_inp = 2
    normalized = (True, False)
    channels = (3,)
    min_side = 10

    def __init__(self, factor: float = 2.0, rows: int | None = None):
        self.factor, self.rows = factor, rows

    def make_batch(self, x, *, generator, train, idx=None):
        return (x, x / 2), ((self.factor * x)[: self.rows],)

    def model(self, encoder):
        return encoder

    def loss(self, pred, target, reduction="mean"):
        return per_image((pred - target) ** 2, reduction)


def ask(task: PretextTask, x: Tensor) -> tuple[Tensor, ...]:
    return task.batch(x, generator=torch.Generator(), train=True)


def test_inputs_that_normalize_may_touch_are_images_and_nothing_else_is():
    x = torch.rand(4, 3, 12, 12)
    seen = []
    task = Doubled()
    make = task.make_batch
    task.make_batch = lambda x, **kwargs: seen.append(type(x)) or make(x, **kwargs)
    image, half, target = ask(task, TensorImage(x))
    assert seen == [Tensor]  # a task works on plain tensors
    assert [type(t) for t in (image, half, target)] == [TensorImage, Tensor, Tensor]
    assert torch.equal(image.as_subclass(Tensor), x) and torch.equal(half, x / 2) and torch.equal(target, 2 * x)


def test_images_that_do_not_suit_are_refused():
    with pytest.raises(TaskError, match="doubled works on images of 3 channels, these have 1"):
        ask(Doubled(), torch.rand(4, 1, 12, 12))
    with pytest.raises(TaskError, match="at least 10 pixels a side, these are 12 x 9"):
        ask(Doubled(), torch.rand(4, 3, 12, 9))
    with pytest.raises(DataError, match=r"float images in \[0, 1\], got torch.uint8"):
        ask(Doubled(), torch.zeros(4, 3, 12, 12, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"batch of images \(B, C, H, W\), got \(3, 12, 12\)"):
        ask(Doubled(), torch.rand(3, 12, 12))


def test_a_task_that_breaks_the_contract_is_told():
    x = torch.rand(4, 3, 12, 12)
    with pytest.raises(TaskError, match=r"make_batch of doubled .* from 4 images it made \[4, 4, 3\] rows"):
        ask(Doubled(rows=3), x)
    for inputs, targets, said in [
        ((x,), (x,), "returned 1 inputs, n_inp is 2, normalized has 2 entries"),
        ((x, x), (), "at least one target, or fastai takes no step"),
        (x, x, r"must return \(inputs, targets\), two tuples of tensors; it returned Tensor and Tensor"),
    ]:
        task = Doubled()
        task.make_batch = lambda x, inputs=inputs, targets=targets, **_: (inputs, targets)
        with pytest.raises(TaskError, match=said):
            ask(task, x)
    task = Doubled()
    task.normalized = (True,)  # as the base has it: the second input would be lost
    with pytest.raises(TaskError, match="returned 2 inputs, n_inp is 2, normalized has 1 entries"):
        ask(task, x)


@pytest.mark.parametrize(
    "task, setting, good, bad",
    [
        ("rotation", "crop", (0, 0.5), (-0.1, 0.6, "abc")),
        ("rotation", "flip", (0, 1), (-0.1, 1.1, "abc")),
        ("simclr", "temperature", (0.01, 5), (0, -1, "abc")),
        ("simclr", "dim", (1, 512), (0, 1.5, "abc")),
        ("jigsaw", "n_permutations", (2, 10_000), (1, 10_001, 8.0, "abc")),
        ("jigsaw", "grey", (0, 1), (-0.1, 1.1, "abc")),
        ("jigsaw", "dropout", (0, 0.99), (-0.1, 1, "abc")),
        ("jigsaw", "tile_features", (1,), (0, 1.5, "abc")),
        ("jigsaw", "hidden", (1,), (0, 1.5, "abc")),
    ],
)
def test_tasks_refuse_settings_that_make_no_sense(task, setting, good, bad):
    for value in good:
        assert get_task(task, **{setting: value}).settings()[setting] == value
    for value in bad:
        with pytest.raises(TaskError, match=f"^{setting} is a .*got {value!r}"):
            get_task(task, **{setting: value})


def test_settings_are_the_constructors_arguments():
    assert Doubled(factor=3).settings() == {"factor": 3, "rows": None}
    assert repr(Doubled(factor=3)) == "Doubled(factor=3, rows=None)"
    assert Doubled.asks() == "What is twice the image?"
    assert (Rotation.kind(), Rotation.asks()) == ("predictive", "By which quarter turn was the image rotated?")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_its_settings_and_can_be_made_again_from_them(name):
    task = get_task(name)
    assert task.name == name and list(task.settings()) == task.setting_names()
    assert get_task(name, **task.settings()).settings() == task.settings()
    assert pickle.loads(pickle.dumps(task)).settings() == task.settings()
    assert len(task.normalized) == task.n_inp
    assert task.asks().endswith("?")


def test_get_task_takes_a_name_a_class_or_a_task():
    assert get_task("rotation", turns="one").turns == "one"
    assert get_task(Rotation, turns="one").turns == "one"
    task = Doubled()
    assert get_task(task) is task and isinstance(get_task(Doubled, factor=5), Doubled)
    with pytest.raises(TaskError, match="already made: give factor to Doubled"):
        get_task(task, factor=3)
    with pytest.raises(TaskError, match="doubled has no setting 'size'; it has factor, rows"):
        get_task(Doubled, size=3)
    with pytest.raises(UnknownNameError, match="'jigsaw'"):
        task_class("jigsaws")
    for wrong in (None, 3, [3], dict):
        with pytest.raises(UnknownNameError, match="no pretext task called"):
            get_task(wrong)


def test_table_of_tasks():
    table = list_tasks()
    assert list(table.index) == list(TASKS)
    row = table.loc["rotation"]
    assert (row["kind"], row["paper"], row["passes"]) == ("predictive", "Gidaris et al. 2018", 4)
    assert row["images"] == "any" and table.loc["colorization", "images"] == "color"
    assert row["what is asked"] == "By which quarter turn was the image rotated?"


def test_loss_for_fastai_has_reduction_activation_and_decodes():
    loss, pred, target = PretextLoss(Doubled()), torch.rand(5, 4), torch.rand(5, 4)
    rows = ((pred - target) ** 2).mean(1)
    assert torch.equal(loss(pred, target), rows.mean())
    assert torch.equal(loss(pred, target, reduction="none"), rows)
    loss.reduction = "none"  # as `get_preds(with_loss=True)` sets it
    assert torch.equal(loss(pred, target), rows)
    torch.testing.assert_close(loss.activation(pred), pred.exp() / pred.exp().sum(-1, keepdim=True))
    assert loss.decodes(torch.tensor([[0.1, 0.7, 0.2]])).tolist() == [1]


def test_per_image_means_over_all_axes_but_the_first():
    x = torch.arange(24.0).view(2, 3, 4)
    assert per_image(x, "none").tolist() == [5.5, 17.5] and per_image(x, "mean") == 11.5
    assert per_image(torch.tensor([1.0, 4.0]), "none").tolist() == [1, 4]


def test_per_view_keeps_images_and_views_apart():
    encoder, head = create_encoder(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), nn.Linear(8, 5)
    x = torch.rand(2, 4, 3, 9, 9)
    out = PerView(encoder, head)(x)
    assert out.shape == (2, 4, 5)
    for i in range(2):
        for v in range(4):
            torch.testing.assert_close(out[i, v], head(encoder(x[i, v : v + 1]))[0])


@pytest.mark.parametrize("views", [(), (2,), (2, 3)])
def test_default_picture_is_the_first_view_with_the_target_as_title(views):
    images = torch.rand(3, *views, 3, 8, 8)
    targets = torch.tensor([4, 5, 6])
    axes = Doubled().show((images,), (targets,))
    assert [ax.get_title() for ax in axes] == ["4", "5", "6"]
    for image, ax in zip(images, axes):
        pixels = image[(0,) * len(views)].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ax.images[0].get_array(), pixels)
    answered = Doubled().show((images,), (torch.rand(3, 2),), pred=torch.tensor([0.25, 0.5, 1]), max_n=2)
    assert [ax.get_title() for ax in answered] == ["(2,) → 0.25", "(2,) → 0.5"]


@pytest.mark.parametrize(
    "task, said, given",
    [
        ("barlow_twins", "dim=512 (the paper's: 8,192)", {"dim": 32}),
        ("vicreg", "dim=512 (the paper's: 8,192)", {"dim": 32}),
        ("byol", "hidden=1024 (the paper's: 4,096)", {"hidden": 32}),
        ("mocov3", "hidden=1024 (the paper's: 4,096), temperature=0.2 (the paper's: 1)", {"hidden": 32}),
        ("dino", "prototypes=1024 (the paper's: 65,536), hidden=1024 (the paper's: 2,048)", {"hidden": 32}),
        ("npid", "temperature=0.2 (the paper's: 0.07)", {"temperature": 0.1}),
        ("pirl", "temperature=0.2 (the paper's: 0.07)", {"temperature": 0.1}),
    ],
)
def test_defaults_that_suit_small_machines_are_said_unless_others_are_given(task, said, given, capsys):
    learner(task, n=24, bs=8, side=36)
    assert f"{task}: for small batches and short runs {said}.\n" in capsys.readouterr().err
    learner(task, n=24, bs=8, side=36, **given)
    assert f"{next(iter(given))}=" not in capsys.readouterr().err
