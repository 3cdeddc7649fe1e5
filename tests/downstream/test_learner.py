"""Fine-tuning on labeled images: what moves when, what stays still, and that the numbers belong to the images."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.learner import DownstreamModel, default_metrics, downstream_learner, layer_groups
from selfsup_fastai.downstream.schedule import SCHEDULES, FrozenNorms
from selfsup_fastai.downstream.targets import Target
from selfsup_fastai.encoders.checkpoint import load_encoder, read_card, save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.inputs import to_input
from selfsup_fastai.errors import DataError, SelfsupError, TaskError
from selfsup_fastai.features import embed, embedded_images

FIVE = ["resnet18", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def write_classes(folder, n, grey, size=32):
    """`n` images of stripes across and `n` of stripes down, each of its own colors and noise."""
    rng = np.random.default_rng(0)
    for label in ("across", "down"):
        (folder / label).mkdir(parents=True)
        for i in range(n):
            wave = np.sin(np.arange(size) * rng.uniform(0.6, 1.2))[:, None, None]
            pixels = 128 + 80 * wave * rng.uniform(0.7, 1.3, 3) + rng.normal(0, 12, (size, size, 3))
            pixels = pixels if label == "across" else pixels.transpose(1, 0, 2)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            (image.convert("L") if grey else image).save(folder / label / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def color_classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("color_classes"), 20, grey=False)


@pytest.fixture(scope="session")
def grey_classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("grey_classes"), 20, grey=True)


@pytest.fixture(scope="session")
def few_classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("few_classes"), 8, grey=False)


def labeled(folder, bs=8, valid_pct=0.25, **kwargs):
    return ImageDataLoaders.from_folder(
        folder, valid_pct=valid_pct, seed=1, bs=bs, num_workers=0, device="cpu", **kwargs
    )


def make(folder, encoder="resnet10t", seed=0, **kwargs):
    set_seed(seed)
    return downstream_learner(labeled(folder), encoder, **kwargs)


def state_of(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def pixels_of(files):
    """(N, 3, H, W) in [0, 1], read without any of the code under test."""
    arrays = [np.asarray(Image.open(f).convert("RGB"), dtype=np.float32) / 255 for f in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class Watch(Callback):
    """Which groups moved in each stage, which norm layers' statistics did, and how many steps were taken."""

    def __init__(self):
        self.moved, self.statistics, self.steps = [], [], 0

    def _groups(self):
        return [[p.detach().clone() for p in group] for group in layer_groups(self.model)]

    def _means(self):
        return {n: b.clone() for n, b in self.model.named_buffers() if n.endswith("running_mean")}

    def before_fit(self):
        self.before = self._groups(), self._means()

    def after_step(self):
        self.steps += 1

    def after_fit(self):
        pairs = zip(self.before[0], self._groups())
        self.moved.append([any(not torch.equal(a, b) for a, b in zip(*pair)) for pair in pairs])
        self.statistics.append({n for n, m in self._means().items() if not torch.equal(m, self.before[1][n])})


def norms_of_groups(learn):
    """For each group, the names of the running means whose norm layer has its weights there."""
    weights = {id(p): i for i, group in enumerate(layer_groups(learn.model)) for p in group}
    names = [set() for _ in layer_groups(learn.model)]
    for name, module in learn.model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            names[weights[id(module.weight)]].add(f"{name}.running_mean")
    return names


def test_gradual_stages_move_the_right_groups_and_hold_frozen_statistics(few_classes):
    learn, watch = make(few_classes, "resnet18"), Watch()
    learn.fine_tune(6, cbs=watch)
    assert watch.moved == [[i >= first for i in range(5)] for first in (4, 3, 2, 1, 0)]
    norms = norms_of_groups(learn)
    assert [len(n) for n in norms] == [5, 5, 5, 5, 0]
    assert watch.statistics == [set().union(*norms[first:]) for first in (4, 3, 2, 1, 0)]


