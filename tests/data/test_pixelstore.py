"""Windows gathered from a store, in memory, from a file and on a device, against slices of the images."""

import os
import sys

import numpy as np
import pytest
import torch

from selfsup_fastai.data.pixelstore import PLACE, DeviceStore, PixelFile, PixelStore, deep_to_255, padded
from selfsup_fastai.errors import DataError

SIZE = (6, 4)


def images(*kinds, seed=0):
    """(C, H, W) arrays of random sizes; `kinds` are (channels, dtype)."""
    rng = np.random.default_rng(seed)
    shapes = [(channels, *rng.integers(6, 12, 2)) for channels, _ in kinds]
    return [rng.integers(0, np.iinfo(d).max, s, dtype=d, endpoint=True) for s, (_, d) in zip(shapes, kinds)]


def stored(arrays, n_in, file=None):
    """A `PixelStore` of them, their bytes one after another, in memory or in a file."""
    places, data = [], b""
    for a in arrays:
        places.append((0, len(data), *a.shape, a.itemsize))
        data += a.tobytes() + bytes(padded(a.nbytes) - a.nbytes)
    if file:
        file.write_bytes(data)
    chunk = PixelFile(file) if file else np.frombuffer(data, np.uint8)
    return PixelStore([chunk], np.array(places, dtype=PLACE), n_in)


def as_batch(array, n_in, deep):
    """What a window of `array` has to be, by plain NumPy."""
    if n_in == 1:
        return array.astype(np.uint16) * 257 if deep and array.dtype == np.uint8 else array
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    return np.concatenate([array] * 3) if len(array) == 1 else array


GREY, DEEP, COLOR = (1, np.uint8), (1, np.uint16), (3, np.uint8)
MIXES = [([GREY] * 5, 1), ([GREY] * 5, 3), ([COLOR] * 5, 3), ([GREY, COLOR] * 3, 3), ([GREY, DEEP] * 3, 1)]
MIXES += [([DEEP, COLOR, GREY] * 2, 3), ([DEEP] * 3, 1)]


@pytest.mark.parametrize("where", ["memory", "file", "device"])
@pytest.mark.parametrize(("kinds", "n_in"), MIXES)
def test_windows_are_slices_of_the_images(tmp_path, kinds, n_in, where):
    arrays = images(*kinds)
    deep = n_in == 1 and DEEP in kinds
    store = stored(arrays, n_in, tmp_path / "pixels" if where == "file" else None)
    if where == "device":
        store = store.on_device(torch.device("cpu"))
    rng = np.random.default_rng(1)
    rows = np.array([*rng.permutation(len(arrays)), 0, 0])
    assert np.array_equal(store.shapes(rows), [arrays[r].shape[1:] for r in rows])
    corners = np.array([[rng.integers(0, s - w + 1) for s, w in zip(arrays[r].shape[1:], SIZE)] for r in rows])
    x = store.gather(rows, corners, SIZE)
    truth = [as_batch(arrays[r], n_in, deep)[:, t : t + 6, q : q + 4] for r, (t, q) in zip(rows, corners)]
    assert store.deep == deep
    if deep:
        wanted = np.stack(truth).astype(np.float32) / np.float32(257)
        assert np.array_equal(deep_to_255(x).numpy(), wanted)
    else:
        assert x.dtype == torch.uint8 and np.array_equal(x.numpy(), np.stack(truth))


def test_images_of_exactly_the_windows_size_are_read_in_one_piece(tmp_path):
    for kind, n_in in (GREY, 1), (COLOR, 3), (DEEP, 1):
        rng = np.random.default_rng(3)
        arrays = [rng.integers(0, np.iinfo(kind[1]).max, (kind[0], *SIZE), dtype=kind[1]) for _ in range(4)]
        store = stored(arrays, n_in, tmp_path / "pixels")
        rows = np.array([2, 0, 3, 1])
        assert np.array_equal(store.gather(rows, np.zeros((4, 2), int), SIZE).numpy(), np.stack(arrays)[rows])


@pytest.mark.parametrize("kind", [GREY, DEEP])
@pytest.mark.parametrize("on_device", [False, True])
def test_what_is_missing_is_mid_grey(kind, on_device):
    arrays = images(kind)
    store = stored(arrays, 1)
    places = np.concatenate([store.places, np.array([(-1, 0, 1, *SIZE, 1)], dtype=PLACE)])
    for chunks, table in (store.chunks, places), ([], places[1:]):
        some = PixelStore(chunks, table, 1)
        some = some.on_device(torch.device("cpu")) if on_device else some
        x = some.gather(np.array([len(table) - 1]), np.zeros((1, 2), int), SIZE)
        assert ((deep_to_255(x) if some.deep else x) == 128).all()


