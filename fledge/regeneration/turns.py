"""One conversation, answered turn by turn, as one training row.

Knows turns, what is drawn per row and what a row holds. Does not know how an answer comes about (`engine.py`) nor where
the row goes. What the chat template is told (`tools`, `chat_template_kwargs`) is recorded in the row, so that the row's
training text begins with the prompt that was sent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.console import warn
from fledge.data.columns import TOKEN_COLUMNS, TURN_COLUMNS, DataFormat
from fledge.data.conversations import Conversation
from fledge.data.image_urls import anchored, has_images
from fledge.data.rejects import Reject
from fledge.data.sampling import ExtraSampling, TemperatureMixture, fraction
from fledge.data.thinking import BOOLEAN_SWITCHES, ThinkingSwitch
from fledge.regeneration.engine import Engine, PromptAnswer, PromptRequest
from fledge.regeneration.fields import FieldCheck
from fledge.regeneration.questions import Message, Turn, turns_of
from fledge.regeneration.settings import AnswerSettings, PromptSourceSettings

if TYPE_CHECKING:
    from fledge.data.tokenize import ChatTemplate

OURS = (
    "id", "finish_reason", "num_prompt_tokens", "num_output_tokens", "sampling", "thinking", "model", "n",
    "prompt_token_ids", "chat_template_kwargs", "turns_left_out", "turns_left_out_because",
    "untraced",
)  # fmt: skip
# Columns of the input row that hold its old answers: left beside the new ones, a reader might take them instead.
STALE = {*TURN_COLUMNS, *TOKEN_COLUMNS, "prompt_ids", "loss_mask", "labels", "attention_mask"}
SENT = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")  # of a message; the rest is kept

# A later turn without an answer for one of these reasons leaves a good, shorter conversation. Any other reason (a
# server that failed too often, say) rejects the row, so that --retry-rejects can ask for all of it again.
ENDS_A_CONVERSATION = ("context length", "prompt too long", "empty answer", "broken image")
CUT, NO_RESULT = "answer cut", "tool call without a result"


@dataclass(frozen=True)
class Drawn:
    """What one row is asked with, the same in every run."""

    temperature: float
    seed: int
    thinking: bool | None
    chat_template_kwargs: dict[str, Any]
    tools: list[dict[str, Any]] | None


class Asker:
    """Asks the user turns of conversations in order, each with the target's own previous answers before it."""

    def __init__(
        self, prompts: PromptSourceSettings, answers: AnswerSettings, engine: Engine, extra: ExtraSampling
    ) -> None:
        self._prompts, self._answers, self._engine, self._extra = prompts, answers, engine, extra
        self._mixture = TemperatureMixture.parse(answers.temperature)
        needed = answers.thinking != "default" or prompts.max_prompt_length is not None
        self._template = engine.template or (_find_template(prompts, engine.model) if needed else None)
        self._fields = FieldCheck(engine, self._template, lambda: _find_template(prompts, engine.model))
        self._switch = _switch(self._template, engine.model) if answers.thinking != "default" else None

    async def row(self, conversation: Conversation) -> dict[str, Any]:
        """The row of one conversation: asked turn by turn. Raises Reject when not even the first turn has an answer."""
        drawn, dialogue = self._draw(conversation), Dialogue(self, _folder_of(conversation))
        turns = turns_of(conversation, self._prompts.system)
        lost = await self._fields.lost(self._request(turns[0].asked, drawn, 0))
        await dialogue.run(turns, drawn)
        last = dialogue.given[-1]
        if last.finish_reason == "length" and self._answers.truncated == "drop":
            raise Reject(CUT, f"turn {len(dialogue.given)} reached its limit after {last.num_output_tokens} tokens")
        sampling = {
            "temperature": drawn.temperature, "top_p": self._answers.top_p, "seed": drawn.seed,
            "max_tokens": self._answers.max_new_tokens, **self._extra.given(),
        }  # fmt: skip
        own = {name: value for name, value in conversation.meta.items() if _is_kept(name, value)}
        return {
            "id": conversation.id,
            **own,
            **_in_format(dialogue.said, self._prompts.data_format),
            "finish_reason": last.finish_reason,
            "num_prompt_tokens": last.num_prompt_tokens,
            "num_output_tokens": sum(answer.num_output_tokens for answer in dialogue.given),
            **dialogue.left_out,
            "sampling": sampling,
            "thinking": drawn.thinking,
            **({"chat_template_kwargs": drawn.chat_template_kwargs} if drawn.chat_template_kwargs else {}),
            **({"untraced": list(lost)} if lost else {}),
            "model": self._engine.model,
            **({} if has_images(dialogue.said) else token_fields(dialogue.given)),
        }

    async def ask(self, messages: list[Message], drawn: Drawn, turn: int) -> PromptAnswer:
        """The target's answer to these messages."""
        request = self._request(messages, drawn, turn)
        self._check_length(request)
        return await self._engine.answer(request)

    def _request(self, messages: list[Message], drawn: Drawn, turn: int) -> PromptRequest:
        """These messages with the fields of the protocol alone, and how their answer is sampled."""
        sent = [{name: message[name] for name in SENT if name in message} for message in messages]
        answers = self._answers
        return PromptRequest(
            sent, answers.max_new_tokens, drawn.temperature, answers.top_p, (drawn.seed + turn) % 2**31,
            drawn.chat_template_kwargs, drawn.tools, self._extra,
        )  # fmt: skip

    def _draw(self, conversation: Conversation) -> Drawn:
        seed, id = self._answers.seed, conversation.id
        thinking = draw_thinking(self._answers.thinking, seed, id)
        switched = self._switch.kwargs(thinking) if self._switch else {}
        return Drawn(
            temperature=self._mixture.draw(seed, id),
            seed=int(fraction("seed", seed, id) * 2**31),
            thinking=thinking,
            chat_template_kwargs={**(conversation.meta.get("chat_template_kwargs") or {}), **switched},
            tools=conversation.meta.get("tools") or None,
        )

    def _check_length(self, request: PromptRequest) -> None:
        longest = self._prompts.max_prompt_length
        if longest is None:
            return
        assert self._template is not None
        count = len(self._template.prompt_ids(request.messages, **request.template_variables()))
        if count > longest:
            raise Reject("prompt too long", f"{count} tokens, --max-prompt-length is {longest}")


