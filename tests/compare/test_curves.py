"""Label curves: paired runs under one budget, kept and found again."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, ImageDataLoaders, MaskBlock
from PIL import Image

from selfsup_fastai.compare import curves
from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.draws import draw_labels
from selfsup_fastai.compare.starts import new_like, starts_of
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.compare.trial import Budget, budget_for
from selfsup_fastai.encoders.checkpoint import is_fresh, save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import DataError, TaskError
from tests.compare.labeled_images import stripes, stripes_table


@pytest.fixture(scope="module")
def dls(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("stripes"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two pretraining seeds' encoders."""
    folder = tmp_path_factory.mktemp("encoders")
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(save_encoder(create_encoder("resnet10t", n_in=1, size=32), folder / f"{seed}", task="x"))
    return made


def test_rows_are_those_of_the_contract(dls, files, tmp_path):
    runs = label_curve({"x": files}, dls, [2, 0.5], seeds=2, steps=4, folder=tmp_path)
    assert list(runs["start"].unique()) == ["scratch", "x"]
    assert len(runs) == 8 and set(runs["metric"]) == {"accuracy"}
    assert runs["n_labels"].tolist() == [4, 20] * 4
    budgets = runs.groupby("n_labels")[["steps", "images"]].nunique()
    assert (budgets == 1).all(axis=None)  # the same for every start and seed
    assert (runs["score"] * 40).round(6).mod(1).eq(0).all()
    assert runs[runs["start"] == "x"]["pretrained"].tolist() == [0, 0, 1, 1]
    assert runs.attrs["n_test"] == 40 and runs.attrs["baseline"] == "scratch"
    assert set(summarize(runs)["verdict"]) <= {"", "better", "worse", "not distinguishable"}


def test_the_same_call_finds_its_runs_and_another_does_not(dls, files, tmp_path, monkeypatch):
    made = []
    true = curves.fine_tuned
    monkeypatch.setattr(curves, "fine_tuned", lambda *args: made.append(args) or true(*args))
    kwargs = dict(labels=[0.5], seeds=1, steps=3, folder=tmp_path)
    first = label_curve({"x": files[0]}, dls, **kwargs)
    assert len(made) == 2
    again = label_curve({"another name": files[0]}, dls, **kwargs)
    assert len(made) == 2
    assert again["score"].tolist() == first["score"].tolist()
    label_curve({"x": files[1]}, dls, **kwargs)  # other weights; scratch is known
    assert len(made) == 3
    label_curve({"x": files[0]}, dls, **kwargs | {"steps": 4})
    assert len(made) == 5
    torn = sorted(tmp_path.glob("*.npz"))[0]
    torn.write_bytes(torn.read_bytes()[:100])  # a file that was not written to its end is no run
    label_curve({"x": files[0]}, dls, **kwargs)
    label_curve({"x": files[1]}, dls, **kwargs)
    label_curve({"x": files[0]}, dls, **kwargs | {"steps": 4})
    assert len(made) == 6


def test_runs_repeat_and_do_not_depend_on_each_other(dls, files):
    both = label_curve({"x": files}, dls, [2, 0.5], seeds=2, steps=3)
    one = label_curve({"x": files}, dls, [0.5], seeds=2, steps=3)
    assert one["score"].tolist() == both[both["labels"].map(repr) == "0.5"]["score"].tolist()


def test_all_starts_get_the_same_labels(dls, files, monkeypatch):
    drawn = []
    true = curves.labeled_with
    monkeypatch.setattr(curves, "labeled_with", lambda d, places, b: drawn.append(places) or true(d, places, b))
    label_curve({"x": files}, dls, [2], seeds=2, steps=2)
    assert len(drawn) == 4
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[2], drawn[3])
    assert not np.array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(drawn[0], draw_labels(40, 2, 0, np.arange(40) % 2))


def test_test_labels_choose_nothing(tmp_path, files):
    """With other labels of the test images the very same is predicted."""
    table = stripes_table(tmp_path, 16, 10)
    other = table.assign(label=["b" if v else lab for lab, v in zip(table["label"], table["is_valid"])])
    other.loc[16, "label"] = "a"
    from selfsup_fastai.data.labeled import labeled_loaders

    found = [label_curve({"x": files}, labeled_loaders(t, 1, 32, 4), [1.0], seeds=1, steps=3) for t in (table, other)]
    one, two = (runs.attrs["predictions"] for runs in found)
    for a, b in zip(found[0]["run"], found[1]["run"]):
        np.testing.assert_array_equal(one[a], two[b])
    assert found[0]["score"].tolist() != found[1]["score"].tolist()


def test_linear_takes_seconds_and_knows_stripes(dls, files):
    runs = label_curve({"x": files}, dls, [0.2, 1.0], seeds=2, method="linear", metric="AUC")
    assert set(runs["metric"]) == {"AUC"}
    assert runs[runs["labels"] == 1.0]["score"].min() > 0.9  # across or down: even random filters can tell


def test_a_budget_of_steps_is_kept():
    for n in (2, 10, 45, 500, 5000):
        b = budget_for(n, 64, steps=200)
        per_epoch = n * b.repeats // b.bs
        assert abs(b.epochs * per_epoch - 200) <= per_epoch / 2  # epochs are whole
        assert b.bs <= min(n, 64)
    assert budget_for(10_000, 64).epochs == 5  # at least so many passes where nothing is said
    assert budget_for(100, 64, epochs=7) == Budget(16, 7, 1)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return stripes_table(tmp_path_factory.mktemp("other"), 24, 12)


