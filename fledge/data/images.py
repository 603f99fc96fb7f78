"""The pictures of a conversation: where each one comes from, its content, and which tokens stand for it.

Knows parts of messages and image files. Knows no model: what a picture costs in tokens is its processor's business
(`vision.py`). A tokenised data set keeps references, not pixels; a picture that changed since is found by its digest.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import EpsImagePlugin, Image, ImageOps

from fledge.data.image_urls import (
    IMAGE_TYPES,
    LONGEST_PATH,
    URL_SCHEMES,
    image_urls_allowed,
    open_image,
    read_image,
    source_of,
)
from fledge.data.rejects import Reject
from fledge.errors import UserError

EpsImagePlugin.gs_binary = False  # `datasets` decodes whatever its files hold: PostScript must start no program

MARK = "<image>"  # LLaVA's spelling: the mark in the text, the file in the row


@dataclass(frozen=True)
class ImageRef:
    """One picture of a sample."""

    source: str  # a path, or the whole picture as a data URL
    digest: str  # of its bytes
    width: int
    height: int
    begin: int  # its tokens are input_ids[begin:end], the template's own image marks not counted
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin

    def open(self) -> Image.Image:
        """The picture, when it is still the one the tokens were made from."""
        try:
            content = read_image(self.source)
        except Reject as reject:
            raise UserError(f"{reject.detail}. It was there when the data was tokenised: put it back.") from None
        if digest_of(content) != self.digest:
            raise UserError(
                f"{self.source[:200]}: the picture changed while the data was in use. Run again: the data is then "
                f"tokenised anew."
            )
        return decode(content, self.source)


@dataclass(frozen=True)
class Picture:
    """A picture that was just read."""

    source: str
    digest: str
    image: Image.Image


def image_parts(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every part that is no text, in order; a part that is neither text nor picture is a Reject."""
    for message in messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part.get("type") in IMAGE_TYPES:
                    yield part
                elif part.get("type") != "text":
                    raise Reject("unknown part", f"a message part has type {part.get('type')!r}; known: text, image")


def read_pictures(messages: Sequence[dict[str, Any]], folder: Path | None) -> list[Picture]:
    """The pictures of a conversation. Relative paths count from `folder`, the place of the data file."""
    return [_read(source_of(part), folder) for part in image_parts(messages)]


def picture_state(conversations: Iterable[Any]) -> str:
    """A digest of the picture files that conversations name: place, size and time of change, or that it is missing;
    of URLs, whether they are fetched.

    What a data file says about pictures by path is not in its bytes; tokens made from them depend on this, too.
    """
    digest = hashlib.blake2b(digest_size=16)
    for conversation in conversations:
        folder = folder_of(conversation.where)
        for part in _known_parts(conversation.messages):
            path = _place(part, folder)
            if path is None:
                digest.update(b"urls" if image_urls_allowed() else b"")
            else:
                found = path.stat() if path.is_file() else None
                digest.update(f"{path}|{found and (found.st_size, found.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def folder_of(where: str) -> Path | None:
    """The folder of a `file:line`; None for rows that came from no file."""
    file = where.rpartition(":")[0]
    return Path(file).parent if file and Path(file).is_file() else None


def decode(content: bytes, source: str) -> Image.Image:
    """The whole picture in RGB, turned as its camera says (what transformers' own loader does); a Reject if broken."""
    image = open_image(content, source)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises many kinds on damaged files
        raise Reject("broken image", f"{source[:80]}: {error}") from None


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def with_row_images(messages: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages whose pictures stand in the row beside them, as messages with image parts.

    Two spellings: image parts without a source, and LLaVA's `<image>` marks in the text; both take the row's `image`
    or `images` (a path, an URL, base64, or what `datasets` decodes: {"bytes": ..., "path": ...}), one after the other.
    """
    given = next((row[key] for key in ("images", "image") if row.get(key) is not None), None)
    waiting = list(given) if isinstance(given, (list, tuple)) else [given]
    if given is None or not waiting:
        return messages
    total, found = len(waiting), []
    for message in messages:
        content = message["content"]
        if isinstance(content, str) and message["role"] == "user" and MARK in content:
            content = _parts_of_marked(content)
        if isinstance(content, list):
            content = [_filled(part, waiting, total) for part in content]
        found.append({**message, "content": content})
    if waiting:
        raise Reject("images do not fit", f"the row has {total} images, its messages have places for less")
    return found


def source_of_value(value: Any) -> str:
    """A picture as a column of a data set holds it, as a source."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), str) and value["bytes"]:  # base64, in JSON
        return value["bytes"] if value["bytes"].startswith("data:") else f"data:image/png;base64,{value['bytes']}"
    if isinstance(value, dict) and isinstance(value.get("bytes"), (bytes, bytearray)) and value["bytes"]:
        return _data_url(value["bytes"])
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value["path"]:
        return value["path"]
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return _data_url(buffer.getvalue())
    raise Reject("broken image", f"a picture is a path, an URL, base64 or bytes, found {type(value).__name__}")


def _read(source: str, folder: Path | None) -> Picture:
    if folder is not None and len(source) < LONGEST_PATH and "://" not in source and (folder / source).is_file():
        source = str((folder / source).resolve())
    content = read_image(source)
    image = decode(content, source)
    kept = source if _is_file(source) else _data_url(content)  # what may be gone tomorrow is kept whole
    return Picture(kept, digest_of(content), image)


def _known_parts(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    contents = (message["content"] for message in messages if isinstance(message["content"], list))
    return (part for content in contents for part in content if part.get("type") in IMAGE_TYPES)


def _place(part: dict[str, Any], folder: Path | None) -> Path | None:
    """Where a part's file is or should be; None for URLs and pictures that are in the row."""
    try:
        source = source_of(part)
    except Reject:
        return None
    if len(source) >= LONGEST_PATH or source.startswith(("data:", *URL_SCHEMES)):
        return None
    path = Path(source.removeprefix("file://")).expanduser()
    return folder / path if folder is not None else path


def _is_file(source: str) -> bool:
    return len(source) < LONGEST_PATH and Path(source.removeprefix("file://")).expanduser().is_file()


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _parts_of_marked(text: str) -> list[dict[str, Any]]:
    """`<image>` marks as parts; the line break LLaVA puts beside a mark belongs to the mark."""
    parts: list[dict[str, Any]] = []
    for piece in re.split(r"(\n?<image>\n?)", text):
        if piece.strip("\n") == MARK:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _filled(part: Any, waiting: list[Any], total: int) -> Any:
    if not isinstance(part, dict) or part.get("type") not in IMAGE_TYPES:
        return part
    if any(part.get(key) for key in ("image", "image_url", "url", "path", "base64")):
        return part
    if not waiting:
        raise Reject("images do not fit", f"the messages have places for more than the row's {total} images")
    return {"type": "image", "image": source_of_value(waiting.pop(0))}
