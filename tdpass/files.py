"""Writing files so that a kill never leaves half of one.

What a kill leaves beside them is removed by the next run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path

from tdpass.errors import UsageError, WriteError

_SUFFIX = ".part"
_TEMPORARY = re.compile(r".*tdpass-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-\w+(\.part)?")
_LONGEST = 100
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SAYS_FULL = re.compile(  # as Rust's libraries, C's and numpy say it
    "|".join(
        [rf"os error ({'|'.join(map(str, sorted(_FULL)))})\b"]
        + [re.escape(os.strerror(code)) for code in sorted(_FULL)]
        + [r"\d+ requested and \d+ written"]
    )
)
_STALE_SECONDS = 24 * 3600.0  # for temporaries of another machine, whose processes cannot be seen


def cache_folder() -> Path:
    """`$TDPASS_CACHE`, or `tdpass` in the user's cache folder."""
    own = os.environ.get("TDPASS_CACHE")
    return Path(own) if own else user_cache_path("tdpass", appauthor=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is flushed and renamed over it, on failure it is removed.

    What processes that are no more left in that folder is removed as well.  Raises `UsageError` when the
    folder does not exist or cannot be written, `WriteError` when the disk is full.
    """
    try:
        remove_stale(path.parent)
        handle, name = tempfile.mkstemp(prefix=_prefix(path.name), suffix=_SUFFIX, dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        with room_for(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, for what becomes several files.

    Removed at the end, by a later run where this one is killed. Raises `UsageError` as `replacing` does.
    """
    try:
        remove_stale(path.parent)
        with (
            tempfile.TemporaryDirectory(
                prefix=_prefix(path.name), suffix=_SUFFIX, dir=path.parent, ignore_cleanup_errors=True
            ) as folder,
            room_for(path),
        ):
            yield Path(folder)
    except OSError as error:
        raise _unwritable(path, error) from None


def check_writable(path: Path) -> None:
    """Raise `UsageError` unless a file can be made where `path` is to be, and `path` is no folder."""
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder; name a file")
    try:
        with tempfile.TemporaryFile(prefix=_prefix(path.name), suffix=_SUFFIX, dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


@contextmanager
def new_folder(folder: Path, option: str) -> Iterator[None]:
    """Make a folder, and those above it, where they are not there.

    What an error leaves empty of what was made is removed again. Raises `UsageError` naming the option that
    the folder was given by.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {folder}: {error.strerror}; name another with {option}"
        ) from None
    try:
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """What is written to `path` runs into a full disk as one `WriteError`, whichever library meets it."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) not in _FULL and not _SAYS_FULL.search(str(error)):
            raise
        raise WriteError(
            f"cannot write {path}: no space is left there; free some, or name another place (what was there "
            "is as it was)"
        ) from error


def scratch_folder() -> Path:
    """A new folder for temporary files, which whoever asks removes.

    What killed processes left of theirs is removed now.
    """
    remove_stale(Path(tempfile.gettempdir()))
    return Path(tempfile.mkdtemp(prefix=_prefix("").lstrip(".")))


def remove_stale(folder: Path) -> None:
    """Remove temporaries in a folder whose process is no more, or which another machine left a day ago."""
    for place in folder.iterdir():
        match = _TEMPORARY.fullmatch(place.name)
        if match is None:
            continue
        with suppress(OSError):
            if _is_stale(match["host"], int(match["process"]), place):
                shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _prefix(name: str) -> str:
    return f".{name[:_LONGEST]}.tdpass-{_host()}-{os.getpid()}-"


def _host() -> str:
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _is_stale(host: str, process: int, place: Path) -> bool:
    if host != _host() or os.name != "posix":
        return place.stat().st_mtime < time.time() - _STALE_SECONDS
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {path}: {error.strerror or error}; name a file in a folder that exists and is writable"
    )
