"""DICOM tags: targets equal the table, what is missing weighs nothing, and no word of a header slips out."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch import Tensor

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from tests.test_contract import tiny

NAN = float("nan")
TRAIN = pd.DataFrame(
    {
        "modality": ["CT", "MR", "CT", "DX", "CT", "MR", "", None],
        "body_part": ["HEAD", "", "CHEST", "CHEST", NAN, "HEAD", "SMITH^JOHN", "HEAD"],
        "view": ["", "", "", "PA", "", "", "", ""],
        "plane": ["axial", "axial", "coronal", "", "axial", "sagittal", "", "axial"],
        "patient": list("aabbccdd"),
    }
)
VALID = pd.DataFrame(
    {
        "modality": ["MR", "US", "DX", " CT "],
        "body_part": ["CHEST", "HEAD", "KNEE", ""],
        "plane": ["coronal", "oblique", "axial", None],
    }
)
NUMBERS = {"modality": ["CT", "DX", "MR"], "body_part": ["CHEST", "HEAD", "SMITH^JOHN"]}
NUMBERS["plane"] = ["axial", "coronal", "sagittal"]


def loaders(train: pd.DataFrame = TRAIN, valid: pd.DataFrame = VALID, bs: int = 4) -> UnlabeledDataLoaders:
    """The value of image i is 20 * i."""
    n = len(train) + len(valid)
    array = np.broadcast_to(np.arange(n, dtype=np.uint8).reshape(-1, 1, 1, 1) * 20, (n, 16, 18, 1))
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=bs, valid_pct=len(valid) / n, num_workers=0)
    dls.train.facts, dls.valid.facts = train, valid
    return dls


def learner(dls=None, **kwargs):
    set_seed(0)
    learn = pretext_learner(loaders() if dls is None else dls, "dicom_tags", tiny, **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn


def expected(facts: pd.DataFrame) -> np.ndarray:
    """What the table says, looked up one by one."""

    def number(tag: str, value: object) -> int:
        return NUMBERS[tag].index(value.strip()) if isinstance(value, str) and value.strip() in NUMBERS[tag] else -1

    return np.array([[number(tag, facts[tag].iloc[i]) for tag in NUMBERS] for i in range(len(facts))])


def test_targets_are_the_tables(capsys):
    learn = learner(window=0.0)
    assert "dicom_tags: view left out: less than two values in the training images." in capsys.readouterr().err
    for dl, facts in zip(learn.dls.loaders, (TRAIN, VALID)):
        values, seen = [item[0, 0, 0] for item in dl.dataset.items], []
        for _ in range(3):
            for b in dl:
                (x,), (tags,) = dl.question(b)
                rows = [values.index(round(v)) for v in (x.flatten(1).mean(1) * 255).tolist()]
                np.testing.assert_array_equal(tags, expected(facts)[rows])
                seen += rows
        assert set(seen) == set(range(len(facts)))
    assert learn.task.n_classes == [3, 3, 3] and learn.task.names["plane"] == NUMBERS["plane"]
    assert learn.task.chance() == pytest.approx(3 / 6)  # of six known modalities three are CT


def test_new_images_have_no_tags():
    learn = learner()
    dl = learn.dls.test_dl([np.zeros((16, 18, 1), np.uint8)] * 3)
    assert dl.question(dl.one_batch())[1][0].tolist() == [[-1, -1, -1]] * 3
    answer = learn.predict(np.zeros((16, 18, 1), np.uint8))
    assert answer.targets[0].tolist() == [[-1, -1, -1]] and answer.decoded.shape == (1, 3)
    (ax,) = answer.show()
    assert ax.get_title() == f"no tags\n→ {learn.task.words(answer.decoded[0])}"


def question(learn) -> tuple[Tensor, Tensor]:
    pred = torch.randn(8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pred, torch.from_numpy(expected(TRAIN))


def by_hand(pred: Tensor, tags: Tensor) -> list[float]:
    rows = []
    for scores, row in zip(pred.numpy(), tags.tolist()):
        heads = [(scores[3 * h : 3 * h + 3], t) for h, t in enumerate(row) if t >= 0]
        rows.append(sum(np.log(np.exp(logits).sum()) - logits[t] for logits, t in heads) / 3)
    return rows


def test_loss_is_the_mean_over_the_tags_and_what_is_missing_weighs_nothing():
    learn = learner()
    pred, tags = question(learn)
    rows = learn.task.loss(pred, tags, reduction="none")
    assert rows.tolist() == pytest.approx(by_hand(pred, tags))
    pred.requires_grad_()
    loss = learn.task.loss(pred, tags)
    assert loss.item() == pytest.approx(rows.mean().item())
    loss.backward()
    for head in range(3):
        missing = tags[:, head] == -1
        gradient = pred.grad[:, 3 * head : 3 * head + 3]
        assert missing.any() and (gradient[missing] == 0).all() and (gradient[~missing] != 0).all()


def test_each_tag_has_its_accuracy():
    learn = learner()
    pred, tags = question(learn)
    assert [m.name for m in learn.task.metrics] == ["modality", "body_part", "plane"]
    for head, metric in enumerate(learn.task.metrics):
        known = tags[:, head] != -1
        named = pred[:, 3 * head : 3 * head + 3].argmax(1)
        assert metric(pred, tags) == pytest.approx((named == tags[:, head])[known].double().mean().item())
    probabilities = learn.task.activation(pred)
    for head in range(3):
        part = slice(3 * head, 3 * head + 3)
        torch.testing.assert_close(probabilities[:, part], pred[:, part].softmax(1))
    assert torch.equal(learn.task.decode(probabilities), learn.task.decode(pred))
    assert torch.equal(learn.task.decode(pred)[:, 1], pred[:, 3:6].argmax(1))
    learn.fit(1)
    assert learn.recorder.metric_names[3:6] == ["modality", "body_part", "plane"]


def test_tags_that_can_be_seen_are_learned():
    facts = pd.DataFrame({"modality": np.repeat(["CT", "MR"], 10), "view": np.tile(["PA", "LL"], 10)})
    array = np.zeros((40, 16, 16, 1), np.uint8)
    array[np.arange(40) % 20 >= 10] = 120  # MR is brighter
    array[np.arange(40) % 2 == 1, 6:10] += 80  # lateral views have a bar
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=10, valid_pct=0.5, num_workers=0)
    valid = dls.items_df["is_valid"].to_numpy()
    both = pd.concat([facts, facts], ignore_index=True)
    dls.train.facts, dls.valid.facts = both[~valid], both[valid]
    learn = learner(dls, window=0.0)
    learn.fit_one_cycle(30, 1e-2)
    assert list(learn.validate()[1:]) == [1, 1]


# --- persons ----------------------------------------------------------------------------------------------------------


def test_age_and_sex_are_asked_only_when_somebody_wants_them():
    ages = ["034Y", "007Y", "036M", 39, 41.5, "", "abc", "090D"]
    person = TRAIN.assign(patient_age=ages, patient_sex=list("MFMF FMM"))
    dls = loaders(person, VALID.assign(patient_age=["035Y", "", "", ""], patient_sex=["F", "M", "", ""]))
    assert list(learner(dls).task.names) == ["modality", "body_part", "plane"]
    task = learner(dls, tags=["modality"], age=True, sex=True).task
    assert task.names == {
        "modality": ["CT", "DX", "MR"],
        "patient_age": ["0-9", "30-39", "40-49"],
        "patient_sex": ["F", "M"],
    }
    ages = task.known(person)[:, 1]
    assert ages[~ages.isnan()].tolist() == [1, 0, 0, 1, 2, 0] and ages.isnan().nonzero().flatten().tolist() == [5, 6]
    assert task.known(person)[:5, 2].nan_to_num(-1).tolist() == [1, 0, 1, 0, -1]
    for setting, column in (("age", "patient_age"), ("sex", "patient_sex")):
        with pytest.raises(TaskError, match=rf"{setting}=True needs the column '{column}', which is not there"):
            learner(**{setting: True})
        with pytest.raises(TaskError, match=f"{column} is about a person: it is asked for with {setting}=True"):
            get_task("dicom_tags", tags=[column])


def test_words_of_headers_that_are_no_terms_become_numbers_and_stay_here(tmp_path):
    learn = learner(path=tmp_path)
    assert learn.task.names["body_part"] == ["CHEST", "HEAD", "body_part 2"]
    learn.fit(1)
    titles = [ax.get_title() for ax in learn.dls.train.new(shuffle=False, bs=8).show_batch()]
    assert titles[0] == "CT, HEAD, axial" and titles[6:] == ["body_part 2", "HEAD, axial"]
    learn.export("learner.pkl")
    raw = (tmp_path / "learner.pkl").read_bytes()
    file = learn.save_encoder(tmp_path / "encoder")
    assert b"sagittal" in raw and b"SMITH" not in raw + file.read_bytes()
    assert json.dumps(read_card(file)["settings"])


def test_own_columns_are_shown_as_they_are():
    facts = pd.DataFrame({"stain": ["H&E", "PAS"] * 4})
    learn = learner(loaders(facts, facts[:4]), tags=["stain"])
    assert learn.task.names == {"stain": ["H&E", "PAS"]}
    b = learn.dls.valid.one_batch()
    assert [ax.get_title() for ax in learn.dls.valid.show_batch(b)] == ["H&E", "PAS"] * 2
    axes = learn.dls.valid.show_results(b, torch.tensor([[0], [0], [1], [1]]))
    assert [ax.get_title() for ax in axes] == [
        "H&E\n→ H&E  ✓",
        "PAS\n→ H&E  ✗",
        "H&E\n→ PAS  ✗",
        "PAS\n→ PAS  ✓",
    ]


# --- company and mistakes ---------------------------------------------------------------------------------------------


def test_it_is_a_neighbor_of_other_tasks():
    set_seed(0)
    learn = pretext_learner(loaders(), "rotation+dicom_tags", tiny)
    learn.remove_cb(ProgressCallback)
    b = learn.dls.valid.one_batch()
    *_, tags = learn.dls.valid.question(b)[1]
    np.testing.assert_array_equal(tags, expected(VALID))
    learn.fit(3, 1e-2)
    assert "dicom_tags_modality" in learn.recorder.metric_names and np.isfinite(learn.recorder.losses).all()


def test_nothing_to_ask_is_said():
    with pytest.raises(TaskError, match=r"dicom_tags needs facts about the images.* DICOM files bring such columns"):
        dls = loaders()
        dls.train.facts = None
        learner(dls)
    same = pd.DataFrame({"modality": ["CT"] * 8})
    with pytest.raises(TaskError, match="nothing to ask: modality, body_part, view, plane have less than two values"):
        learner(loaders(same))
    with pytest.raises(TaskError, match="tags is a list of columns"):
        get_task("dicom_tags", tags="modality")
    with pytest.raises(TaskError, match="age is True or False"):
        get_task("dicom_tags", age="yes")


def test_training_sees_crops_with_other_windows_and_validation_the_center():
    x = torch.rand(64, 1, 16, 20, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    task = get_task("dicom_tags")
    (still,), (tags,) = task.make_batch(x, generator=torch.Generator().manual_seed(1), train=False)
    assert torch.equal(still, x[..., 2:18]) and tags.shape == (64, 0)
    (moved,), _ = task.make_batch(x, generator=torch.Generator().manual_seed(1), train=True)
    assert moved.shape == still.shape and moved.min() < 0.25 and moved.max() > 0.75
    (plain,), _ = get_task("dicom_tags", min_area=1, window=0).make_batch(
        x[..., 2:18], generator=torch.Generator().manual_seed(1), train=True
    )
    torch.testing.assert_close(plain, still, atol=1e-5, rtol=0)
