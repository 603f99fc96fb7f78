"""Answers from a transformers model in this process, on CPU or GPU: `--engine transformers`.

Knows the model, its chat template and a thread that decodes (`batch_decoder.py`). Needs no server: what the quickstart
and small jobs use. The same `Engine` as the client of servers, so turns, resume and rows are the same code.

Answers follow the row's seed, but not bit by bit: which rows share a batch changes the last digits of bf16 logits.
"""

import asyncio
import json
import queue
import re
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from fledge.console import say
from fledge.data.image_urls import has_images
from fledge.data.rejects import Reject
from fledge.errors import UserError
from fledge.regeneration.engine import PromptAnswer, PromptRequest

if TYPE_CHECKING:
    from fledge.data.tokenize import ChatTemplate
    from fledge.regeneration.batch_decoder import DecodingJob

CPU_BATCH, GPU_BATCH = 64, 256
CACHED_BY_COLUMN = {"full_attention", "sliding_attention"}
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
        self._inbox: queue.SimpleQueue[DecodingJob | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None

    @property
    def concurrency(self) -> int:
        return 2 * self._decoder.batch_size  # as many wait as are decoded, so that a free place never stays free

    async def __aenter__(self) -> "LocalEngine":
        await asyncio.to_thread(self._load)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._decode_forever, name="decode", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def answer(self, request: PromptRequest) -> PromptAnswer:
        from fledge.regeneration.batch_decoder import DecodingJob

        if has_images(request.messages):
            raise Reject("image parts", "--engine transformers answers text; images need a server (--engine openai)")
        template = self.template
        assert template is not None, "answer() outside the context"
        if request.tools and not reads_calls(template.text):
            raise Reject(
                "tool calls",
                "--engine transformers reads calls written as <tool_call> JSON, which this template does not ask for; "
                "a server reads every form (--engine openai)",
            )
        ids = template.prompt_ids(request.messages, **request.template_variables())
        room = self._longest - len(ids)
        if room < 1:
            raise Reject("context length", f"the prompt has {len(ids)} tokens, the model takes {self._longest}")
        if self._failed:
            raise self._failed
        done: asyncio.Future[DecodingJob] = self._loop.create_future()
        self._inbox.put(
            DecodingJob(
                ids,
                min(request.max_tokens or room, room),
                request.temperature,
                request.top_p,
                request.seed,
                tag=done,
                extra=request.extra,
            )
        )
        if self._failed:  # it failed between the check and the put: nobody may be left to read the inbox
            raise self._failed
        job = await done
        words = job.output_ids[:-1] if job.finish_reason == "stop" else job.output_ids
        text, calls = template.tokenizer.decode(words, skip_special_tokens=True), None
        if request.tools:
            text, calls = split_calls(text)
        if not text.strip() and not calls:
            raise Reject("empty answer", f"{len(job.output_ids)} tokens and no text")
        return PromptAnswer(
            text=text, tool_calls=calls, finish_reason=job.finish_reason or "length", num_prompt_tokens=len(ids),
            num_output_tokens=len(job.output_ids), prompt_ids=ids, output_ids=job.output_ids,
        )  # fmt: skip

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from fledge.data.tokenize import ChatTemplate
        from fledge.regeneration.batch_decoder import BatchDecoder

        device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
        template = self.template = ChatTemplate.from_pretrained(self.model, self._template_name)
        dtype: Any = self._dtype if self._dtype == "auto" else getattr(torch, self._dtype)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
            model.to(device).eval()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.model}: transformers cannot load it as a language model ({str(error)[:200]}). "
                "Check --model, or use a server (--engine openai)."
            ) from None
        config = model.config.get_text_config()
        other = set(getattr(config, "layer_types", None) or ()) - CACHED_BY_COLUMN
        if other:
            raise UserError(
                f"{self.model}: has layers of kind {', '.join(sorted(other))}, whose state this engine cannot batch. "
                "Use a server (--engine openai)."
            )
        self._longest = getattr(config, "max_position_embeddings", None) or 1 << 30
        batch_size = self._batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
        self._decoder = BatchDecoder(model, eos_token_ids=template.stop_token_ids, batch_size=batch_size)
        say(f"{self.model}: {model.dtype} on {device}, {batch_size} rows at once")

    def _decode_forever(self) -> None:
        """The decoding thread: admit, step, hand out; ends at None in the inbox."""
        waiting: list[DecodingJob] = []
        try:
            while True:
                block = not waiting and self._decoder.num_live == 0
                if not self._collect(waiting, block):
                    return
                finished: list[DecodingJob] = []
                if waiting and self._decoder.wants_more():
                    free = self._decoder.num_free
                    finished += self._decoder.admit(waiting[:free])
                    del waiting[:free]
                finished += self._decoder.step()
                for job in finished:
                    self._loop.call_soon_threadsafe(_give, job)
        except BaseException as error:  # out of memory and the like: whoever waits must hear of it
            self._failed = error  # first: who puts after the inbox was emptied sees it
            self._collect(waiting, False)
            for job in [*waiting, *self._decoder.live_jobs()]:
                self._loop.call_soon_threadsafe(_fail, job, error)

    def _collect(self, waiting: "list[DecodingJob]", block: bool) -> bool:
        """Everything in the inbox; False when the engine is closing."""
        while True:
            try:
                job = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if job is None:
                return False
            waiting.append(job)
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


def _give(job: "DecodingJob") -> None:
    if not job.tag.done():
        job.tag.set_result(job)


def _fail(job: "DecodingJob", error: BaseException) -> None:
    if not job.tag.done():
        job.tag.set_exception(error)
