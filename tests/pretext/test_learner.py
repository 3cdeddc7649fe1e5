"""`pretext_learner`: what it derives from the loaders it is given, and what it counts."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from torch import nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import TASKS, get_task, task_class
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())


def loaders(n: int = 24, channels: int = 3, bs: int = 8, side: int = 16, seed: int = 0, **kwargs):
    array = np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)
    return UnlabeledDataLoaders.from_array(
        array, **{"size": None, "bs": bs, "valid_pct": 1 / 3, "num_workers": 0, **kwargs}
    )


def learner(dls=None, task="rotation", **kwargs):
    set_seed(0)
    kwargs = kwargs if "encoder" in kwargs else {"arch": tiny, **kwargs}
    learn = pretext_learner(dls or loaders(), task, **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn


def labeled(folder, **kwargs) -> ImageDataLoaders:
    settings = {"item_tfms": Resize(24), "bs": 8, "num_workers": 0, **kwargs}
    return ImageDataLoaders.from_name_func(folder, get_image_files(folder), lambda name: name[3], **settings)


def test_nothing_is_written_beside_the_images(color_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(color_folder.iterdir())
    learn = learner(labeled(color_folder))
    assert learn.dls.path == color_folder and learn.path == tmp_path  # fastai's labeled loaders bring the folder along
    learn.lr_find(num_it=12, show_plot=False)
    learn.save("weights")
    learn.export()
    assert sorted(color_folder.iterdir()) == before
    assert {f.name for f in tmp_path.iterdir()} == {"models", "export.pkl"}


@pytest.mark.parametrize("folder, channels", [("grey_folder", 1), ("color_folder", 3)])
def test_channels_are_those_of_the_files_though_fastai_opens_all_as_color(folder, channels, request):
    dls = labeled(request.getfixturevalue(folder))
    assert dls.one_batch()[0].shape[1] == 3
    learn = learner(dls)
    assert learn.encoder.in_chans == channels == learn.dls.one_batch()[0].shape[2]
    assert len(learn.encoder.mean) == channels


def test_channels_can_be_chosen():
    for given, chosen in [(3, 1), (1, 3)]:
        learn = learner(loaders(channels=given), n_in=chosen)
        assert learn.encoder.in_chans == chosen == learn.dls.one_batch()[0].shape[2]
        learn.fit(1)


def test_an_encoder_given_keeps_its_channels_and_statistics():
    encoder = create_encoder(tiny(), n_in=1)
    encoder.mean, encoder.std = (0.25,), (0.5,)
    learn = learner(loaders(channels=3), encoder=encoder)
    assert (learn.encoder.mean, learn.encoder.std) == (encoder.mean, encoder.std) == ((0.25,), (0.5,))
    x = learn.dls.valid.one_batch()[0]
    back = learn.dls.valid.question(learn.dls.valid.one_batch())[0][0]
    torch.testing.assert_close(x.as_subclass(torch.Tensor), (back - 0.25) / 0.5, atol=1e-6, rtol=0)
    assert x.shape[2] == 1


def test_batch_size_is_cut_to_the_images_and_that_is_said_once(capsys):
    dls = loaders(bs=8)
    dls = type(dls)(dls.train.new(bs=64), dls.valid.new(bs=64))
    capsys.readouterr()
    learn = learner(dls)
    assert capsys.readouterr().err.count("Batch size 64 cut to 16") == 1
    learn.fit(1)
    assert len(learn.recorder.losses) == 1 and learn.dls.train.bs == 16


def test_metrics_are_the_tasks_unless_given():
    assert learner().metrics.attrgot("name") == ["accuracy"]
    assert len(learner(metrics=[]).metrics) == 0

    def mine(pred, target):
        return pred.new_tensor(0.5)

    learn = learner(metrics=mine)
    assert learn.validate()[1] == 0.5


def test_what_training_cost_is_counted_over_all_fits_and_nothing_else_is():
    learn = learner(turns="one")
    learn.lr_find(num_it=12, show_plot=False)
    learn.validate()
    assert (learn.epochs_done, learn.images_seen, learn.last_values) == (0, 0, {})
    learn.fit(2)
    learn.get_preds()
    learn.show_results()
    learn.fit_one_cycle(1)
    assert (learn.epochs_done, learn.images_seen) == (3, 3 * 16)


def test_epochs_count_once_where_a_callback_looks_at_predictions_after_each():
    def look(learn):
        looks.append(learn.epoch)
        if len(looks) % 2:  # a look ends an epoch, too
            learn.get_preds()

    looks, learn = [], learner(turns="one")
    learn.fit(2, cbs=Callback(after_epoch=look))
    assert (learn.epochs_done, learn.images_seen, len(looks)) == (2, 2 * 16, 4)


def test_a_run_that_is_cut_short_counts_what_was_done():
    def stop(learn):
        if learn.train_iter == 3:
            raise CancelFitException

    learn = learner()
    learn.fit(4, cbs=Callback(before_batch=stop))
    assert (learn.epochs_done, learn.images_seen) == (1, 3 * 8 * 4)


def test_an_encoder_can_be_saved_before_any_training(tmp_path):
    card = read_card(learner().save_encoder(tmp_path / "fresh"))
    assert (card["epochs"], card["images"], card["metrics"]) == (0, 0, {})


def state(net: nn.Module) -> list[torch.Tensor]:
    return [v.detach().clone() for v in net.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b))


def frozen_learner() -> Learner:
    """A learner of another kind, as fine-tuning leaves it when it is stopped early."""
    model = nn.Sequential(nn.Identity())
    model.encoder = create_encoder(tiny(), n_in=3)
    model.encoder.requires_grad_(False)
    return Learner(loaders(), model, loss_func=nn.MSELoss())


@pytest.mark.parametrize("kind", ["pretext learner", "other learner", "encoder", "module"])
def test_what_is_given_stays_as_it_was_and_two_learners_share_nothing(kind):
    makes = {"pretext learner": learner, "other learner": frozen_learner, "module": tiny}
    given = makes.get(kind, lambda: create_encoder(tiny(), n_in=3))()
    net = given.model.encoder if isinstance(given, Learner) else given
    before, lineage, size = state(net), list(getattr(net, "lineage", ())), getattr(net, "size", None)
    how = {"arch": given} if kind == "module" else {"encoder": given}
    one, other = learner(task="simclr", **how), learner(**how)
    assert kind == "module" or (same(state(one.encoder), before) and same(state(other.encoder), before))
    untouched = state(other.encoder)
    one.fit(1, 1e-1)
    assert same(state(net), before) and same(state(other.encoder), untouched)
    assert (list(getattr(net, "lineage", ())), getattr(net, "size", None)) == (lineage, size)
    moved = [not torch.equal(p, q) for p, q in zip(state(one.encoder), untouched)]
    assert all(m for m, name in zip(moved, one.encoder.state_dict()) if name.endswith("weight")), "all layers train"


def test_what_an_encoder_that_exists_does_to_the_images_is_said(capsys):
    grey = create_encoder("resnet10t", n_in=1)
    learner(loaders(side=32), encoder=grey)
    assert "The encoder takes grey images: these are made grey." in capsys.readouterr().err
    with pytest.raises(TaskError, match="given encoder takes grey images, with which colorization cannot work"):
        learner(loaders(side=32), "colorization", encoder=grey)
    learner(loaders(side=32, channels=1), encoder=create_encoder("resnet10t"))
    assert "The encoder takes color images: grey ones are repeated." in capsys.readouterr().err
    learner(loaders(side=32, channels=1), encoder=grey)
    assert "The encoder takes" not in capsys.readouterr().err


def test_one_task_for_two_learners_learns_of_the_images_of_each():
    task = get_task("exemplar")
    first = learner(loaders(n=24, side=24), task)
    asked, guessing = first.dls.valid.one_batch()[1], first.task.chance()
    second = learner(loaders(n=12, bs=4, side=24), task)
    assert first.task.chance() == guessing != second.task.chance()
    assert torch.equal(first.dls.valid.one_batch()[1], asked)
    assert first.dls.train.task is first.task is not task


def test_an_encoder_goes_on_at_another_size_and_remembers_it():
    first = learner()
    first.fit(1)
    second = learner(loaders(side=24), encoder=first)
    assert (first.encoder.size, second.encoder.size) == (16, 24)
    vit = learner(loaders(side=48), arch="vit_tiny_patch16_224").encoder
    assert (vit.size, vit.fixed_size) == (48, 48)
    assert learner(loaders(side=64), encoder=vit).encoder.size == 48


def test_the_data_print_is_that_of_the_images_also_with_statistics_from_before():
    encoder = learner().encoder
    prints = [learner(loaders(seed=s), encoder=encoder).this_round()["data"]["print"] for s in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] == learner().this_round()["data"]["print"]  # whichever net it was measured for


def test_arguments_that_ask_for_two_nets_are_refused(tmp_path):
    first = learner()
    file = learner(arch="resnet10t").save_encoder(tmp_path / "saved")
    for given in (first, first.encoder, file, str(file)):
        for kwargs, said in [
            ({"pretrained": True}, "pretrained=True goes with the name of a net; this encoder has weights of its own"),
            ({"n_in": 1}, "n_in is 1, but the encoder takes 3 channels. Leave n_in out"),
            ({"arch": "resnet34"}, "arch='resnet34' goes with a new net, but encoder= brings one"),
            ({"arch": tiny}, "arch='tiny' goes with a new net"),
        ]:
            with pytest.raises(TaskError, match=said):
                pretext_learner(loaders(), "rotation", encoder=given, **kwargs)
    for kwargs in ({"pretrained": True}, {"n_in": 1}):
        with pytest.raises(TaskError, match=r"weights of its own|takes 3 channels"):
            pretext_learner(loaders(), "rotation", str(file), **kwargs)
    assert learner(encoder=first, n_in=3).encoder.in_chans == 3
    assert learner(encoder="resnet10t", n_in=1).encoder.in_chans == 1  # a new one


def test_images_of_different_sizes_are_resized_and_that_is_said(tmp_path, capsys):
    for i in range(12):
        write_images(tmp_path / str(i), 1, (40 + i, 52))
        (tmp_path / str(i) / "0000.png").rename(tmp_path / f"{i:04d}.png")
        (tmp_path / str(i)).rmdir()
    dls = labeled(tmp_path, item_tfms=None, bs=4)
    learn = learner(dls)
    assert capsys.readouterr().err.count("The images differ in size: resized to 128 px.") == 1
    assert learn.encoder.size == 128 and learn.dls.one_batch()[0].shape == (4, 4, 3, 128, 128)
    learn.fit(1)
    assert len(learn.recorder.losses) == len(dls.train)
    second = learner(dls, encoder=learner())  # of 16 pixels
    assert "resized to 16 px." in capsys.readouterr().err
    assert second.encoder.size == 16 and second.dls.one_batch()[0].shape == (4, 4, 3, 16, 16)
    learner(labeled(tmp_path))
    assert "differ" not in capsys.readouterr().err


def test_settings_without_a_task_are_refused_where_the_task_is_made_already():
    with pytest.raises(TaskError, match=r"Which task\? pretext_learner\(dls, 'rotation'\)"):
        pretext_learner(loaders(), turns="one")
    made = learner(turns="one").dls
    assert pretext_learner(made, arch=tiny).task.turns == "one"
    with pytest.raises(TaskError, match="already made: give turns to Rotation"):
        pretext_learner(made, turns="all")


@pytest.mark.parametrize("item", ["array", "path"])
def test_predict_opens_what_the_encoder_takes(item, grey_folder):
    learn = learner(loaders(channels=3))
    file = sorted(grey_folder.iterdir())[0]
    answer = learn.predict(file if item == "path" else np.zeros((40, 40), np.uint8))
    assert answer.inputs[0].shape[:3] == (1, 4, 3) and answer.targets[0].tolist() == [[0, 1, 2, 3]]
    assert len(answer.show()) == 1


def test_predict_resizes_as_validation_does(color_folder):
    learn = learner(labeled(color_folder))
    answer = learn.predict(np.full((60, 90, 3), 51, np.uint8))
    assert answer.inputs[0].shape == (1, 4, 3, 24, 24)
    torch.testing.assert_close(answer.inputs[0], torch.full((1, 4, 3, 24, 24), 0.2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", [t for t in TASKS if task_class(t).of_color])
def test_settings_that_change_nothing_in_grey_images_are_named(task, capsys):
    names = task_class(task).of_color
    usual, other = get_task(task).settings(), {"color": "project"}
    given = {name: other.get(name, 0.05) for name in names}
    assert set(names) <= set(usual) and all(usual[name] != value for name, value in given.items())
    grey = np.random.default_rng(0).integers(0, 256, (12, 64, 64), dtype=np.uint8)
    said = []
    for images in (grey, np.stack([grey] * 2 + [255 - grey], -1)):
        dls = UnlabeledDataLoaders.from_array(images, size=None, bs=4, num_workers=0)
        for settings in ({}, given):
            capsys.readouterr()
            pretext_learner(dls, task, "resnet10t", **settings)
            said.append("these images are grey" in capsys.readouterr().err)
    assert said == [False, True, False, False]


def test_a_setting_of_color_changes_nothing_in_grey_images():
    """What is said of them is true: the batches are the same."""
    x = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    idx = torch.arange(4)
    for name in [t for t in TASKS if task_class(t).of_color]:
        made = []
        for given in ({}, {n: {"color": "project"}.get(n, 0.05) for n in task_class(name).of_color}):
            task = get_task(name, **given)
            made.append(task.batch(x, generator=torch.Generator().manual_seed(1), train=True, idx=idx))
        assert all(torch.equal(a, b) for a, b in zip(*made)), name
