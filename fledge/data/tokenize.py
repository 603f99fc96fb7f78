"""Conversations to token ids and the mask of tokens the assistant wrote.

Knows tokenizers and chat templates; knows nothing of files or models. The whole text is tokenised once, with offsets,
and a token is supervised when it lies inside what the assistant wrote (`spans.py`): the generation prompt never is, the
end-of-turn token always is, the newline a template puts after it is not. A token that merges text from both sides of a
border is not supervised, because the assistant did not write all of it.

With a vision-language target (`vision`), the rendered text holds one placeholder per picture; its processor writes them
out before the text is tokenised, and the assistant's spans move along. A sample then names its pictures.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fledge.console import warn
from fledge.data.conversations import Conversation
from fledge.data.images import folder_of, image_parts, read_pictures
from fledge.data.rejects import Reject
from fledge.data.samples import (
    MIN_SUPERVISED,
    TURN_MARK,
    Prompt,
    Sample,
    Text,
    fit_all,
    sample_from_token_ids,
)
from fledge.data.spans import Messages, Unmaskable, supervised_renderings
from fledge.data.templates import read_template
from fledge.data.traces import Untraced, reasoning_name, refuse_untraced, untraced, with_reasoning_as
from fledge.data.vision import Vision, load_vision
from fledge.data.vocab import vocab_size_of
from fledge.errors import UserError, refuse_missing_folder

CHECKED_ROWS = 64  # rows with token ids whose text is compared with their answer, per process
PROBE = (
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "Second question"},
    {"role": "assistant", "content": "second answer"},
)


class ChatTemplate:
    """A tokenizer with the template that renders its conversations: its own, or a named one that overrides it.

    `eos_token_ids` are the model's (config, generation config): a tokenizer's own eos may be wrong (SmolLM2's GGUF
    says <|im_start|>), so it counts only where the model's are not given and the token opens no turn.
    """

    def __init__(
        self, tokenizer: Any, name: str | None = None, *, eos_token_ids: Sequence[int] = (),
        enable_thinking: bool | None = None, vision: Vision | None = None, untraced: Untraced = "reject",
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{_where(tokenizer)}: a slow tokenizer ({type(tokenizer).__name__}) gives no character offsets, and "
                f"the loss mask needs them. Use a checkpoint with tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.vision = vision
        self.name = name or "own"
        self.text = read_template(name, tokenizer) if name else own_template(tokenizer, vision)
        self.enable_thinking = enable_thinking
        self.untraced = untraced
        pictures = f"\0{vision.fingerprint}" if vision else ""
        self.fingerprint = hashlib.sha256(f"{self.text}\0{enable_thinking}{pictures}".encode()).hexdigest()
        self.vocab_size = vocab_size_of(tokenizer)
        self._end_tokens = _control_tokens(tokenizer)
        self._checked = 0
        self._reasoning_name = reasoning_name(self.text)
        self._only_parts = vision is not None and self._reads_only_parts()
        self.end_of_turn = self._end_of_turn()
        self.stop_token_ids = self._stop_token_ids(tuple(eos_token_ids))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, name: str | None = None, *, enable_thinking: bool | None = None,
        trust_remote_code: bool = False, min_pixels: int | None = None, max_pixels: int | None = None,
        untraced: Untraced = "reject",
    ) -> "ChatTemplate":  # fmt: skip
        """Tokenizer (or processor), template and eos ids of a target folder or hub name, without its weights."""
        vision = load_vision(
            name_or_path, min_pixels=min_pixels, max_pixels=max_pixels, trust_remote_code=trust_remote_code
        )
        tokenizer = vision.tokenizer if vision else load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
        return cls(
            tokenizer, name or None, eos_token_ids=model_eos_token_ids(name_or_path), enable_thinking=enable_thinking,
            vision=vision, untraced=untraced,
        )  # fmt: skip

    # ---- text ----------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, add_generation_prompt: bool = False, **kwargs: Any) -> str:
        """The template's text for these messages; a template that refuses them is a Reject."""
        if self.enable_thinking is not None:
            kwargs.setdefault("enable_thinking", self.enable_thinking)
        try:
            return self.tokenizer.apply_chat_template(
                self._as_template_wants(messages), chat_template=self.text, tokenize=False,
                add_generation_prompt=add_generation_prompt, **kwargs,
            )  # fmt: skip
        except Exception as error:  # jinja and the template's own raise_exception: any type, any text
            raise Reject("refused by the template", f"template {self.name!r}: {error}") from None

    def prompt(self, messages: Messages, *, enable_thinking: bool | None = None, folder: Path | None = None) -> Prompt:
        """What generation is fed for these messages, generation prompt included: token ids, and pixels if any."""
        pictures = read_pictures(list(messages), folder) if self.vision else []
        kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if not pictures:
            self._refuse_pictures(messages)
            return Prompt(self.prompt_ids(messages, **kwargs))
        assert self.vision is not None
        images = [picture.image for picture in pictures]
        expanded = self.vision.expand(self.render(messages, True, **kwargs), images)
        ids = self._encodings([expanded.text])[0].ids
        return Prompt(ids, self.vision.inputs(images, torch.tensor(ids), self._stub(len(images))))

    def prompt_ids(self, messages: Messages, *, enable_thinking: bool | None = None) -> list[int]:
        """Token ids of a prompt, generation prompt included: what generation is fed."""
        kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return self._encodings([self.render(messages, True, **kwargs)])[0].ids

    # ---- samples -------------------------------------------------------------------------------------------------

    def encode(self, conversation: Conversation, max_length: int | None = None) -> Sample:
        """The sample of the whole conversation. Raises Reject when it cannot be masked, Drop when nothing is left."""
        return self.samples(conversation, max_length)[0]

    def samples(self, conversation: Conversation, max_length: int | None = None) -> list[Sample]:
        """Every sample of a conversation: one, plus one per turn the template does not keep as written."""
        result = self.encode_many([conversation], max_length)[0]
        if isinstance(result, Reject):
            raise result
        return result

    def encode_many(
        self, conversations: Iterable[Conversation], max_length: int | None = None,
        min_supervised: int = MIN_SUPERVISED,
    ) -> list[list[Sample] | Reject]:  # fmt: skip
        """`samples` for many, tokenised in one batch; a conversation that fails gives its Reject instead."""
        results: list[list[Sample] | Reject] = []
        pending: list[tuple[int, Text]] = []  # result index, what to tokenise
        lost: dict[int, tuple[str, ...]] = {}  # result index, fields that the template did not render
        for conversation in conversations:
            results.append([])
            try:
                ready = self._from_token_ids(conversation) or self._from_markers(conversation)
                if ready is not None:
                    results[-1] = [ready]
                    continue
                lost[len(results) - 1] = self._untraced(conversation)
                pending += [(len(results) - 1, text) for text in self._texts(conversation)]
            except Reject as reject:
                results[-1] = reject
        encodings = self._encodings([text.text for _, text in pending])
        for (index, text), encoding in zip(pending, encodings, strict=True):
            samples = results[index]
            assert isinstance(samples, list)
            sample = text.sample(encoding)
            samples.append(sample if samples or not lost[index] else replace(sample, untraced=lost[index]))
        return [fit_all(result, max_length, min_supervised) for result in results]

    def verify(self) -> None:
        """Stop the run when this template cannot be masked at all, before a million rows say so one by one."""
        messages = list(PROBE[:2])
        try:
            samples = self.samples(Conversation("probe", tuple(messages)))
        except Reject as reject:
            raise UserError(
                f"{_where(self.tokenizer)}: chat template {self.name!r} cannot be masked ({reject.detail}). Choose a "
                f"named template (--chat-template-type), set --enable-thinking, or train on rows that carry token ids "
                f"(prompt_token_ids and token_ids)."
            ) from None
        words = self.tokenizer.decode(samples[0].input_ids[samples[0].loss_mask])
        if "first answer" not in words or "First question" in words:
            raise UserError(
                f"{_where(self.tokenizer)}: chat template {self.name!r} masks {words!r} for the answer 'first answer'. "
                f"Choose another template with --chat-template-type."
            )
        if self.end_of_turn is None:
            warn(
                f"chat template {self.name!r} ends no turn with a control token: the draft never learns where to stop."
            )
        elif self.end_of_turn not in self.stop_token_ids:
            token = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
            warn(f"chat template {self.name!r} ends turns with {token!r}, where the model does not stop generating.")

    def load(self, sample: Sample) -> Sample:
        """The sample with what the model takes beside its tokens: its pictures are read and made pixels here."""
        if not sample.images or sample.model_inputs:
            return sample
        assert self.vision is not None, "a sample with pictures and a template without a processor"
        images = [image.open() for image in sample.images]
        return replace(sample, model_inputs=self.vision.inputs(images, sample.input_ids, self._stub(len(images))))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _texts(self, conversation: Conversation) -> list[Text]:
        """Every text of a conversation that becomes a sample, its placeholders written out."""
        texts = []
        folder = folder_of(conversation.where) if self.vision else None
        pictures = read_pictures(conversation.messages, folder) if self.vision else []
        for rendering in self._renderings(conversation):
            id = conversation.id + ("" if rendering.turn is None else f"{TURN_MARK}{rendering.turn}")
            if self.vision is None:
                texts.append(Text(id, rendering.text, rendering.spans))
                continue
            # a rendering that ends early holds the first of the pictures
            messages = _up_to_answer(conversation.messages, rendering.turn)
            shown = pictures[: sum(1 for _ in image_parts(messages))]
            expanded = self.vision.expand(rendering.text, [picture.image for picture in shown])
            spans = tuple(expanded.span(*span) for span in rendering.spans)
            marks = tuple(zip(shown, expanded.images, strict=True))
            texts.append(Text(id, expanded.text, spans, marks, expanded.token_ids))
        return texts

    def _untraced(self, conversation: Conversation) -> tuple[str, ...]:
        """The fields of a conversation that its text does not show; a Reject where that is not wanted."""
        kwargs = _template_kwargs(conversation)
        lost = untraced(conversation.messages, kwargs, self.render, self.text)
        refuse_untraced(lost, self.name, self.untraced)
        return lost

    def _as_template_wants(self, messages: Messages) -> list[dict[str, Any]]:
        """Reasoning under the template's key, pictures as bare marks, text as parts where it must be."""
        messages = with_reasoning_as(messages, self._reasoning_name)
        if self.vision is None:
            return list(messages)
        wanted = []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                bare = [part if part.get("type") == "text" else {"type": "image"} for part in content]
                message = {**message, "content": bare}
            elif self._only_parts:
                message = {**message, "content": [{"type": "text", "text": content}]}
            wanted.append(message)
        return wanted

    def _refuse_pictures(self, messages: Messages) -> None:
        for index, message in enumerate(messages):
            if not isinstance(message["content"], str) and self.vision is None:
                kinds = sorted({part["type"] for part in message["content"]})
                raise Reject("not text", f"message {index} has parts {kinds}, this is a text target")

    def _shows_pictures(self, conversation: Conversation) -> bool:
        return self.vision is not None and any(True for _ in image_parts(conversation.messages))

    def _reads_only_parts(self) -> bool:
        """Templates of LLaVA and SmolVLM lose a content that is a string: they walk over its parts."""
        self._only_parts = False
        try:
            return PROBE[0]["content"] not in self.render(PROBE[:1])
        except Reject:
            return True

    def _stub(self, num_images: int) -> str:
        """A text with so many placeholders, in the form the processor accepts."""
        return self.render([{"role": "user", "content": [{"type": "image"}] * num_images}])

    def _renderings(self, conversation: Conversation):
        if not any(message["role"] == "assistant" for message in conversation.messages):
            raise Reject("no answer", "it has no assistant message; answer it first with `fledge regenerate`")
        self._refuse_pictures(conversation.messages)
        kwargs = _template_kwargs(conversation)
        messages = _with_finish_reason(conversation)

        def render(messages: Messages, add_generation_prompt: bool) -> str:
            return self.render(messages, add_generation_prompt, **kwargs)

        try:
            return supervised_renderings(messages, render, self._end_tokens)
        except Unmaskable as found:
            raise Reject("cannot be masked", f"template {self.name!r}, {found}") from None

    def _from_markers(self, conversation: Conversation) -> Sample | None:
        """A template with {% generation %} markers states itself what the assistant wrote."""
        if "endgeneration" not in self.text or not conversation.num_answers or self._shows_pictures(conversation):
            return None
        try:
            encoded = self.tokenizer.apply_chat_template(
                self._as_template_wants(conversation.messages), chat_template=self.text, return_dict=True,
                return_assistant_tokens_mask=True, **_template_kwargs(conversation),
            )  # fmt: skip
        except Exception as error:
            raise Reject("refused by the template", f"template {self.name!r}: {error}") from None
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
        ends = torch.zeros_like(mask)
        ends[1:] = mask[:-1] & ~mask[1:] & torch.isin(ids[1:], torch.tensor(self.stop_token_ids))
        return Sample(conversation.id, ids, mask | ends)

    def _from_token_ids(self, conversation: Conversation) -> Sample | None:
        if self._shows_pictures(conversation):  # how ids of another program stand for pictures is not known
            return None
        sample = sample_from_token_ids(conversation, self.vocab_size)
        if sample is None or self._checked >= CHECKED_ROWS:
            return sample
        self._checked += 1
        answer = conversation.messages[-1]["content"] if conversation.messages else None
        if isinstance(answer, str) and answer.strip():
            written = sample.input_ids[sample.loss_mask]
            words = self.tokenizer.decode(written)
            plain = self.tokenizer.decode(written, skip_special_tokens=True)  # as servers return text
            if answer.strip() not in words and answer.strip() not in plain:
                raise Reject(
                    "token ids of another tokenizer",
                    f"its token ids decode to {words[:60]!r}, its answer is {answer.strip()[:60]!r}",
                )
        return sample

    def _encodings(self, texts: list[str]) -> list[Any]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return backend.encode_batch(texts, add_special_tokens=False) if texts else []

    def _end_of_turn(self) -> int | None:
        """The token this template ends an answer with, from a probe; None without one (or when the probe fails)."""
        try:
            rendering = self._renderings(Conversation("probe", PROBE[:2]))[0]
        except Reject:
            return None
        start, end = rendering.spans[-1]
        token = next((token for token in self._end_tokens if rendering.text.endswith(token, start, end)), None)
        return None if token is None else self.tokenizer.convert_tokens_to_ids(token)

    def _stop_token_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        stops = set(eos_token_ids)
        if not stops and self.tokenizer.eos_token_id is not None:
            try:
                opens_a_turn = self.tokenizer.eos_token_id in self.prompt_ids(PROBE[:1])
            except Reject:
                opens_a_turn = False
            stops = set() if opens_a_turn else {self.tokenizer.eos_token_id}
        if not eos_token_ids and self.end_of_turn is not None:
            stops.add(self.end_of_turn)
        return tuple(sorted(stops))