def test_fastais_way_moves_frozen_norms(few_classes):
    """The trap that `norms='eval'` is for: statistics follow even with train_bn=False."""
    learn, watch = make(few_classes, "resnet10t"), Watch()
    everything = set().union(*norms_of_groups(learn))
    learn.fine_tune(2, norms="train", cbs=watch)
    assert watch.statistics[0] == everything
    assert any(watch.moved[0][:-1])
    learn, watch = make(few_classes, "resnet10t"), Watch()
    learn.train_bn = False
    learn.freeze()
    learn.fit(1, cbs=watch)
    assert watch.moved[0] == [False] * (len(watch.moved[0]) - 1) + [True]
    assert watch.statistics[0] == everything
    learn.fit(1, cbs=[watch, FrozenNorms()])
    assert watch.statistics[1] == set()


def test_a_second_run_freezes_as_well_as_the_first(few_classes):
    """Weights that were trained before keep a gradient of zero, by which fastai's optimizer would still decay them."""
    learn, watch = make(few_classes, "resnet10t", wd=0.1), Watch()
    learn.fine_tune(1)
    learn.fine_tune(1, cbs=watch)
    assert watch.moved[0] == [False] * (len(watch.moved[0]) - 1) + [True]
    assert watch.statistics[0] == set()


def test_norm_policy_ends_with_the_run(few_classes):
    learn = make(few_classes, "resnet10t")
    learn.fine_tune(1)
    assert learn.train_bn is True
    assert not [cb for cb in learn.cbs if isinstance(cb, FrozenNorms)]
    learn.freeze()
    norms = [m for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.weight.requires_grad for m in norms)
    assert not learn.model.encoder.body.conv1[0].weight.requires_grad


def test_all_schedules_take_the_same_number_of_steps(few_classes):
    steps = []
    for schedule in SCHEDULES:
        learn, watch = make(few_classes, "resnet10t"), Watch()
        learn.fine_tune(5, freeze_epochs=2, schedule=schedule, cbs=watch)
        assert learn.fine_tune_plan(5, freeze_epochs=2, schedule=schedule)["epochs"].sum() == 7
        steps.append(watch.steps)
    assert steps == [7 * len(learn.dls.train)] * 4


def test_two_stage_is_fastais_fine_tune_step_for_step(color_classes):
    after = []
    for ours in (True, False):
        learn = make(color_classes, wd=0.05)
        plain = Learner(learn.dls, learn.model, splitter=layer_groups, wd=0.05, opt_func=learn.opt_func)
        start = state_of(learn)
        set_seed(3)
        learn.dls.train.rng.seed(3)
        if ours:
            learn.fine_tune(2, 3e-3, schedule="two_stage", freeze_epochs=2)
        else:
            plain.fine_tune(2, 3e-3, freeze_epochs=2)
        after.append(state_of(learn))
        assert not torch.equal(start["encoder.body.conv1.0.weight"], after[-1]["encoder.body.conv1.0.weight"])
    assert after[0].keys() == after[1].keys()
    assert all(torch.equal(after[0][k], after[1][k]) for k in after[0])


def test_rates_of_the_run_are_those_of_the_plan(few_classes):
    class Peaks(Callback):
        def before_fit(self):
            schedule = self.learn.param_scheduler.scheds["lr"]
            peaks.append(np.max([schedule(p) for p in np.linspace(0, 1, 101)], axis=0).tolist())

    peaks = []
    learn = make(few_classes, "resnet18")
    learn.fine_tune(2, base_lr=1e-3, cbs=Peaks())
    assert peaks[0] == pytest.approx([1e-4, 1e-4, 1e-4, 1e-4, 1e-3])  # of which only the head's is used
    assert peaks[1] == peaks[2] == pytest.approx([5e-6, 1.58114e-5, 5e-5, 1.58114e-4, 5e-4])
    table = learn.fine_tune_plan(2, base_lr=1e-3)
    assert table["parameters"].tolist() == [1026, 1026 + 8393728 + 2099712, 11176512 + 1026]
    assert table["lr_min"].tolist() == pytest.approx([1e-3, 5e-5, 5e-6])
    assert table["lr_max"].tolist() == pytest.approx([1e-3, 5e-4, 5e-4])


@pytest.mark.parametrize("arch", FIVE)
def test_every_group_learns_when_all_is_trained(few_classes, arch):
    learn, watch = make(few_classes, arch), Watch()
    start = [[p.detach().clone() for p in group] for group in layer_groups(learn.model)]
    learn.fit(1, 1e-3, cbs=watch)
    assert all(watch.moved[0])
    for before, group in zip(start, layer_groups(learn.model)):
        still = [p for b, p in zip(before, group) if torch.equal(b, p)]
        assert sum(p.numel() for p in still) <= 0.01 * sum(p.numel() for p in group)


