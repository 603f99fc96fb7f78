"""One conversation, answered turn by turn, as one training row.

Knows turns, what is drawn per row and what a row holds. Does not know how an answer comes about (`engine.py`) nor where
the row goes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from fledge.data.conversations import Conversation, DataFormat
from fledge.data.engine import Answer, Engine, Request
from fledge.data.image_urls import anchored, has_images
from fledge.data.regenerate_args import AnswerArgs, PromptArgs
from fledge.data.rejects import Reject
from fledge.data.sampling import TemperatureMixture, fraction

OURS = (
    "finish_reason", "num_prompt_tokens", "num_output_tokens", "sampling", "thinking", "model", "n", "loss_mask",
    "token_ids", "input_ids", "prompt_token_ids", "chat_template_kwargs", "turns_left_out",
    "turns_left_out_because",
)  # fmt: skip

# A later turn without an answer for one of these reasons leaves a good, shorter conversation. Any other reason (a
# server that failed too often, say) rejects the row, so that --retry-rejects can ask for all of it again.
ENDS_A_CONVERSATION = ("context length", "prompt too long", "empty answer", "broken image", "cut while reasoning")


class Asker:
    """Asks the user turns of conversations in order, each with the target's own previous answers before it."""

    def __init__(self, prompts: PromptArgs, answers: AnswerArgs, engine: Engine) -> None:
        self._prompts, self._answers, self._engine = prompts, answers, engine
        self._mixture = TemperatureMixture.parse(answers.temperature)
        self._counter = _prompt_counter(prompts, engine.model)

    async def row(self, conversation: Conversation) -> dict[str, Any]:
        """The row of one conversation: asked turn by turn. Raises Reject when not even the first turn has an answer."""
        answers, prompts = self._answers, self._prompts
        system, questions = questions_of(conversation, prompts.system_prompt)
        temperature = self._mixture.draw(answers.seed, conversation.id)
        thinking = draw_thinking(answers.thinking, answers.seed, conversation.id)
        row_seed = int(fraction("seed", answers.seed, conversation.id) * 2**31)
        folder = _folder_of(conversation)
        said: list[dict[str, Any]] = list(system)
        given: list[Answer] = []
        left_out: dict[str, Any] = {}
        for turn, question in enumerate(questions):
            messages = [*said, anchored(question, folder)]
            try:
                if self._counter is not None:
                    self._counter.check(messages, thinking, prompts.max_prompt_length)
                answer = await self._engine.answer(
                    Request(messages, answers.max_tokens, temperature, answers.top_p, (row_seed + turn) % 2**31,
                            thinking)
                )  # fmt: skip
            except Reject as reject:
                if not given or reject.reason not in ENDS_A_CONVERSATION:
                    raise
                left_out = {"turns_left_out": len(questions) - turn, "turns_left_out_because": reject.reason}
                break
            given.append(answer)
            said = [*messages, _assistant(answer)]
            if answer.finish_reason == "length" and turn + 1 < len(questions):
                left_out = {"turns_left_out": len(questions) - turn - 1, "turns_left_out_because": "answer cut"}
                break
        if given[-1].finish_reason == "length" and answers.truncated == "drop":
            raise Reject(
                "answer cut", f"turn {len(given)} reached its limit after {given[-1].num_output_tokens} tokens"
            )
        sampling = {
            "temperature": temperature, "top_p": answers.top_p, "seed": row_seed, "max_tokens": answers.max_tokens,
        }  # fmt: skip
        return {
            "id": conversation.id,
            **_in_format(said, prompts.data_format),
            **{name: value for name, value in conversation.meta.items() if name not in OURS and name != "id"},
            "finish_reason": given[-1].finish_reason,
            "num_prompt_tokens": given[-1].num_prompt_tokens,
            "num_output_tokens": sum(answer.num_output_tokens for answer in given),
            **left_out,
            "sampling": sampling,
            "thinking": thinking,
            **({"chat_template_kwargs": {"enable_thinking": thinking}} if thinking is not None else {}),
            "model": self._engine.model,
            **({} if has_images(said) else token_fields(given)),
        }


def questions_of(
    conversation: Conversation, system_prompt: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The system message (none or one) and the user turns."""
    messages = conversation.messages
    if any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        raise Reject("tool calls", "its turns depend on tool results, which cannot be asked again")
    system = [dict(message) for message in messages if message["role"] == "system"]
    if not system and system_prompt:
        system = [{"role": "system", "content": system_prompt}]
    questions = [dict(message) for message in messages if message["role"] == "user"]
    if not questions:
        raise Reject("no question", "it has no user turn")
    return system, questions


def prompt_digest(messages: tuple[dict[str, Any], ...]) -> bytes:
    """What a conversation asks, as 20 bytes: system message and user turns."""
    asked = [(m["role"], m["content"]) for m in messages if m["role"] in ("system", "user", "tool")]
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=20).digest()


def draw_thinking(choice: str, seed: int, row_id: str) -> bool | None:
    if choice == "both":
        return fraction("thinking", seed, row_id) < 0.5
    return {"default": None, "on": True, "off": False}[choice]


def token_fields(given: list[Answer]) -> dict[str, Any]:
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
    }


def _assistant(answer: Answer) -> dict[str, Any]:
    reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return {"role": "assistant", "content": answer.text, **reasoning}


def _in_format(messages: list[dict[str, Any]], data_format: DataFormat) -> dict[str, Any]:
    """`messages` for ultrachat, OpenAI messages and image parts, else ShareGPT's `conversations`."""
    if data_format in ("ultrachat", "messages") or has_images(messages):
        return {"messages": messages}
    names = {"user": "human", "assistant": "gpt", "system": "system"}
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


class _PromptCounter:
    """Counts prompt tokens for --max-prompt-length."""

    def __init__(self, name: str) -> None:
        from fledge.data.tokenize import ChatTemplate

        self._template = ChatTemplate.from_pretrained(name)

    def check(self, messages: list[dict[str, Any]], thinking: bool | None, longest: int | None) -> None:
        count = len(self._template.prompt_ids(messages, enable_thinking=thinking))
        if longest is not None and count > longest:
            raise Reject("prompt too long", f"{count} tokens, --max-prompt-length is {longest}")


def _prompt_counter(prompts: PromptArgs, model: str) -> _PromptCounter | None:
    return _PromptCounter(prompts.tokenizer or model) if prompts.max_prompt_length is not None else None
