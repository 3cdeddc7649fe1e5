"""The cache folder: names, what is found again, what gives way, and who may look into it."""

import errno
import json
import multiprocessing
import os
import shutil
import sqlite3
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from selfsup_fastai.data import cache as module
from selfsup_fastai.data.cache import CacheUnusable, PixelCache, cache_folder, is_damage
from selfsup_fastai.errors import UnknownNameError


@pytest.fixture
def cache(tmp_path):
    with PixelCache(tmp_path / "cache") as opened:
        yield opened


def add(cache, keys, n_bytes=100, settings="s"):
    """A build of an image for each key, all bytes of it its place; its name."""
    build = cache.new_build(settings, "in words")
    cache.pixels_of(build).write_bytes(b"".join(bytes([i % 256]) * n_bytes for i in range(len(keys))))
    cache.add(settings, build, {key: (i * n_bytes, 1, 1, n_bytes, 1) for i, key in enumerate(keys)})
    return build


def keys(*names):
    return [name.encode().ljust(16) for name in names]


# ---- names


def test_a_files_name_hangs_on_its_path_size_and_time_of_change(cache, tmp_path, monkeypatch):
    file, other = tmp_path / "a.png", tmp_path / "b.png"
    for f in file, other:
        f.write_bytes(b"12345")
        os.utime(f, ns=(5, 5))
    name = cache.key(file)
    assert len(name) == 16 and name == cache.key(str(file)) and name != cache.key(other)
    monkeypatch.chdir(tmp_path)
    assert cache.key("a.png") == name
    os.utime(file, ns=(5, 6))
    assert cache.key(file) != name
    file.write_bytes(b"123456")
    os.utime(file, ns=(5, 5))
    assert cache.key(file) != name
    file.write_bytes(b"54321")
    os.utime(file, ns=(9, 5))
    assert cache.key(file) == name  # the time of the last look is not part of it
    file.unlink()
    assert cache.key(file) is None


def test_an_arrays_name_is_its_contents_shape_and_type(cache):
    a = np.arange(12, dtype=np.uint8).reshape(3, 4)
    others = [a.reshape(4, 3), a.astype(np.int8), a + 1, a[::-1]]
    assert cache.key(a) == cache.key(a.copy()) == cache.key(np.asfortranarray(a))
    assert len({cache.key(x) for x in (a, *others)}) == 5


def test_objects_are_known_by_their_identity_or_not_at_all(cache):
    one, two = SimpleNamespace(identity=b"1"), SimpleNamespace(identity=b"2")
    assert cache.key(one) == cache.key(SimpleNamespace(identity=b"1")) != cache.key(two)
    assert cache.key(lambda: 0) is None and cache.key(SimpleNamespace(identity="1")) is None


def test_names_mean_nothing_in_another_cache(cache, tmp_path):
    array = np.zeros((2, 2), np.uint8)
    with PixelCache(tmp_path / "other") as other, PixelCache(cache.folder) as same:
        assert other.key(array) != cache.key(array) == same.key(array)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks: elsewhere that is not safe, or not possible")
