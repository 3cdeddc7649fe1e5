"""Slice order: the target says how the slices lie, undone they are in order; what is unknown weighs nothing."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch import Tensor

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.predictive import slice_order
from selfsup_fastai.seeding import Generator
from tests.test_contract import tiny

NAN = float("nan")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(n: int, depth: int = 7) -> pd.DataFrame:
    """Volumes of `depth` slices, in an order in which nobody would store them."""
    at = np.random.default_rng(0).permutation(n)
    return pd.DataFrame({"volume": at // depth, "place": at % depth})


def loaders(facts: pd.DataFrame, bs: int = 6, **kwargs) -> UnlabeledDataLoaders:
    """Of as many validation images, with volumes of their own; the value of image i is its row."""
    n = len(facts)
    array = np.broadcast_to(np.arange(2 * n, dtype=np.uint8).reshape(-1, 1, 1, 1), (2 * n, 16, 18, 1))
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=bs, valid_pct=0.5, num_workers=0, **kwargs)
    for dl in dls.loaders:
        dl.facts = facts
    return dls


def learner(dls, **kwargs):
    set_seed(0)
    learn = pretext_learner(dls, "slice_order", tiny, **kwargs)
    learn.remove_cb(ProgressCallback)
    return learn


def rows_of(dl, slices: Tensor) -> np.ndarray:
    """Of slices (B, 3, ...) in [0, 1] the rows of the dataset that they show."""
    values = np.array([item[0, 0, 0] for item in dl.dataset.items])
    return np.searchsorted(values, (slices.flatten(2).mean(2) * 255).round().numpy())


def test_a_triple_is_what_its_targets_say():
    facts = table(42)
    learn = learner(loaders(facts))
    place, volume = facts["place"].to_numpy(), facts["volume"].to_numpy()
    for dl in learn.dls.loaders:
        asked, orders = [], set()
        for _ in range(10 if dl is learn.dls.train else 1):
            for b in dl:
                (slices,), (order, positions) = dl.question(b)
                shown = rows_of(dl, slices)
                np.testing.assert_allclose(positions, place[shown] / 6, atol=1e-6)
                assert (volume[shown] == volume[shown[:, :1]]).all()
                for rows, answer in zip(shown, order.tolist()):
                    places = place[rows].tolist()
                    if answer == -1:
                        assert len(set(rows)) == 1 and places[0] in (0, 6)
                        continue
                    low, middle, high = sorted(places)
                    assert (middle - low, high - middle) == (1, 1)
                    assert answer == (places[1] == middle)  # put in order, the one in the middle is the middle one
                    asked.append(answer)
                    orders.add(tuple(p - low for p in places))
        if dl is learn.dls.train:
            assert orders == {(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)}
            assert 0.4 < np.mean(asked) < 0.6 and len(asked) == pytest.approx(420 * 5 / 7, abs=30)


def test_orders_are_drawn_equally_often_right_and_wrong():
    x, n = torch.zeros(3000, 1, 8, 8), 3000
    others = torch.stack([x + 0.25, x + 0.75], 1)
    known = torch.tensor([[0.25, 0.5, 0.75, 1]]).expand(n, 4)
    task = get_task("slice_order", min_area=1)
    (slices,), (order, _) = task.make_batch(x + 0.5, generator=seeded(), train=True, known=known, others=others)
    drawn = slices[:, :, 0, 4, 4] * 4
    counts = pd.Series([tuple(row) for row in drawn.round().int().tolist()]).value_counts() / n
    right = {(1, 2, 3), (3, 2, 1)}
    assert len(counts) == 6
    for triple, part in counts.items():
        assert part == pytest.approx(1 / 4 if triple in right else 1 / 8, abs=0.03)
    assert torch.equal(order == 1, drawn[:, 1].round() == 2)


def test_the_three_are_cut_by_one_draw():
    ramp = torch.rand(4, 1, 3, 40, 48, generator=seeded(1))
    task = get_task("slice_order", min_area=0.3)
    known = torch.tensor([[0.1, 0.2, 0.3, 1]]).expand(4, 4)
    made = [
        task.make_batch(
            ramp[:, 0], generator=seeded(2), train=train, known=known, others=ramp.expand(-1, 2, -1, -1, -1)
        )
        for train in (True, False)
    ]
    for (slices,), _ in made:
        assert torch.equal(slices[:, 0], slices[:, 1]) and torch.equal(slices[:, 0], slices[:, 2])
    assert torch.equal(made[1][0][0][:, 0], ramp[:, 0, :, :, 4:44])  # the center square
    assert not torch.equal(made[0][0][0], made[1][0][0])


def test_they_are_on_a_gpu_too():
    """Where views are drawn from another generator than the rest."""
    generator, slices = Generator("cpu", 2), torch.rand(4, 1, 1, 40, 48, generator=seeded(1)).expand(-1, 3, -1, -1, -1)
    generator.host = seeded(3)
    cut = get_task("slice_order", min_area=0.3).cut(slices, generator, train=True)
    assert torch.equal(cut[:, 0], cut[:, 1]) and torch.equal(cut[:, 0], cut[:, 2])


# --- what is known ----------------------------------------------------------------------------------------------------


def test_neighbors_are_at_the_next_places_of_the_same_volume():
    facts = pd.DataFrame(
        {
            "volume": ["v", "w", "v", "v", "w", "v", "w", None, "", "x", "v"],
            "place": [2, 1, 0, 1, 0, 4, 2, 1, 2, NAN, 3],
        }
    )
    found = get_task("slice_order").neighbors(facts).tolist()
    alone = [[i, i] for i in range(11)]
    assert found == [[3, 10], [4, 6], *alone[2:3], [2, 0], *alone[4:10], [0, 5]]


def test_a_gap_or_an_uneven_step_has_no_neighbors_beyond():
    facts = pd.DataFrame({"volume": 1, "place": [0, 1, 2, 4, 5, 6]})
    alone = [[i, i] for i in range(6)]
    assert get_task("slice_order").neighbors(facts).tolist() == [alone[0], [0, 2], *alone[2:4], [3, 5], alone[5]]
    facts = pd.DataFrame({"volume": 1, "place": range(6), "position": [0, 0.1, 0.2, 0.8, 0.9, 1.0]})
    assert get_task("slice_order").neighbors(facts).tolist() == [alone[0], [0, 2], *alone[2:4], [3, 5], alone[5]]
    same_place = pd.DataFrame({"volume": 1, "place": [0, 1, 1, 2]})
    assert get_task("slice_order").neighbors(same_place).tolist() == alone[:4]


def test_positions_are_those_given_or_the_share_of_places_in_all_loaders():
    given = pd.DataFrame({"volume": [1, 1, ""], "place": [0, 1, 2], "position": [0.7, NAN, 0.2]})
    np.testing.assert_array_equal(get_task("slice_order").positions(given), [0.7, NAN, NAN])
    with pytest.raises(TaskError, match="`position` is a share of the volume, 0 to 1"):
        get_task("slice_order").positions(given.assign(position=-12.5))
    dls = loaders(pd.DataFrame({"volume": 1, "place": [0, 1, 2, 3, 4, 5]}))
    dls.valid.facts = pd.DataFrame({"volume": [1, 1, 1, 1, 1, 9], "place": [6, 7, 8, 9, 10, 3]})
    learn = learner(dls)
    np.testing.assert_allclose(learn.dls.train.known[:, 1], np.arange(6) / 10)
    np.testing.assert_allclose(learn.dls.valid.known[:, 1], [0.6, 0.7, 0.8, 0.9, 1.0, NAN])  # one slice has no place


def test_what_nobody_knows_is_not_asked():
    x = torch.rand(3, 1, 16, 16, generator=seeded())
    (slices,), (order, positions) = get_task("slice_order").make_batch(x, generator=seeded(), train=False)
    assert torch.equal(slices, x.unsqueeze(1).expand(-1, 3, -1, -1, -1))
    assert order.tolist() == [-1] * 3 and positions.tolist() == [[-1] * 3] * 3
    known = torch.tensor([[NAN, 0.5, 0.7, 0]])
    _, (order, positions) = get_task("slice_order").make_batch(x[:1], generator=seeded(), train=False, known=known)
    assert order.item() == -1 and sorted(positions[0].tolist()) == pytest.approx([-1, 0.5, 0.7])


def test_too_few_slices_are_told_what_is_needed(capsys):
    with pytest.raises(TaskError, match=r"0 of 20 training images have the slice before and the one after.*by patient"):
        learner(loaders(pd.DataFrame({"volume": range(20), "place": 0})))
    with pytest.raises(TaskError, match="0 of 20 training images have a place in a volume: too few"):
        learner(loaders(pd.DataFrame({"volume": "", "place": range(20)})), ask="position")
    with pytest.raises(TaskError, match=r"the facts 'volume' and 'place'; place missing here. DICOM"):
        learner(loaders(pd.DataFrame({"volume": range(20)})))
    dls = loaders(table(42))
    dls.valid.facts = table(42).assign(volume=range(42))
    capsys.readouterr()
    learner(dls)
    said = "slice_order: 0 of 42 validation images have the slice before and the one after on their side of the split"
    assert said in capsys.readouterr().err
    learner(loaders(table(42).assign(volume=range(42), position=0.5)), ask="position")  # one slice each is enough


# --- the loss ---------------------------------------------------------------------------------------------------------


def question(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    pred = torch.randn(n, 5, generator=seeded(3), dtype=torch.float64)
    order = torch.tensor([1, 0, -1, 1, -1, 0])
    positions = torch.rand(n, 3, generator=seeded(4), dtype=torch.float64)
    positions[1, 2] = positions[4] = positions[5, 0] = -1
    return pred, order, positions


def by_hand(pred: Tensor, order: Tensor, positions: Tensor, weight: float) -> list[float]:
    rows = []
    for scores, truth, places in zip(pred.tolist(), order.tolist(), positions.tolist()):
        loss = 0.0 if truth == -1 else np.log(np.exp(scores[:2]).sum()) - scores[truth]
        off = [abs(1 / (1 + np.exp(-s)) - p) for s, p in zip(scores[2:], places) if p != -1]
        rows.append(loss + weight * sum(off) / 3)
    return rows


def test_loss_is_cross_entropy_and_distance_of_what_is_known():
    pred, order, positions = question()
    task = get_task("slice_order", weight=2.5)
    rows = task.loss(pred, order, positions, reduction="none")
    assert rows.tolist() == pytest.approx(by_hand(pred, order, positions, 2.5))
    assert task.loss(pred, order, positions).item() == pytest.approx(rows.mean().item())
    assert rows[4] == 0  # nothing is known of it
    pred.requires_grad_()
    task.loss(pred, order, positions).backward()
    assert (pred.grad[order == -1, :2] == 0).all() and (pred.grad[:, 2:][positions == -1] == 0).all()
    assert (pred.grad[order != -1, :2] != 0).all() and (pred.grad[:, 2:][positions != -1] != 0).all()
    only = get_task("slice_order", ask="order").loss(pred[:, :2], order, reduction="none")
    assert only.tolist() == pytest.approx(by_hand(pred.detach(), order, positions, 0))
    alone = get_task("slice_order", ask="position").loss(pred[:, 2:], positions, reduction="none")
    assert alone.tolist() == pytest.approx(by_hand(pred.detach(), torch.full((6,), -1), positions, 1))


def test_metrics_count_what_is_known():
    pred, order, positions = question()
    named = pred[:, :2].argmax(1)
    known = order != -1
    assert slice_order.order(pred, order, positions) == pytest.approx((named == order)[known].float().mean().item())
    truth, said = positions[positions != -1].numpy(), pred[:, 2:].sigmoid()[positions != -1].numpy()
    expected = 1 - ((said - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert slice_order.position(pred, order, positions).item() == pytest.approx(expected)
    assert slice_order.position(pred, order, torch.full((6, 3), -1.0)) == 0
    assert slice_order.order(pred, torch.full((6,), -1), positions) == 0


@pytest.mark.parametrize("ask, passes, shape, width", [("both", 3, 3, 5), ("order", 3, 3, 2), ("position", 1, 1, 1)])
def test_one_or_both_are_asked(ask, passes, shape, width):
    learn = learner(loaders(table(42)), ask=ask)
    assert learn.task.passes == passes and learn.dls.one_batch()[0].shape == (6, shape, 1, 16, 16)
    learn.fit(1)
    preds, _, decoded = learn.get_preds(with_decoded=True)
    assert preds.shape == (42, width)
    if ask != "position":
        torch.testing.assert_close(preds[:, :2].sum(1), torch.ones(42))
        assert torch.equal(decoded[:, 0].long(), preds[:, :2].argmax(1))
    if ask != "order":
        assert preds[:, -shape:].min() > 0 and preds[:, -shape:].max() < 1
        assert torch.equal(decoded[:, -shape:], preds[:, -shape:])
    metrics = [m.name for m in learn.metrics]
    assert metrics == {"both": ["order", "position"]}.get(ask, [ask])
    assert learn.show_results() is None


def test_slices_in_order_are_learned():
    """Bright at one end and dark at the other: an order and positions that anybody would see."""
    facts = table(56, depth=8)
    value = (20 + 30 * facts["place"]).to_numpy(np.uint8)
    array = np.concatenate([value, value]).reshape(-1, 1, 1, 1) * np.ones((1, 16, 16, 1), np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=14, valid_pct=0.5, num_workers=0)
    valid = dls.items_df["is_valid"].to_numpy()
    both = pd.concat([facts, facts.assign(volume=facts["volume"] + 7)], ignore_index=True)
    dls.train.facts, dls.valid.facts = both[~valid], both[valid]
    learn = learner(dls, ask="position")
    learn.fit_one_cycle(20, 1e-2)
    assert learn.validate()[1] > 0.9


def test_pictures_say_what_is_true_and_what_was_named():
    task = get_task("slice_order")
    x = torch.rand(3, 3, 1, 16, 16, generator=seeded())
    order, places = torch.tensor([1, 0, -1]), torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.4, -1], [-1, -1, -1]])
    titles = [ax.get_title() for ax in task.show((x,), (order, places))]
    assert titles == ["in order, at 0.10 0.20 0.30", "not in order, at 0.50 0.40 ?", "no neighbors, at ? ? ?"]
    pred = torch.tensor([[0, 0.5, 0.5, 0.5], [0, 0.1, 0.2, 0.3], [1, 0.6, 0.6, 0.6]])
    titles = [ax.get_title() for ax in task.show((x,), (order, places), pred)]
    assert titles[0] == "in order, at 0.10 0.20 0.30,\nnamed not in order, at 0.50 0.50 0.50  ✗"
    assert titles[1].endswith("named not in order, at 0.10 0.20 0.30  ✓")
    assert titles[2].endswith("named in order, at 0.60 0.60 0.60")


def test_settings_without_effect_and_company_are_refused():
    with pytest.raises(TaskError, match="hidden=64 has no effect with ask='position'"):
        get_task("slice_order", ask="position", hidden=64)
    with pytest.raises(TaskError, match=r"weight=2\.0 has no effect with ask='order'"):
        get_task("slice_order", ask="order", weight=2.0)
    with pytest.raises(TaskError, match=r"slice_order cannot be combined .* it shows the slices before and after"):
        get_task("slice_order+rotation")


def test_positions_go_with_other_tasks():
    several = ["rotation", get_task("slice_order", ask="position")]
    learn = pretext_learner(loaders(table(42)), several, tiny)
    learn.remove_cb(ProgressCallback)
    *_, places = learn.dls.valid.question(learn.dls.valid.one_batch())[1]
    np.testing.assert_allclose(places[:, 0], table(42)["place"][:6] / 6, atol=1e-6)
    learn.fit(1)
    assert np.isfinite(learn.recorder.values).all()


def test_no_name_of_a_volume_travels_with_what_is_exported(tmp_path):
    facts = table(42)
    learn = learner(loaders(facts.assign(volume=[f"secret{v}" for v in facts["volume"]])), path=tmp_path)
    learn.fit(1)
    learn.export("learner.pkl")
    raw = (tmp_path / "learner.pkl").read_bytes() + learn.save_encoder(tmp_path / "encoder").read_bytes()
    assert b"slice_order" in raw and b"secret" not in raw