def loaders(table: pd.DataFrame, block, get_y, **kwargs):
    block = DataBlock(
        blocks=(ImageBlock, block), get_x=ColReader("file"), get_y=get_y, splitter=ColSplitter("is_valid"), **kwargs
    )
    return block.dataloaders(table, bs=8)


def test_regression(table):
    table = table.assign(value=[float(lab == "a") for lab in table["label"]])
    dls = loaders(table, RegressionBlock, ColReader("value"))
    runs = label_curve({"scratch": "resnet10t"}, dls, [0.5], seeds=1, steps=3)
    assert runs["metric"].tolist() == ["R2"]
    predicted, truth = next(iter(runs.attrs["predictions"].known.values())), runs.attrs["predictions"].truth
    assert truth.ravel().tolist() == table[table["is_valid"]]["value"].tolist()
    expected = 1 - ((predicted.ravel() - truth.ravel()) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert runs["score"].iloc[0] == pytest.approx(expected, rel=1e-5)
    linear = label_curve({"scratch": "resnet10t"}, dls, [1.0], seeds=1, method="linear", metric="negative MAE")
    assert -0.5 < linear["score"].iloc[0] <= 0
    with pytest.raises(DataError, match="these labels are no classes"):
        label_curve({"scratch": "resnet10t"}, dls, [5], seeds=1)


def test_several_labels_an_image(table):
    table = table.assign(tags=["a;c" if lab == "a" else "b" for lab in table["label"]])
    dls = loaders(table, MultiCategoryBlock, ColReader("tags", label_delim=";"))
    runs = label_curve({"scratch": "resnet10t"}, dls, [0.5], seeds=1, steps=3)
    assert runs["metric"].tolist() == ["mAP"] and 0 < runs["score"].iloc[0] <= 1
    assert label_curve({"scratch": "resnet10t"}, dls, [1.0], seeds=1, method="linear")["score"].iloc[0] > 0.9


def test_masks(table, tmp_path):
    def mask_of(row):
        file = tmp_path / row["file"].name
        Image.fromarray((np.asarray(Image.open(row["file"])) > 128).astype(np.uint8)).save(file)
        return file

    dls = loaders(table, MaskBlock(codes=["dark", "bright"]), mask_of)
    runs = label_curve({"scratch": "resnet10t"}, dls, [1.0], seeds=1, steps=3)
    assert runs["metric"].tolist() == ["dice"] and 0 <= runs["score"].iloc[0] <= 1
    with pytest.raises(TaskError, match="Masks have no linear trial"):
        label_curve({"scratch": "resnet10t"}, dls, [1.0], seeds=1, method="linear")


def test_plain_fastai_loaders(tmp_path):
    from tests.conftest import write_images

    for label, seed in (("a", 1), ("b", 2)):
        write_images(tmp_path / label, 10, (40, 48), seed=seed)
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=0.4, seed=0, bs=4, item_tfms=Resize(32))
    runs = label_curve({"x": create_encoder("resnet10t", size=32)}, dls, [1, 1.0], seeds=1, steps=2)
    assert runs["n_labels"].tolist() == [2, 12, 2, 12]
    assert [type(a) for a in summarize(runs)["labels"]] == [int, int, float, float]


def test_scratch_is_the_same_net_with_new_weights(files):
    (scratch, x) = starts_of({"x": files})
    assert scratch.name == "scratch" and scratch.fresh and scratch.sources == ("resnet10t",)
    assert not x.fresh and [x.pretrained(s) for s in range(4)] == [0, 1, 0, 1]
    vit = create_encoder("vit_tiny_patch16_224", n_in=1, size=32, patch_size=8)
    maker = new_like(vit)
    assert is_fresh(maker)
    one, two = maker(), maker()
    assert one.kwargs == vit.kwargs and one.in_chans == 1
    assert not torch.equal(next(iter(one.parameters())), next(iter(two.parameters())))
    with pytest.raises(TaskError, match="is made anew is not known: add 'scratch'"):
        starts_of({"x": create_encoder(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), size=32)})


@pytest.mark.parametrize(
    ("kwargs", "error", "said"),
    [
        ({"seeds": 0}, TaskError, "seeds"),
        ({"steps": 3, "epochs": 3}, TaskError, "give one of them"),
        ({"epochs": 1}, TaskError, "epochs"),
        ({"method": "knn"}, TaskError, "'fine_tune' or 'linear'"),
        ({"metric": "dice"}, TaskError, "does not suit labels of the kind category"),
        ({"labels": [2.0]}, DataError, "labels holds 2.0"),
        ({"groups": "ward"}, DataError, "no column 'ward'"),
        ({"encoders": {}}, TaskError, "got none"),
        ({"encoders": {"x": []}}, TaskError, "empty list"),
    ],
)
def test_arguments_that_make_no_sense(dls, kwargs, error, said):
    with pytest.raises(error, match=said):
        label_curve(**{"encoders": {"x": "resnet10t"}, "dls": dls, "labels": [0.5]} | kwargs)
