"""A small real server that answers with whatever bytes a test gives it, and one chat server with odd replies."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator

Handler = Callable[[str, bytes, asyncio.StreamWriter], Awaitable[None]]  # path, request body, where to write

MODELS = b'{"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]}'


def http(body: bytes, *, status: str = "200 OK", length: int | None = None, headers: str = "") -> bytes:
    """An HTTP reply; `length` may lie."""
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n{headers}\r\n".encode() + body


def completion(**changes: object) -> dict:
    """A good chat completion, with fields changed."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}
    good = {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    return {**good, **changes}


def choice(**changes: object) -> dict:
    """A good completion whose only choice is changed."""
    return completion(choices=[{**completion()["choices"][0], **changes}])


def event(document: dict | bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


@contextlib.contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """The URL of a server that hands every request to `handler` and then closes the connection."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            sizes = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length:")]
            body = await reader.readexactly(int(sizes[0])) if sizes else b""
            await handler(head.split()[1], body, writer)
            await writer.drain()
        writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(connection, "127.0.0.1", 0)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def stop() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def always(reply: bytes) -> Handler:
    """The same bytes to every request."""

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(reply)

    return handler


def forever(head: bytes, piece: bytes) -> Handler:
    """A reply that never ends."""

    async def handler(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    return handler
