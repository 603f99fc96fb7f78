"""Answers from OpenAI-compatible servers: many endpoints, each kept full, none trusted.

Knows HTTP, endpoints and what can go wrong with them. Knows nothing of conversations or files. What goes wrong, and
what is done about it:

    connection refused, server dead   endpoint is down; probed until it is back; requests go elsewhere, not counted
    hangs (probes time out too)       endpoint is down; what it holds is taken back and asked elsewhere
    429 (and 503 with Retry-After)    endpoint pauses as long as it asked for
    5xx, reset, time-out, odd reply   the request is repeated with backoff, elsewhere if possible; rejected after
                                      `max_attempts`
    empty answer                      asked again with another seed, three times
    prompt + answer over the context  asked again for a shorter answer; rejected when the prompt alone is too long
    401, 403, 404, no server at all   the run stops: every row would fail the same way

vLLM says which tokens it read and wrote (`return_token_ids`); other servers are not asked.
"""

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fledge.console import say, warn
from fledge.data.image_urls import has_images, with_data_urls
from fledge.data.rejects import Reject
from fledge.errors import UserError
from fledge.http_client import Client, Limits, Reply, ServerError, base_url
from fledge.regeneration.chat_completions import (
    CONTEXT_ERROR,
    ContextTooLong,
    body,
    may_not_fit,
    parse_completion,
    parse_retry_after,
    prompt_body,
    room,
    shorter,
)  # fmt: skip
from fledge.regeneration.engine import PromptAnswer, PromptRequest
from fledge.servers.replies import MODELS, Model, Models, Tokenized, error_text, read_reply

if TYPE_CHECKING:
    from fledge.data.tokenize import ChatTemplate

MAX_EMPTY_ANSWERS = 3
MAX_RATE_LIMITS = 200
LONGEST_PAUSE_S = 60.0
PROBE_TIMEOUT_S = 10.0
PROBES_UNTIL_DOWN = 3
UNCOUNTED = ("connection refused", "server hangs", "rate limited")  # no fault of the request


@dataclass(eq=False)
class Endpoint:
    """One server and how it is doing."""

    url: str
    limit: int
    up: bool = True
    model: str = ""
    is_vllm: bool = False
    max_model_len: int | None = None
    in_flight: int = 0
    paused_until: float = 0.0
    limited_since: float | None = None
    num_limits: int = 0
    failed_probes: int = 0
    last_error: str = ""
    attempts: set[asyncio.Task] = field(default_factory=set)

    def usable(self, now: float) -> bool:
        return self.up and self.in_flight < self.limit and now >= self.paused_until


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""

    request_s: float = 900.0
    give_up_after_s: float = 300.0  # no usable server at all for so long stops the run
    backoff_s: float = 0.5
    probe_every_s: float = 5.0
    probe_timeout_s: float = PROBE_TIMEOUT_S
    max_attempts: int = 8


