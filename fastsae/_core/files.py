"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Fill = Callable[[Path], object]


def replace(path: Path, fill: Fill) -> None:
    """``replace_all`` of one file."""
    replace_all({path: fill})


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """One process at a time; of one that is killed the lock ends. Where the system knows no such locks nobody waits."""
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_text(path: Path, text: str) -> None:
    """``replace`` by a text."""
    replace(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace_figure(path: str | os.PathLike[str], canvas: Any, **options: Any) -> None:
    """``replace`` by a matplotlib figure, of the kind that the path's ending says."""
    replace(Path(path), lambda part: canvas.savefig(part, **options))


def replace_all(files: Mapping[Path, Fill]) -> None:
    """Each function fills a file beside its path; when all are on the disk they take their names, one after the other.

    A failure before that leaves every older file as it was, and nothing beside it; OSError (or MemoryError) then names the path. A process
    that is killed leaves the older files or the new ones, and may leave ``.*.part*``. The files beside have names of their own, so that
    several writers of one path do not meet: the last one counts. A link at a path is replaced, not followed; a file's permissions are those
    that the process gives new files.
    """
    parts: dict[Path, Path] = {}
    path = next(iter(files))
    try:
        for path, fill in files.items():
            if path.exists() and not path.is_file():
                kind = errno.EISDIR if path.is_dir() else errno.EEXIST
                raise OSError(kind, os.strerror(kind))
            parts[path] = part = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
            with open(part, "xb") as file:  # nothing that is there already is opened, nor a link followed
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            fill(part)
            if stat.S_IMODE(part.stat().st_mode) != mode:
                os.chmod(part, mode)  # some libraries put a private file of theirs in its place
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
        for path in {path.parent: path for path in files}.values():
            _sync(path.parent)
    except BaseException as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        if isinstance(error, Exception):
            raise _named(path, error) from error
        raise


def _sync(folder: Path) -> None:
    """The names in a folder last once it is on the disk itself; not every system and file system can be asked for that."""
    if os.name != "posix":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _named(path: Path, error: Exception) -> Exception:
    """The failure behind ``error`` with the path: writers in C++ raise of their own what is left of a full disk."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return MemoryError(f"{path} could not be written: out of memory")
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, f"could not be written: {cause.strerror}", str(path))
        cause = cause.__context__
    return OSError(f"{path} could not be written: {error}")
