"""What the commands that read conversations have in common: rows, chat template, samples, pictures."""

from dataclasses import dataclass
from typing import Literal

from fledge.data.conversations import DataFormat, RepeatedIds
from fledge.data.traces import Untraced
from fledge.ranges import Count, Share


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Pictures of vision-language targets."""

    max_pixels: Count | None = None
    """Vision-language targets: area to which larger pictures are reduced. None: the processor's own."""
    min_pixels: Count | None = None
    """Vision-language targets: area to which smaller pictures are enlarged. None: the processor's own."""


@dataclass(frozen=True, kw_only=True)
class ImageUrlSettings:
    """Pictures on the web."""

    allow_image_urls: bool = False
    """Fetch the pictures that rows name by URL, from public addresses only. Without it such rows are rejected."""


@dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """The chat template."""

    chat_template_type: str | None = None
    """Named chat template instead of the tokenizer's own (qwen3, hunyuan, llama3, gemma, chatml, plain ...)."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings(TemplateSettings, PictureSettings, ImageUrlSettings):
    """How a prompt is rendered."""

    thinking: Literal["default", "on", "off"] = "default"
    """Thinking mode of the chat template, for models that have one."""

    @property
    def enable_thinking(self) -> bool | None:
        """The template's argument; None: not given."""
        return {"default": None, "on": True, "off": False}[self.thinking]


@dataclass(frozen=True, kw_only=True)
class RowSettings(ImageUrlSettings):
    """How rows are read."""

    data_format: DataFormat = "auto"
    """Format of the rows: sharegpt (`conversations`), ultrachat or OpenAI `messages`; auto looks at each row."""
    split: str = "train"
    """Split of a hub data set."""
    columns: tuple[str, ...] = ()
    """Columns under other names, as OURS=YOURS: --columns system=persona messages=dialog (docs/formats.md)."""
    repeated_ids: RepeatedIds = "reject"
    """Rows of one id. reject: the later ones are rejected. answers: they are several answers to one prompt; each is a
    sample of its own, all of them on the same side of the evaluation split."""
    max_reject_share: Share = 0.05
    """Stop when a larger share of the rows is unusable."""


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """How much of the data is used."""

    max_samples: Count | None = None
    """Only the first so many conversations."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings(TemplateSettings, PictureSettings, RowSettings):
    """From rows to samples of tokens."""

    model_max_length: Count = 2048
    """Longest sample in tokens; longer ones are cut and counted."""
    train_last_turn_only: bool = False
    """Supervise only the last answer of each conversation."""
    untraced: Untraced = "reject"
    """Rows with a field that the chat template does not render (reasoning, tool calls, tools, a system text). reject:
    they are rejected by name. train: they are trained without it, and counted."""
    num_proc: Count = 1
    """Processes that tokenise (worth it from about 50,000 rows), threads that read pictures ahead."""