def test_no_weight_decay_is_honored(few_classes):
    learn = make(few_classes, "vit_tiny_patch16_224")
    learn.create_opt()
    learn.opt.set_hypers(lr=0.5, wd=0.5)
    body = learn.model.encoder.body
    before = state_of(learn)
    for p in learn.model.parameters():
        p.grad = torch.zeros_like(p)
    learn.opt.step()
    assert torch.equal(body.pos_embed, before["encoder.body.pos_embed"])
    assert torch.equal(body.cls_token, before["encoder.body.cls_token"])
    weight = before["encoder.body.blocks.0.mlp.fc1.weight"]
    assert torch.allclose(body.blocks[0].mlp.fc1.weight, weight * 0.75)
    assert torch.equal(body.norm.weight, before["encoder.body.norm.weight"])  # fastai's own rule still holds
    learn.freeze_to(2)
    assert learn.opt.state[body.pos_embed]["do_wd"] is False


def test_given_loaders_stay_as_they_were(grey_classes):
    set_seed(5)
    used = labeled(grey_classes)
    set_seed(5)
    untouched = labeled(grey_classes)
    learn = downstream_learner(used, "resnet10t")
    learn.fit(1)
    for a, b in zip(used.loaders, untouched.loaders):
        (x, y), (x0, y0) = a.one_batch(), b.one_batch()
        assert x.shape[1] == 3
        assert torch.equal(x, x0)
        assert torch.equal(y, y0)
    assert learn.dls.one_batch()[0].shape[1] == 1


def test_a_12_image_training_set_takes_steps(tmp_path):
    folder = write_classes(tmp_path, 8, grey=False)
    dls = labeled(folder, bs=64)
    assert (len(dls.train_ds), len(dls.train)) == (12, 0)
    learn, watch = downstream_learner(dls, "resnet10t"), Watch()
    learn.fine_tune(2, cbs=watch)
    assert watch.steps == 3
    assert watch.moved[0][-1]
    assert all(watch.moved[-1])


def test_fine_tuning_learns(color_classes):
    learn = make(color_classes, metrics=accuracy)
    learn.fine_tune(8, 1e-2)
    log = learn.fine_tune_log
    assert log["accuracy"].iloc[-1] == 1.0
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]