class OpenAIClient:
    """An `Engine` over several endpoints that serve the same model."""

    template: "ChatTemplate | None" = None  # the servers render the prompts

    def __init__(
        self,
        urls: Sequence[str],
        *,
        concurrency: int | None = None,
        num_in_flight: int = 256,
        model: str | None = None,
        api_key: str | None = None,
        patience: Patience = Patience(),  # noqa: B008  (frozen)
        only_answering: bool = False,
    ) -> None:
        """`concurrency` is per endpoint; None shares `num_in_flight` evenly. With `only_answering`, urls are candidates
        and silent ones are forgotten."""
        self.endpoints = [Endpoint(normal_url(url), concurrency or 1) for url in dict.fromkeys(urls)]
        self._num_in_flight = None if concurrency else num_in_flight
        self.model, self.patience, self.errors = model or "", patience, Counter[str]()
        self._http = Client(api_key=api_key, limits=Limits(total_s=patience.request_s))
        self._only_answering = only_answering
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._fatal: UserError | None = None

    @property
    def concurrency(self) -> int:
        return sum(endpoint.limit for endpoint in self.endpoints)

    async def __aenter__(self) -> "OpenAIClient":
        await self._http.__aenter__()
        try:
            await self._discover()
        except BaseException:
            await self._http.__aexit__()
            raise
        self._monitor = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._monitor.cancel()
        await asyncio.gather(self._monitor, return_exceptions=True)
        await self._http.__aexit__()

    # -- one request

    async def answer(self, request: PromptRequest) -> PromptAnswer:
        """The answer, after as many attempts as it takes; raises Reject when there is none to be had."""
        if has_images(request.messages):
            messages = await asyncio.to_thread(with_data_urls, request.messages)
            request = replace(request, messages=messages)
        attempts, limits, empties, last, counted = 0, 0, 0, None, False
        while True:
            endpoint = await self._acquire(avoid=last)
            try:
                if not counted:
                    counted, request = True, await self._fitted(endpoint, request)
                return await self._attempt(endpoint, request)
            except ContextTooLong as error:
                self.errors["context length"] += 1
                request = shorter(request, error)
                continue
            except ServerError as failure:
                self.errors[failure.kind] += 1
                attempts += failure.kind not in UNCOUNTED
                limits += failure.kind == "rate limited"
                empties += failure.kind == "empty answer"
                last = endpoint
                if attempts >= self.patience.max_attempts or limits > MAX_RATE_LIMITS or empties >= MAX_EMPTY_ANSWERS:
                    raise Reject(failure.kind, f"{failure.detail} (after {attempts + limits} attempts)") from None
                if failure.kind == "empty answer":
                    request = replace(request, seed=(request.seed + 1) & 0x7FFFFFFF)
            finally:
                self._release(endpoint)
            if attempts:
                await asyncio.sleep(self._backoff(attempts))

    async def prompt_ids(self, request: PromptRequest) -> list[int] | None:
        """The token ids that a server makes of a prompt; None where none says so."""
        endpoint = next((endpoint for endpoint in self.endpoints if endpoint.up and endpoint.is_vllm), None)
        return None if endpoint is None else await self._prompt_ids(endpoint, request)

    async def _prompt_ids(self, endpoint: Endpoint, request: PromptRequest) -> list[int] | None:
        url = f"{endpoint.url.removesuffix('/v1')}/tokenize"
        try:
            reply = await self._http.post(url, prompt_body(request, endpoint.model))
            return read_reply(reply.content, Tokenized).tokens if reply.status == 200 else None
        except ServerError:
            return None

    async def _fitted(self, endpoint: Endpoint, request: PromptRequest) -> PromptRequest:
        """The request with the room that a long prompt leaves: vLLM refuses what does not fit without counting it."""
        longest = endpoint.max_model_len if endpoint.is_vllm and not has_images(request.messages) else None
        if longest is None or request.max_tokens is None or not may_not_fit(request, longest):
            return request
        if (ids := await self._prompt_ids(endpoint, request)) is None:
            return request
        if len(ids) >= longest:
            raise Reject("context length", f"{endpoint.url}: the prompt has {len(ids)} tokens, the context {longest}")
        return replace(request, max_tokens=min(request.max_tokens, longest - len(ids)))

    async def _attempt(self, endpoint: Endpoint, request: PromptRequest) -> PromptAnswer:
        """One POST, which `_take_down` may cancel from outside."""
        task = asyncio.create_task(self._post(endpoint, request))
        endpoint.attempts.add(task)
        try:
            answer = await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if task.cancelled() and not (current and current.cancelling()):
                raise ServerError("server hangs", endpoint.url) from None
            task.cancel()
            raise
        except ServerError as error:
            if error.kind == "connection refused":
                self._take_down(endpoint, error.detail)
            raise
        finally:
            endpoint.attempts.discard(task)
        endpoint.limited_since, endpoint.num_limits = None, 0
        return answer

    async def _post(self, endpoint: Endpoint, request: PromptRequest) -> PromptAnswer:
        fields = body(request, model=endpoint.model, max_model_len=endpoint.max_model_len, token_ids=endpoint.is_vllm)
        reply = await self._http.post(f"{endpoint.url}/chat/completions", fields)
        if reply.status != 200:
            self._refused(endpoint, reply)
        return parse_completion(reply.content)

    def _refused(self, endpoint: Endpoint, reply: Reply) -> None:
        """Turn an HTTP error into the exception that says what to do about it."""
        status, retry_after, text = reply.status, reply.retry_after, error_text(reply.content)
        detail = f"{endpoint.url}: HTTP {status}: {text}"
        if status == 429 or (status == 503 and retry_after):
            self._pause(endpoint, retry_after, detail)
            raise ServerError("rate limited", detail)
        if status >= 500 or status in (408, 409, 425):
            raise ServerError(f"HTTP {status}", detail)
        if status in (401, 403, 404):
            hint = "Check --api-key-env." if status != 404 else "Check the URL and --model."
            self._stop(UserError(f"{detail.rstrip('.')}. {hint}"))
        if status in (400, 413, 422) and CONTEXT_ERROR.search(text):
            raise ContextTooLong(detail, room(text))
        raise Reject(f"HTTP {status}", detail)

    # -- endpoints

    async def _acquire(self, avoid: Endpoint | None) -> Endpoint:
        """A place at the least loaded usable endpoint, rather not at the one that just failed."""
        while True:
            if self._fatal:
                raise self._fatal
            now = time.monotonic()
            usable = [endpoint for endpoint in self.endpoints if endpoint.usable(now)]
            if usable:
                best = min(usable, key=lambda e: (e is avoid, e.in_flight / e.limit))
                best.in_flight += 1
                return best
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter

    def _release(self, endpoint: Endpoint) -> None:
        endpoint.in_flight -= 1
        self._wake(1)

    def _wake(self, places: int) -> None:
        while places > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                places -= 1

    def _pause(self, endpoint: Endpoint, retry_after: str | None, detail: str) -> None:
        endpoint.num_limits += 1
        wait = parse_retry_after(retry_after)
        if wait is None:
            wait = self.patience.backoff_s * 2 ** min(endpoint.num_limits, 6)
        wait = min(max(wait, 0.0), max(LONGEST_PAUSE_S, self.patience.give_up_after_s / 2))
        now = time.monotonic()
        endpoint.limited_since = endpoint.limited_since or now
        endpoint.paused_until = max(endpoint.paused_until, now + wait)
        endpoint.last_error = detail
        asyncio.get_running_loop().call_later(wait + 0.001, self._wake, endpoint.limit)

    def _take_down(self, endpoint: Endpoint, why: str, *, cancel: bool = False) -> None:
        """No further requests until a probe succeeds; with `cancel`, those it holds are taken back."""
        if endpoint.up:
            endpoint.up, endpoint.last_error = False, why
            warn(f"{endpoint.url}: down ({why}); its requests go elsewhere until it answers again.")
        if cancel:
            for task in list(endpoint.attempts):
                task.cancel()

    def _stop(self, error: UserError) -> None:
        """End the run: everybody who waits for a place hears of it."""
        self._fatal = self._fatal or error
        self._wake(len(self._waiting))
        raise self._fatal

    def _backoff(self, attempts: int) -> float:
        return min(self.patience.backoff_s * 2 ** (attempts - 1), 30.0) * random.uniform(0.5, 1.0)

    # -- health

    async def _discover(self) -> None:
        """Ask every endpoint what it serves; settle on one model."""
        asked = [endpoint.url for endpoint in self.endpoints]
        answers = await asyncio.gather(*(self._models(endpoint) for endpoint in self.endpoints))
        for endpoint, models in zip(self.endpoints, answers, strict=True):
            endpoint.up = models is not None
        if not any(endpoint.up for endpoint in self.endpoints):
            whys = {endpoint.last_error.removeprefix(f"{endpoint.url}/models: ") for endpoint in self.endpoints}
            places = f"{asked[0]}{f' to {asked[-1]}' if len(asked) > 1 else ''}"
            raise UserError(
                f"no server answers at {places} ({'; '.join(sorted(whys)[:3])}). "
                "Start some with `fledge serve`, or give --server or --base-port."
            )
        if self._only_answering:
            self.endpoints = [endpoint for endpoint in self.endpoints if endpoint.up]
        for endpoint, models in zip(self.endpoints, [m for m in answers if m is not None or not self._only_answering],
                                    strict=True):  # fmt: skip
            if models is None:
                warn(f"{endpoint.url}: does not answer yet ({endpoint.last_error}); the others begin without it.")
            else:
                self._settle(endpoint, models)
        if self._num_in_flight:
            for endpoint in self.endpoints:
                endpoint.limit = max(self._num_in_flight // len(self.endpoints), 1)
        say(f"{sum(e.up for e in self.endpoints)} of {len(self.endpoints)} servers answer, model {self.model}")

    async def _models(self, endpoint: Endpoint) -> list[Model] | None:
        """The models an endpoint serves; [] where it has no such list; None where it does not answer."""
        try:
            limits = replace(MODELS, total_s=self.patience.probe_timeout_s)
            reply = await self._http.get(f"{endpoint.url}/models", limits=limits)
        except ServerError as error:
            endpoint.last_error = error.detail
            return None
        if reply.status in (401, 403):
            raise UserError(f"{endpoint.url}: HTTP {reply.status}: {error_text(reply.content)} Check --api-key-env.")
        if reply.status >= 500:
            endpoint.last_error = f"HTTP {reply.status}"
            return None
        try:
            return read_reply(reply.content, Models).data
        except ServerError:
            return []

    def _settle(self, endpoint: Endpoint, models: list[Model]) -> None:
        """Take over what the endpoint says of its model, and refuse a mixture of models."""
        names = [model.id for model in models]
        if not self.model and len(names) != 1:
            raise UserError(f"{endpoint.url}: serves {', '.join(names) or 'no listed model'}. Choose one with --model.")
        self.model = self.model or names[0]
        if names and self.model not in names:
            raise UserError(f"{endpoint.url}: serves {', '.join(names)}, not {self.model}. All servers need one model.")
        endpoint.model = self.model
        facts = next((model for model in models if model.id == self.model), None)
        if facts is not None:
            endpoint.is_vllm, endpoint.max_model_len = facts.owned_by == "vllm", facts.max_model_len

    async def _watch(self) -> None:
        """Probe what is down, and what has been given work; stop the run when nothing is usable for too long."""
        unusable_since: float | None = None
        while True:
            await asyncio.sleep(self.patience.probe_every_s)
            await asyncio.gather(*(self._probe(e) for e in self.endpoints if not e.up or e.in_flight))
            now = time.monotonic()
            if any(e.up and e.limited_since is None for e in self.endpoints):
                unusable_since = None
                continue
            unusable_since = unusable_since or now
            if now - unusable_since > self.patience.give_up_after_s and not self._fatal:
                reasons = "; ".join(f"{e.url}: {e.last_error}" for e in self.endpoints[:4])
                self._fatal = UserError(
                    f"no server could be used for {self.patience.give_up_after_s:.0f} s ({reasons}). What was answered "
                    "is kept: start the servers and run the same command again to continue."
                )
                self._wake(len(self._waiting))

    async def _probe(self, endpoint: Endpoint) -> None:
        try:
            models = await self._models(endpoint)
        except UserError as error:  # the key is no longer accepted
            self._fatal = self._fatal or error
            self._wake(len(self._waiting))
            return
        if models is not None:
            endpoint.failed_probes = 0
            if not endpoint.up:
                try:
                    self._settle(endpoint, models)
                except UserError as error:
                    endpoint.last_error = str(error)
                    return
                endpoint.up = True
                say(f"{endpoint.url}: answers again")
                self._wake(endpoint.limit)
            return
        endpoint.failed_probes += 1
        if endpoint.failed_probes >= PROBES_UNTIL_DOWN:
            self._take_down(endpoint, f"{endpoint.failed_probes} probes failed", cancel=True)


def normal_url(url: str) -> str:
    """`host:port` and `http://host:port` mean `http://host:port/v1`; another path is left as it is."""
    root = base_url(url)
    return root if root.count("/") > 2 and not url.rstrip("/ ").endswith("/v1") else f"{root}/v1"
