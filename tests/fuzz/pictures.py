"""Pictures in messages: files, data URLs and addresses that come with strangers' rows."""

import base64
import functools
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fledge.data.image_urls import with_data_urls
from fuzz.documents import NO_TEXT
from fuzz.harness import Case, WrongValue
from fuzz.replies_server import Endless, Reply, server

AREA = "pictures"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


@functools.cache
def encoded(kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 10, 20)).save(buffer, kind)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG that states this size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


BAD_BYTES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a picture",
    "a cut PNG": lambda: encoded("PNG")[:-30],
    "a PNG without pixels": lambda: png(9, 7),
    "a PNG of 60,000 by 60,000": lambda: png(60_000, 60_000, bytes(1 << 20)),
    "a PNG of 2 GiB by 1": lambda: png(2**31 - 1, 1, bytes(1000)),
    "a PNG of no width": lambda: png(0, 7),
    "a cut JPEG": lambda: encoded("JPEG")[:100],
    "PostScript": lambda: POSTSCRIPT,
    "PDF": lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF\n",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a pickle": lambda: b"\x80\x04\x95\x10",
    "zeros": lambda: bytes(10_000),
}
BAD_SOURCES: dict[str, Any] = {
    "a loopback address": "http://127.0.0.1:PORT/picture.png",
    "the name of this machine": "http://localhost:PORT/picture.png",
    "a loopback address in IPv6": "http://[::1]:PORT/picture.png",
    "a loopback address as a number": "http://2130706433:PORT/picture.png",
    "a private address": "http://10.0.0.1/picture.png",
    "a link-local address": "http://169.254.169.254/latest/meta-data",
    "an unknown scheme": "gopher://127.0.0.1/x",
    "a file URL elsewhere": "file://host/etc/passwd",
    "a system file": "/etc/passwd",
    "a device": "/dev/zero",
    "a folder": "/tmp",
    "no such file": "absent.png",
    "a path of 100,000": "x" * 100_000,
    "a NUL byte": "a\0b.png",
    "a lone surrogate": "\ud800.png",
    "a data URL of text": "data:text/plain;base64,eHh4eA==",
    "a data URL that is no base64": "data:image/png;base64,%%%",
    "a data URL without a comma": "data:image/png;base64",
    "an empty data URL": "data:,",
    "base64 of nothing useful": "A" * 128,
}


def act_on(part: dict[str, Any]) -> list[dict[str, Any]]:
    return with_data_urls([{"role": "user", "content": [part]}])[0]["content"]


def case(rule: str | None, source: Any, content: bytes | None = None) -> Case:
    """`content` lies in the file that `source` names."""

    def act(folder: Path) -> None:
        server().answers = {"/picture.png": Reply([encoded("PNG")]), "/endless.png": Reply(Endless(b"x"))}
        if content is not None:
            (folder / source).write_bytes(content)
        text = source.replace("PORT", str(server().port)) if isinstance(source, str) else source
        (found,) = act_on({"type": "image", "image": text})
        url = found["image_url"]["url"]
        if rule is None and base64.b64decode(url.partition(",")[2]) != content:
            raise WrongValue(url[:100])

    return Case(AREA, rule, act, shown=str(source)[:100])


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "picture.png")
    act_on({"type": "image", "image": str(folder / "picture.png")})


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A picture that can be shown, or one that must not be opened."""
    kind = draw(st.sampled_from(["valid", "bytes", "data", "source", "type", "pipe"]))
    if kind == "valid":
        name = draw(st.text("abcé ", min_size=1, max_size=8)) + ".png"
        return case(None, name, encoded(draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))))
    if kind == "bytes":
        rule = draw(st.sampled_from(list(BAD_BYTES)))
        return case(f"file of {rule}", "picture.png", BAD_BYTES[rule]())
    if kind == "data":
        rule = draw(st.sampled_from(list(BAD_BYTES)))
        return case(f"data URL of {rule}", "data:image/png;base64," + base64.b64encode(BAD_BYTES[rule]()).decode())
    if kind == "source":
        rule = draw(st.sampled_from(list(BAD_SOURCES)))
        return case(rule, BAD_SOURCES[rule])
    if kind == "pipe":
        return Case(AREA, "a pipe", pipe, shown="mkfifo picture.png")
    value = draw(st.sampled_from([*NO_TEXT, None, ""]))
    return case(f"picture is {value!r}", value)
