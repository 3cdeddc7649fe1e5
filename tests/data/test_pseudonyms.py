"""Names that tell patients apart: keyed, steady, and never one for all who have none."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup_fastai.data import pseudonyms
from selfsup_fastai.data.pseudonyms import KINDS, pseudonym


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_twelve_digits_that_hang_on_the_text_and_on_its_kind(cache):
    names = {pseudonym(kind, text) for kind in KINDS for text in ("1.2.3", "1.2.4", "P0", "é")}
    assert len(names) == 4 * len(KINDS)
    assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in names)
    assert pseudonym("patient", "ab", "c") != pseudonym("patient", "a", "bc")


def test_blank_stays_blank(cache):
    assert pseudonym("patient", "", "") == pseudonym("patient", "", "HOSPITAL") == pseudonym("study", "") == ""


def test_it_is_the_keyed_hash_and_no_plain_one(cache):
    name = pseudonym("study", "1.2.3")
    key = (cache / "SECRET").read_bytes()
    part = len(b"1.2.3").to_bytes(8, "little") + b"1.2.3"
    assert name == hashlib.blake2b(part, digest_size=6, key=key, person=b"study").hexdigest()
    assert name != hashlib.blake2b(part, digest_size=6, person=b"study").hexdigest()


def test_the_same_in_another_process_and_another_one_elsewhere(cache, tmp_path):
    code = "from selfsup_fastai.data.pseudonyms import pseudonym as p; import sys; sys.stderr.write(p('patient', 'P7'))"
    home = os.fspath(Path(pseudonyms.__file__).parents[2])

    def elsewhere(folder) -> str:
        env = {**os.environ, "SELFSUP_CACHE": os.fspath(folder), "PYTHONPATH": home}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60).stderr

    assert elsewhere(cache) == pseudonym("patient", "P7")
    other = elsewhere(tmp_path / "other")
    assert len(other) == 12 and other != pseudonym("patient", "P7")


def test_a_damaged_secret_is_no_key(cache):
    """An empty one would make plain hashes."""
    cache.mkdir()
    (cache / "SECRET").write_bytes(b"")
    pseudonym("patient", "P7")
    assert len((cache / "SECRET").read_bytes()) == 32


@pytest.mark.parametrize("trouble", ["a file", "no key"])
def test_without_the_folder_a_key_of_this_process(tmp_path, monkeypatch, trouble):
    folder = tmp_path / "folder"
    if trouble == "a file":
        folder.write_text("in the way")
    else:
        monkeypatch.setattr(pseudonyms, "secret_of", lambda _: (_ for _ in ()).throw(PermissionError()))
    monkeypatch.setenv("SELFSUP_CACHE", str(folder))
    name = pseudonym("patient", "P7")
    assert len(name) == 12 and name == pseudonym("patient", "P7")
    pseudonyms._key.cache_clear()
    assert pseudonym("patient", "P7") != name