class Dialogue:
    """A conversation under way: what was said, the answers among it, and why turns were left out."""

    def __init__(self, asker: Asker, folder: Path) -> None:
        self._asker, self._folder = asker, folder
        self.said: list[Message] = []
        self.given: list[PromptAnswer] = []
        self.left_out: dict[str, Any] = {}

    async def run(self, turns: list[Turn], drawn: Drawn) -> None:
        """Ask the turns until one has no end; raises Reject when there is no answer at all."""
        for number, turn in enumerate(turns):
            left = len(turns) - number
            try:
                reason = await self._answer(turn, drawn, is_last=turn is turns[-1])
            except Reject as reject:
                if not self.given or reject.reason not in ENDS_A_CONVERSATION:
                    raise
                reason = reject.reason
            if reason == CUT:
                left -= 1  # the turn itself has an answer
            if reason:
                self.left_out = {"turns_left_out": left, "turns_left_out_because": reason} if left else {}
                return

    async def _answer(self, turn: Turn, drawn: Drawn, *, is_last: bool) -> str | None:
        """Ask one turn, with the data's results for the tools that the target calls. Why it did not end, if so."""
        pending, exchanges = [anchored(message, self._folder) for message in turn.asked], iter(turn.exchanges)
        while True:
            answer = await self._asker.ask([*self.said, *pending], drawn, len(self.given))
            self.said += [*pending, _assistant(answer)]
            self.given.append(answer)
            if answer.finish_reason == "length":
                return CUT
            if not answer.tool_calls:
                return None
            exchange = next(exchanges, None)
            if is_last and exchange and not exchange.results:
                return None  # the data ends with a call, too
            results = exchange.results_for(answer.tool_calls) if exchange else None
            if results is None:
                return NO_RESULT
            pending = results


