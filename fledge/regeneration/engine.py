"""What an answering engine is asked and what it says.

Two engines speak this record: `openai_client` (servers) and `local_engine` (the target in this process). The
conversation loop in `turns.py` cannot tell them apart.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fledge.data.sampling import ExtraSampling

if TYPE_CHECKING:
    from fledge.data.tokenize import ChatTemplate


@dataclass(frozen=True)
class PromptRequest:
    """One turn to be answered: everything said so far, what the chat template is told, and how to sample the answer."""

    messages: list[dict[str, Any]]
    max_tokens: int | None  # None: all the room that is left
    temperature: float
    top_p: float
    seed: int
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    extra: ExtraSampling = ExtraSampling()
    continues: bool = False  # the last message is unfinished, and the answer is how it goes on

    def template_variables(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        return {**(self.chat_template_kwargs or {}), **({"tools": self.tools} if self.tools else {})}


@dataclass(frozen=True)
class PromptAnswer:
    """The target's answer. Token ids are there when the engine knows them; `output_ids` ends with the end-of-turn token
    when finish_reason is "stop". `text` may be empty beside tool calls, or when the answer was cut while reasoning."""

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_output_tokens: int
    reasoning: str | None = None
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None
    tool_calls: list[dict[str, Any]] | None = None  # OpenAI's form


class Engine(Protocol):
    """An async context manager. `answer` raises `rejects.Reject` for a request that has no answer."""

    model: str
    errors: Counter[str]  # failed attempts by kind, retried ones included
    template: "ChatTemplate | None"  # of an engine that renders prompts itself, once the context is entered

    @property
    def concurrency(self) -> int:
        """Requests worth having in flight; known once the context is entered."""
        ...

    async def answer(self, request: PromptRequest) -> PromptAnswer: ...
    async def prompt_ids(self, request: PromptRequest) -> list[int] | None:
        """The token ids of the request's prompt; None where the engine cannot tell."""
        ...

    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *error: object) -> None: ...
