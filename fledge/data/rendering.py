"""Messages to text, through a chat template: the one place that calls it.

Knows what templates differ in: tool-call arguments as a mapping or as text, content that must be a list of parts, the
name of the thinking switch. Knows nothing of masks and token ids. The text is the one that inference servers tokenise,
without further special tokens: a template that writes no beginning-of-sequence token gets none.
"""

from collections.abc import Sequence
from typing import Any

from fledge.data.rejects import Reject
from fledge.data.render_limits import refuse_long, within_limits
from fledge.data.tool_calls import ArgumentsForm, with_arguments
from fledge.data.traces import reasoning_name, with_reasoning_as
from fledge.data.vision import Vision

THINKING_SWITCHES = ("enable_thinking", "thinking", "reasoning")  # Qwen and most others; DeepSeek, Granite; Cohere
PROBE = (
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "Second question"},
    {"role": "assistant", "content": "second answer"},
)
PROBE_ARGUMENTS = {"city": "Oslo"}
FORMS: tuple[ArgumentsForm, ...] = ("mapping", "string")

Messages = Sequence[dict[str, Any]]


class Renderer:
    """A template's text with the tokenizer whose special tokens it names."""

    def __init__(
        self, tokenizer: Any, text: str, name: str, *, enable_thinking: bool | None = None,
        vision: Vision | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.text, self.name = tokenizer, text, name
        self.enable_thinking = enable_thinking
        self._with_pictures = vision is not None
        self._reasoning_name = reasoning_name(text)
        self._arguments: ArgumentsForm | None = None  # found when a row first calls a tool
        self.only_parts = self._with_pictures and self._reads_only_parts()

    def render(self, messages: Messages, add_generation_prompt: bool = False, **kwargs: Any) -> str:
        """The template's text for these messages; a template that refuses them is a Reject."""
        return self._apply(self._as_template_wants(messages), add_generation_prompt, **kwargs)

    def reads_switch(self, kwargs: dict[str, Any]) -> bool:
        """Whether the template reads a thinking switch that neither the row (`kwargs`) nor the run sets."""
        stated = self.enable_thinking is not None or any(name in kwargs for name in THINKING_SWITCHES)
        return not stated and any(name in self.text for name in THINKING_SWITCHES)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant wrote ({% generation %})."""
        return "endgeneration" in self.text

    def marks(self, messages: Messages, **kwargs: Any) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text of these messages and the spans its template marks as the assistant's."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = within_limits(self.text, lambda: render_jinja_template(
                conversations=[self._as_template_wants(messages)], chat_template=self.text,
                return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map, **self._switched(kwargs),
            ))  # fmt: skip
            (text,), (spans,) = rendered  # whatever the function's annotation says
            return refuse_long(text), tuple((start, end) for start, end in spans)
        except Exception as error:  # jinja and the template's own raise_exception: any type, any text
            raise self._refused(error) from None

    # ---- inside --------------------------------------------------------------------------------------------------

    def _apply(self, messages: Messages, add_generation_prompt: bool, **kwargs: Any) -> str:
        try:
            return refuse_long(within_limits(self.text, lambda: self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.text, tokenize=False,
                add_generation_prompt=add_generation_prompt, **self._switched(kwargs),
            )))  # fmt: skip
        except Exception as error:  # jinja and the template's own raise_exception: any type, any text
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> Reject:
        return Reject("refused by the template", f"template {self.name!r}: {error}")

    def _switched(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The thinking switch under every name, unless the row sets one itself."""
        if self.enable_thinking is None or any(name in kwargs for name in THINKING_SWITCHES):
            return kwargs
        return {**kwargs, **dict.fromkeys(THINKING_SWITCHES, self.enable_thinking)}

    def _as_template_wants(self, messages: Messages) -> list[dict[str, Any]]:
        """Reasoning and tool calls as the template reads them; pictures as marks, text as parts where it must be."""
        messages = with_reasoning_as(messages, self._reasoning_name)
        if any(message.get("tool_calls") for message in messages):
            if self._arguments is None:
                self._arguments = self._form_of_calls()
            messages = with_arguments(messages, self._arguments)
        if not self._with_pictures:
            return list(messages)
        wanted = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                bare = [part if part.get("type") == "text" else {"type": "image"} for part in content]
                message = {**message, "content": bare}
            elif self.only_parts:
                message = {**message, "content": [{"type": "text", "text": content}]}
            wanted.append(message)
        return wanted

    def _form_of_calls(self) -> ArgumentsForm:
        """The form of tool-call arguments with which the template writes a call.

        Most want a mapping and write JSON or fields themselves; DeepSeek's join a text to theirs. What prints Python's
        spelling of a mapping, or encodes a text again, was not meant.
        """
        for form in FORMS:
            function = {"name": "weather", "arguments": PROBE_ARGUMENTS}
            call = {"id": "a1b2c3d4e", "type": "function", "function": function}
            try:
                text = self._apply(
                    with_arguments([PROBE[0], {"role": "assistant", "content": "", "tool_calls": [call]}], form), False
                )
            except Reject:
                continue
            if "Oslo" in text and repr(PROBE_ARGUMENTS) not in text and r"\"Oslo\"" not in text:
                return form
        return "mapping"

    def _reads_only_parts(self) -> bool:
        """Templates of LLaVA and SmolVLM lose a content that is a string: they walk over its parts."""
        try:
            return PROBE[0]["content"] not in self._apply(PROBE[:1], False)
        except Reject:
            return True
