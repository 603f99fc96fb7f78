"""The target: any transformers causal LM or image-text model, unchanged, as the rest of fledge sees it.

Asks the model through the library's own questions (text config, embeddings, decoder) and reads the tapped states with
hooks on the decoder's layers. Knows no architecture by name: what transformers does not answer uniformly is a row in
`fledge.target.quirks`. Pictures exist up to its forward: behind it they are hidden states and positions.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from fledge.data.templates import OWN, read_template, template_name
from fledge.data.vision import Vision, has_vision, load_vision
from fledge.errors import UserError, refuse_missing_folder
from fledge.target.linear import head_logits
from fledge.target.quantised import FLOATS, embedding_matrix, head_matrix, method_of, not_loadable, plain_weight
from fledge.target.quirks import logit_quirks
from fledge.target.record import TapChoice, TargetOutput, chosen_taps

# B batch, T tokens, A tapped layers, H hidden size, V vocabulary, R axes of a multimodal rope

LOOKS_FOR_SEVERAL_TEXTS = masking_utils.find_packed_sequence_indices
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Target:
    """A frozen target model with its tokenizer. Forward passes return hidden states; `head` turns rows into logits."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        vision: Vision | None = None,
        tap_layers: TapChoice = None,
        name: str = "",
        revision: str | None = None,
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.vision = vision
        self.tokenizer = vision.tokenizer if vision and tokenizer is None else tokenizer
        self.config = self.model.config
        self.text_config = self.config.get_text_config()
        self.name: str = name or self.config.name_or_path
        self.revision = revision
        self.layers = self._decoder_layers()
        self.tap_layers = self._checked_taps(tap_layers)
        self.quirks = logit_quirks(self.text_config)
        self.rope_axes = rope_axes(self.text_config)
        use_flash_attention(self.device)
        self._base = base_of(self.model)
        self._accepted = frozenset(inspect.signature(self._base.forward).parameters)
        self.num_layers, self.hidden_size = len(self.layers), self.text_config.hidden_size
        self._taps: dict[int, Tensor] | None = None
        self._hooks = [
            self.layers[layer].register_forward_pre_hook(self._tap(layer), with_kwargs=True)
            for layer in self.tap_layers
        ]
        self._check_head()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: Any = None,
        tap_layers: TapChoice = None,
        revision: str | None = None,
        max_memory: dict[Any, str] | None = None,
        tp_plan: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        chat_template: str | None = None,
    ) -> "Target":
        """Load a model folder or hub name. `device_map` / `tp_plan` spread targets larger than one GPU. A named
        `chat_template` must fit the tokenizer: that is looked at before the weights are read."""
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # one step for each tensor
        refuse_missing_folder(name_or_path)
        if Path(name_or_path).exists() and not (Path(name_or_path) / "config.json").is_file():
            raise UserError(f"{name_or_path}: no config.json there. Give a transformers model folder or a hub name.")
        spread = {"device_map": device_map, "max_memory": max_memory, "tp_plan": tp_plan}
        options = {key: value for key, value in spread.items() if value is not None}
        method = None
        try:
            config = AutoConfig.from_pretrained(name_or_path, revision=revision)
            vision = load_vision(
                name_or_path, config, min_pixels=min_pixels, max_pixels=max_pixels, revision=revision
            )  # fmt: skip
            tokenizer = vision.tokenizer if vision else AutoTokenizer.from_pretrained(name_or_path, revision=revision)
            if template_name(chat_template) != OWN:
                read_template(str(chat_template), tokenizer)
            method = method_of(config)
            placed = device_map or tp_plan
            if method and not placed:  # quantised layers are made where they stay
                options["device_map"] = placed = {"": device or default_device()}
            loaded: Any = auto_class(config).from_pretrained(
                name_or_path, revision=revision, dtype=dtype, output_loading_info=True, **options
            )
        except UserError:
            raise
        except Exception as error:  # the library raises a dozen types here: truncated files, unknown names, no network
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            if method:
                raise not_loadable(name_or_path, method, reason) from error
            raise UserError(
                f"{name_or_path}: could not be loaded as a causal LM or image-text model ({reason}). Check the path or "
                f"hub name and that its files are complete."
            ) from error
        model, loading = loaded
        if not placed:
            model = model.to(device or default_device())
        _refuse_bad_weights(model, loading["missing_keys"], name_or_path)
        return cls(model, tokenizer, vision=vision, tap_layers=tap_layers, name=name_or_path, revision=revision)

    def remove_hooks(self) -> None:
        """For a model that goes on without this target, which gives no taps any more."""
        for hook in self._hooks:
            hook.remove()

    # -- facts ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_weight.dtype

    @property
    def embedding_weight(self) -> Tensor:
        """(V, H) input embedding, before any scaling the model applies to its output."""
        weight = plain_weight(self.model.get_input_embeddings())
        return self._dequantised_embedding if weight is None else weight

    @property
    def head_weight(self) -> Tensor:
        """(V, H) output embedding."""
        weight = plain_weight(self.model.get_output_embeddings())
        return self._dequantised_head if weight is None else weight

    @functools.cached_property
    def _dequantised_embedding(self) -> Tensor:
        device = next(self.model.parameters()).device
        return embedding_matrix(self.model.get_input_embeddings(), self.text_config.vocab_size, device)

    @functools.cached_property
    def _dequantised_head(self) -> Tensor:
        return head_matrix(self.model.get_output_embeddings(), self.hidden_size, self.dtype, self.device)

    @property
    def vocab_size(self) -> int:
        """Rows of the head: the width of the logits (tokenizers are often a little smaller)."""
        return self.head_weight.shape[0]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation: generation config, then model config, then tokenizer."""
        generation = getattr(self.model, "generation_config", None)
        for source in (generation, self.config, self.text_config, self.tokenizer):
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
        return ()

    # -- forward -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        taps: bool = True,
        **model_inputs: Any,
    ) -> TargetOutput:
        """Hidden states for input_ids (B, T). `attention_mask`: 2-D, additive 4-D, or a dict of these by layer type.

        position_ids are (B, T), or (R, B, T) for a multimodal rope; `model_inputs` are the pixels and their like.
        """
        self._taps = {} if taps and self.tap_layers else None
        try:
            with one_text_a_row():
                output = self._base(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    attention_mask=attention_mask,
                    use_cache=past_key_values is not None,
                    **{cache_argument(self._base): past_key_values},
                    **self._as_the_model_wants(model_inputs),
                )
            collected = self._taps
        finally:
            self._taps = None
        last_hidden = output.last_hidden_state
        if collected is None:
            return TargetOutput(last_hidden, None)
        tapped = [collected[layer].to(last_hidden.device) for layer in self.tap_layers]
        if tapped[0].shape != last_hidden.shape:
            raise UserError(
                f"{self.name}: its layers pass on states of shape {tuple(tapped[0].shape)}, several for each token, "
                f"and a head reads one. Decode it with a drafter that reads none, or without a draft."
            )
        return TargetOutput(last_hidden, torch.stack(tapped, dim=-2))

    def positions(self, input_ids: Tensor, model_inputs: Mapping[str, Tensor]) -> Tensor:
        """Where the model puts these tokens (T,): (T,), or (R, T) when pictures spread over several axes."""
        if self.rope_axes == 1 or not model_inputs:
            return torch.arange(input_ids.shape[0], device=input_ids.device)
        get_rope_index = self._base.get_rope_index
        known = inspect.signature(get_rope_index).parameters
        asked = {key: value.to(input_ids.device) for key, value in model_inputs.items() if key in known}
        position_ids, _ = get_rope_index(input_ids=input_ids[None], **asked)
        return position_ids[:, 0]

    def head(self, last_hidden: Tensor) -> Tensor:
        """(..., H) after the final norm -> (..., V), exactly the model's logits."""
        return self.quirks.apply(head_logits(self.model.get_output_embeddings(), last_hidden))

    def _as_the_model_wants(self, model_inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Only what the forward knows (processors say more), floating point in the model's dtype."""
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor) else value
            for key, value in model_inputs.items() if key in self._accepted
        }  # fmt: skip

    # -- construction --------------------------------------------------------------------------------------------------

    def _decoder_layers(self) -> nn.ModuleList:
        decoder = self.model.get_decoder()
        wanted = self.text_config.num_hidden_layers
        for _, module in decoder.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) >= wanted and hasattr(module[0], "forward"):
                return module[:wanted] if len(module) > wanted else module
        raise UserError(
            f"{self.name}: found no list of {wanted} decoder layers in {type(decoder).__name__}. fledge needs a "
            f"decoder-only transformer; see docs/add-a-target.md."
        )

    def _checked_taps(self, tap_layers: TapChoice) -> tuple[int, ...]:
        num_layers = len(self.layers)
        taps = chosen_taps(tap_layers, num_layers)
        if list(taps) != sorted(set(taps)) or not set(taps) <= set(range(num_layers)):
            reason = "given" if tap_layers is not None else "derived as 2, N // 2, N - 3"
            raise UserError(
                f"{self.name}: tap layers {list(taps)} ({reason}) are not distinct, ascending layers of a target with "
                f"{num_layers} layers. Give them explicitly, e.g. tap_layers 0 1 {num_layers - 1}."
            )
        return taps

    def _tap(self, layer: int):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._taps is not None:
                self._taps[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.inference_mode()
    def _check_head(self) -> None:
        """`head(last_hidden)` must be the model's logits: catches a missing soft-cap, logit scale or final norm."""
        ids = torch.arange(1, 9, device=self.device)[None] % self.vocab_size
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        found = self.head(self.forward(ids, taps=False).last_hidden).float()
        error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
        if not torch.isfinite(expected).all():
            raise UserError(f"{self.name}: the model's logits contain NaN or infinity. Check the weights or the dtype.")
        if error > HEAD_TOLERANCE.get(self.dtype, 5e-2):
            raise UserError(
                f"{self.name}: head(last_hidden) differs from the model's logits by {error:.1e} (relative). "
                f"Model type {self.text_config.model_type!r} needs a row in fledge/target/quirks.py."
            )


def base_of(model: Any) -> Any:
    """The model without its head. Llama 4's text model names a base that it does not have, and keeps it as `model`."""
    return model.base_model if model.base_model is not model else model.model


def cache_argument(model: Any) -> str:
    """What this model's forward calls its cache: `past_key_values`, from transformers 5.24 on `cache`."""
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def auto_class(config: Any) -> Any:
    """The transformers class that loads this config with its head."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM


def rope_axes(text_config: Any) -> int:
    """Rows of position_ids: 1, or the axes of a multimodal rope (3 in the Qwen-VL family, 4 in HunYuan-VL)."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or [0])


def longrope_limit(rope: Mapping[str, Any] | None) -> int | None:
    """The length past which a longrope turns *all* tokens by other factors; None for other `rope_parameters`."""
    rope = rope or {}
    layers = [rope, *(row for row in rope.values() if isinstance(row, dict))]
    known = next((row for row in layers if row.get("rope_type") == "longrope"), None)
    return None if known is None else int(known["original_max_position_embeddings"])


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextmanager
def one_text_a_row() -> Iterator[None]:
    """The library looks at the positions of every batch whether a row holds several texts, and waits for the device to
    do so. Rows of ours never do."""
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = LOOKS_FOR_SEVERAL_TEXTS


def use_flash_attention(device: torch.device) -> None:
    """cuDNN's attention is PyTorch's first choice on Hopper and builds a plan for every new length, which costs more
    than the attention itself where prompts have all lengths."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _refuse_bad_weights(model: nn.Module, missing: Sequence[str], name: str) -> None:
    if missing:
        raise UserError(
            f"{name}: {len(missing)} weights are missing from its files (first {sorted(missing)[0]}) and would be "
            f"random. Get a complete checkpoint."
        )
    bad = [key for key, tensor in model.named_parameters() if tensor.dtype in FLOATS and not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{name}: {len(bad)} weights contain NaN or infinity, first {bad[0]}. Get a sound checkpoint.")
