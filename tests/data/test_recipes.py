"""Recipes as images need them: photographs, scans, what has no up."""

import json
from dataclasses import replace

import pytest

from selfsup_fastai.data.recipes import BYOL_2, GREY_SCAN, SIMCLR, SWAV_LOCAL, adapted
from selfsup_fastai.errors import TaskError, UnknownNameError


def test_photographs_get_the_papers_recipe():
    assert adapted(SIMCLR) == SIMCLR == adapted(SIMCLR, "photo", channels=1)
    assert adapted(BYOL_2, {}) == BYOL_2


def test_scans_are_never_mirrored_and_keep_a_lesion_in_sight():
    scan = adapted(BYOL_2, channels=1)
    assert scan == adapted(BYOL_2, "scan") == replace(GREY_SCAN, blur_p=0.1)
    assert (scan.flip, scan.vertical_flip, scan.hue, scan.grey_p, scan.solarize_p) == (0, 0, 0, 0, 0)
    assert scan.scale == (0.3, 1.0) and scan.window == 0.2
    assert adapted(SWAV_LOCAL, "scan").scale == (0.07, 0.14)


def test_what_has_no_up_is_turned_any_way():
    any_way = adapted(SIMCLR, "microscopy")
    assert any_way == replace(SIMCLR, turn=180.0, vertical_flip=0.5)


def test_small_images_are_not_blurred_unless_asked_for():
    assert adapted(SIMCLR, side=63).blur_p == 0 and adapted(SIMCLR, side=64).blur_p == 0.5
    assert adapted(SIMCLR, {"blur_p": 0.3}, side=32).blur_p == 0.3


def test_fields_and_strength_change_what_is_named_alone():
    weak = adapted(SIMCLR, {"strength": 0.5, "flip": 0, "scale": [0.3, 1]})
    expected = replace(SIMCLR, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, flip=0.0, scale=(0.3, 1.0))
    assert weak == expected
    assert adapted(SIMCLR, json.loads(json.dumps({"strength": 0.5, "flip": 0, "scale": (0.3, 1)}))) == weak
    assert adapted(SIMCLR, {"strength": 9}).hue == 0.5
    assert adapted(SIMCLR, {"kind": "scan", "turn": 0}) == replace(GREY_SCAN, turn=0.0)


@pytest.mark.parametrize(
    "views, error, said",
    [
        ("scans", UnknownNameError, "no kind of views called 'scans'. Did you mean 'scan'"),
        ({"kind": "x-ray"}, UnknownNameError, "no kind of views called 'x-ray'"),
        ({"flips": 0}, UnknownNameError, "no field of a recipe called 'flips'. Did you mean 'flip'"),
        ({"flip": 2}, TaskError, "flip is 2.0; it must be a probability"),
        ({"scale": [0.5, 0.2]}, TaskError, "scale is"),
        ({"scale": 0.5}, TaskError, "scale is two numbers; got 0.5"),
        ({"flip": "no"}, TaskError, "flip is a number; got 'no'"),
        ({"strength": -1}, TaskError, "strength is -1.0"),
        (7, TaskError, r"views is one of photo, scan, microscopy, or a recipe's fields.*got 7"),
    ],
)
def test_what_makes_no_sense_is_answered(views, error, said):
    with pytest.raises(error, match=said):
        adapted(SIMCLR, views)
