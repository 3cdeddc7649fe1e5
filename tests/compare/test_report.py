"""compare/report.py: the page says what the comparison says, leaks nothing and fetches nothing."""

import datetime
import hashlib
import re
from base64 import b64decode, b64encode
from dataclasses import replace
from importlib.resources import files
from io import BytesIO
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from PIL import Image

from selfsup_fastai.compare import report
from selfsup_fastai.compare import report_notes as notes
from selfsup_fastai.compare.report import write_report
from selfsup_fastai.compare.report_meaning import GLOSSARY
from selfsup_fastai.compare.report_neighbors import find_neighbors, query_rows, untrained
from selfsup_fastai.compare.report_pictures import MOST_CURVES, drawn_starts
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.interpret import nearest_neighbors
from selfsup_fastai.encoders.checkpoint import save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from tests.compare.made_up import GAINS, LEAKS, made_up
from tests.compare.pages import Page
from tests.conftest import write_images

HOSTILE = """<script>alert("1")</script>'&<b>"""
MARK = "ZQXSECRET"


@pytest.fixture
def hostile(tmp_path):
    """Unlabeled and labeled loaders of images whose folders, classes and broken files have hostile names."""
    folder = tmp_path / f"patient {MARK}"
    names = ["<b>bold", "\"'&<img src=x onerror=alert(1)>", "plain"]
    for part, n in (("train", 6), ("valid", 4)):
        for i, name in enumerate(names):
            write_images(folder / part / name, n, (40, 40), seed=i)
    (folder / "train" / "plain" / f"{MARK}<i>.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    dls = UnlabeledDataLoaders.from_folder(folder / "train", size=32, bs=8, num_workers=0)
    (folder / "train" / "plain" / f"{MARK}<i>.png").unlink()
    labeled = ImageDataLoaders.from_folder(folder, valid="valid", item_tfms=Resize(32), bs=4, num_workers=0)
    return dls, labeled


def encoder_in(folder):
    torch.manual_seed(3)
    return save_encoder(create_encoder("resnet10t", size=32), folder / "encoders" / "simclr-42.safetensors")


def page_of(out, comparison, dls=None, labeled=None, **kwargs) -> Page:
    return Page(write_report(comparison, dls, labeled, out, **kwargs))


@pytest.mark.parametrize("metric", ["accuracy", "AUC"])
def test_the_table_says_what_the_summary_says(tmp_path, metric):
    comparison = made_up(metric=metric)
    page = page_of(tmp_path, comparison)
    results = page.tables[:3]  # one for each number of labels, few labels first
    for labels, table in zip((2, 5, 20), results):
        assert [len(row) for row in table] == [5] * 5
        for _, row in comparison.summary[comparison.summary["labels"] == labels].iterrows():
            name = "from scratch" if row["start"] == "scratch" else row["start"]
            cells = next(cells for cells in table if cells[0] == name)
            share = 100 if metric == "accuracy" else 1
            digits = 1 if metric == "accuracy" else 3
            told = [float(v.replace("−", "-")) for v in re.findall(r"[-−+]?\d+\.\d+", f"{cells[1]} {cells[2]}")]
            said = [row["score"], row["low"], row["high"]]
            if row["verdict"]:
                said += [row["gain"], row["gain_low"], row["gain_high"]]
                assert row["verdict"] in cells[4] and {"better": "▲", "worse": "▼"}.get(row["verdict"], "≈") in cells[4]
                p = float(re.search(r"p [=<] ([\d.]+)", cells[4])[1])
                assert p == pytest.approx(row["p_corrected"], abs=0.006)
            assert told == pytest.approx([round(share * v, digits) for v in said], abs=10**-digits / 1.9)
        assert table[-1][0] == "from scratch"
    assert ("%" in results[0][1][1]) == (metric == "accuracy")


def test_the_gain_is_drawn_where_it_lies(tmp_path):
    comparison = made_up()
    page = page_of(tmp_path, comparison)
    rows = comparison.summary[comparison.summary["verdict"] != ""]
    low, high = min(0, rows["gain_low"].min()), max(0, rows["gain_high"].max())
    drawn = {}
    for i, (tag, attributes) in enumerate(page.elements):
        if tag == "svg":
            zero, line, mark = (page.elements[i + k][1] for k in (1, 2, 3))
            drawn[attributes["aria-label"]] = [float(v) for v in (zero["x1"], line["x1"], mark["x"], line["x2"])]
    assert len(drawn) == len(rows)
    for _, row in rows.iterrows():
        label = next(label for label in drawn if f"{100 * row['gain']:+.1f} points".replace("-", "−") in label)
        zero, left, mark, right = drawn[label]
        places = [6 + 108 * (v - low) / (high - low) for v in (0, row["gain_low"], row["gain"], row["gain_high"])]
        assert [zero, left, mark + 1, right] == pytest.approx(places, abs=0.02)


def test_every_run_race_probes_and_dicts_are_there(tmp_path):
    comparison = made_up(command="selfsup compare a --labeled b")
    page = page_of(tmp_path, comparison)
    runs = next(table for table in page.tables if table[0][:2] == ["Start", "Labels"])
    assert len(runs) == 1 + len(comparison.runs)
    assert runs[1][4] == f"{100 * comparison.runs['score'][0]:.1f} %"
    comparison.race.loc[len(comparison.race)] = ["colorization", 0, 0, 0.0, np.nan, False, "needs color"]
    race = next(table for table in page_of(tmp_path, comparison).tables if table[0][0] == "Task")
    assert race[-1] == ["colorization", "✗ took no part: needs color", "–", "–", "0"]
    assert race[0][2:] == ["Round 1: 5,000 images", "Round 2: 15,000 images", "Seconds"]
    assert [row[0] for row in race[1:]] == ["simclr", "rotation", "jigsaw", "mae", "byol", "colorization"]
    assert race[1] == ["simclr", "✓ stayed to the end", "0.550", "0.630", "166"]
    assert race[4] == ["mae", "✗ fell out in round 1: number 4 of 5; 3 went on", "0.410", "–", "61"]
    probes = next(table for table in page.tables if table[0][0] == "Layer")
    assert probes[0] == ["Layer", "from scratch", *GAINS]
    best = comparison.probes.set_index(["layer", "start"])["score"]
    assert probes[-1] == ["layer4", *(f"{100 * best['layer4', s]:.1f} %" for s in ("scratch", *GAINS))]
    assert page.row("labeled images to test with")[1] == "144"
    assert page.row("classes")[1] == "dress: 30, hat: 30, pants: 30, shoes: 30"
    assert page.row("budget of each task")[1] == "20,000 images"
    assert page.row("numbers of labels")[1] == "2 labels a class, 5 labels a class, 20 labels a class"
    assert page.row("kind of labels")[1] == "category"
    assert page.row("torch")[1] == "2.15"
    assert page.row("test images seen in pretraining")[1] == "0"
    assert all(f"{word[0].upper()}{word[1:]}" in page.text for word in GLOSSARY)
    assert "".join(page.parts["h1"]) == comparison.verdict


CASES = {
    "helped": (GAINS, {}, ["It helped", "“simclr”", "Fine-tune the encoder of “simclr”"]),
    "unclear": ({"simclr": 0.0, "rotation": 0.002}, {"spread": 0.03}, ["Not distinguishable", "does not prove"]),
    "worse": ({"simclr": -0.2, "rotation": -0.3}, {}, ["It made things worse", "Do not use these encoders"]),
    "other": (
        {"resnet18 from timm": 0.2, "simclr": 0.0},
        {"tasks": ["simclr"], "spread": 0.03},
        ["Not by pretraining", "helped, “resnet18 from timm”"],
    ),
    "unlabeled": (None, {}, ["Not known yet", "There were no labels", "Label about twenty"]),
}


@pytest.mark.parametrize("kind", CASES)
def test_what_it_means_follows_from_the_verdicts(tmp_path, kind):
    gains, changes, said = CASES[kind]
    tasks = changes.pop("tasks", None)
    comparison = made_up(gains, f"Verdict {kind}.", **changes)
    if tasks:
        comparison.settings["tasks"] = tasks
    page = page_of(tmp_path, comparison)
    assert all(sentence in page.text for sentence in said), page.text[:1500]
    others = [CASES[other][2][0] for other in CASES if other != kind]
    assert not any(badge in page.text[:400] for badge in others)
    assert next(a["class"] for a in page.all("div") if "verdict" in a["class"]) == f"verdict {kind}"
    assert "".join(page.parts["h1"]) == f"Verdict {kind}."
    if kind == "helped":
        best = comparison.summary.loc[comparison.summary["gain"].idxmax()]
        scratch = comparison.summary.query("start == 'scratch' and labels == @best.labels").iloc[0]
        scores = f"accuracy {100 * best['score']:.1f} % against {100 * scratch['score']:.1f} % with 2 labels a class"
        assert scores in page.text and f"The gain is +{100 * best['gain']:.1f} points" in page.text
    if kind == "unclear":
        most = 100 * comparison.summary["gain_high"].max()
        assert f"gains of up to +{most:.1f} points may hide in the noise" in page.text
    if kind == "unlabeled":
        assert not any(table[0][0] == "Start" for table in page.tables)
        assert next(table for table in page.tables if table[0][0] == "Task" and "Alignment" in table[0])[1][1] == "61.2"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "No: none of the 144 test images was among the images to pretrain on."),
        ({"test images seen in pretraining": 3}, "Yes: 3 of the 144 test images were among"),
        ({"patients on both sides": 2}, "Yes: patients were among"),
        (
            {"patients on both sides": 2, "left out of pretraining": 9},
            "No: 9 images that showed a test image, or shared",
        ),
    ],
)
def test_leaks_are_told_in_words(changes, said):
    assert notes.leak_words({**LEAKS, **changes}).startswith(said)
    assert notes.leak_words({}) == "That was not checked."


