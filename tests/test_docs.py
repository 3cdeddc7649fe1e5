"""The documentation says what is so: generated pages are up to date, links lead somewhere, and every code block runs.

Blocks run as they stand but for sizes and epochs (`SMALLER`), in one folder and one namespace per document.
"""

import importlib.util
import json
import re
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed

from selfsup_fastai import cli
from selfsup_fastai.pretext import TASKS, task_class
from selfsup_fastai.runs import comparing
from tests.conftest import write_images, write_scans
from tests.dicoms import slices

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/guide.md", "docs/evidence.md", "docs/dicom.md"]
PAGES += ["docs/scaling.md"]
PAGES += [*(f"docs/tasks/{name}.md" for name in TASKS)]
COMPARE = "selfsup compare photos --labeled labeled --out report"
AT_ONCE = ("rotation", "inpainting", "simclr", "mae", "nat")  # a page of each kind; those of all tasks take minutes
OF_TASKS = [name if name in AT_ONCE else pytest.param(name, marks=pytest.mark.slow) for name in TASKS]
SMALLER = [  # So that nobody waits; the rest of each block is what the reader reads
    (r"(dataloaders\(\"labeled\", bs)=64", r"\1=8, num_workers=0"),
    (r"size=128", "size=40"),
    (r"Resize\(128\)", "Resize(40)"),
    (r"bs=64", "bs=8"),
    (r"resnet18", "resnet10t"),
    (r"fit_one_cycle\(20,", "fit_one_cycle(1,"),
    (r"(fine_tune|fine_tune_plan)\(10\b", r"\1(1"),
    (r"valid_pct=(0\.\d), ", r"valid_pct=\1, bs=8, num_workers=0, "),
    (r"budget=20_000", "budget=40, seeds=2, steps=3"),
    (r"seeds=3", "seeds=2, steps=3"),
]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


def smaller(code: str) -> str:
    for pattern, replacement in SMALLER:
        code = re.sub(pattern, replacement, code)
    return code


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with photos/ (24 images and one that is none), scans/ and dicoms/ (DICOM files of six patients each),
    labels.csv for the latter, and labeled/ (two classes), as the documents assume."""
    write_images(tmp_path / "photos", 24, (48, 48))
    write_scans(tmp_path / "scans")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    for seed, label in enumerate(("cat", "dog"), start=1):
        write_images(tmp_path / "labeled" / label, 20, (48, 48), seed=seed)
    _write_scans(tmp_path)
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    return tmp_path


def _write_scans(folder: Path) -> None:
    """dicoms/ (six patients with four slices each) and labels.csv."""
    files = [file for i in range(6) for file in slices(folder / "dicoms" / f"{i}", 4, f"P{i}", side=48, seed=i)]
    names = [str(file.relative_to(folder / "dicoms")) for file in files]
    labels = pd.DataFrame({"file": names, "label": ["ab"[int(name[0]) % 2] for name in names]})
    labels.to_csv(folder / "labels.csv", index=False)


def run_python(page: str) -> dict:
    """All Python blocks of a page, one after the other; returns their namespace."""
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(smaller(code), page, "exec"), names)
    return names


def run_command(line: str, monkeypatch) -> int:
    """`selfsup ...` in this process; returns the exit code."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", line.split())
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return end.value.code


# --- what is generated ------------------------------------------------------------------------------------------------


def test_generated_texts_are_up_to_date(generate):
    """If this fails: `make docs`."""
    stale = [str(file) for file, text in generate.pages().items() if (ROOT / file).read_text("utf-8") != text]
    assert stale == []


def test_no_page_of_a_task_that_is_gone():
    assert {file.stem for file in (ROOT / "docs/tasks").glob("*.md")} == set(TASKS)


def test_table_takes_the_place_of_the_old_one(generate):
    old = f"before\n{generate.BEGIN}\n| old |\n{generate.END}\nafter\n"
    new = generate.with_table(old)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "| old |" not in new
    assert generate.with_table(new) == new
    with pytest.raises(SystemExit, match="lost the marks"):
        generate.with_table("no marks here")


@pytest.mark.parametrize("name", TASKS)
def test_task_page_tells_all(generate, name):
    cls, page = task_class(name), generate.task_page(name)
    for part in (
        cls.asks(),
        *(f"`{setting}`" for setting in cls.setting_names()),
        "## Guards against shortcuts",
        "## When it suits",
    ):
        assert part in page
    assert re.search("https://(arxiv.org/abs|doi.org)/", page)
    assert all(comment for _, _, comment in generate.settings_of(cls))  # each setting is explained


def test_cost_and_channels_are_told_for_each_mode(generate):
    page = generate.task_page("split_brain")
    assert "1 image-sized pass through the encoder.\nImages of 3 channels, at least 16 pixels a side." in page
    assert "With `halves='diagonal'`: 2 image-sized passes, images of 1 or 3 channels." in page
    for name, modes in generate.MODES.items():
        default = task_class(name)()
        for settings in modes:
            other = task_class(name)(**settings)
            assert (other.passes, other.channels) != (default.passes, default.channels)


