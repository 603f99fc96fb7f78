"""What an answering engine is asked and what it says.

Two engines speak this record: `openai_client` (servers) and `local_engine` (transformers in this process). The
conversation loop in `regenerate.py` cannot tell them apart.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Request:
    """One turn to be answered: everything said so far, and how to sample the answer."""

    messages: list[dict[str, Any]]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    thinking: bool | None  # None: whatever the chat template does by itself


@dataclass(frozen=True)
class Answer:
    """The target's answer. Token ids are there when the engine knows them; `output_ids` ends with the end-of-turn token
    when finish_reason is "stop"."""

    text: str
    finish_reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_output_tokens: int
    reasoning: str | None = None
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None


class Engine(Protocol):
    """An async context manager. `answer` raises `rejects.Reject` for a request that has no answer."""

    model: str
    errors: Counter[str]  # failed attempts by kind, retried ones included

    @property
    def concurrency(self) -> int:
        """Requests worth having in flight; known once the context is entered."""
        ...

    async def answer(self, request: Request) -> Answer: ...
    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *error: object) -> None: ...
