"""What is decoded is kept, found again by later runs, and never wrong: whatever happens to files, disk and process."""

import errno
import hashlib
import io
import json
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup_fastai.data import files as checking
from selfsup_fastai.data import keeping as module
from selfsup_fastai.data.cache import PixelCache
from selfsup_fastai.data.crops import crops, picture
from selfsup_fastai.data.files import check_files
from selfsup_fastai.data.keeping import keeping
from selfsup_fastai.data.opening import decode
from tests.conftest import ROOT, write_images

SIZE = (16, 24)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache for each test."""
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checked(monkeypatch):
    """The names of the files that were decoded, in child processes or here, since the list was last emptied."""
    seen = []
    there, here = checking._Crew._check, module.Keeping._decoded
    monkeypatch.setattr(checking._Crew, "_check", lambda s, c, file: seen.append(file.name) or there(s, c, file))
    monkeypatch.setattr(module.Keeping, "_decoded", lambda s, n: seen.append(Path(s.items[n]).name) or here(s, n))
    return seen


def build(files, cache=True, size=SIZE, n_in=None, max_gb=1.0, during=None):
    """As `UnlabeledDataLoaders` do it: the store or None, and what `check_files` returns."""
    with keeping(cache, files, size, n_in, max_gb) as kept:
        ok, report = check_files(files, n_workers=1, keeper=kept)
        if during:
            during()
        if kept:
            kept.fill(ok.index)
        return kept and kept.store(list(ok.index), n_in or int(ok["channels"].max())), ok, report


def whole(store, row):
    """Image number `row` of a store, (C, H, W)."""
    height, width = store.shapes(np.array([row]))[0].tolist()
    return store.gather(np.array([row]), np.zeros((1, 2), int), (height, width))[0].numpy()


def right(store, files, size=SIZE, n_in=None):
    """Whether the store holds what decoding the files now gives."""
    truth = [decode(file, size, n_in)[1] for file in files]
    return len(store) == len(files) and all(np.array_equal(whole(store, i), t) for i, t in enumerate(truth))


def listed(path):
    return sorted(path.glob("*.png"))


@pytest.fixture
def images(tmp_path):
    return listed(write_images(tmp_path / "images", 12, (20, 50)))


def kept_bytes(folder):
    return sum(p.stat().st_size for p in folder.glob("pixels-1/*"))


SLOW = "Images are decoded anew in every epoch."

# ---- from run to run


def test_a_second_run_decodes_nothing_and_starts_no_process(images, checked, monkeypatch, capsys):
    assert right(build(images)[0], images) and sorted(checked) == [f.name for f in images]
    assert "12 images were decoded and kept for later runs" in capsys.readouterr().err
    checked.clear()
    monkeypatch.setattr(checking, "_popen", None)
    store, ok, report = build(images)
    assert right(store, images) and not checked and report.empty
    assert ok["width"].tolist() == [50] * 12 and ok["channels"].tolist() == [3] * 12
    assert capsys.readouterr().err == ""


def test_other_settings_are_other_pixels_beside_one_another(images, checked):
    kinds = [((16, 24), None), ((24, 16), None), ((16, 24), 1)]
    for size, n_in in kinds:
        assert right(build(images, size=size, n_in=n_in)[0], images, size, n_in)
    assert len(checked) == 36
    for size, n_in in kinds:
        assert right(build(images, size=size, n_in=n_in)[0], images, size, n_in)
    assert len(checked) == 36


def test_only_new_and_changed_files_are_decoded_and_deleted_ones_reported(images, checked):
    build(images)
    images[5].unlink()
    changed = images[7]
    before = changed.read_bytes()
    Image.open(changed).transpose(Image.Transpose.ROTATE_180).save(changed)
    with open(changed, "ab") as file:  # the same size
        file.write(bytes(max(0, len(before) - changed.stat().st_size)))
    new = images[0].with_name("new.png")
    Image.open(images[0]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(new)
    checked.clear()
    store, ok, report = build([*images, new])
    there = [*images[:5], *images[6:], new]
    assert right(store, there) and list(ok["file"]) == there
    assert report[["file", "code"]].values.tolist() == [[images[5], "missing"]]
    assert sorted(checked) == sorted([images[5].name, changed.name, "new.png"])


def test_the_same_size_with_another_time_is_another_file(images, checked):
    noise = np.random.default_rng(0).integers(0, 256, (2, 20, 50, 3), dtype=np.uint8)
    file = images[0].with_suffix(".bmp")
    Image.fromarray(noise[0]).save(file)
    assert right(build([file, images[0]])[0], [file, images[0]])
    size = file.stat().st_size
    Image.fromarray(noise[1]).save(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    checked.clear()
    assert file.stat().st_size == size and right(build([file, images[0]])[0], [file, images[0]])
    assert checked == [file.name]


def test_a_file_that_changes_while_it_is_decoded_is_not_kept_as_what_it_was(images, folder, monkeypatch):
    other = Image.open(images[3]).transpose(Image.Transpose.ROTATE_180)
    there = checking._Crew._check

    def meanwhile(self, child, file):
        found = there(self, child, file)
        if file == images[3]:
            other.save(file)
            os.utime(file, ns=(0, 12345))
        return found

    with PixelCache(folder) as cache:
        name = cache.key(images[3])
        monkeypatch.setattr(checking._Crew, "_check", meanwhile)
        store, *_ = build(images)
        assert right(store, images)  # what it is now
        settings = module._settings(SIZE, None)[0]
        assert not cache.places(settings, [name]) and not cache.facts([name])
        assert len(cache.places(settings, [cache.key(images[3])])) == 1


def test_a_grey_file_that_gets_colors_while_it_is_decoded_is_left_to_the_slow_road(tmp_path):
    files = listed(write_images(tmp_path / "grey", 4, (20, 50), channels=1))
    color = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)

    def during():
        kept.keys[2] = None  # as if it had changed before `keep` looked
        del kept.new_places[name]
        Image.fromarray(color).save(files[2])

    with keeping(True, files, SIZE, None, 1.0) as kept:
        name = kept.keys[2]
        ok, _ = check_files(files, n_workers=1, keeper=kept)
        during()
        kept.fill(ok.index)
        assert kept.store(list(ok.index), 1) is None
        assert right(kept.store(list(ok.index), 3), [], n_in=3) is False  # three channels hold it


def test_a_file_that_vanishes_while_it_is_decoded_is_grey_and_that_is_said(images, monkeypatch, capsys):
    there = checking._Crew._check

    def meanwhile(self, child, file):
        found = there(self, child, file)
        if file == images[3]:
            file.unlink()
        return found

    monkeypatch.setattr(checking._Crew, "_check", meanwhile)
    store, ok, _ = build(images)
    assert len(ok) == 12 and (whole(store, 3) == 128).all()
    assert "\n1 images vanished while" in "\n" + capsys.readouterr().err
    others = [i for i in range(12) if i != 3]
    assert all(np.array_equal(whole(store, i), decode(images[i], SIZE)[1]) for i in others)


def test_a_file_that_is_given_twice_is_kept_once(images, folder):
    twice = [*images, *images]
    store, ok, _ = build(twice)
    assert right(store, twice) and len(ok) == 24
    once = kept_bytes(folder)
    assert once == sum(-(-decode(f, SIZE)[1].nbytes // 64) * 64 for f in images)


# ---- broken files


def bomb(folder):
    """A PNG whose header promises 40000 x 40000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    file = folder / "bomb.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return file