def test_harm_with_other_numbers_of_labels_is_said():
    comparison = made_up()
    rows = (comparison.summary["start"] == "simclr") & (comparison.summary["labels"] == 20)
    comparison.summary.loc[rows, "verdict"] = "worse"
    assert "With 20 labels a class it did harm" in report.read(comparison).sentences[1]


def test_what_does_not_stand_among_all_comparisons_is_a_hint(tmp_path):
    comparison = made_up()
    comparison.summary["all_low"] -= 0.5
    page = page_of(tmp_path, comparison)
    assert "A hint, no more" in page.text and "9 comparisons were made" in page.text
    assert "--encoder" not in page.text
    comparison.summary["all_low"] = comparison.summary["gain_low"] / 2
    comparison.summary.attrs["confidence"] = 0.9
    page = page_of(tmp_path, comparison)
    best = comparison.summary.loc[comparison.summary["gain"].idxmax()]
    assert "It helped" in page.text and "90 % interval" in page.text
    assert f"(interval +{100 * best['all_low']:.1f} to +{100 * best['all_high']:.1f})" in page.text


def test_a_verdict_of_several_sentences_has_one_headline(tmp_path):
    verdict = "On your data pretraining helped: simclr gains 0.5 points. Worse than scratch: mae."
    page = page_of(tmp_path, made_up(verdict=verdict))
    assert "".join(page.parts["h1"]) == "On your data pretraining helped: simclr gains 0.5 points."
    assert "Worse than scratch: mae." in page.text


