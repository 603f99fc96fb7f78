"""Pictures that rows name: URLs only when asked for, never from this network; only formats that we name."""

import asyncio
import base64
import io
import os
import shutil

import pytest
from fakes.hostile_server import always, forever, http, serving
from PIL import EpsImagePlugin, Image

from fledge.data import image_urls
from fledge.data.image_urls import allow_image_urls, open_image, read_image, with_data_urls
from fledge.data.images import decode, read_pictures
from fledge.data.rejects import Reject
from fledge.http_client import Limits

EVERYWHERE = lambda address: True  # noqa: E731
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n0 0 moveto 9 9 lineto stroke showpage\n%%EOF\n"


def picture(kind: str = "PNG", size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def message(source: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source}}]}]


@pytest.fixture
def allowed():
    allow_image_urls(True)
    yield
    allow_image_urls(False)


def test_urls_are_not_fetched_unless_asked_for():
    """A row of a downloaded data set could make the machine ask any address of its network."""
    asked = []

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        asked.append(path)
        writer.write(http(picture()))

    allow_image_urls(False)
    with serving(handler) as url:
        for read in (lambda: with_data_urls(message(f"{url}/a.png")), lambda: read_pictures(message(url), None)):
            with pytest.raises(Reject, match="image URL: .*--allow-image-urls"):
                read()
        with pytest.raises(Reject, match="--allow-image-urls"):
            read_image(f"{url}/a.png", may_connect=EVERYWHERE)
        assert not asked
        allow_image_urls(True)
        assert read_image(f"{url}/a.png", may_connect=EVERYWHERE) == picture()  # control
        allow_image_urls(False)
    assert asked == ["/a.png"]


def test_not_from_this_network(allowed):
    reached = []

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        reached.append(path)
        writer.write(http(picture()))

    with serving(handler) as url:
        for source in (url, url.replace("127.0.0.1", "localhost"), url.replace("127.0.0.1", "[::ffff:127.0.0.1]")):
            with pytest.raises(Reject, match="broken image"):
                with_data_urls(message(f"{source}/latest/meta-data"))
    assert not reached


@pytest.mark.parametrize(
    "handler",
    [
        always(http(b"", status="404 Not Found")),
        always(http(b"", status="302 Found", headers="Location: file:///etc/passwd\r\n")),
        forever(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 10_000),
    ],
)
def test_a_server_without_the_picture_rejects_the_row(allowed, monkeypatch, handler):
    monkeypatch.setattr(image_urls, "FETCH", Limits(total_s=5.0, body_bytes=100_000, redirects=5))
    with serving(handler) as url, pytest.raises(Reject, match="broken image"):
        read_image(url, may_connect=EVERYWHERE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_named_formats_are_opened(kind):
    assert open_image(picture(kind), "x").size == (4, 4) and decode(picture(kind), "x").mode == "RGB"


def test_postscript_under_a_pictures_name_starts_nothing(tmp_path, monkeypatch):
    """A file called x.png with PostScript inside was handed to Ghostscript."""
    started = []
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: started.append(a) or Image.new("RGB", (9, 9)).im
    )
    (tmp_path / "x.png").write_bytes(POSTSCRIPT)
    inside = f"data:image/png;base64,{base64.b64encode(POSTSCRIPT).decode()}"
    for source in (str(tmp_path / "x.png"), inside):
        with pytest.raises(Reject, match="no picture of the formats PNG"):
            with_data_urls(message(source))
        with pytest.raises(Reject, match="no picture of the formats PNG"):
            read_pictures(message(source), None)
    assert not started
    with Image.open(io.BytesIO(POSTSCRIPT)) as image:  # control: PIL by itself would
        image.load()
    assert started


def test_nobody_starts_ghostscript(tmp_path, monkeypatch):
    """`datasets` opens the pictures of a data set by itself, of any format."""
    program = tmp_path / "gs"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not EpsImagePlugin.has_ghostscript()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # control: PIL's default would find it
    assert EpsImagePlugin.has_ghostscript()


def test_a_picture_of_too_many_pixels_is_rejected(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Reject, match="decompression bomb"):
        open_image(picture(size=(20, 20)), "x")
    assert open_image(picture(size=(10, 10)), "x").size == (10, 10)  # control


def test_a_local_file_has_a_largest_size_too(tmp_path, monkeypatch):
    """A row may name any file of this machine: /proc/kcore, a regular file without end, once filled the memory."""
    (tmp_path / "a.png").write_bytes(picture())
    assert read_image(str(tmp_path / "a.png")) == picture()  # control
    monkeypatch.setattr(image_urls, "FETCH", Limits(body_bytes=10))
    with pytest.raises(Reject, match="larger than"):
        read_image(str(tmp_path / "a.png"))


def test_local_files_and_data_urls_need_no_flag(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    copy = shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    for source in (
        str(tmp_path / "a.png"),
        f"file://{copy}",
        f"data:image/png;base64,{base64.b64encode(picture()).decode()}",
    ):
        assert with_data_urls(message(source))[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