def test_the_log_and_the_recorder_hold_the_whole_run(color_classes):
    learn = make(color_classes, metrics=accuracy)
    learn.fine_tune(4)
    steps = len(learn.dls.train)
    log = learn.fine_tune_log
    assert list(log.columns) == ["stage", "epoch", "train_loss", "valid_loss", "accuracy"]
    assert log["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert log["stage"].tolist() == learn.fine_tune_plan(4)["stage"].repeat(learn.fine_tune_plan(4)["epochs"]).tolist()
    assert learn.recorder.iters == [steps * (i + 1) for i in range(5)]
    assert len(learn.recorder.losses) == len(learn.recorder.lrs) == len(learn.recorder.hps["lr"]) == 5 * steps
    assert [list(v) for v in learn.recorder.values] == log.iloc[:, 2:].to_numpy().tolist()
    valid_loss, acc = learn.validate()
    assert log[["valid_loss", "accuracy"]].iloc[-1].tolist() == pytest.approx([valid_loss, acc])
    learn.fine_tune(1)
    assert learn.fine_tune_log["epoch"].tolist() == [0, 1]


def test_the_log_survives_an_interruption(color_classes):
    class Stop(Callback):
        def before_fit(self):
            if learn.opt.frozen_idx == 0:
                raise KeyboardInterrupt

    learn = make(color_classes)
    with pytest.raises(KeyboardInterrupt):
        learn.fine_tune(2, cbs=Stop())
    assert learn.fine_tune_log["epoch"].tolist() == list(range(len(learn.fine_tune_plan(2)) - 1))
    assert learn.train_bn is True


@pytest.mark.parametrize("ds_idx", [0, 1])
def test_predictions_are_rows_of_the_images_in_order(color_classes, ds_idx):
    learn = make(color_classes)
    learn.fine_tune(1)
    preds, targets = learn.get_preds(ds_idx=ds_idx)
    files = list(learn.dls.loaders[ds_idx].dataset.items)
    mean, std = (torch.tensor(s).view(-1, 1, 1) for s in (learn.model.encoder.mean, learn.model.encoder.std))
    with torch.no_grad():
        expected = learn.model.eval()((pixels_of(files) - mean) / std).softmax(1)
    assert torch.allclose(preds, expected, atol=1e-5)
    assert targets.tolist() == [["across", "down"].index(f.parent.name) for f in files]
    assert preds[:, 1].std() > 1e-4  # different images, different rows


def test_predict_and_export(color_classes, tmp_path):
    learn = make(color_classes, path=tmp_path)
    learn.fine_tune(1)
    preds, _ = learn.get_preds()
    file = learn.dls.valid_ds.items[3]
    label, index, probabilities = learn.predict(file)
    assert torch.allclose(probabilities, preds[3], atol=1e-5)
    assert label == ["across", "down"][int(index)]
    assert int(index) == int(preds[3].argmax())
    learn.export("learner.pkl")
    again = load_learner(tmp_path / "learner.pkl")
    assert torch.allclose(again.predict(file)[2], preds[3], atol=1e-5)
    assert torch.allclose(learn.predict(file)[2], preds[3], atol=1e-5)  # usable after the export too
    learn.fine_tune(1)


def test_show_results_titles_are_the_labels_and_the_predictions(color_classes):
    from matplotlib import pyplot as plt

    learn = make(color_classes)
    learn.fine_tune(1)
    learn.show_results(max_n=4, shuffle=False)
    decoded = learn.get_preds(with_decoded=True)
    names = ["across", "down"]
    expected = [f"{names[int(y)]}\n{names[int(d)]}" for y, d in zip(decoded[1], decoded[2])][:4]
    titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
    assert titles == expected


def test_a_grey_encoder_gets_grey_pixels_with_its_statistics(grey_classes, tmp_path, capsys):
    set_seed(0)
    encoder = create_encoder("resnet10t", n_in=1, size=32)
    encoder.mean, encoder.std = (0.3,), (0.2,)
    file = save_encoder(encoder, tmp_path / "grey", task="rotation")
    learn = downstream_learner(labeled(grey_classes), file)
    said = capsys.readouterr().err
    assert "encoder resnet10t (rotation, 32 px, 1 channel): labeled images opened as grey" in said
    assert "normalized with the encoder's statistics" in said
    x, _ = learn.dls.valid.one_batch()
    files = list(learn.dls.valid_ds.items)[: len(x)]
    arrays = [np.asarray(Image.open(f), dtype=np.float32) / 255 for f in files]
    expected = (torch.from_numpy(np.stack(arrays))[:, None] - 0.3) / 0.2
    assert torch.allclose(torch.Tensor(x), expected, atol=1e-5)
    assert learn.dls.valid.after_batch.fs[-1].mean.flatten().tolist() == pytest.approx([0.3])
    before = encoder.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in learn.model.encoder.state_dict().items())
    learn.fine_tune(1)


@pytest.mark.parametrize(("folder", "channels"), [("grey_classes", 1), ("color_classes", 3)])
def test_a_new_net_follows_the_images(folder, channels, request, capsys):
    dls = labeled(request.getfixturevalue(folder))
    encoder = downstream_learner(dls, "resnet10t").model.encoder
    assert encoder.in_chans == channels
    pixels = pixels_of(dls.train_ds.items)[:, :channels]
    assert encoder.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=2e-3)
    assert encoder.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=2e-3)
    said = capsys.readouterr().err
    assert f"opened as {'grey' if channels == 1 else 'color'}, normalized with their own statistics" in said