def test_page_without_settings_and_with_bars(generate):
    class Plain(task_class("rotation")):
        def __init__(self):
            super().__init__()

    assert generate.settings_table(Plain) == "None."
    assert generate._cell("a | b") == "a \\| b"


def test_pictures_are_drawn_from_the_tasks(generate, tmp_path):
    generate.draw_picture("rotation", tmp_path / "a.png")
    generate.draw_picture("jigsaw", tmp_path / "b.png")
    a, b = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert a[:4] == b[:4] == b"\x89PNG" and a != b and len(a) > 10_000
    assert all((ROOT / f"docs/img/{name}.png").stat().st_size < 200_000 for name in TASKS)


# --- links and commands -----------------------------------------------------------------------------------------------


def heading_ids(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Links to files and headings that are not there."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        target, _, anchor = link.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in heading_ids(file)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert dead_links(ROOT / page) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A b\n[x](gone.md) [x](#a-b) [x](page.md#c) [x](https://example.org/y)")
    assert dead_links(page) == ["gone.md", "page.md#c"]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for block in blocks(page, "bash") for line in block.splitlines() if line[:5] == "make "}
    assert named <= targets


def test_every_replacement_is_needed():
    code = "".join(block for page in PAGES for block in blocks(page, "python"))
    assert [pattern for pattern, _ in SMALLER if not re.search(pattern, code)] == []


def test_every_shell_line_is_one_we_know():
    """What the tests below do not run, they would have to be taught."""
    lines = {line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()}
    names = "pretrain|finetune|predict|embed|neighbors|probe|compare|export|scan|shards"
    known = rf"(selfsup ({names}) |make [a-z-]+|pip install -e (\.|\"\.\[dicom\]\")$)"
    unknown = [line for line in lines if not re.match(known, line)]
    assert unknown == []
    assert any(line.startswith("selfsup finetune labeled --encoder runs/rotation/") for line in lines)


# --- the blocks run ---------------------------------------------------------------------------------------------------


def test_readme_python(workplace):
    names = run_python("README.md")
    assert len(names["dls"].train_ds) + len(names["dls"].valid_ds) == 24
    card = names["read_card"]("rotation.safetensors")
    assert card["task"] == "rotation" and card["epochs"] == 1
    assert card["images"] == 4 * 21  # 22 images to train, three whole batches of 7, four turns of each
    encoder = names["learn"].model.encoder
    assert encoder.lineage[0]["task"] == "rotation"
    probabilities, truth = names["learn"].get_preds()
    assert len(truth) == 8
    assert names["learn"].validate()[1] == (probabilities.argmax(1) == truth).float().mean().item()


def test_guide_python(workplace):
    names = run_python("docs/guide.md")
    assert list(names["dls"].report["code"]) == ["not_an_image"]
    assert len(names["dls"].items_df) == 24
    x = torch.rand(2, 3, 40, 40)
    encoder = names["load_encoder"]("rotation.safetensors").eval()
    assert torch.equal(names["net"].eval()(x), encoder(x))  # timm reads the file as we do
    assert list(names["learn"].fine_tune_log["epoch"]) == [0, 1]


def test_scaling_python(workplace, monkeypatch):
    names = run_python("docs/scaling.md")
    assert [len(dl.dataset) for dl in names["dls"].loaders] == [22, 2]
    assert len(list(Path("shards_in_use").glob("*.tar"))) == 1
    _train_alone()
    assert Path("rotation.safetensors").exists()
    lines = [line for line in commands("docs/scaling.md") if "--nproc" not in line]
    assert [line.split()[1] for line in lines] == ["shards", "pretrain"]
    assert run_command(f"{lines[0]} --overwrite", monkeypatch) == 0
    assert run_command(f"{lines[1]} --size 40 --bs 8 --arch resnet10t --epochs 1 --workers 0", monkeypatch) == 0
    assert json.loads(Path("runs/rotation/settings.json").read_text())["epochs"] == 1


def _train_alone() -> None:
    """The program that a launcher starts, started once."""
    Path("train.py").write_text(smaller(blocks("docs/scaling.md", "python")[0]))
    runpy.run_path("train.py", run_name="__main__")


