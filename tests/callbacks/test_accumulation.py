"""Which tasks may accumulate gradients: what each declares is true, and the others are refused."""

from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import Tensor

from selfsup_fastai.callbacks.accumulation import INSTEAD
from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import TASKS, get_task, task_class
from tests.test_contract import ARCH, SMALL, Numbered, Paired, flat, learner, loaders, pictures, tiny

WHOLE = [name for name in TASKS if not task_class(name).accumulates]
PARTNERED = ("counting",)  # whose target is the row of another image in the batch: which one it is makes no other loss
OTHER_LOSSES = [
    ("aet", {"compare": "matrix"}),
    ("aet", {"transform": "projective", "turn": 180}),
    ("autoencoder", {"error": "cross_entropy"}),
    ("colorization", {"answer": "regression"}),
    ("inpainting", {"region": "center", "adversarial": True}),
    ("split_brain", {"halves": "diagonal"}),
    ("models_genesis", {"curve": 0.9, "paint": 0.9}),
    ("mae", {"normalize_patches": False}),
    ("pirl", {"transform": "rotation", "centered": False}),
    ("moco", {"queue": 4}),
    ("dino", {"center_momentum": 0.9, "batchnorm": False}),
]


def filled(task, settings: dict):
    """A learner with batches of eight whose memories have seen all images, in evaluation mode."""
    made = get_task(task, **SMALL.get(task, {}) | settings)
    learn = learner(made, loaders(pictures(32), bs=8), arch=ARCH.get(task, tiny))
    learn.fit(1, 0.0)
    learn.model.eval()
    if made.name == "nat":  # which exchanges codes in training only; its layers stay as they are
        learn.model.training, learn.model.every = True, 1
    return learn


def question(learn, seed: int = 0) -> list[Tensor]:
    """A training batch of eight."""
    torch.manual_seed(seed)
    b = [t.as_subclass(Tensor) for t in learn.dls.train.one_batch()]
    if learn.task.name in PARTNERED:  # the next one of four
        b[-1] = torch.tensor([1, 2, 3, 0, 5, 6, 7, 4])
    return b


def rows(learn, b: list[Tensor], start: int, stop: int) -> list[Tensor]:
    b = [t[start:stop] for t in b]
    if learn.task.name in PARTNERED:
        b[-1] = b[-1] - start
    return b


def loss_and_gradient(learn, b: list[Tensor]) -> tuple[float, Tensor]:
    learn.model.zero_grad()
    n = learn.dls.n_inp
    loss = learn.loss_func(learn.model(*b[:n]), *b[n:])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in learn.model.parameters() if p.grad is not None])


def whole_and_halves(learn) -> tuple[tuple[float, Tensor], tuple[float, Tensor]]:
    """Loss and gradient of a batch, and their means over its halves."""
    b = question(learn)
    first, second = (loss_and_gradient(learn, rows(learn, b, i, i + 4)) for i in (0, 4))
    return loss_and_gradient(learn, b), ((first[0] + second[0]) / 2, (first[1] + second[1]) / 2)


def relative_errors(learn) -> tuple[float, float]:
    """Of the loss and of the gradient of halves as those of the whole batch."""
    (loss, gradient), (mean_loss, mean_gradient) = whole_and_halves(learn)
    assert loss and gradient.any()
    return abs(mean_loss / loss - 1), ((mean_gradient - gradient).norm() / gradient.norm()).item()


# --- what tasks declare -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, settings", [*((task, {}) for task in [*TASKS, Numbered, Paired]), *OTHER_LOSSES])
def test_every_task_declares_whether_a_batch_is_the_mean_of_its_halves(task, settings):
    learn = filled(task, settings)
    of_loss, of_gradient = relative_errors(learn)
    if learn.task.accumulates:
        assert of_loss < 2e-5 and of_gradient < 2e-5
    else:
        assert of_gradient > 0.05


def test_nearly_all_do_and_so_do_those_that_others_are_sent_to():
    assert {"simclr", "nnclr", "mocov3", "barlow_twins", "vicreg", "swav", "nat"} <= set(WHOLE)
    assert len(WHOLE) < len(TASKS) / 3
    named = INSTEAD.replace(" or", ",").split(", ")
    assert len(named) == 4 and all(task_class(name).accumulates for name in named)