def test_a_new_vit_is_made_for_the_size_of_the_images(few_classes):
    encoder = make(few_classes, "vit_tiny_patch16_224").model.encoder
    assert encoder.body.pos_embed.shape[1] == 1 + (32 // 16) ** 2


def test_a_torchvision_constructor_and_a_module_are_encoders_too(grey_classes):
    made = downstream_learner(labeled(grey_classes), torchvision.models.resnet18).model.encoder
    assert (made.arch, made.in_chans) == ("resnet18", 1)
    own = downstream_learner(labeled(grey_classes), lambda: nn.Sequential(nn.Conv2d(3, 8, 3))).model.encoder
    assert (own.in_chans, own.size) == (1, 32)  # a constructor makes a new net, which follows the images
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
    learn = downstream_learner(labeled(grey_classes), net)
    assert torch.equal(learn.model.encoder.body[0].weight, net[0].weight)  # it keeps its channels, images follow
    x, _ = learn.dls.valid.one_batch()
    assert x.shape[1] == 3
    learn.fine_tune(1)


def test_the_given_encoder_stays_as_it_was(few_classes):
    set_seed(0)
    source = create_encoder("resnet10t")
    before = {k: v.clone() for k, v in source.state_dict().items()}
    learn = downstream_learner(labeled(few_classes), source)
    learn.fit(1, 1e-2)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    assert source.mean is None
    tuned = {k: v.clone() for k, v in learn.model.encoder.state_dict().items()}
    second = downstream_learner(labeled(few_classes), learn)
    assert all(torch.equal(v, tuned[k]) for k, v in second.model.encoder.state_dict().items())
    second.fit(1, 1e-2)
    assert all(torch.equal(v, tuned[k]) for k, v in learn.model.encoder.state_dict().items())


def test_save_encoder_keeps_what_was_tuned(few_classes, tmp_path):
    set_seed(0)
    source = create_encoder("resnet10t", size=32)
    learn = downstream_learner(labeled(few_classes), source)
    learn.fine_tune(2)
    file = learn.save_encoder(tmp_path / "tuned")
    saved = load_encoder(file)
    state = learn.model.encoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in saved.state_dict().items())
    assert not torch.equal(saved.body.conv1[0].weight, source.body.conv1[0].weight)
    assert (saved.mean, saved.std) == (learn.model.encoder.mean, learn.model.encoder.std)
    card = read_card(file)
    assert card["lineage"] == [{"task": "fine_tune", "epochs": 3, "images": 36}]  # 12 images, in batches of 6
    assert card["metrics"] == pytest.approx(
        dict(learn.fine_tune_log[["train_loss", "valid_loss", "accuracy"]].iloc[-1])
    )


def test_the_card_counts_every_fit_and_keeps_its_last_values(few_classes, tmp_path):
    learn = make(few_classes, "resnet10t", metrics=accuracy, path=tmp_path)
    learn.lr_find(num_it=2, show_plot=False, suggest_funcs=None)
    learn.fit_one_cycle(2, 1e-3)
    values = dict(zip(["train_loss", "valid_loss", "accuracy"], learn.recorder.values[-1]))
    learn.validate(ds_idx=0)
    learn.get_preds()
    card = read_card(learn.save_encoder(tmp_path / "scratch"))
    assert (card["epochs"], card["images"], card["metrics"]) == (2, 24, pytest.approx(values))
    learn.fine_tune(1)
    card = read_card(learn.save_encoder(tmp_path / "scratch"))
    assert (card["epochs"], card["images"]) == (4, 48)
    assert card["lineage"] == [{"task": "fine_tune", "epochs": 4, "images": 48}]


def test_the_lineage_goes_from_learner_to_learner(few_classes, tmp_path, capsys):
    """The encoder of a learner tells the same story as one from the file that the learner saves."""
    pretraining = make(few_classes, "resnet10t")
    pretraining.this_round = lambda: {"task": "rotation", "epochs": 5, "images": 320, "data": {"print": "abc"}}
    first = downstream_learner(labeled(few_classes), pretraining)
    assert "encoder resnet10t (rotation, 32 px, 3 channels)" in capsys.readouterr().err
    assert pretraining.model.encoder.lineage == []
    first.fit(1)
    file = first.save_encoder(tmp_path / "first")
    rounds = [pretraining.this_round(), {"task": "fine_tune", "epochs": 1, "images": 12}]
    assert read_card(file)["lineage"] == rounds
    first.freeze()
    for source in (first, file):
        second = downstream_learner(labeled(few_classes), source)
        assert all(p.requires_grad for p in second.model.encoder.parameters())
        assert second.model.encoder.lineage == rounds
    assert downstream_learner(labeled(few_classes), second).model.encoder.lineage == rounds  # not trained: no round


