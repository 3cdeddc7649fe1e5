"""Several tasks at once: each batch one task's question, in validation all of them, and every number its task's own."""

import pytest
import torch
from fastai.learner import load_learner
from fastai.torch_core import TensorImage, set_seed
from matplotlib import pyplot as plt
from torch import Tensor

from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.encoders.inputs import to_input
from selfsup_fastai.errors import TaskError, UnknownNameError
from selfsup_fastai.pictures import grid_axes
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.seeding import VALID_SEED
from tests.test_contract import flat, items, loaders, pictures, plain, standardize, tiny, without_bar

BOTH = ["rotation", "jigsaw"]


def learner(tasks=BOTH, n: int = 32, **kwargs):
    set_seed(0)
    dls = kwargs.pop("dls", None) or loaders(pictures(n))
    return without_bar(pretext_learner(dls, tasks, arch=tiny, **kwargs))


def asked(b, task) -> list[bool]:
    """Of each task, whether a batch holds its question."""
    return [own[0].numel() > 0 for own in task.apart(b, [t.n_inp for t in task.tasks])]


def test_validation_asks_every_task_about_every_image():
    learn = learner(jigsaw={"n_permutations": 8})
    x, generator = plain(items(learn.dls.valid)), torch.Generator().manual_seed(VALID_SEED)
    batches = list(learn.dls.valid)
    assert sum(len(b[0]) for b in batches) == len(learn.dls.valid_ds) == 8
    for i, b in enumerate(batches):
        images = x[4 * i : 4 * i + 4]
        (turned,), (turns,) = learn.task.tasks[0].make_batch(images, generator=generator, train=False)
        (tiles,), (order,) = learn.task.tasks[1].make_batch(images, generator=generator, train=False)
        torch.testing.assert_close(b[0].as_subclass(Tensor), standardize(turned, learn), atol=2e-6, rtol=0)
        assert torch.equal(b[1], tiles) and torch.equal(b[2], turns) and torch.equal(b[3], order)
        assert isinstance(b[0], TensorImage) and not isinstance(b[1], TensorImage)


def test_a_training_batch_is_for_one_task_and_every_task_has_its_turn():
    learn = learner()
    turns = [asked(b, learn.task) for _ in range(8) for b in learn.dls.train]
    assert {sum(turn) for turn in turns} == {1} and 0.2 < sum(turn[0] for turn in turns) / len(turns) < 0.8
    assert learn.task.passes == pytest.approx((4 + learn.task.tasks[1].passes) / 2)


def test_only_the_asked_task_and_the_encoder_learn():
    learn = learner()
    b = next(b for b in learn.dls.train if asked(b, learn.task)[1])
    learn.loss_func(learn.model(*b[:2]), *b[2:]).backward()
    rotation, jigsaw = ({n for n, p in m.named_parameters() if p.grad is not None} for m in learn.model.models)
    assert all(name.startswith("encoder.") for name in rotation) and {"head.0.weight", "tile.0.weight"} <= jigsaw


@pytest.mark.parametrize("weights", [None, {"jigsaw": 0.25}, "uncertainty"])
def test_the_loss_is_the_mean_of_the_tasks_own_weighted(weights):
    learn = learner(weights=weights)
    s = torch.tensor([0.3, -0.7])
    learn.model.log_variances.data.copy_(s)
    b = learn.dls.valid.one_batch()
    pred = learn.model.eval()(*b[:2])
    own = [task.loss(pred[i], b[2 + i]) for i, task in enumerate(learn.task.tasks)]
    expected = {
        None: own[0] + own[1],
        "uncertainty": (-s).exp()[0] * own[0] + s[0] + (-s).exp()[1] * own[1] + s[1],
    }.get(weights if isinstance(weights, str) else None, own[0] + own[1])
    if isinstance(weights, dict):
        expected = own[0] + 0.25 * own[1]
    expected = expected / 2  # as in training, where each batch is for one of the two
    torch.testing.assert_close(learn.loss_func(pred, *b[2:]), expected)
    torch.testing.assert_close(learn.task.loss(pred, *b[2:], reduction="none").mean(), expected)
    learn.loss_func(pred, *b[2:]).backward()
    assert (learn.model.log_variances.grad is not None) == (weights == "uncertainty")