@pytest.fixture
def hostile(images):
    """Good files with broken ones among them; and what is wrong with each of those."""
    home = images[0].parent
    (home / "empty.png").write_bytes(b"")
    (home / "text.png").write_text("no image")
    (home / "cut.png").write_bytes(images[0].read_bytes()[:100])
    bad = {home / "empty.png": "empty", home / "text.png": "not_an_image", home / "cut.png": "truncated"}
    return [images[0], *bad, *images[1:], bomb(home)], {**bad, home / "bomb.png": "too_large"}


def test_broken_files_are_reported_as_without_a_cache_and_remembered(hostile, images, checked):
    files, bad = hostile
    plain = check_files(files, n_workers=1)
    checked.clear()
    for n in len(files), 0:
        store, ok, report = build(files)
        assert right(store, images) and len(checked) == n
        assert ok.equals(plain[0]) and report.equals(plain[1]) and list(report["file"]) == list(bad)
        assert dict(zip(report["file"], report["code"])) == bad
        checked.clear()


@pytest.mark.parametrize("code", sorted(module._FLEETING))
def test_what_may_pass_is_tried_again(images, checked, monkeypatch, code):
    there = checking._Child.check
    failed = ({"code": code, "message": ""}, None)
    monkeypatch.setattr(
        checking._Child, "check", lambda s, file, *a: failed if file == images[2] else there(s, file, *a)
    )
    _, _, report = build(images)
    assert report["code"].tolist() == [code]
    monkeypatch.setattr(checking._Child, "check", there)
    checked.clear()
    store, _, report = build(images)
    assert report.empty and right(store, images) and checked == [images[2].name]


