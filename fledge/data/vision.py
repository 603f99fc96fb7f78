"""A target's processor: pictures in, placeholder tokens and pixel tensors out.

The processor of transformers decides how many tokens a picture is and what the model is fed. This wrapper asks it twice
and never guesses: once when data is tokenised (`expand`: the text with its placeholders written out), once when a
sample is fed to the target (`inputs`: the pixels). Between the two only references to pictures are kept.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fledge.data.rejects import Reject
from fledge.data.samples import PER_TOKEN
from fledge.errors import UserError

TEXT_KEYS = ("input_ids", "attention_mask", "text_replacement_offsets", *PER_TOKEN)
VOLATILE = ("image_processor_type", "processor_class", "transformers_version", "feature_extractor_type")


@dataclass(frozen=True)
class Expanded:
    """A text whose image placeholders are written out."""

    text: str
    images: tuple[tuple[int, int], ...]  # characters of each picture in `text`
    token_ids: list[int]  # as the processor tokenises it
    _moves: tuple[tuple[int, int], ...]  # (character of the original text, how far everything from there moved)

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Where characters begin:end of the original text are now. They hold no placeholder."""
        shift = next((move for at, move in reversed(self._moves) if begin >= at), 0)
        return begin + shift, end + shift


class Vision:
    """The image side of a processor, with the pixel limits of a run."""

    def __init__(self, processor: Any, *, min_pixels: int | None = None, max_pixels: int | None = None) -> None:
        self.processor = processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.image_token: str = processor.image_token
        own = getattr(processor.tokenizer, "image_token_id", None)  # Gemma 3 writes one token and expands to another
        self.image_token_id: int = processor.image_token_id if own is None else own
        if min_pixels is not None or max_pixels is not None:
            limit_pixels(processor.image_processor, min_pixels, max_pixels)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def template_text(self) -> str | None:
        """The processor's chat template; None when only its tokenizer has one."""
        template = self.processor.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides how a picture becomes numbers."""
        image_processor = self.processor.image_processor
        known = {key: value for key, value in image_processor.to_dict().items() if key not in VOLATILE}
        known |= {"class": type(image_processor).__name__, "processor": type(self.processor).__name__}
        for name in ("image_seq_length", "image_seq_len", "patch_size", "num_additional_image_tokens"):
            known[f"processor.{name}"] = getattr(self.processor, name, None)
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()

    def expand(self, text: str, images: Sequence[Image.Image]) -> Expanded:
        """Write the placeholders of these pictures out. A text with more or fewer placeholders is a Reject."""
        places = text.count(self.image_token)
        if places != len(images):
            raise Reject(
                "images do not fit",
                f"{len(images)} images, but the rendered text has {places} {self.image_token} marks",
            )
        if not images:
            return Expanded(text, (), [], ())
        found = self._call(text, images)
        if "text_replacement_offsets" not in found:
            raise UserError(
                f"{type(self.processor).__name__} does not say where it puts image tokens (text_replacement_offsets). "
                f"fledge needs that for the loss mask; update transformers, or see docs/add-a-target.md."
            )
        pieces, spans, moves, last, shift = [], [], [], 0, 0
        for place in found["text_replacement_offsets"][0]:
            begin, end = place["span"]
            pieces += [text[last:begin], place["replacement"]]
            spans.append((begin + shift, begin + shift + len(place["replacement"])))
            shift += len(place["replacement"]) - (end - begin)
            moves.append((end, shift))
            last = end
        expanded = "".join([*pieces, text[last:]])
        return Expanded(expanded, tuple(spans), found["input_ids"][0].tolist(), tuple(moves))

    def inputs(self, images: Sequence[Image.Image], input_ids: Tensor, stub: str) -> dict[str, Tensor]:
        """What the model takes beside input_ids (T,): pixels, grids, token types.

        `stub` is any text with as many placeholders: how a picture becomes pixels does not depend on the text, and the
        sample's own text may have been cut.
        """
        found = self._call(stub, images)
        kept = {key: value for key, value in found.items() if key not in TEXT_KEYS and isinstance(value, Tensor)}
        for key in PER_TOKEN:
            if key in found:
                kept[key] = torch.tensor(self.processor.create_mm_token_type_ids([input_ids.tolist()]))
        return kept

    def _call(self, text: str, images: Sequence[Image.Image]) -> Any:
        try:
            return self.processor(
                text=[text], images=list(images), return_tensors="pt", add_special_tokens=False,
                return_text_replacement_offsets=True,
            )  # fmt: skip
        except (ValueError, TypeError, ZeroDivisionError) as error:  # too small, too narrow, marks in the wrong place
            raise Reject("refused by the processor", f"{type(self.processor).__name__}: {error}") from None


def limit_pixels(image_processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    """Bound the area of a resized picture, for processors that resize to an area."""
    known = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    size = getattr(image_processor, "size", None)
    if "max_pixels" not in known or size is None:
        raise UserError(
            f"--max-pixels and --min-pixels: {type(image_processor).__name__} resizes to a fixed size, not to an area. "
            f"Leave the flags out for this target."
        )
    least = size["shortest_edge"] if min_pixels is None else min_pixels
    most = size["longest_edge"] if max_pixels is None else max_pixels
    if not 0 < least <= most:
        raise UserError(f"--min-pixels {least} and --max-pixels {most}: needed is 0 < min <= max. Give both.")
    image_processor.size = type(size)(shortest_edge=least, longest_edge=most) if not isinstance(size, dict) else {
        **size, "shortest_edge": least, "longest_edge": most}  # fmt: skip


def has_vision(config: Any) -> bool:
    """Whether a transformers config is one of an image-text model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and getattr(config, "vision_config", None) is not None


