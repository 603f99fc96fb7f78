"""What servers answer, as typed records: chat completions (whole and streamed), models, hidden states, errors.

Unknown fields are ignored, known ones must have their type: a reply that does not fit is a "malformed answer". Knows
the dialects of vLLM, SGLang and OpenAI. Knows no sockets.
"""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from fledge.errors import UserError
from fledge.http_client import Client, Limits, Reply, ServerError, one_line
from fledge.parsing import parse_json

Record = TypeVar("Record")
Count = Annotated[int, Meta(ge=0, lt=2**31)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Word = Annotated[str, Meta(pattern=r"\A[\w./-]{1,64}\Z")]
MODELS = Limits(total_s=30.0, body_bytes=4 << 20)


class Usage(Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class FunctionCall(Struct, omit_defaults=True):
    name: Annotated[str, Meta(min_length=1, max_length=1024)]
    arguments: str | dict[str, Any] | None = None


class ToolCall(Struct, omit_defaults=True):
    function: FunctionCall
    id: str | None = None
    type: str | None = None


class Message(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""


class Choice(Struct):
    message: Message
    finish_reason: Word | None = None
    token_ids: list[TokenId] | None = None


class Completion(Struct):
    choices: Annotated[list[Choice], Meta(min_length=1)]
    usage: Usage | None = None
    prompt_token_ids: list[TokenId] | None = None


class Tokenized(Struct):
    """What vLLM's /tokenize makes of a prompt."""

    tokens: list[TokenId]


class StreamChoice(Struct):
    delta: Message | None = None
    finish_reason: Word | None = None


class Chunk(Struct):
    """One event of a streamed completion."""

    choices: list[StreamChoice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw | UnsetType = UNSET


class Model(Struct):
    id: Annotated[str, Meta(min_length=1, max_length=1024)]
    owned_by: str | None = None
    max_model_len: Annotated[int, Meta(ge=1, lt=2**31)] | None = None


class Models(Struct):
    data: list[Model]


class Transfer(Struct):
    hidden_states_path: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None


class StatesReply(Struct):
    kv_transfer_params: Transfer | None = None


class _ErrorBody(Struct):
    message: str


class _ErrorReply(Struct):
    error: _ErrorBody | str | None = None
    message: str | None = None


def read_reply(content: bytes, kind: type[Record]) -> Record:
    """The JSON of a reply; a ServerError "malformed answer" when it is none of this kind."""
    try:
        return parse_json(content, kind, "the reply")
    except UserError as error:
        start = content[:80].decode(errors="replace")
        raise ServerError("malformed answer", f"{error} It starts {start!r}") from None


def error_text(content: bytes) -> str:
    """The message inside an error document, or its beginning; one line."""
    text = content[:100_000].decode(errors="replace")
    try:
        found = parse_json(content, _ErrorReply, "the reply")
        error = found.error.message if isinstance(found.error, _ErrorBody) else found.error
        text = error or found.message or text
    except UserError:
        pass
    return one_line(text, 400)


def check_status(reply: Reply, url: str) -> None:
    """A ServerError "HTTP status" for anything but 200."""
    if reply.status != 200:
        raise ServerError(f"HTTP {reply.status}", f"{url}: HTTP {reply.status}: {error_text(reply.content)}")


async def served_model(client: Client, url: str) -> str:
    """The name of the model that the server at a base URL serves."""
    reply = await client.get(f"{url}/v1/models", limits=MODELS)
    check_status(reply, url)
    models = read_reply(reply.content, Models).data
    if not models:
        raise ServerError("malformed answer", f"{url}: lists no model")
    return models[0].id