def test_processes_that_start_at_once_agree_on_the_secret_and_share_the_index(tmp_path):
    context = multiprocessing.get_context("fork")
    found, barrier = context.SimpleQueue(), context.Barrier(8)

    def start(name):
        barrier.wait(30)
        with PixelCache(tmp_path / "cache") as cache:
            add(cache, keys(name))
            found.put((os.getpid(), cache.key(np.zeros(3, np.uint8))))

    processes = [context.Process(target=start, args=(name,)) for name in "abcdefgh"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 8
    pids, names = zip(*(found.get() for _ in processes))
    assert set(pids) == {process.pid for process in processes} and len(set(names)) == 1
    there = ["SECRET", "index-1.sqlite", "locks", "pixels-1"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == there
    with PixelCache(tmp_path / "cache") as cache:
        assert len(cache.places("s", keys(*"abcdefgh"))) == 8


@pytest.mark.parametrize("contents", [b"", b"short", bytes(100)])
def test_a_broken_secret_is_replaced(tmp_path, contents):
    with PixelCache(tmp_path) as cache:
        before = cache.key(np.zeros(3))
    (tmp_path / "SECRET").write_bytes(contents)
    with PixelCache(tmp_path) as cache:
        assert cache.key(np.zeros(3)) != before and len((tmp_path / "SECRET").read_bytes()) == 32


# ---- where it lies


def test_the_folder_is_that_of_the_environment_or_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("SELFSUP_CACHE", "~/pixels")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert cache_folder() == tmp_path / "pixels"
    monkeypatch.delenv("SELFSUP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "selfsup_fastai"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "selfsup_fastai"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_only_the_owner_may_look_into_it(cache, tmp_path):
    add(cache, keys("a"))
    for path in (cache.folder, *cache.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path.name
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with PixelCache(shared) as other:
        add(other, keys("a"))
    inside = [p for p in shared.rglob("*") if p.is_file()]
    assert len(inside) == 3 and {stat.S_IMODE(p.stat().st_mode) for p in inside} == {0o600}


def test_a_file_in_its_place_is_explained_without_its_name(tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in tmp_path / "taken", tmp_path / "taken" / "below":
        with pytest.raises(CacheUnusable, match="the cache folder cannot be used") as error:
            PixelCache(folder)
        assert "taken" not in str(error.value)


def test_opening_a_cache_that_is_there_writes_nothing(cache):
    add(cache, keys("a"))
    before = {p: p.stat().st_mtime_ns for p in (cache.folder, *cache.folder.rglob("*"))}
    with PixelCache(cache.folder) as again:
        assert again.places("s", keys("a"))
    assert {p: p.stat().st_mtime_ns for p in (cache.folder, *cache.folder.rglob("*"))} == before


# ---- what is found again


def test_images_are_found_by_settings_and_name(cache):
    build = add(cache, keys("a", "b"))
    other = add(cache, keys("a"), n_bytes=7, settings="t")
    assert cache.places("s", keys("a", "b", "c")) == {
        keys("a")[0]: (build, 0, 1, 1, 100, 1),
        keys("b")[0]: (build, 100, 1, 1, 100, 1),
    }
    assert cache.places("t", keys("a", "b")) == {keys("a")[0]: (other, 0, 1, 1, 7, 1)}
    assert cache.places("u", keys("a")) == {}


def test_thousands_of_names_are_asked_for_at_once(cache):
    many = keys(*map(str, range(2500)))
    add(cache, many, n_bytes=1)
    cache.remember({key: {"width": i % 3} for i, key in enumerate(many)})
    assert {key: place[1] for key, place in cache.places("s", many).items()} == {k: i for i, k in enumerate(many)}
    assert cache.facts(reversed(many)) == {key: {"width": i % 3} for i, key in enumerate(many)}


def test_images_beyond_the_end_of_a_file_are_lost_and_no_others(cache):
    build = add(cache, keys("a", "b", "c"))
    os.truncate(cache.pixels_of(build), 299)
    assert set(cache.places("s", keys("a", "b", "c"))) == set(keys("a", "b"))
    cache.pixels_of(build).unlink()
    assert cache.places("s", keys("a", "b", "c")) == {}


def test_opened_files_hold_what_the_places_say(cache):
    builds = [add(cache, keys("a", "b")), add(cache, keys("c"))]
    found = cache.places("s", keys("a", "b", "c"))
    order = keys("c", "b", "x", "a")
    files, table = cache.opened([found.get(key) for key in order], (-1, 0, 1, 2, 3, 1))
    assert [table[name].tolist() for name in ("chunk", "offset", "height", "width")] == [
        [0, 1, -1, 1],
        [0, 100, 0, 0],
        [1, 1, 2, 1],
        [100, 100, 3, 100],
    ]
    into = bytearray(100)
    files[1].read_into(100, memoryview(into))
    assert into == bytes([1]) * 100 and len(files) == len(builds)


# ---- what gives way


def test_the_least_recently_used_build_is_dropped_first_and_only_as_many_as_need_be(cache, monkeypatch):
    clock = iter(range(1, 100))
    monkeypatch.setattr(module.time, "time", lambda: next(clock))
    first, second, third = (add(cache, keys(name)) for name in "abc")
    cache.use([first])
    assert cache.total() == 300
    assert cache.make_room(100, 350, keep=[])
    assert set(cache.places("s", keys(*"abc"))) == set(keys("a", "c")) and not cache.pixels_of(second).exists()
    assert not cache.make_room(200, 350, keep=[first, third])
    assert set(cache.places("s", keys(*"abc"))) == set(keys("a", "c"))
    assert cache.make_room(200, 350, keep=[third])
    assert set(cache.places("s", keys(*"abc"))) == set(keys("c"))
    assert list(cache.table()["build"]) == [third]


def test_a_disk_that_fills_up_makes_old_builds_give_way(cache, monkeypatch):
    builds = [add(cache, keys(name)) for name in "ab"]
    monkeypatch.setattr(PixelCache, "free", lambda self: 250 - self.total())
    assert cache.make_room(100, 10**9, keep=[])
    assert not cache.pixels_of(builds[0]).exists() and cache.pixels_of(builds[1]).exists()
    assert not cache.make_room(200, 10**9, keep=[builds[1]])


def test_a_twentieth_of_the_disk_is_left_to_others(cache, monkeypatch):
    for total, free, ours in (1000, 100, 50), (10**12, 5 * 10**9, 4 * 10**9), (1000, 20, -30):
        usage = SimpleNamespace(total=total, free=free)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _folder, usage=usage: usage)
        assert cache.free() == ours


def test_files_that_vanish_while_they_are_counted_are_no_error(cache, monkeypatch):
    add(cache, keys("a"))
    gone = cache.pixels / "gone.pixels"
    found = [*cache.pixels.glob("*.pixels"), gone]
    monkeypatch.setattr(type(gone), "glob", lambda self, pattern: found)
    assert cache.total() == 100


def test_builds_are_removed_by_name_or_all_of_them(cache):
    first, second = add(cache, keys("a")), add(cache, keys("b"), n_bytes=50)
    cache.remember({keys("a")[0]: {"width": 1}})
    with pytest.raises(UnknownNameError, match="nosuch"):
        cache.clear(["nosuch"])
    assert cache.clear([second]) == 50 and list(cache.table()["build"]) == [first]
    assert cache.table()[["images", "GB", "what"]].values.tolist() == [[1, 1e-7, "in words"]]
    assert cache.facts(keys("a")) == {keys("a")[0]: {"width": 1}}
    stray = cache.pixels / "stray.pixels"
    stray.write_bytes(b"1")
    cache.add("s", "dropped", {keys("z")[0]: (0, 1, 1, 100, 1)})  # as a build does that another process has dropped
    assert cache.clear() == 101 and cache.table().empty and cache.facts(keys("a")) == {} and not stray.exists()
    for table in "builds", "images", "files":
        assert cache.db.execute(f"SELECT COUNT(*) FROM {table}").fetchone() == (0,), table


# ---- damage


def test_an_index_that_is_none_is_made_anew_with_its_journal_and_pixels(tmp_path, capsys):
    with PixelCache(tmp_path) as cache:
        pixels = cache.pixels_of(add(cache, keys("a")))
    (tmp_path / "index-1.sqlite").write_bytes(b"no database at all" * 500)
    (tmp_path / "index-1.sqlite-journal").write_bytes(b"old pages")
    with PixelCache(tmp_path) as cache:
        assert cache.places("s", keys("a")) == {} and not pixels.exists()
        assert not (tmp_path / "index-1.sqlite-journal").exists()
        add(cache, keys("a"))
        assert len(cache.places("s", keys("a"))) == 1
    assert capsys.readouterr().err.count("The index of the pixel cache was damaged") == 1


def test_formats_live_side_by_side(tmp_path, monkeypatch, capsys):
    with PixelCache(tmp_path) as cache:
        build, name = add(cache, keys("a")), cache.key(np.zeros(3))
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 11)
        with PixelCache(tmp_path) as newer:
            assert newer.key(np.zeros(3)) == name and newer.total() == 0 and newer.places("s", keys("a")) == {}
            other = add(newer, keys("a"), n_bytes=7)
    with PixelCache(tmp_path) as cache:
        assert cache.places("s", keys("a")) == {keys("a")[0]: (build, 0, 1, 1, 100, 1)}
        cache.renew()
        assert cache.clear() == 0
    monkeypatch.setattr(module, "FORMAT", 11)
    with PixelCache(tmp_path) as newer:
        assert newer.places("s", keys("a")) == {keys("a")[0]: (other, 0, 1, 1, 7, 1)}
    assert capsys.readouterr().err.count("damaged") == 1  # by `renew`


@pytest.mark.parametrize("kind", [sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.OperationalError])
def test_an_index_that_is_wrongly_asked_or_busy_is_not_thrown_away(cache, monkeypatch, kind):
    add(cache, keys("a"))

    def fails(*_):
        raise kind("not its fault")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_connect", fails)
        with pytest.raises(CacheUnusable, match="not its fault"):
            PixelCache(cache.folder)
    assert len(cache.places("s", keys("a"))) == 1


def raised(call):
    """What it raises."""
    with pytest.raises(Exception) as error:
        call()
    return error.value


def test_damage_is_told_from_what_is_not(cache, tmp_path):
    """With the errors that SQLite and JSON do raise."""
    (tmp_path / "none").write_bytes(b"no database at all" * 500)
    none = sqlite3.connect(tmp_path / "none")
    unreadable = "SELECT CAST(x'fffe' AS TEXT)"
    damage = [
        lambda: none.execute("SELECT * FROM sqlite_master"),
        lambda: cache.db.execute(unreadable).fetchone(),
        lambda: json.loads("{"),
    ]
    closed = sqlite3.connect(":memory:")
    closed.close()
    cache.new_build("s", "")
    others = [
        lambda: closed.execute("SELECT 1"),
        lambda: cache.db.execute("INSERT INTO builds (name) SELECT name FROM builds"),
        lambda: cache.db.execute("SELECT * FROM nosuch"),
        lambda: os.stat(tmp_path / "nosuch"),
    ]
    assert [is_damage(raised(call)) for call in damage] == [True] * 3
    assert [is_damage(raised(call)) for call in others] == [False] * 4
    none.close()


# ---- files that cannot be removed, as on Windows while they are in use


@pytest.fixture
def in_use(monkeypatch):
    """The builds whose files cannot be removed."""
    builds, unlink = set(), Path.unlink

    def refuse(path, *args, **kwargs):
        if path.stem in builds:
            raise PermissionError
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", refuse)
    return builds


def test_a_build_in_use_stays_whole_and_the_next_one_gives_way(cache, in_use):
    first, second, third = (add(cache, keys(name)) for name in "abc")
    in_use.add(first)
    assert not cache.drop(first) and set(cache.places("s", keys(*"abc"))) == set(keys(*"abc"))
    assert cache.make_room(100, 300, keep=[])
    assert set(cache.places("s", keys(*"abc"))) == set(keys("a", "c")) and not cache.pixels_of(second).exists()
    assert set(cache.table()["build"]) == {first, third}
    assert cache.clear([first]) == 0 and set(cache.table()["build"]) == {first, third}
    in_use.clear()
    assert cache.drop(first) and set(cache.places("s", keys(*"abc"))) == set(keys("c"))


def test_nothing_more_is_dropped_once_a_build_in_use_makes_it_vain(cache, in_use):
    in_use.add(add(cache, keys("a")))
    add(cache, keys("b"))
    assert not cache.make_room(200, 250, keep=[])  # both would have to go
    assert set(cache.places("s", keys(*"ab"))) == set(keys(*"ab"))


def test_room_is_measured_and_not_reckoned(cache, monkeypatch):
    """A run that holds a removed file open keeps its room on the disk."""
    held, other = add(cache, keys("a")), add(cache, keys("b"))
    monkeypatch.setattr(PixelCache, "free", lambda self: 0 if self.size(other) else 100)
    assert cache.make_room(100, 10**9, keep=[])
    assert not cache.pixels_of(held).exists() and cache.places("s", keys(*"ab")) == {}


def test_what_was_in_use_is_removed_later(cache, in_use):
    build = add(cache, keys("a"))
    in_use.add(build)
    assert cache.clear() == 0 and cache.table().empty and cache.places("s", keys("a")) == {}
    in_use.clear()
    young, kept = cache.pixels / "young.pixels", add(cache, keys("b"))
    young.touch()
    day = 24 * 3600
    for name, age in (build, day + 60), ("young", day - 60), (kept, 2 * day):
        os.utime(cache.pixels_of(name), (time.time() - age,) * 2)
    with PixelCache(cache.folder) as again:
        assert sorted(p.stem for p in again.pixels.iterdir()) == sorted(["young", kept])
        assert set(again.places("s", keys(*"ab"))) == set(keys("b"))


def test_nothing_is_dropped_where_it_would_not_be_enough(cache):
    add(cache, keys("a"), 1000), add(cache, keys("b"), 1000)
    assert not cache.make_room(5000, 4000, ())
    assert set(cache.places("s", keys("a", "b"))) == set(keys("a", "b"))


def test_one_wrong_name_among_builds_to_remove_removes_none(cache):
    build = add(cache, keys("a"))
    with pytest.raises(UnknownNameError, match="no build in the cache called 'typo'"):
        cache.clear([build, "typo"])
    assert cache.places("s", keys("a"))


def test_a_file_system_without_links_has_a_secret_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    with PixelCache(tmp_path) as cache:
        name = cache.key(np.zeros(1))
    monkeypatch.undo()
    with PixelCache(tmp_path) as cache:
        assert cache.key(np.zeros(1)) == name
    assert not list(tmp_path.glob("SECRET.*"))


def test_a_failed_change_leaves_nothing_half_done(cache):
    build = cache.new_build("s", "")
    good, bad = (0, 1, 1, 1, 1), (0, 1, 1, 1, object())
    with pytest.raises(sqlite3.Error):
        cache.add("s", build, dict(zip(keys("a", "b"), (good, bad))))
    cache.pixels_of(build).write_bytes(b"1")
    assert cache.places("s", keys("a", "b")) == {}
    cache.add("s", build, {keys("a")[0]: good})
    assert set(cache.places("s", keys("a", "b"))) == set(keys("a"))


def test_a_copy_that_finds_no_room_is_no_error(cache):
    """Clearing ends with a VACUUM, which writes the index anew."""
    add(cache, keys("a"))

    class Full(sqlite3.Connection):
        def execute(self, query, *args):
            if query == "VACUUM":
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(query, *args)

    cache.db.close()
    cache.db = sqlite3.connect(cache.index, isolation_level=None, factory=Full)
    assert cache.clear() == 100 and cache.table().empty


# ---- folders that may only be read


@pytest.fixture
def read_only(monkeypatch):
    """`os.access` says that nothing may be written: also to the superuser, whom permissions do not stop."""
    access = os.access
    return lambda: monkeypatch.setattr(module.os, "access", lambda path, how: how != os.W_OK and access(path, how))


def test_a_reader_sees_what_others_add_meanwhile(cache, read_only):
    add(cache, keys("a"))
    read_only()
    with PixelCache(cache.folder) as reader:
        assert not reader.writable and set(reader.places("s", keys(*"ab"))) == set(keys("a"))
        add(cache, keys("b"))
        assert set(reader.places("s", keys(*"ab"))) == set(keys(*"ab"))


def test_a_change_that_was_cut_off_keeps_nobody_from_reading(cache, tmp_path, read_only):
    """The journal that is left cannot be played back where nothing may be written."""
    add(cache, keys("a"))
    cache.db.execute("PRAGMA cache_size = 1")
    cache.db.execute("BEGIN IMMEDIATE")
    row = "INSERT INTO files VALUES (?, ?)"
    cache.db.executemany(row, [(key, "{}" * 100) for key in keys(*map(str, range(500)))])
    shutil.copytree(cache.folder, tmp_path / "cut")
    cache.db.execute("ROLLBACK")
    assert (tmp_path / "cut" / f"{cache.index.name}-journal").stat().st_size > 0
    read_only()
    with pytest.raises(sqlite3.OperationalError):
        module._connect(f"{(tmp_path / 'cut' / cache.index.name).as_uri()}?mode=ro", "PRAGMA schema_version")
    with PixelCache(tmp_path / "cut") as reader:
        assert set(reader.places("s", keys("a"))) == set(keys("a"))
