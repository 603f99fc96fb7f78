"""The client against real sockets that do what they should not."""

import asyncio
import gzip
import ipaddress
import socket
import time

import pytest
from fakes.hostile_server import always, forever, http, serving

from fledge.errors import UserError
from fledge.http_client import Client, Limits, ServerError, base_url, blocking, get, is_public, post

SMALL = Limits(total_s=5.0, body_bytes=100_000, line_bytes=1000, lines=50)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def lines_of(url: str, limits: Limits = SMALL) -> list[bytes]:
    async def read() -> list[bytes]:
        async with Client(limits=limits) as client, client.stream(url, {}) as (_, lines):
            return [line async for line in lines]

    return blocking(read())


def test_a_good_reply():
    """Control: what stays within the limits arrives whole."""
    with serving(always(http(b"x" * 100_000))) as url:
        assert get(url, limits=SMALL).content == b"x" * 100_000
        assert post(url, {"a": 1}, limits=SMALL).status == 200
    with serving(always(http(b"\n".join([b"y" * 1000] * 50)))) as url:
        assert lines_of(url) == [b"y" * 1000] * 50


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (always(http(b"x" * 100_001)), "reply too large"),
        (forever(CHUNKED, chunk(b"x" * 1000)), "reply too large"),
        (forever(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000), "reply too large"),
        (forever(b"", b"HTTP/1.1 200 OK\r\n"), "connection broke"),
        (forever(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 1000), "connection broke"),
        (always(http(b"x", length=10)), "connection broke"),
        (always(http(b"x", length=-1)), "connection broke"),
        (always(b"SSH-2.0-OpenSSH_9.2\r\n"), "connection broke"),
        (always(b""), "connection broke"),
        (always(CHUNKED + b"zz\r\nx\r\n"), "connection broke"),
        (always(http(gzip.compress(b"0" * 10_000_000), headers="Content-Encoding: gzip\r\n")), "malformed answer"),
        (always(http(b"", status="302 Found", headers="Location: http://localhost:1/\r\n")), "redirect"),
        (always(http(b"", status="307 Temporary Redirect", headers="Location: /\r\n")), "redirect"),
    ],
)
def test_what_is_no_reply_is_an_error_of_a_kind(handler, kind):
    with serving(handler) as url, pytest.raises(ServerError) as found:
        get(url, limits=SMALL)
    assert found.value.kind == kind and "\n" not in found.value.detail


@pytest.mark.parametrize(
    "handler",
    [
        always(http(b"z" * 1001)),
        always(http(b"z\n" * 51)),
        forever(CHUNKED, chunk(b": ping\n\n")),
        forever(CHUNKED, chunk(b"data")),
    ],
)
def test_streams_end(handler):
    """A line without an end, and lines without an end."""
    with serving(handler) as url, pytest.raises(ServerError, match="reply too large"):
        lines_of(url)


def test_time_ends():
    """A byte now and then keeps a read alive for ever; the limit is on the whole."""

    async def drip(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    began = time.monotonic()
    with serving(drip) as url, pytest.raises(ServerError, match="time-out"):
        get(url, limits=Limits(total_s=0.4))
    assert time.monotonic() - began < 3


def test_nothing_listens():
    with pytest.raises(ServerError, match="connection refused"):
        get("http://127.0.0.1:9", limits=SMALL)


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with serving(always(http(b"direct"))) as url:
        assert get(url, limits=SMALL).content == b"direct"


def test_user_and_password_are_sent_and_not_shown():
    seen = []

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        seen.append(path)
        writer.write(http(b"x" * 100_001))

    with serving(handler) as url, pytest.raises(ServerError) as found:
        get(url.replace("http://", "http://ann:hunter22@"), limits=SMALL)
    assert seen and "hunter22" not in str(found.value)


def test_which_addresses_are_public():
    for text in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"):
        assert is_public(ipaddress.ip_address(text)), text
    for text in (
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:db8::1",
    ):  # fmt: skip
        assert not is_public(ipaddress.ip_address(text)), text


def test_a_name_is_judged_by_the_address_it_is_connected_to(monkeypatch):
    """DNS rebinding: a harmless name resolves to this machine at the moment of the connection."""
    with serving(always(http(b"inside"))) as url:
        port = url.rpartition(":")[2]

        async def resolve(self, host, *_args, **_kwargs):
            place = {"hostname": host, "host": "127.0.0.1", "port": int(port), "family": socket.AF_INET}
            return [{**place, "proto": 0, "flags": 0}]

        monkeypatch.setattr("aiohttp.resolver.ThreadedResolver.resolve", resolve)
        monkeypatch.setattr("aiohttp.connector.DefaultResolver.resolve", resolve)
        name = f"http://pictures.example:{port}/a.png"
        assert get(name, limits=SMALL).content == b"inside"  # control: the name leads here
        for refused in (name, url, f"http://localhost:{port}", f"http://[::ffff:127.0.0.1]:{port}", "http://0x7f.1:80"):
            with pytest.raises(ServerError, match="no public address|broke|Cannot connect"):
                get(refused, limits=SMALL, may_connect=is_public)
        with pytest.raises(ServerError, match="127.0.0.1 is no public address"):
            get(name, limits=SMALL, may_connect=is_public)


def test_redirects_are_followed_only_when_asked_for_and_each_address_is_judged():
    """The first server may be connected to; the one it sends us to may not."""
    reached = []

    async def inside(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        reached.append(path)
        writer.write(http(b"secret"))

    with serving(inside) as private:
        elsewhere = f"{private.replace('127.0.0.1', '127.0.0.2')}/latest"
        with serving(always(http(b"", status="302 Found", headers=f"Location: {elsewhere}\r\n"))) as first:
            follow = Limits(total_s=5.0, redirects=2)
            only_first = lambda address: str(address) == "127.0.0.1"  # noqa: E731
            with pytest.raises(ServerError, match="127.0.0.2 is no public address"):
                get(first, limits=follow, may_connect=only_first)
            assert not reached
        here = f"Location: {private}/latest\r\n"
        with serving(always(http(b"", status="302 Found", headers=here))) as first:  # control
            assert get(first, limits=follow, may_connect=only_first).content == b"secret"
    for place in ("file:///etc/passwd", "ftp://host/x", "", "http://["):
        with serving(always(http(b"", status="302 Found", headers=f"Location: {place}\r\n"))) as first:
            with pytest.raises(ServerError):
                get(first, limits=follow)


def test_redirects_end():
    with serving(always(http(b"", status="302 Found", headers="Location: /again\r\n"))) as url:
        with pytest.raises(ServerError, match="too often"):
            get(url, limits=Limits(total_s=5.0, redirects=3))


def test_addresses_of_servers():
    assert base_url("host:1") == "http://host:1" and base_url("https://a/b/v1/") == "https://a/b"
    assert base_url("http://ann:pw@host:1/v1") == "http://ann:pw@host:1"
    for text in ("", "http://", "ftp://host", "http://host:99999", "file:///etc/passwd", "http://h/?api_key=x"):
        with pytest.raises(UserError, match="no address of a server"):
            base_url(text)


def test_inside_a_running_loop():
    """A notebook has a loop already."""

    async def cell() -> bytes:
        return get(url, limits=SMALL).content

    async def outside() -> bytes:
        return await asyncio.to_thread(lambda: asyncio.run(cell()))

    with serving(always(http(b"fine"))) as url:
        assert asyncio.run(outside()) == b"fine"