def test_what_an_older_decoder_could_not_read_is_tried_again(hostile, checked, monkeypatch):
    files, bad = hostile
    build(files)
    monkeypatch.setattr(module, "_DECODERS", [*module._DECODERS, "newer"])
    checked.clear()
    _, _, report = build(files)
    assert set(checked) == {f.name for f in files} and len(report) == len(bad)


# ---- killed, interrupted, at once: real processes

SCRIPT = """
import sys, time, os, json, hashlib
from pathlib import Path
import numpy as np
from selfsup_fastai.data import keeping as module
from selfsup_fastai.data.files import check_files

folder, first, last, height, mark, go = sys.argv[1:]
module._FLUSH_SECONDS = 0
keep = module.OnDisk.keep
decoded = []

def slow(self, number, facts, array):
    decoded.append(number)
    keep(self, number, facts, array)
    Path(mark).touch()
    until = time.monotonic() + 30
    while go != "-" and len(decoded) >= 8 and not os.path.exists(go) and time.monotonic() < until:
        time.sleep(0.01)

module.OnDisk.keep = slow
files = sorted(Path(folder).glob("*.png"))[int(first):int(last)]
with module.keeping(True, files, (int(height), 24), None, 1.0) as kept:
    ok, _ = check_files(files, n_workers=1, keeper=kept)
    kept.fill(ok.index)
    store = kept.store(list(ok.index), 3)
pixels = hashlib.sha256()
for i, (height, width) in enumerate(store.shapes(np.arange(len(store))).tolist()):
    pixels.update(store.gather(np.array([i]), np.zeros((1, 2), int), (height, width)).numpy().tobytes())
print(json.dumps([len(decoded), pixels.hexdigest()]))
"""


def start(images, tmp_path, name, first=0, last=99, height=16, wait=True):
    """A process that builds; it stops after eight images until `go(name)`, if it is to wait."""
    go = str(tmp_path / f"{name}.go") if wait else "-"
    command = [sys.executable, "-c", SCRIPT, str(images[0].parent), str(first), str(last), str(height)]
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    heard = {}
    if sys.platform != "win32":  # a shell's background jobs ignore Ctrl-C, and so would their children
        heard["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command += [str(tmp_path / f"{name}.mark"), go]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, **heard)


def until(happened, seconds=60):
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.01)