def test_a_saved_encoder_with_the_name_of_a_network_is_not_passed_over(few_classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = make(few_classes, "resnet10t")
    learn.save_encoder("resnet10t")
    with pytest.raises(SelfsupError, match=r"Write '\./resnet10t\.safetensors' for the saved encoder"):
        downstream_learner(labeled(few_classes), "resnet10t")
    again = downstream_learner(labeled(few_classes), "./resnet10t").model.encoder
    assert torch.equal(again.body.conv1[0].weight, learn.model.encoder.body.conv1[0].weight)


def test_several_labels_an_image(few_classes):
    frame = pd.DataFrame({"name": [str(f) for f in sorted(few_classes.rglob("*.png"))]})
    frame["labels"] = ["a b" if "across" in name else "b" for name in frame["name"]]
    dls = ImageDataLoaders.from_df(
        frame, path="/", label_delim=" ", valid_pct=0.25, seed=1, bs=4, num_workers=0, device="cpu"
    )
    learn = downstream_learner(dls, "resnet10t")
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat)
    assert learn.model(learn.dls.one_batch()[0]).shape == (4, 2)
    learn.fine_tune(1)
    preds, targets = learn.get_preds()
    with torch.no_grad():
        assert torch.allclose(preds, learn.model(learn.dls.valid.one_batch()[0]).sigmoid(), atol=1e-5)
    assert targets[:, 1].tolist() == [1.0] * 4


def _block(folder, target, get_y, **kwargs):
    block = DataBlock((ImageBlock, target), get_items=lambda p: sorted(p.rglob("*.png")), get_y=get_y)
    block.splitter = RandomSplitter(0.25, seed=1)
    return block.dataloaders(folder, bs=4, num_workers=0, device="cpu", **kwargs)


def test_numbers_as_labels(few_classes):
    dls = _block(few_classes, RegressionBlock(1), lambda f: float(int(f.stem)))
    learn = downstream_learner(dls, "resnet10t")
    assert isinstance(learn.loss_func, type(MSELossFlat()))
    learn.fine_tune(1)
    preds, targets = learn.get_preds()
    assert targets.flatten().tolist() == [float(int(f.stem)) for f in learn.dls.valid_ds.items]
    expected = ((preds.flatten() - targets.flatten()) ** 2).mean()
    assert learn.validate()[0] == pytest.approx(float(expected), rel=1e-4)


def test_two_labels_an_image_are_refused(few_classes):
    blocks = (ImageBlock, CategoryBlock, CategoryBlock)
    block = DataBlock(blocks, get_items=lambda p: sorted(p.rglob("*.png")), get_y=[lambda f: f.stem] * 2, n_inp=1)
    with pytest.raises(TaskError, match="2 labels"):
        downstream_learner(block.dataloaders(few_classes, bs=4, num_workers=0, device="cpu"), "resnet10t")


def test_data_that_is_not_labeled_loaders_is_refused(few_classes):
    with pytest.raises(DataError, match="Expected labeled DataLoaders, got PosixPath"):
        downstream_learner(few_classes, "resnet10t")
    with pytest.raises(DataError, match="got TfmdDL"):
        downstream_learner(labeled(few_classes).train, "resnet10t")
    unlabeled = UnlabeledDataLoaders.from_folder(few_classes, size=32, num_workers=0)
    with pytest.raises(DataError, match="images without labels"):
        downstream_learner(unlabeled, "resnet10t")


def test_what_cannot_be_told_from_the_data_must_be_given():
    items = [(torch.rand(3, 32, 32), i % 2) for i in range(8)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu")
    with pytest.raises(TaskError, match="pass n_out"):
        downstream_learner(dls, "resnet10t")
    with pytest.raises(TaskError, match=r"n_out is -2"):
        downstream_learner(dls, "resnet10t", n_out=-2)
    learn = downstream_learner(dls, "resnet10t", n_out=2)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)  # whole numbers are classes
    learn.fine_tune(1)
    assert learn.get_preds()[1].tolist() == [0, 1] * 4


def test_one_loader_is_enough_where_images_are_held_out(few_classes):
    learn = downstream_learner(DataLoaders(labeled(few_classes).train, device="cpu"), "resnet10t")
    start = state_of(learn)
    with pytest.raises(DataError, match="no loader to validate with"):
        learn.fine_tune(1)
    assert all(torch.equal(v, start[k]) for k, v in learn.model.state_dict().items())
    learn.fine_tune(1, best="valid_loss")
    assert learn.fine_tune_log["valid_loss"].notna().all()


