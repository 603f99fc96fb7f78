"""Answers from a transformers model in this process, on CPU or GPU: `--engine transformers`.

Knows the target, its chat template and a thread that runs a session of `fledge.decoding`: a finished row makes room for
the next. Needs no server: what the quickstart and small jobs use. The same `Engine` as the client of servers, so turns,
resume and rows are the same code.

Draws follow the row's seed and the token's position, so an answer does not depend on which rows share a batch, as far
as the target's logits do not: in bf16 their last digits do.
"""

import asyncio
import json
import queue
import re
import threading
from collections import Counter
from typing import Any

import torch

from fledge.console import say
from fledge.data.detokenize import answer_text
from fledge.data.image_urls import has_images
from fledge.data.rejects import Reject
from fledge.data.samples import Prompt
from fledge.data.tokenize import ChatTemplate
from fledge.decoding.generate import serving_session
from fledge.decoding.law import sampling_of
from fledge.decoding.memory import described
from fledge.decoding.records import Generation
from fledge.decoding.requests import PromptTooLong, Request, RequestState, check_request
from fledge.decoding.session import Session
from fledge.regeneration.engine import PromptAnswer, PromptRequest
from fledge.target.model import Target

CPU_BATCH, GPU_BATCH = 64, 256
UNLIMITED = 1 << 40  # new tokens; the target's positions limit them
TOOL_CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class LocalEngine:
    """An `Engine`: requests queue up, one thread answers them in batches."""

    def __init__(
        self, model: str, *, dtype: str = "auto", device: str | None = None, batch_size: int | None = None,
        chat_template_type: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self._dtype, self._device, self._batch_size = model, dtype, device, batch_size
        self._template_name = chat_template_type
        self.errors: Counter[str] = Counter()
        self.template: ChatTemplate | None = None
        self._inbox: queue.SimpleQueue[tuple[Request, asyncio.Future[Generation]] | None] = queue.SimpleQueue()
        self._futures: dict[RequestState, asyncio.Future[Generation]] = {}  # of the decoding thread
        self._failed: BaseException | None = None

    @property
    def concurrency(self) -> int:
        return 2 * self._session.batch_size  # as many wait as are decoded, so that a free slot never stays free

    async def __aenter__(self) -> "LocalEngine":
        self._session = await asyncio.to_thread(self._load)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._decode_forever, name="decode", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def answer(self, request: PromptRequest) -> PromptAnswer:
        prompt = await self._prompt(request)
        generation = await self._generated(self._request(request, prompt))
        tokens, session = generation.token_ids, self._session
        ended = tokens[-1] in session.stop_token_ids
        text = answer_text(session.target.tokenizer, tokens[:-1] if ended else tokens, request.extra.stop or ())
        calls = None
        if request.tools:
            text, calls = split_calls(text)
        if not text.strip() and not calls:
            raise Reject("empty answer", f"{len(tokens)} tokens and no text")
        whole = ended or generation.finish_reason == "length"  # a stop string cuts the text, not the tokens
        return PromptAnswer(
            text=text, tool_calls=calls, finish_reason=generation.finish_reason, num_prompt_tokens=len(prompt),
            num_output_tokens=len(tokens), prompt_ids=prompt.ids if whole else None,
            output_ids=tokens if whole else None,
        )  # fmt: skip

    async def prompt_ids(self, request: PromptRequest) -> list[int]:
        return (await self._prompt(request)).ids

    async def _prompt(self, request: PromptRequest) -> Prompt:
        """Token ids and pictures of what was said so far; raises Reject where they cannot be had."""
        template = self.template
        assert template is not None, "answer() outside the context"
        if request.tools and not reads_calls(template.text):
            raise Reject(
                "tool calls",
                "--engine transformers reads calls written as <tool_call> JSON, which this template does not ask for; "
                "a server reads every form (--engine openai)",
            )
        if request.continues:
            return Prompt(template.unfinished_ids(request.messages))
        variables = request.template_variables()
        if has_images(request.messages):  # files and perhaps the network are read
            return await asyncio.to_thread(template.prompt, request.messages, **variables)
        return template.prompt(request.messages, **variables)

    def _request(self, request: PromptRequest, prompt: Prompt) -> Request:
        """The request of a session; raises Reject where the prompt leaves no room for an answer."""
        sampling = sampling_of(request.extra, temperature=request.temperature, top_p=request.top_p, seed=request.seed)
        made = Request(prompt.ids, request.max_tokens or UNLIMITED, sampling, model_inputs=prompt.model_inputs)
        try:
            check_request(self._session.target, made)
        except PromptTooLong as error:
            raise Reject("context length", str(error)) from None
        return made

    async def _generated(self, request: Request) -> Generation:
        if self._failed:
            raise self._failed
        future: asyncio.Future[Generation] = self._loop.create_future()
        self._inbox.put((request, future))
        if self._failed:  # it failed between the check and the put: nobody may be left to read the inbox
            raise self._failed
        return await future

    def _load(self) -> Session:
        dtype = self._dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        target = Target.from_pretrained(
            self.model, dtype=dtype, device=self._device, tap_layers=(), chat_template=self._template_name
        )
        self.template = ChatTemplate(
            target.tokenizer, self._template_name, eos_token_ids=target.eos_token_ids, vision=target.vision
        )  # fmt: skip
        batch_size = self._batch_size or (CPU_BATCH if target.device.type == "cpu" else GPU_BATCH)
        session = serving_session(target, batch_size=batch_size, eos_token_ids=self.template.stop_token_ids)
        say(
            f"{self.model}: {target.dtype} on {target.device}, {session.batch_size} rows at once: "
            f"{described(target, session.batch_size)}"
        )
        return session

    def _decode_forever(self) -> None:
        """The decoding thread: requests join, a round runs, answers go out; ends at None in the inbox."""
        session = self._session
        try:
            while self._collect(block=session.idle):
                for state, future in self._futures.items():
                    if future.cancelled():  # nobody waits for it any more
                        session.cancel(state)
                session.step()
                for state in [state for state in self._futures if state.finished]:
                    self._loop.call_soon_threadsafe(_give, self._futures.pop(state), state.generation())
        except BaseException as error:  # out of memory and the like: whoever waits must hear of it
            self._failed = error  # first: who puts after the inbox was emptied sees it
            self._collect(block=False)
            for future in self._futures.values():
                self._loop.call_soon_threadsafe(_fail, future, error)

    def _collect(self, block: bool) -> bool:
        """Everything in the inbox; False when the engine is closing."""
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if item is None:
                return False
            request, future = item
            self._futures[self._session.add(request)] = future
            block = False


def reads_calls(template: str) -> bool:
    """Whether a template asks for calls as JSON between <tool_call> tags (Qwen2.5, Qwen3, Hermes)."""
    return "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template


def split_calls(text: str) -> tuple[str, list[dict[str, Any]] | None]:
    """The words before the tool calls and the calls in OpenAI's form; all of it as words where a call is not one."""
    calls: list[dict[str, Any]] = []
    for number, written in enumerate(TOOL_CALL.findall(text)):
        try:
            call = json.loads(written)
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
        except (ValueError, KeyError, TypeError):
            return text, None
        calls.append({"id": f"call_{number}", "type": "function", "function": function})
    return (text[: text.index("<tool_call>")].rstrip(), calls) if calls else (text, None)


def _give(future: asyncio.Future[Generation], generation: Generation) -> None:
    if not future.done():
        future.set_result(generation)


def _fail(future: asyncio.Future[Generation], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
