"""Tools and tool calls in one form, whatever spelling a row has.

Tools become OpenAI's `{"type": "function", "function": {...}}`, and so do calls. The arguments of a call stay as they
were written, a mapping or the text of one: templates differ in what they want, and `with_arguments` gives it to them.
A text that was encoded twice would train the head on quotes and backslashes, so it is decoded once, never twice.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from fledge.data.rejects import Reject

ArgumentsForm = Literal["mapping", "string"]
Messages = Sequence[dict[str, Any]]
ARGUMENT_KEYS = ("arguments", "parameters", "args")


def decoded(value: Any, what: str) -> Any:
    """A value that may be the JSON text of one; `what` names it in the error."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise Reject("not JSON", f"{what} is a text that is not valid JSON ({error})") from None


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The tools of a row: a list, the JSON text of one, or a list of such texts; each in OpenAI's form."""
    value = decoded(value, "tools") if value != "" else []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise Reject("unknown tools", f"tools is a list of objects, found {type(value).__name__}")
    tools = []
    for index, tool in enumerate(value):
        tool = decoded(tool, f"tool {index}")
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
            raise Reject("unknown tools", f"tool {index} is not an object that describes a function")
        tools.append(tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool})
    return tools


def tool_calls_of(value: Any, index: int) -> list[dict[str, Any]]:
    """The calls of message `index`: a list, one call, or the JSON text of either."""
    value = decoded(value, f"tool_calls of message {index}") if value != "" else []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise Reject("unknown tool call", f"message {index}: tool_calls is a list, found {type(value).__name__}")
    return [_call(call, index) for call in value]


def with_arguments(messages: Messages, form: ArgumentsForm) -> list[dict[str, Any]]:
    """The messages with the arguments of every tool call in the form that a template (or a server) wants."""
    return [
        {**message, "tool_calls": [_with_form(call, form) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _call(call: Any, index: int) -> dict[str, Any]:
    """One call as `{"id"?, "type": "function", "function": {"name", "arguments"}}`."""
    where = f"message {index}"
    call = decoded(call, f"a tool call of {where}")
    function = decoded(call.get("function", call), f"a tool call of {where}") if isinstance(call, dict) else {}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise Reject("unknown tool call", f"{where} has a tool call without the name of a function")
    arguments: Any = next((function[key] for key in ARGUMENT_KEYS if function.get(key) not in (None, "")), {})
    if not isinstance(decoded(arguments, f"{where}: arguments of {name}"), dict):
        found = str(arguments)[:60]
        raise Reject("unknown tool call", f"{where}: the arguments of {name} are not a JSON object: {found!r}")
    id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _with_form(call: dict[str, Any], form: ArgumentsForm) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if form == "mapping":
        arguments = decoded(arguments, "arguments")
    elif not isinstance(arguments, str):
        arguments = json_text(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def json_text(value: Any) -> str:
    """JSON as Python and most models write it: a space behind `:` and `,`, characters as they are."""
    return json.dumps(value, ensure_ascii=False)
