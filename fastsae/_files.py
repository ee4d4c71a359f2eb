"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a file beside ``path`` that then takes its name; a crash at any point leaves the older file or the new one."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":  # the new name itself lasts once its folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