def own_template(tokenizer: Any, vision: Vision | None = None) -> str:
    """The processor's or the tokenizer's own chat template."""
    if vision is not None and vision.template_text:
        return vision.template_text
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"{_where(tokenizer)}: the tokenizer has no (default) chat template. Name one with --chat-template-type."
        ) from None


def load_tokenizer(name_or_path: str, *, trust_remote_code: bool = False) -> Any:
    """A target's tokenizer; every way it can fail is one line."""
    from transformers import AutoTokenizer

    refuse_missing_folder(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing files, no network, broken json, remote code: the library's types vary
        raise UserError(
            f"{name_or_path}: no tokenizer could be loaded ({type(error).__name__}: {str(error)[:200]}). "
            f"Give a folder with tokenizer.json or the name of a model on the hub."
        ) from None


def model_eos_token_ids(name_or_path: str) -> tuple[int, ...]:
    """The ids at which the model stops, from its generation config, else its config, else none."""
    from transformers import AutoConfig, GenerationConfig

    for read in (GenerationConfig.from_pretrained, AutoConfig.from_pretrained):
        try:
            eos = getattr(read(name_or_path), "eos_token_id", None)
        except (OSError, ValueError, KeyError):
            continue
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ()


def _with_finish_reason(conversation: Conversation) -> list[dict[str, Any]]:
    """An answer that stopped at the length limit was given no end of turn: its template's one is not supervised."""
    messages = [dict(message) for message in conversation.messages]
    if conversation.meta.get("finish_reason") == "length":
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        messages[last]["finish_reason"] = "length"
    return messages


def _template_kwargs(conversation: Conversation) -> dict[str, Any]:
    """What a row says about its own rendering: `tools` and `chat_template_kwargs` (enable_thinking and the like)."""
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {**conversation.template_kwargs, **tools}


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that may end a turn: special tokens, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {tokenizer.eos_token} if tokenizer.eos_token else set()
    return tuple(sorted(special, key=len, reverse=True))


def _up_to_answer(messages: Sequence[dict[str, Any]], turn: int | None) -> Sequence[dict[str, Any]]:
    """The messages of a rendering: up to the message `turn`, or up to the last answer."""
    last = turn if turn is not None else max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return messages[: last + 1]


def _where(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"
