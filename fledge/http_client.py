"""HTTP with servers that are not trusted: every reply has a largest size, a longest time and no way out.

Knows sockets, limits and what can go wrong; every fault is a `ServerError` with a kind that can be counted. Bodies come
uncompressed (a compressed one may be a thousand times larger than it looks), redirects are not followed unless asked
for, proxies, cookies and `.netrc` of the environment are not used. `user:password@` in a URL is sent as HTTP has it.
Knows nothing of what the replies mean: `replies.py` does.
"""

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from fledge.errors import UserError
from fledge.redaction import keep_secret

Result = TypeVar("Result")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class ServerError(Exception):
    """A server did not answer as it should: `kind` is short and counted, `detail` is for people."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Limits:
    """What one reply may cost."""

    total_s: float = 900.0  # from the connection to the last byte
    connect_s: float = 10.0
    body_bytes: int = 64 << 20
    line_bytes: int = 4 << 20
    lines: int = 1_000_000
    redirects: int = 0


@dataclass(frozen=True)
class Reply:
    """A whole reply."""

    status: int
    content: bytes
    retry_after: str | None = None


class Client:
    """A session with any number of servers; use as an async context manager."""

    def __init__(
        self, *, api_key: str | None = None, limits: Limits = Limits(),  # noqa: B008  (frozen)
        may_connect: Callable[[Address], bool] | None = None,
    ) -> None:  # fmt: skip
        """`may_connect` sees every address before it is connected to, redirects included; None allows all."""
        keep_secret(api_key)
        self.limits, self._may_connect = limits, may_connect
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            # uvicorn closes an idle connection after 5 s; reusing one at that moment would look like a reset
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0, socket_factory=self._socket),
            headers=self._headers, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
        )  # fmt: skip
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def get(self, url: str, *, limits: Limits | None = None) -> Reply:
        async with self._sent("GET", url, None, limits or self.limits) as response:
            return await _whole(response, limits or self.limits)

    async def post(self, url: str, document: Any, *, limits: Limits | None = None) -> Reply:
        async with self._sent("POST", url, document, limits or self.limits) as response:
            return await _whole(response, limits or self.limits)

    @asynccontextmanager
    async def stream(self, url: str, document: Any) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """The status of a reply to POST, and its lines as they come."""
        async with self._sent("POST", url, document, self.limits) as response:
            yield response.status, _lines(response, self.limits)

    @asynccontextmanager
    async def _sent(
        self, method: str, url: str, document: Any, limits: Limits
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response whose headers are there; faults, also those of the block that reads it, become ServerErrors."""
        shown = _without_user(url)
        timeout = aiohttp.ClientTimeout(total=limits.total_s, sock_connect=limits.connect_s)
        try:
            async with asyncio.timeout(limits.total_s):  # over all redirects; aiohttp's own is per request
                for _ in range(limits.redirects + 1):
                    async with self._session.request(
                        method, URL(url), json=document, timeout=timeout, allow_redirects=False
                    ) as response:
                        if response.status not in REDIRECTS:
                            _check_encoding(response, shown)
                            yield response
                            return
                        url = _next_place(URL(url), response.headers.get("Location", ""), shown)
                raise ServerError("redirect", f"{shown}: redirects {'too often' if limits.redirects else 'elsewhere'}")
        except TimeoutError as error:
            why = one_line(error) or f"no whole answer in {limits.total_s:.0f} s"
            raise ServerError("time-out", f"{shown}: {why}") from None
        except aiohttp.ClientConnectorError as error:
            refused = error.os_error.errno == errno.ECONNREFUSED  # the text of aiohttp says address and port again
            why = os.strerror(errno.ECONNREFUSED) if refused else one_line(error)
            raise ServerError("connection refused", f"{shown}: {why}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a URL or header that is none
            raise ServerError("connection broke", f"{shown}: {type(error).__name__} {one_line(error)}") from None

    def _socket(self, found: Any) -> socket.socket:
        """The socket for one resolved address: what is refused here cannot be reached by another name or redirect."""
        family, kind, protocol, _, place = found
        address = ipaddress.ip_address(place[0].partition("%")[0])
        if self._may_connect is not None and not self._may_connect(address):
            raise PermissionError(errno.EACCES, f"{address} is no public address")
        return socket.socket(family, kind, protocol)


async def _whole(response: aiohttp.ClientResponse, limits: Limits) -> Reply:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limits.body_bytes:
            raise ServerError("reply too large", f"{response.url.host}: sent more than {limits.body_bytes} bytes")
        pieces.append(piece)
    return Reply(response.status, b"".join(pieces), response.headers.get("Retry-After"))


async def _lines(response: aiohttp.ClientResponse, limits: Limits) -> AsyncIterator[bytes]:
    rest, size, number = b"", 0, 0
    async for piece in response.content.iter_any():
        size += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        number += len(lines)
        if size > limits.body_bytes or number > limits.lines or len(rest) > limits.line_bytes:
            raise ServerError(
                "reply too large",
                f"{response.url.host}: sent {size} bytes in {number} lines; at most {limits.body_bytes} bytes, "
                f"{limits.lines} lines and {limits.line_bytes} bytes a line are read",
            )
        for line in lines:
            yield line
    if rest:
        yield rest


def _check_encoding(response: aiohttp.ClientResponse, shown: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() not in ("", "identity"):
        raise ServerError("malformed answer", f"{shown}: sent {encoding[:40]!r} where no compression was asked for")


def _next_place(here: URL, location: str, shown: str) -> str:
    there = here.join(URL(location))
    if not location or there.scheme not in ("http", "https"):
        raise ServerError("redirect", f"{shown}: redirects to {location[:200]!r}")
    return str(there)


def _without_user(url: str) -> str:
    try:
        return str(URL(url).with_user(None))[:300]
    except ValueError:
        return url[:300]


def one_line(text: object, longest: int = 300) -> str:
    """A server's words on one line, without characters that would steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 8 * longest]).split())[:longest]


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet: not this machine, its network, or an IPv6 spelling of those."""
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in NAT64:
            inside = ipaddress.IPv4Address(address.packed[-4:])
        if inside:
            return is_public(inside)
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def base_url(text: str) -> str:
    """`host:port`, `http://host:port` and the same with `/v1` as a URL without it; UserError when it is none."""
    text = text.strip()
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    try:
        parsed = URL(url)
        good = parsed.scheme in ("http", "https") and parsed.host and parsed.port and not parsed.query_string
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{text!r} is no address of a server. Give host:port or http://host:port.")
    keep_secret(parsed.password)
    return url


def blocking(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine, for callers that have no event loop, or stand in the middle of one (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def get(url: str, *, limits: Limits, may_connect: Callable[[Address], bool] | None = None) -> Reply:
    """One GET with a session of its own; blocks."""

    async def once() -> Reply:
        async with Client(limits=limits, may_connect=may_connect) as client:
            return await client.get(url)

    return blocking(once())


def post(url: str, document: Any, *, limits: Limits) -> Reply:
    """One POST with a session of its own; blocks."""

    async def once() -> Reply:
        async with Client(limits=limits) as client:
            return await client.post(url, document)

    return blocking(once())