@pytest.mark.parametrize("name", OF_TASKS)
def test_task_page_python(workplace, name):
    names = run_python(f"docs/tasks/{name}.md")
    assert names["read_card"](f"{name}.safetensors")["task"] == name
    assert all(np.isfinite(names["learn"].recorder.values[-1]))


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("selfsup ")]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_commands(workplace, monkeypatch, capsys, page):
    lines = [line for line in commands(page) if " dicoms" not in line and line != COMPARE]
    assert [line.split()[1] for line in lines][:2] == ["pretrain", "finetune"]
    assert COMPARE in commands(page)  # run below
    small = {"pretrain": " --size 40 --bs 8 --arch resnet10t", "finetune": " --bs 8"}
    for line in lines[:2]:
        line = re.sub(r" --epochs \d+", "", line)
        assert run_command(f"{line}{small[line.split()[1]]} --epochs 1 --workers 0", monkeypatch) == 0
    assert capsys.readouterr().out.split() == ["runs/rotation/encoder.safetensors", "runs/finetune"]
    for line in lines[2:]:
        assert line.startswith("selfsup predict photos ")
        assert run_command(f"{line} --workers 0", monkeypatch) == 3  # notes.txt is no image
        assert len(pd.read_csv("predictions.csv")) == 24
    settings = json.loads(Path("runs/finetune/settings.json").read_text())
    assert settings["epochs"] == 1
    assert list(pd.read_csv("runs/rotation/left_out.csv")["code"]) == ["not_an_image"]
    assert len(pd.read_csv("runs/finetune/predictions.csv")) == 8
    promised = set(re.findall(r"`(\w+\.(?:json|csv|png|safetensors|pkl))`", (ROOT / page).read_text()))
    made = {file.name for file in Path("runs").glob("*/*")}
    assert promised == made  # the table of files is complete and promises nothing else
    shutil.rmtree("runs")


@pytest.mark.slow
def test_commands_of_evidence(workplace, monkeypatch, capsys):
    quick = partial(comparing.compare_pretexts, steps=2, baselines=("scratch",))
    monkeypatch.setattr(comparing, "compare_pretexts", quick)
    small = {
        "compare": "--size 40 --bs 8 --tasks rotation --seeds 1 --labels 1.0 --budget 40 --workers 0",
        "pretrain": "--size 40 --bs 8 --arch resnet10t --epochs 1 --workers 0",
        "finetune": "--bs 8 --epochs 1 --workers 0",
        "export": "",
    }
    codes = {}
    for line in commands("docs/evidence.md"):
        name = line.split()[1]
        codes[name] = run_command(f"{line} {small.get(name, '--workers 0')}", monkeypatch)
    assert codes == dict.fromkeys([*small, "probe", "neighbors", "embed"], 0) | {"predict": 3}  # notes.txt is no image
    said = capsys.readouterr().out
    assert "On your data nothing can be said: from a single seed nobody knows what is chance." in said
    assert "from a single seed" in Path("report/index.html").read_text("utf-8")
    assert set(pd.read_csv("runs/probe/layers.csv")["start"]) == {"untrained", "rotation"}
    assert Path("neighbors.png").read_bytes()[:4] == b"\x89PNG"
    assert np.load("features.npz")["embeddings"].shape == (24, 512)
    assert len(pd.read_csv("predictions.csv")) == 24
    assert Path("rotation_timm/model.safetensors").stat().st_size > 1_000_000


@pytest.mark.slow
def test_evidence_python(workplace):
    names = run_python("docs/evidence.md")
    comparison = names["comparison"]
    assert set(comparison.encoders) == {"rotation", "simclr"} and len(names["files"]) == 2  # seeds
    assert sorted(set(comparison.runs["n_labels"])) == [10, 28] and comparison.data["n_test"] == 12
    assert set(names["runs"]["start"]) == {"scratch", "rotation"} and len(names["runs"]) == 2 * 2 * 2
    assert names["found"]["test images"] == 12 and names["found"]["test images seen in pretraining"] == 0
    assert Path("report/index.html").stat().st_size > 10_000
    assert names["model"].kind == "mask" and names["model"].vocab == ("dark", "bright")
    assert names["backbone"].out_channels == 256


@pytest.mark.parametrize("page", ["README.md", "docs/dicom.md"])
def test_commands_for_scans(workplace, monkeypatch, capsys, page):
    lines = [line for line in commands(page) if " dicoms" in line]
    assert lines[0] == "selfsup scan dicoms --out scan"
    for line in lines:
        small = " --size 40 --bs 4 --arch resnet10t --epochs 1" if " pretrain " in line else ""
        assert run_command(line + small, monkeypatch) == 0
    said = capsys.readouterr().out
    assert "CT" in said and "24" in said
    assert len(pd.read_csv("scan/scan.csv")) == 24 and Path("scan/contact_sheet.png").stat().st_size > 1_000


def test_dicom_page_python(workplace):
    names = run_python("docs/dicom.md")
    assert len(names["table"]) == len(names["dls"].items_df) == len(names["labeled"].items_df) == 24
    sides = names["labeled"].items_df.groupby("patient")["is_valid"].nunique()
    assert (sides == 1).all() and list(names["learn"].fine_tune_log["epoch"]) == [0, 1]


@pytest.mark.parametrize("name", OF_TASKS)
def test_task_page_command(workplace, monkeypatch, name):
    (line,) = [block.strip() for block in blocks(f"docs/tasks/{name}.md", "bash")]
    arch = "--arch resnet10t" if task_class(name).arch == "resnet18" else ""
    assert run_command(f"{line} --size 40 --bs 8 {arch} --epochs 1 --workers 0", monkeypatch) == 0
    assert Path(f"runs/{name}/encoder.safetensors").stat().st_size > 1_000_000