def test_several_tasks_accumulate_if_each_of_them_does():
    assert get_task("rotation+moco").accumulates and not get_task("rotation+simclr").accumulates


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", WHOLE)
def test_a_loss_of_the_whole_batch_is_refused_before_the_first_step(task):
    learn = learner(task, cbs=GradientAccumulation(8))
    before = flat(learn)
    with pytest.raises(TaskError) as error:
        learn.fit(1, 1e-2)
    assert torch.equal(flat(learn), before) and not learn.recorder.losses and learn.images_seen == 0
    said = str(error.value)
    assert f"GradientAccumulation(8) does not go with {task}, whose loss is that of a batch as a whole" in said
    assert "larger batches (bs=8" in said and said.endswith(f"such as {INSTEAD}.")


def test_wherever_it_comes_from_and_training_goes_on_without_it():
    learn = learner("simclr")
    with pytest.raises(TaskError, match="with simclr,"):
        learn.fit(1, cbs=[GradientAccumulation(8)])
    with pytest.raises(TaskError, match="with simclr,"):
        learn.fit_one_cycle(1, cbs=GradientAccumulation(8))
    learn.fit(1)
    assert len(learn.recorder.losses) == 6
    learn.add_cb(GradientAccumulation(8))
    with pytest.raises(TaskError, match="with simclr,"):
        learn.fit(1)
    with pytest.raises(TaskError, match="with simclr,"):
        learn.lr_find(num_it=4, show_plot=False)
    learn.remove_cb(GradientAccumulation)
    learn.fit(1)
    assert learn.epochs_done == 2


def test_what_does_not_train_is_not_bothered():
    learn, plain = learner("simclr", cbs=GradientAccumulation(8)), learner("simclr")
    assert learn.validate() == plain.validate()
    assert torch.equal(learn.get_preds()[0], plain.get_preds()[0])
    learn.show_results()


def test_one_of_several_tasks_is_enough_and_it_is_the_one_that_is_named():
    with pytest.raises(TaskError, match="with simclr,"):
        learner("rotation+simclr", cbs=GradientAccumulation(8)).fit(1)
    with pytest.raises(TaskError, match="with vicreg and simclr,"):
        learner("vicreg+moco+simclr", cbs=GradientAccumulation(8)).fit(1)


# --- what is done -----------------------------------------------------------------------------------------------------


class Steps(Callback):
    """The gradients that steps are taken with, and what was recorded of each batch."""

    order = 30  # after what cancels a step

    def before_fit(self):
        self.gradients = []

    def before_step(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.learn.model.parameters()]
        self.gradients.append(torch.cat([g.flatten() for g in grads]))


@pytest.mark.parametrize(
    "task, weights, consistency",
    [
        ("rotation", {}, None),
        ("rotation+relative_position", {}, None),
        ("rotation+relative_position", {"weights": "uncertainty"}, None),
        ("rotation", {}, Consistency(5.0)),
        ("rotation", {}, Consistency(5.0, "mse")),
    ],
)
def test_a_step_has_the_mean_gradient_of_its_batches(task, weights, consistency):
    """With a rate of 0, so that nothing moves in between."""
    runs = []
    for cbs in ([], [GradientAccumulation(8)]):
        learn, steps = learner(get_task(task, **weights), consistency=deepcopy(consistency)), Steps()
        learn.fit(1, 0.0, cbs=[*cbs, steps])
        runs.append((torch.stack(steps.gradients), torch.tensor(learn.recorder.losses)))
    (each, losses), (accumulated, recorded) = runs
    assert len(each) == 6 and len(accumulated) == 3
    torch.testing.assert_close(accumulated, each.unflatten(0, (3, 2)).mean(1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(recorded, losses)


def test_a_step_has_no_gradient_of_one_that_the_fit_before_did_not_finish():
    found = []
    for cleaned in (False, True):
        learn, steps = learner("rotation"), Steps()
        learn.fit(1, 0.0, cbs=GradientAccumulation(16))  # 6 batches of 4: a step, and half of one
        learn.validate()
        assert any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
        if cleaned:
            learn.model.zero_grad()
        learn.fit(1, 0.0, cbs=[GradientAccumulation(16), steps])
        found.append(steps.gradients[0])
    torch.testing.assert_close(*found)


def test_batches_that_are_large_enough_by_themselves_are_not_refused():
    learn = learner("simclr", loaders(pictures(32), bs=8), cbs=GradientAccumulation(8))  # a step each batch
    learn.fit(1, 1e-2)
    assert learn.epochs_done == 1
    with pytest.raises(TaskError, match="with simclr,"):
        learner("simclr", loaders(pictures(32), bs=8), cbs=GradientAccumulation(9)).fit(1)


def test_consistency_of_a_network_that_sees_edges_is_refused_with_what_to_do():
    with pytest.raises(TaskError, match=r"nat feeds its network with edges.* take sobel=False"):
        learner(get_task("nat"), consistency=0.5)
