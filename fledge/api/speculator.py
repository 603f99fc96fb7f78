"""A target with its drafter, from Python: `load`, and a `Speculator` that generates, streams and answers in batches.

pair = fledge.load("Qwen/Qwen3-8B", "path/to/head")
print(pair.generate([{"role": "user", "content": "Why is the sky blue?"}]).text)
"""

import functools
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from fledge.api.pairs import Draft, TapLayers, let_go, pair_up, target_of
from fledge.api.settings import GenerationOptions, GenerationSettings, read_settings
from fledge.data.detokenize import Detokenizer, answer_text
from fledge.data.gguf import model_folder
from fledge.data.rejects import Reject
from fledge.data.samples import Prompt
from fledge.data.tokenize import ChatTemplate
from fledge.decoding import generate as decoding
from fledge.decoding.default_tree import drafting
from fledge.decoding.exact import want_exact
from fledge.decoding.records import Generation
from fledge.drafters.base import Drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target

Messages = Sequence[Mapping[str, Any]]  # of a chat
PromptLike = str | Messages | Sequence[int] | Tensor | Mapping[str, Any]
OF_A_TOKENIZER = {"input_ids", "attention_mask", "token_type_ids"}


@dataclass(frozen=True)
class GeneratedText:
    """An answer, and what the drafter was worth."""

    text: str
    token_ids: list[int]  # the stop token included when it was generated, and the last token of a stop string
    finish_reason: Literal["stop", "length"]
    tau: float  # tokens per forward of the target; NaN where the prompt's forward was the only one
    tokens_per_s: float  # after the first token


def load(
    target: Any,
    draft: Draft = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    tree: TreeShape | None = None,
    exact: bool = False,
    chat_template_type: str | None = None,
    enable_thinking: bool | None = None,
) -> "Speculator":
    """A target and its drafter, ready to answer.

    `target`: a folder, a hub name, a GGUF file, or a loaded transformers model, whose `tokenizer` must be given then;
    it is put into evaluation mode. `draft`: the folder that training wrote, the name of a drafter without weights, a
    loaded drafter, or None for plain decoding. `tree`: the shape of the draft trees, else the engine's own choice.
    `exact`: the same text with and without a draft, bit for bit, in bf16 too, at any cost; without it where that costs
    nothing (`fledge.decoding.exact`). `chat_template_type` and
    `enable_thinking` are about chat messages, as in `fledge decode`.
    """
    if isinstance(target, (str, bytes)) or hasattr(target, "__fspath__"):
        if tokenizer is not None:
            raise UserError("tokenizer= belongs to a loaded model; a folder or hub name brings its own. Leave it out.")
        kind, folder = _dtype(dtype), model_folder(str(target))

        def make_target(taps: TapLayers) -> Target:
            return Target.from_pretrained(folder, dtype=kind, device=device, tap_layers=taps)
    else:
        if tokenizer is None:
            raise UserError(
                f"a loaded model ({type(target).__name__}) needs its tokenizer: load(model, tokenizer=...)."
            )
        if dtype != "auto" or device is not None:
            raise UserError("dtype= and device= are for loading; this model is loaded. Move it with model.to(...).")

        def make_target(taps: TapLayers) -> Target:
            return target_of(target, tokenizer, taps)

    pair = pair_up(draft, make_target)
    want_exact(pair[0], exact)
    return Speculator(*pair, tree=tree, chat_template_type=chat_template_type, enable_thinking=enable_thinking)


