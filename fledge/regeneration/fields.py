"""Which fields of a prompt the target never sees, because its chat template does not render them.

Where the template is on this machine, each prompt is rendered with and without each field. Where only a server has it,
the server is asked which tokens it makes of the first prompt that has a field, with it and without (vLLM's /tokenize);
what holds for one prompt is taken to hold for all. A server that does not tell is named in one line.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fledge.console import warn
from fledge.data.rejects import Reject
from fledge.data.thinking import QUESTION
from fledge.data.traces import ARGUMENT, untraced
from fledge.regeneration.engine import Engine, PromptRequest

if TYPE_CHECKING:
    from fledge.data.tokenize import ChatTemplate


class FieldCheck:
    """Looks at prompts before they are asked; knows after the first of a kind what the server does with its field."""

    def __init__(
        self, engine: Engine, template: "ChatTemplate | None", find: Callable[[], "ChatTemplate | None"]
    ) -> None:  # fmt: skip
        """`find` looks for the template on this machine, when the first field turns up and it is not known yet."""
        self._engine, self._template, self._find = engine, template, find
        self._lost: dict[str, bool] = {}  # field -> whether the server drops it
        self._looked = template is not None
        self._looking = asyncio.Lock()

    async def lost(self, request: PromptRequest) -> tuple[str, ...]:
        """Names of the fields of a first prompt (system text, tools, template arguments) that leave no trace."""
        fields = _without_each(replace(request, messages=[*request.messages[:-1], *QUESTION]))
        if not fields:
            return ()
        async with self._looking:
            if not self._looked:
                self._template, self._looked = await asyncio.to_thread(self._find), True
            if self._template is None:
                for name in fields.keys() - self._lost.keys():
                    self._lost[name] = await self._dropped(name, *fields[name])
        if self._template is None:
            return tuple(name for name in fields if self._lost[name])
        try:
            return untraced(request.messages, request.template_variables(), self._template.render, self._template.text)
        except Reject:  # the template refuses the prompt, and so will the answering
            return ()

    async def _dropped(self, name: str, request: PromptRequest, *others: PromptRequest) -> bool:
        """Whether the server makes the same tokens of a prompt with the field and of all `others`."""
        whole = await self._engine.prompt_ids(request)
        if whole is None:
            warn(
                f"{self._engine.model}: its server does not tell what its chat template makes of {name}, so rows with "
                f"it are asked unchecked. Name the target's folder or hub name with --target to have it checked."
            )
            return False
        return all([await self._engine.prompt_ids(other) == whole for other in others])


def _without_each(request: PromptRequest) -> dict[str, list[PromptRequest]]:
    """For each field that a prompt has beside its question, the prompt and those that differ in this field alone."""
    fields: dict[str, list[PromptRequest]] = {}
    if request.messages[0]["role"] == "system":
        fields["system"] = [request, replace(request, messages=request.messages[1:])]
    if request.tools:
        fields["tools"] = [request, replace(request, tools=None)]
    kwargs = request.chat_template_kwargs or {}
    for name, value in kwargs.items():
        others: list[dict[str, Any]] = [{key: kwargs[key] for key in kwargs if key != name}]
        if isinstance(value, bool):  # the value may be the template's own choice
            others.append({**kwargs, name: not value})
        fields[ARGUMENT + name] = [request, *(replace(request, chat_template_kwargs=other) for other in others)]
    return fields
