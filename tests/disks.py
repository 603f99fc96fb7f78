"""Disks that are full or read-only: small tmpfs mounts, where the tests may mount (as root)."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of this size at `folder`; the test is skipped where none can be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


@contextmanager
def filled(disk: Path, left_bytes: int) -> Iterator[None]:
    """Within, only so much is free."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - left_bytes)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    yield
    filler.unlink()
