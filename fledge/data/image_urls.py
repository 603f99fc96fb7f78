"""Image parts of a message, as data URLs that any server takes.

Knows where an image may hide (a path, a URL, base64, a data URL; under several spellings of a part) and whether it can
be decoded. Knows no model. A broken image rejects its row: a server would answer about an image it never saw.

Data is not trusted, so a row decides little. Files are read wherever the row says (relative paths from its own folder):
whoever runs the command may read them, and only what decodes as a picture of `FORMATS` goes further. URLs are fetched
only with --allow-image-urls, and only from public addresses: a row must not reach the services of this network.
"""

import base64
import binascii
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.data.rejects import Reject
from fledge.http_client import Address, Limits, ServerError, get, is_public
from fledge.parsing import read_bytes

if TYPE_CHECKING:
    from PIL import Image

FETCH = Limits(total_s=30.0, body_bytes=64 << 20, redirects=5)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # none that starts a program, as EPS does
LONGEST_PATH = 4096
URL_SCHEMES = ("http://", "https://")
_ALLOWED = "FLEDGE_IMAGE_URLS_ALLOWED"  # a variable of the environment, so that worker processes inherit it
IMAGE_TYPES = ("image", "image_url", "input_image")


def allow_image_urls(allowed: bool) -> None:
    """What --allow-image-urls says, for this process and those it starts."""
    os.environ[_ALLOWED] = "1" if allowed else ""


def image_urls_allowed() -> bool:
    return bool(os.environ.get(_ALLOWED))


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


def read_image(source: str, *, may_connect: Callable[[Address], bool] = is_public) -> bytes:
    """The bytes behind a source; raises Reject. `may_connect` decides about the addresses of a URL."""
    try:
        if source.startswith("data:"):
            return base64.b64decode(source.partition(",")[2], validate=True)
        if source.startswith(URL_SCHEMES):
            return _fetched(source, may_connect)
        path = Path(source.removeprefix("file://")).expanduser()
        if len(source) < LONGEST_PATH and path.is_file():
            return read_bytes(path, largest=FETCH.body_bytes)
        if len(source) >= 64 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", source):
            return base64.b64decode(source)
    except (OSError, ValueError, RuntimeError, binascii.Error) as error:  # RuntimeError: ~user without a home
        raise Reject("broken image", f"{_short(source)}: {error}") from None
    raise Reject("broken image", f"{_short(source)}: no such file, and neither a URL nor base64")


def open_image(content: bytes, source: str) -> "Image.Image":
    """The picture, decoded whole; a Reject when it is broken, of another format than FORMATS, or too large for PIL."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise Reject("broken image", f"{_short(source)}: no picture of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # PIL raises many kinds on damaged files
        raise Reject("broken image", f"{_short(source)}: {error}") from None


def _fetched(url: str, may_connect: Callable[[Address], bool]) -> bytes:
    if not image_urls_allowed():
        raise Reject("image URL", f"{_short(url)}: URLs are fetched only with --allow-image-urls")
    try:
        reply = get(url, limits=FETCH, may_connect=may_connect)
    except ServerError as error:
        raise Reject("broken image", error.detail) from None
    if reply.status != 200:
        raise Reject("broken image", f"{_short(url)}: HTTP {reply.status}")
    return reply.content


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "text":
        return part
    if part.get("type") not in IMAGE_TYPES:
        raise Reject("unknown part", f"a message part has type {part.get('type')!r}; text and image are known")
    source = source_of(part)
    content = read_image(source)
    mime = _mime(open_image(content, source))
    url = source if source.startswith("data:") else f"data:{mime};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _mime(image: "Image.Image") -> str:
    from PIL import Image

    return Image.MIME.get(image.format or "", "image/png")


def _short(source: str) -> str:
    return source if len(source) < 80 else f"{source[:60]}... ({len(source)} characters)"
