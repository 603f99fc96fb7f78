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

from fledge.data.conversations import Conversation
from fledge.data.images import folder_of, image_parts, read_pictures
from fledge.data.masking import Masked, masked
from fledge.data.rejects import Reject
from fledge.data.rendering import PROBE, THINKING_SWITCHES, Renderer
from fledge.data.samples import (
    MIN_SUPERVISED,
    TURN_MARK,
    Drop,
    Prompt,
    Sample,
    Text,
    fit_all,
    last_run,
    sample_from_token_ids,
)
from fledge.data.spans import Ends, Messages, Rendering, Unmaskable, trained_answers
from fledge.data.templates import OWN, fitting_template, read_template, template_name
from fledge.data.traces import Untraced, refuse_untraced
from fledge.data.vision import Vision, load_vision
from fledge.data.vocab import vocab_size_of
from fledge.errors import UserError, refuse_missing_folder

END = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands where an unfinished message ends
CHECKED_ROWS = 64  # rows with token ids whose text is compared with their answer, per process


class ChatTemplate:
    """A tokenizer with the template that renders its conversations: its own, or a named one that overrides it.

    `last_turn_only` supervises the last answer of a conversation alone; what comes before it is context.
    `eos_token_ids` are the model's (config, generation config): a tokenizer's own eos may be wrong (SmolLM2's GGUF
    says <|im_start|>), so it counts only where the model's are not given and the token opens no turn.
    """

    def __init__(
        self, tokenizer: Any, name: str | None = None, *, eos_token_ids: Sequence[int] = (),
        enable_thinking: bool | None = None, vision: Vision | None = None, last_turn_only: bool = False,
        untraced: Untraced = "reject",
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{_where(tokenizer)}: a slow tokenizer ({type(tokenizer).__name__}) gives no character offsets, and "
                f"the loss mask needs them. Use a checkpoint with tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.vision = vision
        self.name = template_name(name)
        self.text = own_template(tokenizer, vision) if self.name == OWN else read_template(self.name, tokenizer)
        self.last_turn_only, self.untraced = last_turn_only, untraced
        self.renderer = Renderer(tokenizer, self.text, self.name, enable_thinking=enable_thinking, vision=vision)
        self.fingerprint = self._fingerprint()
        self.vocab_size = vocab_size_of(tokenizer)
        self._checked = 0
        self.stop_token_ids = self._known_stops(tuple(eos_token_ids))
        self._ends = self._ends_of_turns()
        self.end_of_turn = self._end_of_turn()
        if not eos_token_ids and self.end_of_turn is not None:
            self.stop_token_ids = tuple(sorted({*self.stop_token_ids, self.end_of_turn}))
            self._ends = self._ends_of_turns()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, name: str | None = None, *, enable_thinking: bool | None = None,
        trust_remote_code: bool = False, min_pixels: int | None = None, max_pixels: int | None = None,
        last_turn_only: bool = False, untraced: Untraced = "reject",
    ) -> "ChatTemplate":  # fmt: skip
        """Tokenizer (or processor), template and eos ids of a target folder or hub name, without its weights."""
        vision = load_vision(
            name_or_path, min_pixels=min_pixels, max_pixels=max_pixels, trust_remote_code=trust_remote_code
        )
        tokenizer = vision.tokenizer if vision else load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
        return cls(
            tokenizer, name or None, eos_token_ids=model_eos_token_ids(name_or_path), enable_thinking=enable_thinking,
            vision=vision, last_turn_only=last_turn_only, untraced=untraced,
        )  # fmt: skip

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The texts of the tokens at which the target stops generating."""
        return self._ends.stops

    # ---- text ----------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, add_generation_prompt: bool = False, **kwargs: Any) -> str:
        """The template's text for these messages; a template that refuses them is a Reject."""
        return self.renderer.render(messages, add_generation_prompt, **kwargs)

    def prompt(
        self, messages: Messages, *, enable_thinking: bool | None = None, folder: Path | None = None, **kwargs: Any
    ) -> Prompt:
        """What generation is fed for these messages, generation prompt included: token ids, and pixels if any. `kwargs`
        are the template's."""
        pictures = read_pictures(list(messages), folder) if self.vision else []
        if enable_thinking is not None:
            kwargs |= dict.fromkeys(THINKING_SWITCHES, enable_thinking)
        if not pictures:
            self._refuse_pictures(messages)
            return Prompt(self.prompt_ids(messages, **kwargs))
        assert self.vision is not None
        images = [picture.image for picture in pictures]
        expanded = self.vision.expand(self.render(messages, True, **kwargs), images)
        ids = self._encodings([expanded.text])[0].ids
        return Prompt(ids, self.vision.inputs(images, torch.tensor(ids), self._stub(len(images))))

    def prompt_ids(self, messages: Messages, **kwargs: Any) -> list[int]:
        """Token ids of a prompt, generation prompt included: what generation is fed. `kwargs` are the template's."""
        return self._encodings([self.render(messages, True, **kwargs)])[0].ids

    def unfinished_ids(self, messages: Messages) -> list[int]:
        """Token ids of these messages up to the last character of the last one, which is still to be written."""
        *before, last = messages
        text = self.render([*before, {**last, "content": f"{last['content']}{END}"}])
        if END not in text:
            raise Reject("refused by the template", f"template {self.name!r} leaves out a message of {last['role']}")
        return self._encodings([text[: text.rindex(END)]])[0].ids

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
                self._refuse_untrained(conversation)
                ready = self._from_token_ids(conversation)
                if ready is not None:
                    results[-1] = [ready]
                    continue
                masked = self._masked(conversation)
                refuse_untraced(masked.untraced, self.name, self.untraced)
                lost[len(results) - 1] = masked.untraced
                pending += [(len(results) - 1, text) for text in self._texts(conversation, masked.renderings)]
            except Reject as reject:
                results[-1] = reject
        encodings = self._encodings([text.text for _, text in pending])
        for (index, text), encoding in zip(pending, encodings, strict=True):
            samples = results[index]
            assert isinstance(samples, list)
            sample = text.sample(encoding)
            samples.append(sample if samples or not lost[index] else replace(sample, untraced=lost[index]))
        return [fit_all(result, max_length, min_supervised) for result in results]

    def load(self, sample: Sample) -> Sample:
        """The sample with what the model takes beside its tokens: its pictures are read and made pixels here."""
        if not sample.images or sample.model_inputs:
            return sample
        assert self.vision is not None, "a sample with pictures and a template without a processor"
        images = [image.open() for image in sample.images]
        return replace(sample, model_inputs=self.vision.inputs(images, sample.input_ids, self._stub(len(images))))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _texts(self, conversation: Conversation, renderings: list[Rendering]) -> list[Text]:
        """Every text of a conversation that becomes a sample, its placeholders written out."""
        texts = []
        folder = folder_of(conversation.where) if self.vision else None
        pictures = read_pictures(conversation.messages, folder) if self.vision else []
        for rendering in renderings:
            id = conversation.id + ("" if rendering.turn is None else f"{TURN_MARK}{rendering.turn}")
            if self.vision is None:
                texts.append(Text(id, rendering.text, rendering.spans))
                continue
            # a rendering that ends early holds the first of the pictures
            end = self._answers(conversation)[-1] if rendering.turn is None else rendering.turn
            shown = pictures[: sum(1 for _ in image_parts(conversation.messages[: end + 1]))]
            expanded = self.vision.expand(rendering.text, [picture.image for picture in shown])
            spans = tuple(expanded.span(*span) for span in rendering.spans)
            marks = tuple(zip(shown, expanded.images, strict=True))
            texts.append(Text(id, expanded.text, spans, marks, expanded.token_ids))
        return texts

    def _refuse_pictures(self, messages: Messages) -> None:
        for index, message in enumerate(messages):
            if not isinstance(message["content"], str) and self.vision is None:
                kinds = sorted({part["type"] for part in message["content"]})
                raise Reject("not text", f"message {index} has parts {kinds}, this is a text target")

    def _answers(self, conversation: Conversation) -> list[int]:
        """Indices of the messages to supervise."""
        return trained_answers(conversation.messages, self.last_turn_only)

    def _refuse_untrained(self, conversation: Conversation) -> None:
        if conversation.num_answers and not self._answers(conversation):
            raise Drop("not supervised", "the row marks every answer that could be supervised as not to be trained")

    def _shows_pictures(self, conversation: Conversation) -> bool:
        return self.vision is not None and any(True for _ in image_parts(conversation.messages))

    def _stub(self, num_images: int) -> str:
        """A text with so many placeholders, in the form the processor accepts."""
        return self.render([{"role": "user", "content": [{"type": "image"}] * num_images}])

    def _masked(self, conversation: Conversation) -> Masked:
        if not conversation.num_answers:
            raise Reject("no answer", "it has no assistant message; answer it first with `fledge regenerate`")
        self._refuse_pictures(conversation.messages)
        messages, answers = _with_finish_reason(conversation), self._answers(conversation)
        tools = {"tools": conversation.tools} if conversation.tools else {}
        try:
            return masked(messages, answers, self.renderer, self._ends, {**conversation.template_kwargs, **tools})
        except Unmaskable as found:
            raise Reject(
                "cannot be masked", f"template {self.name!r}, {found}; another may be named (--chat-template-type)"
            ) from None

    def _from_token_ids(self, conversation: Conversation) -> Sample | None:
        if self._shows_pictures(conversation):  # how ids of another program stand for pictures is not known
            return None
        sample = sample_from_token_ids(conversation, self.vocab_size)
        if sample is not None and self.last_turn_only:
            sample = replace(sample, loss_mask=last_run(sample.loss_mask))
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

    def _fingerprint(self) -> str:
        parts = [self.text, str(self.renderer.enable_thinking)]
        parts += [self.vision.fingerprint] if self.vision else []
        parts += ["last turn only"] if self.last_turn_only else []
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _ends_of_turns(self) -> Ends:
        """The texts of control tokens, longest first, and of the stop tokens among them."""
        added = self.tokenizer.added_tokens_decoder
        stops = {self.tokenizer.convert_ids_to_tokens(id) for id in self.stop_token_ids if id < self.vocab_size}
        special = {token.content for token in added.values() if token.special} | stops - {None}
        return Ends(tuple(sorted(special, key=len, reverse=True)), tuple(sorted(stops - {None})))

    def _end_of_turn(self) -> int | None:
        """The token this template ends an answer with, from a probe; None without one (or when the probe fails)."""
        try:
            rendering = self._masked(Conversation("probe", PROBE[:2])).renderings[0]
        except Reject:
            return None
        start, end = rendering.spans[-1]
        token = next((token for token in self._ends.control if rendering.text.endswith(token, start, end)), None)
        return None if token is None else self.tokenizer.convert_tokens_to_ids(token)

    def _known_stops(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """The model's stop ids; without them the tokenizer's eos, unless it opens a turn."""
        eos = self.tokenizer.eos_token_id
        if eos_token_ids or eos is None:
            return tuple(sorted(set(eos_token_ids)))
        try:
            opening = self.render(PROBE[:1], True).removeprefix(self.render(PROBE[:1]))
        except Reject:
            return (eos,)
        return () if self.tokenizer.eos_token in opening else (eos,)


def own_template(tokenizer: Any, vision: Vision | None = None) -> str:
    """The processor's or the tokenizer's own chat template."""
    if vision is not None and vision.template_text:
        return vision.template_text
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"{_where(tokenizer)}: the tokenizer has no (default) chat template. Name one with --chat-template-type; "
            f"{fitting_template(tokenizer)!r} fits it."
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


def _where(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"
