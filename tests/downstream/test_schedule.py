"""The stages, rates and group sizes of gradual unfreezing, written out; and what counts as a frozen norm layer."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from selfsup_fastai.downstream.learner import DownstreamModel, layer_groups
from selfsup_fastai.downstream.schedule import (
    SCHEDULES,
    Rates,
    Stage,
    decayed_rates,
    frozen_norms,
    plan,
    planned_rates,
    spread_rates,
    stage_rates,
    stages,
)
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.heads import linear_head
from selfsup_fastai.errors import TaskError, UnknownNameError

# Groups of under 1 % of the encoder are merged into their neighbors; the last group is a head of 3 outputs.
SIZES = {
    "resnet18": [157504, 525568, 2099712, 8393728, 1539],
    "efficientnet_b0": [65730, 242930, 543148, 2026348, 1129392, 3843],
    "convnext_atto": [156920, 1336000, 1881600, 963],
    "vit_tiny_patch16_224": [151104, *[444864] * 11, 445248, 579],
    "swin_tiny_patch4_window7_224": [1195842, 10955400, 15368112, 2307],
}
# (epochs, first group trained) of every stage of a run of 1 + 10 epochs, and the rates of the last stage
RUNS = {
    "resnet18": [(1, 4), (1, 3), (1, 2), (1, 1), (7, 0)],
    "efficientnet_b0": [(1, 5), (1, 4), (1, 3), (1, 2), (7, 0)],
    "convnext_atto": [(1, 3), (1, 2), (1, 1), (8, 0)],
    "vit_tiny_patch16_224": [(1, 13), (1, 10), (1, 7), (1, 4), (7, 0)],
    "swin_tiny_patch4_window7_224": [(1, 3), (1, 2), (1, 1), (8, 0)],
}
RATES = {
    "resnet18": [1e-5, 3.16228e-5, 1e-4, 3.16228e-4, 1e-3],
    "efficientnet_b0": [1e-5, 2.51189e-5, 6.30957e-5, 1.58489e-4, 3.98107e-4, 1e-3],
    "convnext_atto": [1e-5, 4.64159e-5, 2.15443e-4, 1e-3],
    "vit_tiny_patch16_224": [
        *(1e-5, 1.42510e-5, 2.03092e-5, 2.89427e-5, 4.12463e-5, 5.87802e-5, 8.37678e-5),
        *(1.19378e-4, 1.70125e-4, 2.42446e-4, 3.45511e-4, 4.92388e-4, 7.01704e-4, 1e-3),
    ],
    "swin_tiny_patch4_window7_224": [1e-5, 4.64159e-5, 2.15443e-4, 1e-3],
}


@pytest.mark.parametrize("arch", SIZES)
def test_groups_stages_and_rates_of_five_nets(arch):
    encoder = create_encoder(arch, size=64 if arch.startswith("vit") else None)
    groups = layer_groups(DownstreamModel(encoder, linear_head(encoder.num_features, 3, 0.0)))
    assert [sum(p.numel() for p in group) for group in groups] == SIZES[arch]
    run = stages(len(groups), epochs=10)
    assert [(s.epochs, s.first) for s in run] == RUNS[arch]
    assert stage_rates(run[-1], len(groups), Rates(2e-3)) == pytest.approx(RATES[arch], rel=1e-5)
    assert len(encoder.group_names()) == len(groups) - 1


@pytest.mark.parametrize("freeze_epochs", [0, 1, 3])
@pytest.mark.parametrize("n_groups", range(2, 17))
def test_every_run_keeps_the_rules(n_groups, freeze_epochs):
    for epochs in range(1, 45):
        run = stages(n_groups, epochs, freeze_epochs)
        assert sum(s.epochs for s in run) == epochs + freeze_epochs
        assert len(run) <= 5
        assert all(s.epochs >= 1 for s in run)
        head, later = [s for s in run if s.head_only], [s for s in run if not s.head_only]
        assert head == ([Stage(freeze_epochs, n_groups - 1, True)] if freeze_epochs else [])
        assert later[-1].first == 0
        each = max(1, epochs // 10)
        assert [s.epochs for s in later[:-1]] == [each] * (len(later) - 1)
        assert each * (len(later) - 1) <= epochs / 2
        borders = [n_groups - 1, *(s.first for s in later)]
        chunks = [upper - lower for upper, lower in pairwise(borders)]
        assert min(chunks) >= 1
        assert max(chunks) - min(chunks) <= 1


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"n_groups": 14, "epochs": 1}, [(1, 13), (1, 0)]),
        ({"n_groups": 14, "epochs": 2}, [(1, 13), (1, 7), (1, 0)]),
        ({"n_groups": 14, "epochs": 4, "freeze_epochs": 2}, [(2, 13), (1, 9), (1, 5), (2, 0)]),
        ({"n_groups": 14, "epochs": 100, "freeze_epochs": 0}, [(10, 10), (10, 7), (10, 4), (70, 0)]),
        ({"n_groups": 14, "epochs": 100, "max_stages": 2}, [(1, 13), (100, 0)]),
        ({"n_groups": 5, "epochs": 40, "stage_epochs": 1}, [(1, 4), (1, 3), (1, 2), (1, 1), (37, 0)]),
        ({"n_groups": 5, "epochs": 40, "stage_epochs": 15}, [(1, 4), (15, 2), (25, 0)]),
        ({"n_groups": 2, "epochs": 100}, [(1, 1), (100, 0)]),
        ({"n_groups": 3, "epochs": 1, "freeze_epochs": 0}, [(1, 0)]),
    ],
)
def test_extreme_runs(kwargs, expected):
    assert [(s.epochs, s.first) for s in stages(**kwargs)] == expected


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_groups": 5, "epochs": 0},
        {"n_groups": 5, "epochs": -1},
        {"n_groups": 5, "epochs": 2.5},
        {"n_groups": 5, "epochs": True},
        {"n_groups": 5, "epochs": "3"},
        {"n_groups": 5, "epochs": 3, "freeze_epochs": -1},
        {"n_groups": 1, "epochs": 3},
        {"n_groups": 5, "epochs": 3, "max_stages": 1},
        {"n_groups": 5, "epochs": 3, "stage_epochs": 0},
    ],
)
def test_runs_that_make_no_sense(kwargs):
    with pytest.raises(TaskError, match="must be a whole number of at least"):
        stages(**kwargs)


@pytest.mark.parametrize(
    ("schedule", "epochs", "freeze_epochs", "expected"),
    [
        ("two_stage", 10, 1, [(1, 4, True), (10, 0, False)]),
        ("two_stage", 10, 0, [(10, 0, False)]),
        ("all", 10, 1, [(11, 0, False)]),
        ("lp_ft", 10, 1, [(5, 4, True), (6, 0, False)]),
        ("lp_ft", 3, 4, [(4, 4, True), (3, 0, False)]),
        ("lp_ft", 1, 0, [(1, 0, False)]),
        ("lp_ft", 1, 1, [(1, 4, True), (1, 0, False)]),
    ],
)
def test_other_schedules(schedule, epochs, freeze_epochs, expected):
    assert [tuple(s) for s in stages(5, epochs, freeze_epochs, schedule)] == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("freeze_epochs", [0, 1, 5])
def test_every_schedule_is_as_long(schedule, freeze_epochs):
    for epochs in range(1, 15):
        run = stages(6, epochs, freeze_epochs, schedule)
        assert sum(s.epochs for s in run) == epochs + freeze_epochs
        assert run[-1].first == 0 and not run[-1].head_only


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UnknownNameError, match="gradual"):
        stages(5, 3, schedule="gradul")


def test_layer_decay_by_hand():
    assert decayed_rates(1.0, 4, 0.5) == [0.125, 0.25, 0.5, 1.0]
    assert stage_rates(Stage(3, 0), 3, Rates(2e-3, decay=0.75)) == pytest.approx([5.625e-4, 7.5e-4, 1e-3])
    assert stage_rates(Stage(3, 2, True), 3, Rates(2e-3, decay=0.75)) == pytest.approx([2e-4, 2e-4, 2e-3])
    for decay in (0, -1, 1.5, "x"):
        with pytest.raises(TaskError, match="layer_decay"):
            decayed_rates(1.0, 4, decay)


def test_planned_rates_are_the_one_cycle_written_out():
    shapes = [{"pct_start": 0.99, "div": 25, "div_final": 1e5}, {"pct_start": 0.3, "div": 5, "div_final": 1e5}]
    run = stages(3, 4, 1, "two_stage")
    table = planned_rates(run, ["stem", "top", "head"], Rates(2e-3, mult=4), shapes, points=10)
    assert list(table.columns) == ["stem", "top", "head"]
    assert table.index[[0, 10, 49]].tolist() == pytest.approx([0, 1, 4.9])
    assert table["stem"].iloc[:10].isna().all() and table["head"].iloc[0] == pytest.approx(2e-3 / 25)
    peak = table.iloc[10 + 12]  # 0.3 of 40 points
    assert peak.tolist() == pytest.approx([2.5e-4, 5e-4, 1e-3])
    half_way = 5e-4 / 5 + (5e-4 - 5e-4 / 5) * (1 - math.cos(math.pi / 2)) / 2
    assert table["top"].iloc[10 + 6] == pytest.approx(half_way)


def test_rates_are_those_of_fastais_slice():
    from fastai.optimizer import SGD

    opt = SGD([[nn.Parameter(torch.zeros(1))] for _ in range(6)], lr=1.0)
    opt.set_hyper("lr", slice(4e-3 / 50, 4e-3))
    assert spread_rates(4e-3, 6, lr_mult=50) == [h["lr"] for h in opt.hypers]
    opt.set_hyper("lr", slice(4e-3))
    assert stage_rates(Stage(1, 5, True), 6, Rates(4e-3)) == [h["lr"] for h in opt.hypers]
    assert spread_rates(4e-3, 1) == [4e-3]


@pytest.mark.parametrize("base_lr", [0, -1e-3, float("nan"), float("inf"), "1e-3", None, True])
def test_rates_that_make_no_sense(base_lr):
    with pytest.raises(TaskError, match=r"base_lr is .* must be a number above 0"):
        spread_rates(base_lr, 5)
    with pytest.raises(TaskError, match=r"base_lr is .* must be a number above 0"):
        stage_rates(Stage(1, 4, True), 5, Rates(base_lr))


def test_plan_is_a_table_of_the_run():
    table = plan(stages(5, 4), ["stem", "layer2", "layer3", "layer4", "head"], [10, 20, 30, 40, 5], Rates(2e-3))
    assert list(table.columns) == ["stage", "epochs", "trained", "frozen", "lr_min", "lr_max", "parameters"]
    assert table["stage"].tolist() == [1, 2, 3, 4]
    assert table["epochs"].tolist() == [1, 1, 1, 2]
    assert table["trained"].tolist() == ["head", "layer4, head", "layer3, layer4, head", "stem ... head"]
    assert table["frozen"].tolist() == ["stem ... layer4", "stem, layer2, layer3", "stem, layer2", "-"]
    assert table["lr_min"].tolist() == pytest.approx([2e-3, 10**-3.5, 1e-4, 1e-5])
    assert table["lr_max"].tolist() == pytest.approx([2e-3, 1e-3, 1e-3, 1e-3])
    assert table["parameters"].tolist() == [5, 45, 75, 105]


def _freeze(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


def test_frozen_norms_follow_their_own_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    _freeze(*model[:2], model[4])
    assert frozen_norms(model) == [model[1]]  # a LayerNorm has no statistics and does the same in both modes


def test_norms_without_parameters_go_with_their_neighbor():
    block = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), block, nn.BatchNorm2d(4, affine=False))
    _freeze(model[0])
    assert frozen_norms(model) == [model[1]]
    _freeze(block)
    assert frozen_norms(model) == [model[1], block[0], block[2], model[3]]


def test_a_norm_alone_in_its_module_looks_further_up():
    wrapped = nn.Sequential(nn.BatchNorm2d(4, affine=False))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), wrapped, nn.Conv2d(4, 4, 1))
    _freeze(model[0])
    assert frozen_norms(model) == [wrapped[0]]
    assert frozen_norms(nn.Sequential(nn.BatchNorm2d(4, affine=False))) == []