def test_an_encoder_that_eats_lightness_is_given_it(few_classes):
    encoder = create_encoder("resnet10t", n_in=1)
    encoder.eat("L")
    learn = downstream_learner(labeled(few_classes), encoder)
    seen = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    images = embedded_images(labeled(few_classes).valid, list(range(len(seen))))
    torch.testing.assert_close(seen, 2 * to_input(torch.stack(images), "L") - 1)
    expected = embed(learn.model.encoder, labeled(few_classes).valid).x
    torch.testing.assert_close(embed(learn.model.encoder, learn.dls.valid).x, expected)  # and not given it twice
    learn.dls.show_batch()
    learn.fine_tune(1)


def test_encoders_that_do_not_fit_are_refused(few_classes, tmp_path):
    with pytest.raises(SelfsupError, match="resnet10t"):
        downstream_learner(labeled(few_classes), "resnet10r")
    with pytest.raises(SelfsupError, match="missing"):
        downstream_learner(labeled(few_classes), tmp_path / "missing.safetensors")
    with pytest.raises(TaskError, match="n_in is 1, but the encoder takes 3"):
        downstream_learner(labeled(few_classes), create_encoder("resnet10t"), n_in=1)
    with pytest.raises(TaskError, match="pretrained=True goes with the name of a net"):
        downstream_learner(labeled(few_classes), create_encoder("resnet10t"), pretrained=True)
    with pytest.raises(SelfsupError, match="got NoneType"):
        downstream_learner(labeled(few_classes), None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": -3}, "epochs is -3"),
        ({"epochs": 1.5}, r"epochs is 1\.5"),
        ({"epochs": 2, "freeze_epochs": -1}, "freeze_epochs is -1"),
        ({"epochs": 2, "base_lr": 0}, "base_lr is 0"),
        ({"epochs": 2, "base_lr": -1e-3, "schedule": "two_stage"}, r"base_lr is -0\.001"),
        ({"epochs": 2, "lr_mult": 0}, "lr_mult is 0"),
        ({"epochs": 2, "norms": "evil"}, "Did you mean 'eval'"),
    ],
)
def test_arguments_that_make_no_sense_train_nothing(few_classes, kwargs, message):
    learn = make(few_classes)
    start = state_of(learn)
    with pytest.raises(SelfsupError, match=message):
        learn.fine_tune(**kwargs)
    assert all(torch.equal(v, start[k]) for k, v in learn.model.state_dict().items())


def test_no_epochs_for_the_head(few_classes):
    for schedule in SCHEDULES:
        learn, watch = make(few_classes), Watch()
        learn.fine_tune(1, freeze_epochs=0, schedule=schedule, cbs=watch)
        assert watch.steps == len(learn.dls.train)
        assert all(watch.moved[-1])


def test_a_copy_of_the_model_predicts_the_same(few_classes):
    learn = make(few_classes)
    assert isinstance(learn.model, DownstreamModel)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        model = deepcopy(learn.model).eval()
        assert torch.equal(model(x), model.head(model.encoder(x)))


def test_lr_find_leaves_the_net_as_it_was(few_classes, tmp_path):
    learn = make(few_classes, path=tmp_path)
    start = state_of(learn)
    learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert all(torch.equal(v, start[k]) for k, v in learn.model.state_dict().items())
    watch = Watch()
    learn.fine_tune(1, cbs=watch)
    assert watch.moved[0] == [False] * (len(watch.moved[0]) - 1) + [True]


def test_resized_and_augmented_loaders_keep_their_transforms(color_classes):
    from fastai.vision.augment import Flip

    dls = labeled(color_classes, item_tfms=Resize(24), batch_tfms=Flip(p=1.0, batch=True))
    learn = downstream_learner(dls, "resnet10t")
    x, _ = learn.dls.train.one_batch()
    assert x.shape[-2:] == (24, 24)
    assert [type(t).__name__ for t in learn.dls.train.after_batch.fs] == ["IntToFloatTensor", "Flip", "Standardize"]