def load_vision(
    name_or_path: str, config: Any = None, *, min_pixels: int | None = None, max_pixels: int | None = None,
    revision: str | None = None, trust_remote_code: bool = False,
) -> Vision | None:  # fmt: skip
    """The processor of an image-text model; None for a text model, where pixel limits are refused.

    Without `config` the model's own is read; a folder without one (a tokenizer alone) is a text model.
    """
    config = config or _config_of(name_or_path, revision, trust_remote_code)
    if not has_vision(config):
        if min_pixels is not None or max_pixels is not None:
            raise UserError(f"--max-pixels and --min-pixels: {name_or_path} sees no pictures.")
        return None
    from transformers import AutoProcessor

    options = {"revision": revision, "trust_remote_code": trust_remote_code or None}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **options)
    except Exception as error:  # without torchvision there are no video processors; pictures do not need one
        processor = _without_video(name_or_path, config, options, error)
    if getattr(processor, "image_token", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(
            f"{name_or_path}: its processor ({type(processor).__name__}) has no image token. Is "
            f"preprocessor_config.json there? docs/add-a-target.md says what a vision-language target needs."
        )
    return Vision(processor, min_pixels=min_pixels, max_pixels=max_pixels)


def _config_of(name_or_path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None


def _without_video(name_or_path: str, config: Any, options: dict[str, Any], error: Exception) -> Any:
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    known: Any = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None
    if known is not None and "video_processor" in known.get_attributes():
        try:
            return image_only(known).from_pretrained(name_or_path, **options)
        except Exception as second:  # the library's types vary
            error = second
    reason = str(error).strip().splitlines()
    raise UserError(
        f"{name_or_path}: no image processor could be loaded ({type(error).__name__}: "
        f"{reason[0] if reason else 'no message'}). Give a folder with preprocessor_config.json or a hub name; some "
        f"processors need `pip install torchvision`."
    ) from error


@cache
def image_only(processor_class: Any) -> Any:
    """A processor class without its video side, which alone needs torchvision. Its objects can be pickled."""
    names = [name for name in processor_class.get_attributes() if name != "video_processor"]

    @wraps(processor_class.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("video_processor", None)  # SmolVLM's has no default
        processor_class.__init__(self, *args, **kwargs)

    body = {
        "__init__": init,
        "get_attributes": classmethod(lambda cls: names),
        "__reduce__": lambda self: (_rebuilt, (processor_class, self.__dict__)),
        "__module__": processor_class.__module__,
    }
    return type(processor_class.__name__, (processor_class,), body)


def _rebuilt(processor_class: Any, state: dict[str, Any]) -> Any:
    made = object.__new__(image_only(processor_class))
    made.__dict__.update(state)
    return made