def test_uncertainty_settles_at_the_log_of_the_loss():
    """exp(-s) L + s is least at s = log L (Kendall et al. 2018)."""
    task = get_task(BOTH, weights="uncertainty")
    pred = (torch.zeros(2, 1, 4), torch.zeros(2, 64), torch.zeros(2, 2, requires_grad=True))
    targets = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    s = torch.zeros(2, requires_grad=True)
    opt = torch.optim.Adam([s], 0.1)
    for _ in range(300):
        opt.zero_grad()
        task.loss((*pred[:2], s.expand(2, -1)), *targets).backward()
        opt.step()
    torch.testing.assert_close(s.detach(), torch.tensor([4.0, 64.0]).log().log(), atol=1e-3, rtol=0)


def test_each_column_is_the_number_of_its_task():
    learn = learner()
    learn.fit(2, 1e-2)
    names = list(learn.recorder.metric_names)
    assert names[3:-1] == ["rotation_loss", "rotation_accuracy", "jigsaw_loss", "jigsaw_accuracy"]
    values = dict(zip(names[1:-1], learn.recorder.values[-1]))
    preds, targets = learn.get_preds()
    turns = (preds[0].argmax(-1) == targets[0]).float().mean()
    orders = (preds[1].argmax(-1) == targets[1]).float().mean()
    assert values["rotation_accuracy"] == pytest.approx(turns.item())
    assert values["jigsaw_accuracy"] == pytest.approx(orders.item())
    assert values["valid_loss"] == pytest.approx((values["rotation_loss"] + values["jigsaw_loss"]) / 2, rel=1e-5)
    assert learn.task.levels() == {"rotation_accuracy": 0.25, "jigsaw_accuracy": 1 / 64}


@pytest.mark.parametrize("ds_idx", [0, 1])
def test_get_preds_gives_one_row_an_image_for_every_task(ds_idx):
    learn = learner(n=30)
    preds, targets = learn.get_preds(ds_idx=ds_idx)
    assert {len(t) for t in (*preds, *targets)} == {len(learn.dls[ds_idx].dataset)}
    assert preds[0].shape[1:] == (4, 4) and preds[1].shape[1:] == (64,)
    torch.testing.assert_close(preds[1].sum(1), torch.ones(len(preds[1])))


def test_same_seed_same_weights_and_an_exported_learner_goes_on(tmp_path):
    first, second = learner(), learner(path=tmp_path)
    for learn in (first, second):
        set_seed(1)
        learn.fit_one_cycle(2, 1e-2)
    assert torch.equal(flat(first), flat(second))
    second.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    assert loaded.model.models[0].encoder is loaded.model.models[1].encoder is loaded.model.encoder
    card = read_card(second.save_encoder(tmp_path / "encoder"))
    assert card["task"] == "rotation+jigsaw" and card["settings"]["rotation"]["turns"] == "all"
    assert card["lineage"][0]["task"] == "rotation+jigsaw"


def test_every_task_has_its_pictures_under_its_name_in_one_figure():
    learn = learner()
    axes = learn.show_batch(max_n=3)
    blocks = plt.gcf().subfigs
    assert len(axes) == 6 and [ax.figure for ax in axes] == [blocks[0]] * 3 + [blocks[1]] * 3
    assert [block.get_suptitle() for block in blocks] == BOTH and len(plt.get_fignums()) == 1
    assert all(ax.images for ax in axes)
    learn.show_results(max_n=2)
    assert len(plt.gcf().subfigs) == len(plt.get_fignums()) == 2
    assert learn.show_batch(max_n=2, ctxs=(given := grid_axes(4))) == given and all(ax.images for ax in given)


def test_a_look_at_a_batch_shows_what_each_task_asks_in_training():
    learn = learner(["autoencoder", "rotation"], rotation={"flip": 1.0, "crop": 0})
    images = plain(items(learn.dls.train))
    (asked, turned), (true, turns) = learn.show_batch(show=False)
    assert len(asked) == len(turned) == len(true) == len(turns) == 4
    upright = turned[torch.arange(4), turns.eq(0).int().argmax(1)]
    assert all(any(torch.allclose(x, image.flip(-1), atol=1e-5) for image in images) for x in upright)
    assert not torch.equal(asked, learn.show_batch(show=False)[0][0])
    assert {sum(x[0].numel() > 0 for x in learn.task.apart(b, [1, 1])) for b in learn.dls.train} == {1}