class Speculator:
    """A target that answers with the help of a drafter; the text is the target's own. Made by `load`.

    A prompt is a text (taken as it is), the messages of a chat (rendered by the chat template), token ids, a tensor of
    them, or what a tokenizer returned. `generation_config` is transformers'; keyword arguments win.
    """

    def __init__(
        self, target: Target, drafter: Drafter | None, *, tree: TreeShape | None = None,
        chat_template_type: str | None = None, enable_thinking: bool | None = None,
    ) -> None:  # fmt: skip
        self.target, self.drafter, self.tree = target, drafter, tree
        self._chat_template_type, self._enable_thinking = chat_template_type, enable_thinking
        weakref.finalize(self, let_go, target)

    @property
    def tokenizer(self) -> Any:
        return self.target.tokenizer

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """Renders chat messages; its end-of-turn tokens end answers to them."""
        target = self.target
        return ChatTemplate(
            target.tokenizer, self._chat_template_type, eos_token_ids=target.eos_token_ids,
            enable_thinking=self._enable_thinking, vision=target.vision,
        )  # fmt: skip

    def generate(
        self, prompt: PromptLike, generation_config: Any = None, **options: Unpack[GenerationOptions]
    ) -> GeneratedText:
        """The answer to one prompt."""
        settings, ready = self._settings(generation_config, options), self._prompt(prompt)
        made = decoding.generate(
            self.target, self.drafter, ready.ids, model_inputs=ready.model_inputs,
            **self._arguments(settings, [prompt], len(ready)), **drafting(self.target, self.drafter, self.tree),
        )  # fmt: skip
        return self._finished(made, settings)

    def stream(
        self, prompt: PromptLike, generation_config: Any = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[str]:  # fmt: skip
        """The same answer in pieces of text, as they are generated. Closing the iterator ends the generation."""
        settings, ready = self._settings(generation_config, options), self._prompt(prompt)
        rounds = decoding.stream(
            self.target, self.drafter, [ready.ids], model_inputs=ready.model_inputs,
            **self._arguments(settings, [prompt], len(ready)), **drafting(self.target, self.drafter, self.tree),
        )  # fmt: skip
        return self._pieces(rounds, settings.sampling.stop)

    def generate_batch(
        self, prompts: Sequence[PromptLike], generation_config: Any = None, *, batch_size: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[GeneratedText]:  # fmt: skip
        """The answers to several prompts, in their order, `batch_size` at a time (None: all).

        With a seed, prompt i draws as it does alone with the seed plus i.
        """
        if isinstance(prompts, (str, Mapping)):
            raise UserError(f"generate_batch takes a list of prompts, not a {type(prompts).__name__}.")
        settings, ready = self._settings(generation_config, options), [self._prompt(prompt) for prompt in prompts]
        arguments = self._arguments(settings, prompts, max(map(len, ready), default=0))
        at_once = min(batch_size or len(ready), len(ready))
        arguments |= drafting(self.target, self.drafter, self.tree, at_once=at_once)
        made = decoding.generate_batch(
            self.target, self.drafter, [one.ids for one in ready], batch_size=batch_size,
            model_inputs=[one.model_inputs for one in ready], **arguments,
        )  # fmt: skip
        return [self._finished(one, settings) for one in made]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _settings(self, config: Any, options: GenerationOptions) -> GenerationSettings:
        return read_settings(config, getattr(self.target.model, "generation_config", None), options)

    def _arguments(self, settings: GenerationSettings, prompts: Sequence[PromptLike], longest: int) -> dict[str, Any]:
        """What every way to decode takes."""
        stops = settings.eos_token_ids
        if stops is None:
            of_chats = self.template.stop_token_ids if any(is_chat(prompt) for prompt in prompts) else ()
            stops = tuple(sorted({*self.target.eos_token_ids, *of_chats}))
        return {
            "max_new_tokens": settings.limit(longest), "sampling": settings.sampling, "eos_token_ids": stops,
        }  # fmt: skip

    def _prompt(self, prompt: PromptLike) -> Prompt:
        """Token ids, and the pixels of a chat with pictures."""
        if isinstance(prompt, str):
            return Prompt(self.tokenizer(prompt)["input_ids"])
        if is_chat(prompt):
            try:
                return self.template.prompt([dict(message) for message in prompt])  # type: ignore[arg-type, union-attr]
            except Reject as reject:
                raise UserError(f"the chat cannot be rendered ({reject.detail}). Change it, or give a text.") from None
        if isinstance(prompt, Mapping):
            return Prompt(_ids_of_encoding(prompt))
        return Prompt(_one_row(prompt))  # type: ignore[arg-type]

    def _pieces(self, rounds: Generator[list[list[int]], None, None], stop: Sequence[str]) -> Iterator[str]:
        detokenizer = Detokenizer(self.tokenizer, stop)
        with closing(rounds):
            for (tokens,) in rounds:
                if piece := "".join(map(detokenizer.add, tokens)):
                    yield piece
        if rest := detokenizer.rest():
            yield rest

    def _finished(self, made: Generation, settings: GenerationSettings) -> GeneratedText:
        text = answer_text(self.tokenizer, made.token_ids, settings.sampling.stop)
        return GeneratedText(text, made.token_ids, made.finish_reason, made.tau, made.tokens_per_s)


def is_chat(prompt: PromptLike) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)


def _ids_of_encoding(encoding: Mapping[str, Any]) -> list[int]:
    """The ids of one row that a tokenizer encoded, without its padding."""
    if unknown := sorted(encoding.keys() - OF_A_TOKENIZER):
        raise UserError(f"a prompt of input_ids came with {', '.join(unknown)}. Give pictures as parts of a chat.")
    ids = _one_row(encoding["input_ids"])
    mask = encoding.get("attention_mask")
    return ids if mask is None else [token for token, seen in zip(ids, _one_row(mask), strict=True) if seen]


def _one_row(ids: Any) -> list[int]:
    """One prompt's ids, from a list or a tensor of one or two dimensions."""
    row = torch.as_tensor(ids)
    if row.dim() == 2 and len(row) == 1:
        row = row[0]
    if row.dim() != 1 or (len(row) and (row.is_floating_point() or row.is_complex())):
        raise UserError(
            f"a prompt of token ids is one row of integers, found {row.dtype} of shape {tuple(row.shape)}. Several "
            f"prompts go to generate_batch."
        )
    return row.tolist()


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, (str, torch.dtype)):
        raise UserError(f"dtype={dtype!r} is no number format. Use auto, bfloat16, float16, float32 or a torch.dtype.")
    return found
