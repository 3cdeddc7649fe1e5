"""Names for patients, studies, series and instances that tell them apart and say nothing about them.

Each is a hash keyed with the random bytes of the pixel cache's folder: the same on this machine for this user from run
to run, and of no use to anybody without that folder. A plain hash of an id would be found out by trying all ids.
"""

import hashlib
import os
import secrets
from functools import lru_cache

from selfsup_fastai.data.secret import cache_folder, secret_of
from selfsup_fastai.messages import say

__all__ = ["KINDS", "pseudonym"]

KINDS = {"patient": b"patient", "study": b"study", "series": b"series", "instance": b"instance", "term": b"term"}
"""What is named. The same text as an id of another kind has another pseudonym."""

_DIGITS = 12
_PLACES = ("SELFSUP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA", "HOME")  # variables that say which folder it is


def pseudonym(
    kind: str,  # A key of `KINDS`
    *parts: str,  # What the file says, such as PatientID and IssuerOfPatientID
) -> str:
    """Twelve hexadecimal digits; '' where the first part is blank: what has no name must not get one for all."""
    if not parts[0]:
        return ""
    digest = hashlib.blake2b(digest_size=_DIGITS // 2, key=_key(*map(os.environ.get, _PLACES)), person=KINDS[kind])
    for part in parts:
        text = part.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)  # ('ab', 'c') is not ('a', 'bc')
    return digest.hexdigest()


@lru_cache
def _key(*_places: str | None) -> bytes:
    """The secret of the cache folder; where it cannot be used, one of this process alone."""
    try:
        return secret_of(cache_folder())
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        say("The cache folder cannot be used: pseudonyms, and splits by patient, are others in the next run.")
        return secrets.token_bytes(32)
