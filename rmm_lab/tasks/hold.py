"""A folder that one process writes to: it is held by a lock on its file ``.lock``, and told by name.

The lock is the operating system's, so that it ends with the process, however that ends. ``kill -9`` leaves
the file, which the next one to hold the folder takes over.
"""

from __future__ import annotations

import errno
import os
import platform
import shlex
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmm_lab.errors import InputError
from rmm_lab.tasks.files import check_path, place_in

LOCK = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some file systems of clusters have none


def check_writable(folder: Path, option: str) -> Path:
    """What is there of a folder's path; InputError where nothing can be written below."""
    above = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not above.is_dir():
        found = f"{above} is a file"
    elif not os.access(above, os.W_OK | os.X_OK):
        found = f"nothing may be written to {above}"
    else:
        return above
    raise InputError(f"{option}: expected a folder to write to, but {found}; name another one")


def check_new(folder: Path, option: str = "--run-dir", resume: bool = True) -> None:
    """Raise InputError unless ``folder`` is absent or empty; the file of a lock does not count.

    option: what the user named it by. resume: whether what is there may be a run to go on with.
    """
    above = check_writable(folder, option)
    if above == folder and any(p.name != LOCK for p in folder.iterdir()):
        if (folder / LOCK).exists():  # or it was left by a process that was killed
            with held(folder, option):
                pass
        more = f", or go on with --resume {shlex.quote(str(folder))}" if resume else ""
        raise InputError(
            f"{option}: expected a new or empty folder, found files in {folder}; name another one{more}"
        )


def check_apart(folder: Path, option: str, inputs: Iterable[str]) -> None:
    """Raise InputError where ``folder`` is an input's or lies in one: what is written would be read as data.

    option: what the user named it by. inputs: sources of models and data, of which hub names are nowhere.
    """
    check_path(str(folder), option)
    target = Path(os.path.realpath(folder))
    for source in inputs:
        _, place, _ = place_in(source) or ("", source, "")
        at = Path(os.path.realpath(os.path.expanduser(place)))
        known = [p for p in (target, *target.parents) if p == at or (p.exists() and at.exists())]
        if "hf-hub" not in source and any(p == at or p.samefile(at) for p in known):
            raise InputError(
                f"{option}: expected a folder outside of what is read, found {folder} in {place}; name one "
                "beside it"
            )


@contextmanager
def held(folder: Path, option: str) -> Iterator[None]:
    """No other process may hold the folder meanwhile; InputError if one does."""
    file = folder / LOCK
    descriptor = _opened(file)
    try:
        _lock(descriptor, folder, option)
        while not _is(file, descriptor):  # another's, who has ended and taken the file away
            os.close(descriptor)
            descriptor = _opened(file)
            _lock(descriptor, folder, option)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {os.getpid()} on {platform.node()} since {since}"
        try:
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, who.encode())
            yield
        finally:
            with suppress(FileNotFoundError, PermissionError):  # Windows removes no open file
                file.unlink()
    finally:
        os.close(descriptor)


@contextmanager
def held_new(folder: Path, option: str = "--run-dir", resume: bool = True) -> Iterator[None]:
    """The same for a folder that is made if need be; InputError if it is not empty.

    What was made and is left empty is removed again. Of several processes that begin at once, one gets it.
    """
    check_new(folder, option, resume)
    with held_made(folder, option):
        check_new(folder, option, resume)  # now that no other can write to it
        yield


@contextmanager
def held_made(folder: Path, option: str) -> Iterator[None]:
    """The same for a folder that may hold files; it is made if need be, and removed if it is left empty."""
    check_writable(folder, option)
    missing = [p for p in (folder, *folder.absolute().parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder, option):
            yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _opened(file: Path) -> int:
    """A regular file to read and write, made if need be; a link would lead to a file of somebody else's."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(file, flags, 0o644)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        found = "something else"
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        found = "a link" if error.errno == errno.ELOOP else "something else"
    raise InputError(f"{file}: expected the file of a lock, found {found}; remove it")


def _is(file: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path, option: str) -> None:
    """Lock an open file at once; InputError names the process that has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 2**20, os.SEEK_SET)  # beyond the text, which others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            print(
                f"note: {folder}: this file system has no locks; let no other process write there",
                file=sys.stderr,
            )
            return
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise
        os.lseek(descriptor, 0, os.SEEK_SET)
        who = os.read(descriptor, 200).decode("utf-8", "replace") or "another process"
        raise InputError(
            f"{option}: expected a folder that no other process holds, found {folder} held by {who}; wait "
            "until it ends, or name another folder"
        ) from error