def test_more_channels_only_where_the_slow_road_would_show_the_same():
    grey, color = stored(images(GREY, GREY), 1), stored(images(COLOR), 3)
    assert grey.with_channels(1) is grey and grey.with_channels(3).n_in == 3
    assert color.with_channels(1) is None  # the luma is another resizing
    from_color = PixelStore(grey.chunks, grey.places, 1, made_grey=True)
    assert from_color.with_channels(3) is None  # the colors are not there any more
    for store in color, from_color:
        assert DeviceStore(store, torch.device("cpu")).with_channels(4 - store.n_in) is None


@pytest.mark.parametrize("kinds", [[GREY, GREY], [GREY, DEEP]])
def test_a_device_holds_one_copy_of_grey_images_for_one_channel_and_three(kinds):
    arrays = images(*kinds)
    store = stored(arrays, 1).on_device(torch.device("cpu"))
    three = store.with_channels(3)
    assert (three.flat is store.flat) == (DEEP not in kinds)
    x = three.gather(np.array([1, 0]), np.zeros((2, 2), int), SIZE)
    assert np.array_equal(x.numpy(), np.stack([as_batch(a, 3, False)[:, :6, :4] for a in arrays[::-1]]))
    one = store.gather(np.array([0]), np.zeros((1, 2), int), SIZE)
    assert one.shape == (1, 1, *SIZE)


def test_the_bytes_on_a_device_are_counted_before_they_are_there():
    for kinds, n_in in MIXES:
        store = stored(images(*kinds), n_in)
        flat = store.on_device(torch.device("cpu")).flat
        assert store.nbytes == flat.numel() * flat.element_size()


def test_a_file_that_is_cut_short_is_an_error_that_says_what_to_do(tmp_path):
    for kind, n_in in (COLOR, 3), (GREY, 3):
        store = stored(images(kind, kind), n_in, tmp_path / "pixels")
        os.truncate(tmp_path / "pixels", 10)
        with pytest.raises(DataError, match="Make the loaders anew") as error:
            store.gather(np.array([0]), np.zeros((1, 2), int), SIZE)
        assert str(tmp_path) not in str(error.value)


def test_a_file_that_is_removed_stays_readable_and_open_only_as_long_as_it_is_used(tmp_path):
    if sys.platform == "win32":
        pytest.skip("Windows removes no files that are open")
    arrays = images(COLOR)
    store = stored(arrays, 3, tmp_path / "pixels")
    (tmp_path / "pixels").unlink()
    x = store.gather(np.array([0]), np.zeros((1, 2), int), SIZE)
    assert np.array_equal(x[0].numpy(), arrays[0][:, :6, :4])
    number = store.chunks[0].file
    del store
    with pytest.raises(OSError):
        os.fstat(number)


def memory(name):
    """MB of this process, by /proc."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_a_large_file_does_not_become_memory(tmp_path):
    n, size = 160, (1024, 1024)  # 160 MB
    with open(tmp_path / "pixels", "wb") as file:
        for i in range(n):
            file.write(bytes([i]) * 2**20)
    places = np.array([(0, i * 2**20, 1, *size, 1) for i in range(n)], dtype=PLACE)
    store = PixelStore([PixelFile(tmp_path / "pixels")], places, 1)
    store.gather(np.arange(4), np.zeros((4, 2), int), size)
    before, most = memory("VmRSS"), 0
    for rows in np.random.default_rng(0).permutation(n).reshape(-1, 4):
        x = store.gather(rows, np.zeros((4, 2), int), size)
        assert x[:, 0, 0, 0].tolist() == rows.tolist() and x[:, 0, -1, -1].tolist() == rows.tolist()
        most = max(most, memory("VmRSS") - before)
    assert most < 40


def test_a_file_that_comes_in_pieces_is_read_whole(tmp_path, monkeypatch):
    (tmp_path / "pixels").write_bytes(bytes(range(256)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:100]], at))
    out = bytearray(250)
    PixelFile(tmp_path / "pixels").read_into(3, memoryview(out))
    assert out == bytes(range(3, 253))
