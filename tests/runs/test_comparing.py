"""`selfsup compare` from folders: what stops it, and what is handed on; the race has tests of its own."""

import pytest

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.errors import DataError
from selfsup_fastai.runs import comparing
from tests.conftest import write_images
from tests.runs.small import classes

QUICK = dict(size=16, bs=4, num_workers=0, cache=False)


def test_folders_become_loaders_and_a_comparison_is_not_written_over(tmp_path, monkeypatch):
    images, labeled, out = tmp_path / "images", classes(tmp_path / "labeled"), tmp_path / "out"
    write_images(images, 6, seed=1)
    (images / "broken.png").write_text("")
    called = []

    def compared(dls, labeled, out, **asked):
        called.append((len(dls.train_ds) + len(dls.valid_ds), len(labeled.train_ds), len(labeled.valid_ds), asked))
        (out / "encoders").mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text("{}")
        return Comparison("nothing")

    monkeypatch.setattr(comparing, "compare_pretexts", compared)
    monkeypatch.setattr(comparing, "write_report", lambda comparison, dls, labeled, out, paths: out / "index.html")
    args = (images, labeled, out)
    assert comparing.compare_folders(*args, valid_pct=0.25, seeds=2, **QUICK)[1] == out / "index.html"
    assert called == [(6, 12, 4, {"seeds": 2})]
    assert (out / "left_out.csv").read_text().count("empty") == 1
    with pytest.raises(DataError, match=r"holds a comparison\. Go on with it"):
        comparing.compare_folders(*args, **QUICK)
    comparing.compare_folders(*args, resume=True, **QUICK)
    assert len(called) == 2
    with pytest.raises(DataError, match="lies in the folder of images"):
        comparing.compare_folders(images, labeled, images / "out", **QUICK)


def test_a_stop_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    images, out = write_images(tmp_path / "images", 6), tmp_path / "out"
    kept = []

    def stopped(dls, labeled, out, **asked):
        (out / "encoders").mkdir(parents=True, exist_ok=True)
        for name in kept:
            (out / name).write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "compare_pretexts", stopped)
    for said in ("No run was finished yet. The same command with --resume", f"What is done is kept in {str(out)!r}."):
        with pytest.raises(KeyboardInterrupt):
            comparing.compare_folders(images, None, out, **QUICK)  # an empty comparison/ stands in nobody's way
        assert said in capsys.readouterr().err
        kept.append("encoders/a.safetensors")
    with pytest.raises(DataError, match="holds a comparison"):
        comparing.compare_folders(images, None, out, **QUICK)