def draw_thinking(choice: str, seed: int, row_id: str) -> bool | None:
    if choice == "both":
        return fraction("thinking", seed, row_id) < 0.5
    return {"default": None, "on": True, "off": False}[choice]


def token_fields(given: list[PromptAnswer]) -> dict[str, Any]:
    """Token ids of the row, with which training needs no template: of one turn as prompt and answer, of several as one
    sequence and its mask. Left out where a later prompt does not continue the earlier tokens (a template that drops
    old reasoning, for one): there the mask comes from the template."""
    if any(answer.prompt_ids is None or answer.output_ids is None for answer in given):
        return {}
    if len(given) == 1:
        return {"prompt_token_ids": given[0].prompt_ids, "token_ids": given[0].output_ids}
    ids: list[int] = []
    mask: list[int] = []
    for answer in given:
        assert answer.prompt_ids is not None and answer.output_ids is not None
        if answer.prompt_ids[: len(ids)] != ids:
            return {}
        mask += [0] * (len(answer.prompt_ids) - len(ids)) + [1] * len(answer.output_ids)
        ids = answer.prompt_ids + answer.output_ids
    return {"input_ids": ids, "loss_mask": mask}


def tally(row: dict[str, Any]) -> dict[str, int]:
    """What the manifest counts of a row."""
    return {
        f"finish_reason: {row['finish_reason']}": 1,
        "prompt_tokens": row["num_prompt_tokens"],
        "output_tokens": row["num_output_tokens"],
        f"temperature: {row['sampling']['temperature']}": 1,
        **(
            {f"turns left out: {row['turns_left_out_because']}": row["turns_left_out"]}
            if "turns_left_out" in row
            else {}
        ),
        **({f"thinking: {'on' if row['thinking'] else 'off'}": 1} if row["thinking"] is not None else {}),
        **{f"untraced: {name}": 1 for name in row.get("untraced", ())},
    }


def _is_kept(name: str, value: Any) -> bool:
    """Whether a column of the input row is copied: `data` is a conversation only where it is a list."""
    return name not in OURS and (name not in STALE or (name == "data" and not isinstance(value, (list, tuple))))


def _assistant(answer: PromptAnswer) -> Message:
    reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    calls = {"tool_calls": answer.tool_calls} if answer.tool_calls else {}
    return {"role": "assistant", "content": answer.text, **reasoning, **calls}


def _in_format(messages: list[Message], data_format: DataFormat) -> dict[str, Any]:
    """`messages` for ultrachat, OpenAI messages, image parts and tools, else ShareGPT's `conversations`."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    with_tools = any(message["role"] not in names or message.get("tool_calls") for message in messages)
    if data_format in ("ultrachat", "messages") or with_tools or has_images(messages):
        return {"messages": messages}
    return {
        "conversations": [
            {"from": names[m["role"]], "value": m["content"]}
            | {name: value for name, value in m.items() if name not in ("role", "content")}
            for m in messages
        ]
    }


def _folder_of(conversation: Conversation) -> Path:
    """Where relative image paths of a row start: the folder of its file."""
    return Path(conversation.where.rpartition(":")[0] or ".").parent


def _find_template(prompts: PromptSourceSettings, model: str) -> "ChatTemplate | None":
    """The target's template: that of --target, else of the servers' model (any name) if it is on this machine."""
    from transformers import AutoTokenizer

    from fledge.data.tokenize import ChatTemplate

    if prompts.target or prompts.max_prompt_length is not None:
        return ChatTemplate.from_pretrained(prompts.target or model)
    try:
        return ChatTemplate(AutoTokenizer.from_pretrained(model, local_files_only=True))
    except Exception:  # not here, or not to be read: the library's types vary
        return None


def _switch(template: "ChatTemplate | None", model: str) -> ThinkingSwitch:
    if template is not None:
        return ThinkingSwitch.of(template)
    names = " and ".join(BOOLEAN_SWITCHES.on)
    warn(
        f"{model}: its chat template is not on this machine, so --thinking is sent as {names}. Name the target's "
        "folder or hub name with --target to have the template's own switch."
    )
    return BOOLEAN_SWITCHES
