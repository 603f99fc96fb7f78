"""Image parts of a message, as data URLs that any server takes.

Knows where an image may hide (a path, an URL, base64, a data URL; under several spellings of a part) and whether it can
be decoded. Knows no model. A broken image rejects its row: a server would answer about an image it never saw.
"""

import base64
import binascii
import io
import re
import urllib.request
from pathlib import Path
from typing import Any

from fledge.data.rejects import Reject

FETCH_TIMEOUT_S = 30.0
LARGEST_IMAGE_BYTES = 64 << 20
LONGEST_PATH = 4096
IMAGE_TYPES = ("image", "image_url", "input_image")


def has_images(messages: list[dict[str, Any]]) -> bool:
    return any(
        isinstance(message["content"], list) and any(part.get("type") != "text" for part in message["content"])
        for message in messages
    )


def anchored(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The message with relative image paths made absolute, so that it means the same in a row of another folder."""
    if not isinstance(message["content"], list):
        return message
    parts = []
    for part in message["content"]:
        source = source_of(part) if part.get("type") in IMAGE_TYPES else ""
        path = folder / source.removeprefix("file://") if 0 < len(source) < LONGEST_PATH else None
        parts.append({"type": "image", "image": str(path.resolve())} if path and path.is_file() else part)
    return {**message, "content": parts}


def with_data_urls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with every image as `{"type": "image_url", "image_url": {"url": "data:..."}}`. Blocks: files
    and the network are read here."""
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def source_of(part: dict[str, Any]) -> str:
    """The path, URL or base64 text of an image part."""
    found = part.get("image_url", part.get("image"))
    if isinstance(found, dict):
        found = found.get("url")
    found = found or part.get("url") or part.get("path") or part.get("base64")
    if not isinstance(found, str) or not found:
        raise Reject("broken image", f"an image part needs a path, URL or base64 text, found keys {sorted(part)}")
    return found


def read_image(source: str) -> bytes:
    """The bytes behind a source; raises Reject."""
    try:
        if source.startswith("data:"):
            return base64.b64decode(source.partition(",")[2], validate=True)
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=FETCH_TIMEOUT_S) as response:
                return response.read(LARGEST_IMAGE_BYTES)
        path = Path(source.removeprefix("file://")).expanduser()
        if len(source) < LONGEST_PATH and path.is_file():
            return path.read_bytes()
        if len(source) >= 64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", source):
            return base64.b64decode(source)
    except (OSError, ValueError, binascii.Error) as error:
        raise Reject("broken image", f"{_short(source)}: {error}") from None
    raise Reject("broken image", f"{_short(source)}: no such file, and neither an URL nor base64")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "text":
        return part
    if part.get("type") not in IMAGE_TYPES:
        raise Reject("unknown part", f"a message part has type {part.get('type')!r}; text and image are known")
    source = source_of(part)
    content = read_image(source)
    mime = _check(content, source)
    url = source if source.startswith("data:") else f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _check(content: bytes, source: str) -> str:
    """The image's media type, after decoding it."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return Image.MIME.get(image.format or "", "image/png")
    except Exception as error:  # PIL raises many kinds on damaged files
        raise Reject("broken image", f"{_short(source)}: {error}") from None


def _short(source: str) -> str:
    return source if len(source) < 80 else f"{source[:60]}... ({len(source)} characters)"