@pytest.fixture(scope="module")
def mixed_classes(tmp_path_factory):
    """16 images of stripes, 32 pixels high and 32 to 47 wide."""
    folder = write_classes(tmp_path_factory.mktemp("mixed_classes"), 8, grey=False)
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        with Image.open(file) as image:
            wide = image.resize((32 + i, 32))
        wide.save(file)
    return folder


@pytest.mark.parametrize(("size", "side"), [(24, 24), (None, 128)])
def test_images_of_different_sizes_get_the_size_of_the_encoder(mixed_classes, size, side, capsys):
    set_seed(0)
    encoder = create_encoder("resnet10t", size=size)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    learn = downstream_learner(labeled(mixed_classes), encoder)
    assert f"opened as color, resized from different sizes to {side} px, normalized" in capsys.readouterr().err
    x, _ = learn.dls.valid.one_batch()
    centers = []
    for file in list(learn.dls.valid_ds.items)[: len(x)]:
        image = Image.open(file)
        left = (image.width - 32) // 2
        center = image.crop((left, 0, left + 32, 32)).resize((side, side), Image.Resampling.BILINEAR)
        centers.append(np.asarray(center, dtype=np.float32) / 255)
    expected = (torch.from_numpy(np.stack(centers)).permute(0, 3, 1, 2) - 0.5) / 0.25
    assert torch.allclose(torch.Tensor(x), expected, atol=1e-5)
    learn.fine_tune(1)
    assert learn.predict(learn.dls.valid_ds.items[0])[2].shape == (2,)


def test_a_new_net_gets_images_of_different_sizes_at_128_pixels(mixed_classes, capsys):
    learn = make(mixed_classes, "vit_tiny_patch16_224")
    assert "resized from different sizes to 128 px" in capsys.readouterr().err
    assert learn.model.encoder.body.pos_embed.shape[1] == 1 + (128 // 16) ** 2
    assert learn.dls.one_batch()[0].shape[-2:] == (128, 128)


@pytest.mark.parametrize("encoder_size", [16, None])
def test_images_that_the_user_resizes_or_that_are_alike_keep_their_size(
    mixed_classes, few_classes, encoder_size, capsys
):
    encoder = create_encoder("resnet10t", size=encoder_size)
    for dls, side in (labeled(mixed_classes, item_tfms=Resize(40)), 40), (labeled(few_classes), 32):
        learn = downstream_learner(dls, encoder)
        assert learn.dls.one_batch()[0].shape[-2:] == (side, side)
    assert "resized" not in capsys.readouterr().err


def test_where_no_metrics_are_named_the_labels_decide(few_classes):
    learn = make(few_classes, "resnet10t")
    learn.fit(1, 1e-3)
    probabilities, truth = learn.get_preds()
    assert learn.recorder.metric_names[3:-1] == ["accuracy"]
    assert learn.validate()[1] == pytest.approx((probabilities.argmax(1) == truth).float().mean().item())
    assert not make(few_classes, "resnet10t", metrics=[]).metrics
    dice, r2, ranked = (default_metrics(Target(kind, 2))[0] for kind in ("mask", "points", "multicategory"))
    assert [metric.name for metric in (dice, r2, ranked)] == ["dice", "R2", "mAP"]
    truth = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 0, 0, 0]]])
    found = torch.tensor([[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 1, 0, 0]]])
    for rows in (slice(0, 2), slice(2, 3)):  # 2 * 1 / 3, nothing rightly, 0: however they are batched
        dice.accumulate(SimpleNamespace(pred=F.one_hot(found[rows]).movedim(-1, 1), yb=[truth[rows]]))
    assert dice.value == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert r2.value is None
    for rows in ([0.0, 1.0], [5.0]):
        column = torch.tensor(rows)[:, None]
        r2.accumulate(SimpleNamespace(pred=column + 1, yb=[column]))
    assert r2.value == pytest.approx(1 - 3 / 14)  # errors of 1; 4 + 1 + 9 from the mean, 2
    r2.accumulate(SimpleNamespace(pred=torch.tensor([[float("nan")]]), yb=[torch.ones(1, 1)]))
    assert r2.value is None  # diverged
    ranked.accumulate(SimpleNamespace(pred=torch.tensor([[0.1], [0.2]]), yb=[torch.ones(2, 1)]))
    assert ranked.value is None  # a label that all have