def test_one_run_has_no_interval_and_says_so(tmp_path):
    comparison = made_up(seeds=2)
    for name in ("low", "gain_low", "all_low", "p", "p_corrected"):
        comparison.summary[name] = np.where(comparison.summary["verdict"] == "", np.nan, -np.inf)
    for name in ("high", "gain_high", "all_high"):
        comparison.summary[name] = np.inf
    comparison.summary.loc[comparison.summary["verdict"] != "", "verdict"] = "not distinguishable"
    page = page_of(tmp_path, replace(comparison, runs=comparison.runs[comparison.runs["seed"] == 0]))
    assert "so few runs tell little" in page.text and "not known: too few runs" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)


def test_shares_of_labels_are_said_as_shares(tmp_path):
    comparison = made_up()
    shares = {2: 0.01, 5: 0.1, 20: 1.0}
    comparison.runs["labels"], comparison.summary["labels"] = (
        table["labels"].map(shares) for table in (comparison.runs, comparison.summary)
    )
    text = page_of(tmp_path, comparison).text
    titles = ["1 % of the labels: 12 labeled images", "10 % of the labels: 30", "All labels: 120 labeled images"]
    assert all(title in text for title in titles)


def test_hostile_names_stay_text(tmp_path, hostile):
    dls, labeled = hostile
    comparison = made_up({HOSTILE: 0.1, "simclr": 0.02}, verdict=f"Verdict {HOSTILE}", command=f"selfsup {HOSTILE}")
    comparison.settings.update({"tasks": ["simclr"], HOSTILE: HOSTILE})
    comparison.data["classes"] = dict.fromkeys(labeled.vocab, 6)
    comparison.leaks[HOSTILE], comparison.versions[HOSTILE] = [HOSTILE], HOSTILE
    comparison.race.loc[0, "task"] = comparison.probes.loc[0, "layer"] = comparison.signals.loc[0, "task"] = HOSTILE
    comparison.encoders["simclr"] = [encoder_in(tmp_path / "out")]
    page = page_of(tmp_path / "out", comparison, dls, labeled)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "b", "i", "iframe", "object"} or page.source.count("<b>") == 3  # the three headings
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 8 and HOSTILE in "".join(page.parts["h1"])
    assert all(name in page.text for name in labeled.vocab)
    assert any(f"Query: {name}" == image.get("alt") for image in page.all("img") for name in labeled.vocab)