def test_the_answer_about_one_image_is_a_line_for_each_task():
    answer = learner(["rotation", "autoencoder"]).predict(pictures(1)[0])
    first, second = repr(answer).splitlines()
    assert first == f"Answer(rotation: asked [[0, 1, 2, 3]], answered {answer.decoded[0].tolist()}"
    assert second.strip().startswith("autoencoder: asked an array of shape (1, 3, ") and second.endswith("draws it)")
    assert len(answer.show()) == 2


def test_batches_of_two_with_grey_images_of_odd_size():
    learn = learner(dls=loaders(pictures(8, (47, 61), 1), bs=2))
    learn.fit(1)
    assert torch.isfinite(flat(learn)).all()


@pytest.mark.parametrize("tasks, kind", [(["rotation", "colorization"], "L"), (["split_brain", "rotation"], "lab")])
def test_a_task_that_feeds_lightness_has_the_others_fed_so_too(tasks, kind):
    learn = learner(tasks)
    assert learn.encoder.input == kind and learn.encoder.split == ("split_brain" in tasks)
    at = tasks.index("rotation")
    b, x = learn.dls.valid.one_batch(), plain(items(learn.dls.valid))[:4]
    torch.testing.assert_close(b[at][:, 0].as_subclass(Tensor), 2 * to_input(x, kind) - 1, atol=1e-5, rtol=0)
    own = 1 - at  # the question of the task that sees color
    fed = to_input(x, "L") if kind == "L" else to_input(x, "lab")
    torch.testing.assert_close(b[own].as_subclass(Tensor), 2 * fed - 1, atol=1e-5, rtol=0)
    learn.fit(1)
    assert torch.isfinite(flat(learn)).all()


def test_what_cannot_be_combined_is_said():
    with pytest.raises(TaskError, match="two or more different ones; got rotation, rotation"):
        get_task(["rotation", "rotation"])
    with pytest.raises(UnknownNameError, match="rotaton"):
        get_task(["rotaton", "jigsaw"])
    with pytest.raises(TaskError, match="exemplar cannot be combined with other tasks: it leaves out images"):
        get_task(["rotation", "exemplar"])
    with pytest.raises(TaskError, match=r"different things \(colorization: L, split_brain: lab\)"):
        get_task(["colorization", "split_brain"])
    with pytest.raises(TaskError, match=r"'turns'; .* rotation=\{'turns': 'one'\}, in .* --set rotation\.turns=one"):
        get_task(BOTH, turns="one")
    with pytest.raises(TaskError, match="are a dict, such as"):
        get_task(BOTH, rotation="one")
    with pytest.raises(UnknownNameError, match="simclr"):
        get_task(BOTH, weights={"simclr": 1.0})
    with pytest.raises(TaskError, match="the weight of jigsaw is a number, above 0"):
        get_task(BOTH, weights={"jigsaw": 0})
    with pytest.raises(TaskError, match="'uncertainty'; got 'auto'"):
        get_task(BOTH, weights="auto")
    for weights in (0.5, [1, 0.1], (3,)):
        with pytest.raises(TaskError, match="weights are a number for each task by name"):
            get_task(BOTH, weights=weights)
    assert get_task("rotation+jigsaw").names == BOTH
    assert get_task(["rotation"], turns="one").settings()["turns"] == "one"


def test_teachers_memories_and_rates_of_several_tasks_are_each_their_own():
    small = {"byol": {"dim": 8, "hidden": 8}, "moco": {"dim": 8, "queue": 8}, "simsiam": {"dim": 8, "bottleneck": 4}}
    learn = learner(
        list(small),
        byol={**small["byol"], "momentum": 0.5},
        moco={**small["moco"], "momentum": 0.7},
        simsiam=small["simsiam"],
    )
    followed = {"byol": [], "moco": []}
    for name, model in zip(small, learn.model.models):
        if name in followed:
            model.teacher.follow = followed[name].append
    learn.fit_one_cycle(1, 1e-2)
    n = len(learn.recorder.losses)
    assert len(followed["byol"]) == len(followed["moco"]) == n == 6
    assert followed["byol"][0] == 0.5 and followed["byol"][-1] > 0.9 and followed["moco"] == [0.7] * n
    predictor = learn.model.models[2].predictor
    assert [id(p) for p in learn.opt.param_lists[0]] == [id(p) for p in predictor.parameters()]
    teachers = {id(p) for model in learn.model.models[:2] for p in model.teacher.parameters()}
    assert not teachers & {id(p) for group in learn.opt.param_lists for p in group}
    assert learn.model.models[1].queue.entered % 4 == 0
    assert learn.validate()[0] > 0
