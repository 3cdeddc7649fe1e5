"""Finding files in awkward folders, and checking files that hang, crash or lie."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from selfsup_fastai.data import files
from selfsup_fastai.data.files import check_files, find_files, summary
from selfsup_fastai.data.opening import REASONS
from selfsup_fastai.errors import DataError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def picture(path: Path, size=(6, 4), color=(200, 10, 10), form="PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, form)
    return path


# ---- find_files


def test_every_file_at_any_depth_sorted_and_whatever_its_name(tmp_path):
    names = [
        ".hidden",
        "no_suffix",
        "b.PNG",
        "b/.deep/x",
        "a b/ü\n\t'\".png",
        "a/b/c/d/e/f/g.txt",
        "-rf",
        "日本/写真.jpg",
    ]
    made = [touch(tmp_path / name) for name in names]
    made.append(touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-1 \xe9.png"))))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    made += [tmp_path / "pipe", tmp_path / "dangling", tmp_path / "itself"]
    assert find_files(tmp_path) == sorted(made, key=str)
    assert find_files(str(tmp_path)) == find_files(tmp_path)


def test_recurse_false_stays_at_the_top(tmp_path):
    top = touch(tmp_path / "top.png")
    touch(tmp_path / "below" / "file.png")
    assert find_files(tmp_path, recurse=False) == [top]


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    inside, outside = touch(root / "z" / "inside.png"), touch(elsewhere / "deep" / "outside.png")
    (root / "a_link_to_z").symlink_to(root / "z")
    (root / "z" / "up").symlink_to(root)
    for name in "linked_9", "linked_1", "linked_5", "linked_0", "linked_7":
        (root / name).symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert find_files(root) == [root / "linked_0" / "deep" / outside.name, inside]


def test_a_very_deep_folder(tmp_path):
    folder = tmp_path.joinpath(*["d" * 10] * 150)
    assert find_files(touch(folder / "bottom").parents[150]) == [folder / "bottom"]


def test_a_folder_that_cannot_be_read_is_passed_over_with_a_warning(tmp_path, monkeypatch):
    kept = touch(tmp_path / "open" / "kept")
    touch(tmp_path / "secret" / "not seen")
    scandir = os.scandir

    def forbidding(path):
        if path.endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)  # root, who runs many tests, may read everything
    with pytest.warns(UserWarning, match=r"^1 folder\(s\) could not be read") as caught:
        assert find_files(tmp_path) == [kept]
    assert "secret" not in str(caught[0].message)


def test_folders_that_are_none_are_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = touch(tmp_path / "file.png")
    with pytest.raises(DataError, match=r"no folder 'nowhere' \(looked for in '.*'\)"):
        find_files("nowhere")
    with pytest.raises(DataError, match=r"is a file.*from_files.*from_single_image"):
        find_files(file)
    with pytest.raises(DataError, match=r"got int"):
        find_files(3)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert find_files(empty) == []


# ---- check_files


def test_both_frames_keep_the_order_of_the_files(tmp_path):
    paths = []
    for i in range(30):
        good = picture(tmp_path / f"{29 - i:02}.png", size=(i + 2, 3))
        paths += [good, touch(tmp_path / f"empty {i}")] if i % 3 else [good]
    ok, report = check_files(paths, n_workers=3)
    assert ok["file"].tolist() == [path for path in paths if path.suffix]
    assert ok["width"].tolist() == list(range(2, 32))
    assert report["file"].tolist() == [path for path in paths if not path.suffix]
    assert set(report["code"]) == {"empty"}
    assert set(report["message"]) == {REASONS["empty"]}
    assert ok.columns.tolist() == ["file", "width", "height", "mode", "format", "frames", "channels", "bits", "max"]
    assert report.columns.tolist() == ["file", "code", "message"]


def test_what_is_known_of_a_file(tmp_path):
    Image.fromarray(np.array([[0, 4095, 7]], np.uint16)).save(tmp_path / "deep.png")
    ok, report = check_files([str(tmp_path / "deep.png"), picture(tmp_path / "grey.jpg", (9, 8), (5, 5, 5), "JPEG")])
    assert report.empty
    assert ok.to_dict("records")[0] == {
        "file": tmp_path / "deep.png",
        **{
            "width": 3,
            "height": 1,
            "mode": "I;16",
            "format": "PNG",
            "frames": 1,
            "channels": 1,
            "bits": 16,
            "max": 4095,
        },
    }
    second = ok.to_dict("records")[1]
    assert (second["width"], second["height"], second["mode"], second["channels"]) == (9, 8, "RGB", 1)
    assert np.isnan(second["max"])


def test_names_of_every_kind_reach_the_child(tmp_path):
    names = ["new\nline.png", "ünï.png", "日本.png", ' "quoted" \\.png', "-m"]
    paths = [tmp_path / name for name in names] + [Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))]
    ok, report = check_files([picture(path) for path in paths], n_workers=1)
    assert report.empty
    assert ok["file"].tolist() == paths


def test_relative_paths_are_those_of_this_process_whatever_else_is_in_the_folder(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    touch(tmp_path / "json.py").write_text("raise SystemExit")  # a child that looked here first would not start
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "say", pytest.fail)
    ok, _ = check_files(["a.png"])
    assert ok["file"].tolist() == [Path("a.png")]


def test_nothing_to_check():
    ok, report = check_files([])
    assert (len(ok), len(report)) == (0, 0)
    assert "channels" in ok and "code" in report
    assert ok["max"].dtype == float


def test_arguments_are_checked(tmp_path):
    with pytest.raises(DataError, match=r"list of paths; got one"):
        check_files(tmp_path)
    with pytest.raises(DataError, match=r"got one with int in it"):
        check_files([tmp_path, 3])
    with pytest.raises(DataError, match=r"at least 1 .* got 0"):
        check_files([], n_workers=0)


@pytest.fixture
def fake_child(tmp_path, monkeypatch):
    """A child that does what the name of the file says, and notes each of its starts."""
    script, starts = tmp_path / "child.py", tmp_path / "starts"
    starts.touch()
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, signal, sys, time
            open({os.fspath(starts)!r}, "a").write(f"{{os.getpid()}}\\n")
            print(json.dumps({{"ready": True}}), flush=True)
            for line in sys.stdin:
                name = os.path.basename(json.loads(line)["path"])
                if name.startswith("hang"):
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    time.sleep(600)
                if name.startswith("die"):
                    os.kill(os.getpid(), signal.SIGSEGV)
                if name.startswith("garble"):
                    print("half an ans", flush=True)
                    continue
                if name.startswith("flaky") and len(open({os.fspath(starts)!r}).readlines()) == 1:
                    os._exit(1)
                facts = dict.fromkeys(["width", "height", "frames", "channels", "bits"], 1)
                print(json.dumps(facts | {{"mode": "L", "format": "PNG", "max": None}}), flush=True)
            """
        )
    )
    monkeypatch.setattr(files, "_COMMAND", [sys.executable, os.fspath(script)])
    return lambda: [int(pid) for pid in starts.read_text().split()]