def test_nothing_is_fetched(tmp_path, hostile):
    comparison = made_up(encoders={"simclr": [encoder_in(tmp_path)]})
    page = page_of(tmp_path, comparison, *hostile)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in attributes:
                wanted = ("data:",) if tag in ("img", "link") else ("#",)
                assert attributes[name].startswith(wanted), (tag, attributes[name][:80])
        assert "style" not in attributes
    style = "".join(page.parts["style"])
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    checksum = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;") and f"'sha256-{checksum}'" in policy
    drawn = [b64decode(a["src"].split(",")[1]).decode() for a in page.all("img") if "svg+xml" in a["src"]]
    assert len(drawn) == 2
    for svg in drawn:
        assert "<script" not in svg and all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))


def test_the_page_is_whole_and_can_be_read_by_all(tmp_path, hostile):
    page = page_of(tmp_path, made_up(encoders={"simclr": [encoder_in(tmp_path)]}), *hostile)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)
    assert all(a["alt"].strip() for a in page.all("img")) and len(page.all("img")) > 40
    assert all("scope" in a for a in page.all("th"))
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    curve = next(a["alt"] for a in page.all("img") if a["alt"].startswith("Curves of accuracy over the number"))
    assert all(start in curve for start in ("scratch", *GAINS)) and "2 labels a class" in curve


def test_curves_of_one_start_look_alike_in_all_pictures():
    comparison = made_up({"scratch + consistency": 0.02, **{f"task{i}": i / 100 for i in range(9)}})
    comparison.settings["tasks"] = [f"task{i}" for i in range(9)]
    drawn = drawn_starts(comparison)
    means = comparison.summary.query("start != 'scratch'").groupby("start")["score"].mean().sort_values()
    assert drawn[0] == "scratch" and set(drawn[1:]) == set(means.index[-6:])
    assert drawn[1:] == sorted(drawn[1:], key=lambda start: (not start.startswith("task"), start))
    assert "best 6 are drawn" in notes.curve_words(comparison, MOST_CURVES)


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_letters_stand_out_in_light_and_dark():
    style = (files("selfsup_fastai.compare") / "page" / "style.css").read_text("utf-8")
    palettes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S)]
    palettes = [p for p in palettes if len(p) == 9]
    assert len(palettes) == 2  # by day and by night
    for palette in palettes:
        for ground in ("paper", "card", "tint"):
            for ink in ("ink", "soft", "good", "bad", "link"):
                a, b = sorted(luminance(palette[name]) + 0.05 for name in (ground, ink))
                assert b / a >= 4.5, (ground, ink, b / a)


def test_no_file_is_named_unless_asked_for(tmp_path, hostile):
    command = f"selfsup compare '/data/{MARK}' --labeled={MARK} --tasks rotation,simclr --out '{MARK} out'"
    comparison = made_up(command=command, encoders={"simclr": [encoder_in(tmp_path / MARK)]})
    hostile[0].train_ds.tls[0].tfms.fs[0].are_scans = True
    page = page_of(tmp_path / "out", comparison, *hostile)
    assert MARK not in page.source and "broken" not in page.source and str(tmp_path) not in page.source
    assert "selfsup compare FOLDER --labeled=LABELED --tasks rotation,simclr --out REPORT" in page.text
    assert page.row("1", "")[1].startswith("The")  # one file, and why it was left out
    assert "--encoder simclr-42.safetensors" in page.text
    assert not any(MARK in file.name for file in (tmp_path / "out").rglob("*"))
    asked = page_of(tmp_path / "out", comparison, *hostile, paths=True)
    assert f"{MARK}<i>.png" in asked.text and command in asked.text


def test_photographs_keep_their_command(tmp_path):
    command = "selfsup compare 'my photos' --labeled few --out report"
    assert command in page_of(tmp_path, made_up(command=command)).text


def test_the_encoder_to_use_is_named_as_seen_from_the_report(tmp_path):
    comparison = made_up(encoders={"simclr": [encoder_in(tmp_path / "out")]})
    line = "selfsup finetune LABELED --encoder encoders/simclr-42.safetensors"
    assert line in page_of(tmp_path / "out", comparison).text
    gone = made_up(encoders={"simclr": [tmp_path / "gone.safetensors"]})
    dls = UnlabeledDataLoaders.from_folder(write_images(tmp_path / "images", 8), size=32, num_workers=0)
    assert "What looks alike" not in page_of(tmp_path / "out", gone, dls).text


