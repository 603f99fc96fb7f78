"""What the assistant wrote in one conversation, as a template renders it: texts with spans.

Joins what `spans.py` finds in the prompts with what the template marks itself ({% generation %}), and with what the row
says: answers it excludes, and thoughts of which it does not say how they were asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fledge.data.rendering import THINKING_SWITCHES, Renderer
from fledge.data.spans import (
    Ends,
    Messages,
    Rendering,
    Unmaskable,
    marked_rendering,
    supervised_renderings,
    within_marks,
)
from fledge.data.thoughts import thought_of
from fledge.data.traces import untraced

PLAIN_KEYS = {"role", "content", "finish_reason", "train"}


@dataclass(frozen=True)
class Masked:
    """The renderings of a conversation, and the names of its fields that left no trace in them."""

    renderings: list[Rendering]
    untraced: tuple[str, ...] = ()


def masked(
    messages: Messages, answers: Sequence[int], renderer: Renderer, ends: Ends, kwargs: dict[str, Any]
) -> Masked:  # fmt: skip
    """What the assistant wrote in these `answers`; `kwargs` are the row's tools and template variables.

    A row with thoughts that does not state the thinking switch was made with thinking on: that is tried where the
    template's own setting (DeepSeek V3.1: off) leaves the thoughts out, or asks for an answer without one.
    """
    thoughts = [thought for index in answers if (thought := thought_of(messages[index]))]
    settings = [kwargs]
    if thoughts and renderer.reads_switch(kwargs):
        settings.append({**kwargs, **dict.fromkeys(THINKING_SWITCHES, True)})
    without_thoughts: list[Rendering] | None = None
    first_error: Unmaskable | None = None
    for setting in settings:
        try:
            renderings = _renderings(messages, answers, renderer, ends, setting)
        except Unmaskable as error:
            first_error = first_error or error
            continue
        if all(any(thought in rendering.text for rendering in renderings) for thought in thoughts):
            lost = _untraced(messages, renderings, renderer, kwargs, setting)
            return Masked(renderings, tuple(name for name in lost if name != "reasoning_content"))
        without_thoughts = without_thoughts or renderings
    if without_thoughts is None:
        assert first_error is not None
        without_thoughts = [_as_marked(messages[: answers[-1] + 1], answers, renderer, ends, kwargs, first_error)]
    return Masked(without_thoughts, _untraced(messages, without_thoughts, renderer, kwargs, kwargs))


def _untraced(
    messages: Messages, renderings: list[Rendering], renderer: Renderer, kwargs: dict[str, Any],
    setting: dict[str, Any],
) -> tuple[str, ...]:  # fmt: skip
    """Names of the fields without a trace; a plain conversation whose contents are all there needs no look."""
    if not kwargs and all(
        PLAIN_KEYS.issuperset(message) and str(message["content"]).strip() in renderings[0].text for message in messages
    ):
        return ()
    switches = {name: value for name, value in setting.items() if name not in kwargs}

    def render(messages: Messages, **kwargs: Any) -> str:
        return renderer.render(messages, **switches, **kwargs)

    lost = untraced(messages, kwargs, render, renderer.text)
    if messages[0]["role"] == "system" and str(messages[0]["content"]).strip() in renderings[0].text:
        lost = tuple(name for name in lost if name != "system")  # it is in the prompt, which the text begins with
    return lost


def _renderings(
    messages: Messages, answers: Sequence[int], renderer: Renderer, ends: Ends, kwargs: dict[str, Any]
) -> list[Rendering]:
    def render(messages: Messages, add_generation_prompt: bool) -> str:
        return renderer.render(messages, add_generation_prompt, **kwargs)

    renderings = supervised_renderings(messages, answers, render, ends)
    if not renderer.has_marks:
        return renderings
    marked = []
    for rendering in renderings:
        last = answers[-1] if rendering.turn is None else rendering.turn
        marked.append(within_marks(rendering, *renderer.marks(messages[: last + 1], **kwargs), ends))
    return marked


def _as_marked(
    messages: Messages, answers: Sequence[int], renderer: Renderer, ends: Ends, kwargs: dict[str, Any],
    error: Unmaskable,
) -> Rendering:  # fmt: skip
    """What the template itself marks, where its prompts are no beginnings of what it renders."""
    if renderer.has_marks:
        text, marks = renderer.marks(messages, **kwargs)
        if rendering := marked_rendering(messages, answers, text, marks, ends):
            return rendering
    raise error