def test_children_that_hang_die_or_talk_nonsense_cost_one_file_each(fake_child):
    names = ["one", "hang", "two", "die", "three", "garble", "four", "hang again", "five"]
    began = time.monotonic()
    ok, report = check_files(names, n_workers=2, timeout=0.5)
    assert time.monotonic() - began < 10
    assert [path.name for path in ok["file"]] == ["one", "two", "three", "four", "five"]
    codes = dict(zip((path.name for path in report["file"]), report["code"]))
    assert codes == {"hang": "timeout", "die": "crashed", "garble": "crashed", "hang again": "timeout"}
    assert report["message"].tolist() == [REASONS[code] for code in report["code"]]


def test_a_crash_is_believed_only_when_a_fresh_child_crashes_too(fake_child):
    ok, report = check_files(["flaky", "other"], n_workers=1)
    assert [path.name for path in ok["file"]] == ["flaky", "other"]
    assert report.empty
    assert len(fake_child()) == 2


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def open_descriptors():
    return sorted(os.listdir("/dev/fd"))


def test_no_process_thread_or_descriptor_is_left(fake_child):
    before = open_descriptors(), threading.active_count()
    check_files(["one", "hang", "die", "two"], n_workers=3, timeout=0.3)
    deadline = time.monotonic() + 5
    while (open_descriptors(), threading.active_count()) != before and time.monotonic() < deadline:
        time.sleep(0.02)  # the readers see the end of their pipe a moment later
    assert (open_descriptors(), threading.active_count()) == before
    assert len(fake_child()) >= 3
    assert not any(map(alive, fake_child()))