def test_questions_show_what_each_task_asks(tmp_path, hostile):
    comparison = made_up()
    comparison.settings["tasks"] = ["rotation", "simclr", "rotation (2)", "dicom_tags"]
    page = page_of(tmp_path, comparison, hostile[0])
    assert "By which quarter turn was the image rotated? (Gidaris et al. 2018)" in page.text
    assert page.text.count("By which quarter turn") == 2 and "rotation (2)" in page.text
    assert "No picture:" in page.text  # these are no scans
    assert sorted(f.name for f in (tmp_path / "pictures").iterdir()) == [
        "asked_rotation-2.png", "asked_rotation.png", "asked_simclr.png", "label_curve.png", "probes.png"
    ]  # fmt: skip
    with Image.open(tmp_path / "pictures" / "label_curve.png") as picture:
        assert picture.size[0] > 600


def test_the_same_comparison_makes_the_same_page_and_a_failure_leaves_it(tmp_path, hostile, monkeypatch):
    comparison = made_up(encoders={"simclr": [encoder_in(tmp_path)]})
    state = torch.get_rng_state()
    first = write_report(comparison, *hostile, tmp_path).read_bytes()
    assert torch.equal(state, torch.get_rng_state())
    assert write_report(comparison, *hostile, tmp_path).read_bytes() == first
    assert str(datetime.date.today()) in first.decode() and len(first) < 5e6
    monkeypatch.setattr(report, "rendered", lambda page: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(comparison, *hostile, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == first


def test_neighbors_are_those_of_the_two_networks(tmp_path, hostile):
    labeled = hostile[1]
    encoder = create_encoder("resnet10t", size=32)
    classes = torch.stack([y for _, y in labeled.valid_ds])
    found = find_neighbors(encoder, labeled.valid, list(labeled.vocab), queries=4, k=3)
    assert [query.label for query in found.queries] == [*labeled.vocab, labeled.vocab[0]]
    for part, network in (("before", untrained(encoder)), ("after", encoder)):
        axes = nearest_neighbors(network, labeled.valid, queries=len(labeled.valid_ds), k=3)
        rows = [axes[4 * i : 4 * i + 4] for i in query_rows(12, classes, 4)]
        same = []
        for query, (shown, *others) in zip(found.queries, rows):
            assert_same_picture(query.picture, shown)
            for neighbor, ax in zip(getattr(query, part), others):
                assert_same_picture(neighbor.picture, ax)
                assert ax.get_title().split() == [neighbor.cosine, "✓" if neighbor.same else "✗"]
                same.append(neighbor.same)
        assert getattr(found, part) == pytest.approx(np.mean(same))


def assert_same_picture(picture, ax):
    """As far as JPEG keeps it."""
    drawn = np.asarray(ax.images[0].get_array())
    decoded = np.asarray(Image.open(BytesIO(b64decode(picture.source.split(",")[1])))) / 255
    assert np.abs(decoded - drawn).mean() < 0.05


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224", torch.nn.Sequential])
def test_untrained_is_the_same_network_without_what_it_learned(arch):
    if isinstance(arch, type):
        arch = arch(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
    encoder = create_encoder(arch, size=32)
    encoder.mean, encoder.std = (0.1,) * 3, (0.2,) * 3
    with torch.no_grad():
        for p in encoder.parameters():
            p.fill_(7.0)
    fresh, again = untrained(encoder), untrained(encoder)
    weights = dict(fresh.named_parameters())
    assert not any((p == 7.0).all() for p in weights.values())
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert fresh.mean == encoder.mean and all((p == 7.0).all() for p in encoder.parameters())


def test_unlabeled_images_have_neighbors_without_marks(tmp_path):
    dls = UnlabeledDataLoaders.from_folder(write_images(tmp_path / "images", 12), size=32, num_workers=0)
    found = find_neighbors(create_encoder("resnet10t", size=32), dls.train, queries=3, k=2)
    assert found.before is found.after is None and len(found.queries) == 3
    assert {n.same for query in found.queries for n in (*query.before, *query.after)} == {None}


def test_only_one_image_a_class_in_turn():
    assert query_rows(7, torch.tensor([2, 0, 0, 1, 2, 0, 1]), 5) == [1, 3, 0, 2, 6]
    assert query_rows(9, None, 3) == [0, 4, 8]


def test_an_empty_comparison_still_makes_a_page(tmp_path):
    comparison = made_up(
        None, probes=None, race=None, signals=pd.DataFrame(), leaks={}, versions={}, data={}, settings={}
    )
    page = page_of(tmp_path, comparison)
    assert "Not known yet" in page.text and "That was not checked." in page.text