def ended(process):
    """The number of images it decoded, a digest of all pixels, and what it said."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return (*json.loads(out), err)


def digest(files, size=SIZE):
    return hashlib.sha256(b"".join(decode(f, size)[1].tobytes() for f in files)).hexdigest()


def found(folder, files, size=SIZE):
    with PixelCache(folder) as cache:
        return len(cache.places(module._settings(size, None)[0], [cache.key(f) for f in files]))


def test_a_killed_run_is_taken_up_where_it_was(images, tmp_path, folder, checked):
    process = start(images, tmp_path, "a")
    until(lambda: (tmp_path / "a.mark").exists() and found(folder, images) == 8)
    process.kill()
    process.communicate()
    with open(next(folder.glob("pixels-1/*")), "ab") as file:
        file.write(b"half an image that never entered the index")
    store, *_ = build(images)
    assert right(store, images) and len(checked) == len(set(checked)) == 4
    checked.clear()
    assert right(build(images)[0], images) and not checked


@pytest.mark.slow
def test_who_comes_second_waits_says_so_and_decodes_nothing(images, tmp_path, folder):
    first = start(images, tmp_path, "a")
    until((tmp_path / "a.mark").exists)
    second = start(images, tmp_path, "b")
    line = second.stderr.readline()
    assert line == "Another process is decoding these images: waiting for it (cache='ram' does not wait).\n"
    (tmp_path / "a.go").touch()
    assert ended(first)[:2] == (12, digest(images))
    assert ended(second)[:2] == (0, digest(images))
    assert kept_bytes(folder) == sum(-(-decode(f, SIZE)[1].nbytes // 64) * 64 for f in images)


def test_who_waits_for_a_process_that_is_killed_goes_on_in_its_place(images, tmp_path):
    first = start(images, tmp_path, "a")
    until((tmp_path / "a.mark").exists)
    second = start(images, tmp_path, "b", wait=False)
    assert "waiting for it" in second.stderr.readline()
    first.kill()
    first.communicate()
    n, pixels, _ = ended(second)
    assert pixels == digest(images) and n == 4


@pytest.mark.slow
def test_runs_over_sets_that_overlap_do_not_disturb_one_another(images, tmp_path, checked):
    first = start(images, tmp_path, "a", 0, 10)
    until((tmp_path / "a.mark").exists)
    second = start(images, tmp_path, "b", 5, 12, wait=False)
    other = start(images, tmp_path, "c", 0, 12, height=20, wait=False)
    assert ended(second)[1] == digest(images[5:])
    assert ended(other)[1] == digest(images, (20, 24))
    (tmp_path / "a.go").touch()
    assert ended(first)[1] == digest(images[:10])
    for size in SIZE, (20, 24):
        assert right(build(images, size=size)[0], images, size) and not checked


def test_an_interrupted_run_keeps_what_it_has(images, checked, monkeypatch):
    keep = module.OnDisk.keep

    def interrupted(self, number, facts, array):
        keep(self, number, facts, array)
        if self.n_kept == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.OnDisk, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(images)
    monkeypatch.setattr(module.OnDisk, "keep", keep)
    checked.clear()
    assert right(build(images)[0], images) and len(checked) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c_in_another_process_keeps_what_it_has(images, tmp_path, folder):
    process = start(images, tmp_path, "a")
    until(lambda: (tmp_path / "a.mark").exists() and found(folder, images) == 8)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert found(folder, images) == 8


# ---- room


def test_too_little_room_is_said_with_reasons_and_leaves_nothing(images, folder, capsys):
    needed = sum(-(-decode(f, SIZE)[1].nbytes // 64) * 64 for f in images)
    store, ok, _ = build(images, max_gb=(needed - 1) / 1e9)
    said = capsys.readouterr().err
    assert store is None and len(ok) == 12 and kept_bytes(folder) == 0 and found(folder, images) == 0
    assert said.count(SLOW) == 1 and "Pixels are not kept: they would take" in said and "max_gb is" in said
    assert right(build(images, max_gb=needed / 1e9)[0], images)


def test_room_runs_out_at_the_end_where_fewer_images_are_kept_than_expected(hostile, folder, capsys):
    store, ok, _ = build(hostile[0], max_gb=1e-9)
    assert store is None and len(ok) == 12 and kept_bytes(folder) == 0
    assert capsys.readouterr().err.count(SLOW) == 1


@pytest.mark.parametrize("cache", [True, "ram"])
def test_broken_files_need_no_room(tmp_path, monkeypatch, capsys, cache):
    """Among 80 good files 80 that are empty, and room for little more than the good ones."""
    files = listed(write_images(tmp_path / "images", 80, (20, 50)))
    empty = [files[0].with_name(f"empty{i}.png") for i in range(80)]
    for file in empty:
        file.write_bytes(b"")
    files = [*empty[:40], *files[:40], empty[40].with_name("missing.png"), *empty[40:], *files[40:]]
    needed = sum(-(-decode(f, SIZE)[1].nbytes // 64) * 64 for f in files if f.exists() and f.stat().st_size)
    monkeypatch.setattr(module, "available_memory", lambda: 2 * int(1.2 * needed))
    store, ok, report = build(files, cache=cache, max_gb=1.2 * needed / 1e9)
    assert len(report) == 81 and right(store, list(ok["file"])) and SLOW not in capsys.readouterr().err


def test_older_builds_give_way_and_runs_that_use_them_go_on(images, tmp_path, folder, checked):
    needed = sum(-(-decode(f, SIZE)[1].nbytes // 64) * 64 for f in images)
    others = listed(write_images(tmp_path / "others", 12, (20, 50), seed=1))
    first, *_ = build(images)
    second, *_ = build(others, max_gb=1.5 * needed / 1e9)
    assert kept_bytes(folder) == needed and found(folder, images) == 0 and found(folder, others) == 12
    assert right(second, others)
    if sys.platform != "win32":
        assert right(first, images)
        with PixelCache(folder) as cache:
            cache.clear()
        assert right(second, others) and kept_bytes(folder) == 0
    checked.clear()
    assert right(build(images)[0], images) and len(checked) == 12


def test_a_build_that_another_run_drops_while_it_grows_costs_no_more_than_time(images, folder, capsys):
    def dropped():
        with PixelCache(folder) as cache:
            cache.clear()

    store, ok, _ = build(images, during=dropped)
    assert store is None and len(ok) == 12 and SLOW in capsys.readouterr().err
    assert right(build(images)[0], images)


def test_memory_that_does_not_do_is_said(images, monkeypatch, capsys, folder):
    monkeypatch.setattr(module, "available_memory", lambda: 2000)
    assert build(images, cache="ram")[0] is None
    assert "half of what is free is" in (said := capsys.readouterr().err) and said.count(SLOW) == 1
    monkeypatch.undo()
    assert right(build(images, cache="ram")[0], images) and not folder.exists()


# ---- full and read-only disks


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A file system of 2 MB that holds the cache."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if (
        not sys.platform.startswith("linux")
        or os.geteuid() != 0
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    monkeypatch.setenv("SELFSUP_CACHE", str(disk / "cache"))
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def remount(disk, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def test_a_disk_too_small_is_noticed_before_it_is_full(tmp_path, small_disk, capsys):
    files = listed(write_images(tmp_path / "many", 200, (80, 80)))
    store, ok, _ = build(files, size=(80, 80))  # 3.8 MB
    said = capsys.readouterr().err
    assert store is None and len(ok) == 200 and said.count(SLOW) == 1
    assert "the disk of the cache has too little room" in said
    assert kept_bytes(small_disk / "cache") == 0


def test_a_disk_that_fills_up_all_the_same_is_no_error(tmp_path, small_disk, capsys, monkeypatch):
    files = listed(write_images(tmp_path / "many", 80, (100, 150)))
    monkeypatch.setattr(PixelCache, "free", lambda self: 10**12)
    for seconds in 0.0, 1000.0:  # written piece by piece; or all at the end
        monkeypatch.setattr(module, "_FLUSH_SECONDS", seconds)
        store, ok, _ = build(files, size=(100, 150))
        said = capsys.readouterr().err
        assert store is None and len(ok) == 80 and said.count(SLOW) == 1 and "the disk of the cache is full" in said
        assert kept_bytes(small_disk / "cache") == 0
    store, *_ = build(files[:20], size=(100, 150))  # 0.9 MB
    assert right(store, files[:20], (100, 150))


def test_what_is_kept_serves_from_a_disk_without_a_byte_left(images, small_disk, checked):
    build(images)
    checked.clear()
    with open(small_disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    assert right(build(images)[0], images) and not checked


def test_a_cache_that_may_only_be_read_serves_what_it_has(images, tmp_path, small_disk, checked, capsys):
    build(images)
    remount(small_disk, "ro")
    checked.clear(), capsys.readouterr()
    assert right(build(images)[0], images) and not checked and capsys.readouterr().err == ""
    gone = tmp_path / "images" / "gone.png"
    store, _, report = build([*images, gone])  # nothing new to keep
    assert right(store, images) and report["code"].tolist() == ["missing"]
    new = listed(write_images(tmp_path / "new", 3, (20, 50), seed=1))
    assert build([*images, *new])[0] is None
    assert f"may not be written to by this user. {SLOW}" in capsys.readouterr().err
    remount(small_disk, "rw")
    assert right(build([*images, *new])[0], [*images, *new])


def test_an_empty_cache_that_may_only_be_read_is_explained(images, small_disk, capsys):
    (small_disk / "cache").mkdir()
    remount(small_disk, "ro")
    store, ok, _ = build(images)
    assert store is None and len(ok) == 12
    assert "Pixels are not kept: the cache folder cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("call", ["write", "fsync", "open"])
@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_any_failure_of_the_disk_leads_to_the_slow_road(images, folder, monkeypatch, capsys, call, seconds):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/name")

    def fails(*_args, **_kwargs):
        raise OSError(errno.EIO, "Input/output error", "/secret/name")

    opened = {"write": lambda path, *_a, **_k: io.BufferedWriter(Full(path, "a"), 1 << 20), "open": fails}
    if call == "fsync":
        monkeypatch.setattr(module.os, "fsync", fails)
    else:
        monkeypatch.setattr(module, "open", opened[call], raising=False)
    monkeypatch.setattr(module, "_FLUSH_SECONDS", seconds)
    store, ok, _ = build(images)
    said = capsys.readouterr().err
    assert store is None and len(ok) == 12 and said.count(SLOW) == 1 and "secret" not in said
    assert ("is full" if call == "write" else "the cache failed (Input/output error)") in said
    assert kept_bytes(folder) == 0 and found(folder, images) == 0
    monkeypatch.undo()
    monkeypatch.setenv("SELFSUP_CACHE", str(folder))
    assert right(build(images)[0], images)


def test_a_file_in_place_of_the_cache_is_explained(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "taken"))
    store, ok, _ = build(images)
    assert store is None and len(ok) == 12
    said = capsys.readouterr().err
    assert said.startswith("Pixels are not kept: the cache folder cannot be used") and SLOW in said


# ---- damage


@pytest.mark.parametrize("damage", ["garbage", "empty", "half", "middle", "rows", "text"])
def test_a_damaged_index_costs_decoding_and_no_wrong_pixel(images, folder, checked, capsys, damage):
    files = [*images, *listed(write_images(images[0].parent / "more", 200, (16, 24), seed=9))]
    build(files)
    index = folder / "index-1.sqlite"
    whole_index = index.read_bytes()
    assert len(whole_index) > 10 * 4096
    if damage in ("rows", "text"):
        with sqlite3.connect(index) as db:
            db.execute("UPDATE files SET facts = ?", ("{" if damage == "rows" else sqlite3.Binary(b"\xff\xfe"),))
            if damage == "text":
                db.execute("UPDATE files SET facts = CAST(facts AS TEXT)")
        db.close()
    else:
        noise = np.random.default_rng(0).bytes(len(whole_index))
        damaged = {"garbage": noise, "empty": b"", "half": whole_index[: len(whole_index) // 2]}
        damaged["middle"] = whole_index[:4096] + noise[4096:]
        index.write_bytes(damaged[damage])
    checked.clear(), capsys.readouterr()
    assert right(build(files)[0], files) and len(checked) == len(files)
    assert (damage == "empty") != ("The index of the pixel cache was damaged" in capsys.readouterr().err)
    checked.clear()
    assert right(build(files)[0], files) and not checked


def test_a_damaged_index_that_shows_only_when_it_is_written_to(images, folder, monkeypatch, capsys):
    def malformed(self, *_):
        raise sqlite3.DatabaseError("database disk image is malformed")

    with monkeypatch.context() as patch:
        patch.setattr(PixelCache, "add", malformed)
        assert build(images)[0] is None
    said = capsys.readouterr().err
    assert SLOW in said and "was damaged" in said and kept_bytes(folder) == 0
    assert right(build(images)[0], images)


@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_lost_pixels_are_decoded_again(images, folder, checked, damage):
    build(images)
    pixels = next(folder.glob("pixels-1/*"))
    sizes = [-(-decode(f, SIZE)[1].nbytes // 64) * 64 for f in images]
    if damage == "gone":
        pixels.unlink()
    else:
        os.truncate(pixels, sum(sizes) - 100 if damage == "cut" else 0)
    checked.clear()
    assert right(build(images)[0], images) and len(checked) == (1 if damage == "cut" else 12)


@pytest.mark.parametrize("damage", ["gone", "other"])
def test_with_another_secret_everything_is_decoded_anew(images, folder, checked, damage):
    build(images)
    if damage == "gone":
        (folder / "SECRET").unlink()
    else:
        (folder / "SECRET").write_bytes(bytes(range(32)))
    checked.clear()
    assert right(build(images)[0], images) and len(checked) == 12


# ---- privacy


def test_no_byte_of_the_cache_and_no_line_names_a_file(tmp_path, folder, capsys):
    home = write_images(tmp_path / "JaneDoe1950", 6, (20, 50))
    for file in listed(home):
        file.rename(file.with_name(f"MRN4711-{file.name}"))
    (home / "MRN4711-broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    build([*listed(home), home / "MRN4711-missing.png"])
    build(listed(home), max_gb=1e-9, size=(20, 20))
    names = [path.name for path in folder.rglob("*")]
    contents = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file()) + "".join(names).encode()
    said = capsys.readouterr().err
    assert SLOW in said and b'"code"' in contents
    for part in "JaneDoe", "Doe1950", "MRN4711", "broken", ".png":  # shorter ones may be found by chance
        assert part.encode() not in contents and part.encode("utf-16-le") not in contents and part not in said
    assert str(home) not in said


# ---- what needs no check


def test_arrays_and_crops_are_kept_by_what_they_are():
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 40, 3), dtype=np.uint8)
    photo = picture(Image.fromarray(array[0].repeat(8, 0).repeat(8, 1)))
    cut = crops(photo, 20, 3, 32)
    for items, again in (list(array), list(array.copy())), (cut, crops(photo, 20, 3, 32)):
        truth = [decode(i() if callable(i) else i, SIZE)[1] for i in items]
        for some, order, n_new in (items, truth, 20), (again, truth, 0), (again[::-1], truth[::-1], 0):
            with keeping(True, some, SIZE, None, 1.0) as kept:
                kept.fill(range(20))
                store = kept.store(range(20), 3)
                assert kept.n_kept == n_new
            assert all(np.array_equal(whole(store, i), t) for i, t in enumerate(order))


def test_arrays_are_hashed_once(monkeypatch):
    arrays, seen = list(np.random.default_rng(0).integers(0, 256, (5, 20, 50, 3), dtype=np.uint8)), []
    there = PixelCache.key
    monkeypatch.setattr(PixelCache, "key", lambda s, item: seen.append(id(item)) or there(s, item))
    with keeping(True, arrays, SIZE, None, 1.0) as kept:
        kept.fill(range(5))
        assert kept.n_kept == 5
    assert sorted(seen) == sorted(map(id, arrays))


def test_crops_are_their_own_however_threads_take_turns(monkeypatch):
    """Their random numbers come from no generator that threads share."""
    photo = picture(Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)))
    items = crops(photo, 40, 3, 16)
    truth = [decode(item(), SIZE)[1] for item in items]
    uniform = random.uniform
    monkeypatch.setattr(random, "uniform", lambda a, b: time.sleep(1e-3) or uniform(a, b))  # the other's turn
    monkeypatch.setattr(module, "num_cpus", lambda: 4)
    state = random.getstate()
    with keeping("ram", items, SIZE, None, 1.0) as kept:
        kept.fill(range(40))
        store = kept.store(range(40), 3)
    assert all(np.array_equal(whole(store, i), t) for i, t in enumerate(truth))
    assert random.getstate() == state


def test_what_has_no_identity_is_kept_in_memory_only():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    for cache, there in (True, False), ("ram", True):
        with keeping(cache, [lambda: image] * 3, SIZE, None, 1.0) as kept:
            kept.fill(range(3))
            store = kept.store(range(3), 3)
        assert (store is not None) == there
    assert np.array_equal(whole(store, 2), decode(image, SIZE)[1])


def test_deep_images_in_memory_go_to_a_device_too(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (3, 16, 24)).astype(np.uint16)
    for i, values in enumerate(deep):
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    files = listed(tmp_path)
    for cache in True, "ram":
        store, *_ = build(files, cache=cache)
        on_device = store.on_device(torch.device("cpu"))
        for one in store, on_device:
            assert np.array_equal(whole(one, 1).view(np.uint16), deep[1:2])
