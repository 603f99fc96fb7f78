"""Which pictures each tokenised sample holds, as one file beside the tokens.

One line of JSON per picture, found by offsets: paths are short, but pictures given as base64 or fetched from the
network are kept whole, and a million of those must not be in memory.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from fledge.data.images import ImageRef
from fledge.parsing import parse_json

FILE, OFFSETS = "images.jsonl", "image_offsets.npy"


class ImageEntry(msgspec.Struct, array_like=True):
    """An ImageRef as a line of the table has it."""

    source: str
    digest: str
    width: int
    height: int
    begin: int
    end: int


class ImageTable:
    """Read side: table[row] are the pictures of a sample."""

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / OFFSETS)
        path = self._file = folder / FILE
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)

    def __getitem__(self, row: int) -> tuple[ImageRef, ...]:
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        lines = self._bytes[begin:end].tobytes().splitlines()
        where, again = f"{self._file} (sample {row})", "Delete this folder and run again."
        return tuple(
            ImageRef(*msgspec.structs.astuple(parse_json(line, ImageEntry, where, hint=again))) for line in lines
        )

    @staticmethod
    @contextmanager
    def writer(folder: Path, wanted: bool) -> Iterator["ImageTableWriter"]:
        """Collects the pictures of samples in order; writes nothing at all for text targets."""
        if not wanted:
            yield ImageTableWriter(None)
            return
        with open(folder / FILE, "wb") as file:
            table = ImageTableWriter(file)
            yield table
        np.save(folder / OFFSETS, np.array(table.offsets, dtype=np.int64))


class ImageTableWriter:
    def __init__(self, file: IO[bytes] | None) -> None:
        self._file, self.offsets = file, [0]

    def add(self, images: Sequence[ImageRef]) -> None:
        """The pictures of the next sample."""
        if self._file is None:
            assert not images, "pictures for a text target"
            return
        lines = b"".join(json.dumps(astuple(image)).encode() + b"\n" for image in images)
        self._file.write(lines)
        self.offsets.append(self.offsets[-1] + len(lines))
