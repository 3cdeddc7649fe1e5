"""The cache folder, and the random bytes in it that names are hashed with: those of images, and those of patients."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["SECRET", "cache_folder", "ensure_secret", "secret_of"]

SECRET = "SECRET"
"""The file's name."""

_BYTES = 32


def cache_folder() -> Path:
    """Where pixels are kept: `$SELFSUP_CACHE`, or a folder in the user's cache."""
    own = os.environ.get("SELFSUP_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    return Path(base).expanduser() / "selfsup_fastai"


def secret_of(folder: Path) -> bytes:
    """The random bytes of a cache folder, which is made if need be. Raises `OSError` where it cannot be used."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ensure_secret(folder)
    return (folder / SECRET).read_bytes()


def ensure_secret(folder: Path) -> None:
    """Random bytes in a folder, unless they are there."""
    secret = folder / SECRET
    if secret.is_file() and secret.stat().st_size != _BYTES:  # no key: every name is a new one
        secret.unlink(missing_ok=True)
    if not secret.exists():  # else nothing is written: the disk may be full
        with suppress(FileExistsError):
            _make_secret(secret)


def _make_secret(secret: Path) -> None:
    """All of it at once. Raises `FileExistsError` where another process was faster."""
    fresh = secret.with_name(f"{SECRET}.{secrets.token_hex(4)}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
        _put(fresh, secret)
    finally:
        fresh.unlink(missing_ok=True)


def _put(fresh: Path, place: Path) -> None:
    """Give a file another name as well. Raises `FileExistsError` where that is taken."""
    try:
        os.link(fresh, place)
    except (OSError, NotImplementedError, AttributeError) as error:
        if isinstance(error, FileExistsError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        if not place.exists():  # a file system without links
            os.replace(fresh, place)