@pytest.fixture
def heard():
    """Ctrl-C raises KeyboardInterrupt, also where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_check_and_its_children(fake_child, heard):
    def press():
        while len(fake_child()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        check_files(["hang 1", "hang 2", "hang 3"], n_workers=2, timeout=60)
    assert time.monotonic() - began < 20
    assert not any(map(alive, fake_child()))
    assert len(fake_child()) == 2


@pytest.mark.parametrize("command", [["/no/such/python"], [sys.executable, "-c", "print('hello')"]])
def test_without_children_the_files_are_checked_here_and_it_is_said_once(tmp_path, monkeypatch, command):
    monkeypatch.setattr(files, "_COMMAND", command)
    said = []
    monkeypatch.setattr(files, "say", said.append)
    ok, report = check_files([picture(tmp_path / "a.png"), touch(tmp_path / "b"), picture(tmp_path / "c")], n_workers=2)
    assert [path.name for path in ok["file"]] == ["a.png", "c"]
    assert report["code"].tolist() == ["empty"]
    assert len(said) == 1
    assert "a.png" not in said[0]


def test_an_error_of_our_own_reaches_the_caller(tmp_path, monkeypatch):
    def broken(*_args):
        raise ZeroDivisionError

    monkeypatch.setattr(files._Child, "check", broken)
    with pytest.raises(ZeroDivisionError):
        check_files([tmp_path / "a", tmp_path / "b"], n_workers=2)


def test_a_real_child_gives_up_on_memory_not_on_the_run(tmp_path):
    """88 million pixels, 4 bytes each, where 400 MiB are to be had; then the next file in the same process."""
    wide = tmp_path / "wide.pgm"
    with wide.open("wb") as file:
        file.write(b"P5 9400 9400 65535\n")
        file.truncate(9400 * 9400 * 2 + 19)
    program = "import sys; from selfsup_fastai.data import opening; opening.MEMORY_LIMIT = 400 << 20; opening.main()"
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.fspath(Path(files.__file__).parents[2])}
    request = f'{{"path": "{wide}", "size": null}}\n{{"path": "{picture(tmp_path / "small.png")}", "size": null}}\n'
    done = subprocess.run([sys.executable, "-c", program], input=request, capture_output=True, text=True, env=env)
    _ready, first, second = done.stdout.splitlines()
    assert '"out_of_memory"' in first
    assert '"width": 6' in second


def test_a_run_in_a_pipe_shows_no_bar(tmp_path):
    program = (
        f"from selfsup_fastai.data.files import *; print(len(check_files(find_files({os.fspath(tmp_path)!r}))[0]))"
    )
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("3\n", "")


# ---- summary


def test_summary_is_one_line_without_names(tmp_path):
    paths = [picture(tmp_path / "fine.png")]
    paths += [touch(tmp_path / f"empty {i}") for i in range(2)]
    paths += [tmp_path / "gone.png"]
    (tmp_path / "notes.txt").write_text("not a picture")
    _ok, report = check_files([*paths, tmp_path / "notes.txt"])
    assert summary(report) == "4 of 5 files left out: 2 empty, 1 missing, 1 not an image (dls.report lists them)"
    many = pd.DataFrame({"file": "x", "code": ["truncated"] * 1500 + ["dicom", "no_permission"], "message": ""})
    many.attrs["checked"] = 20_000
    expected = "1,502 of 20,000 files left out: 1,500 truncated, 1 DICOM, 1 without permission (dls.report lists them)"
    assert summary(many) == expected
    assert summary(check_files(paths[:1])[1]) is None
