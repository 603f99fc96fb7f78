"""What is asked, how it is answered, and by whom."""

from dataclasses import dataclass
from typing import Literal

from fledge.data.settings import LimitSettings, RowSettings, TemplateSettings
from fledge.ranges import Count, Natural, Port, Positive, PositiveShare, Seed, Share
from fledge.servers.settings import ApiKeySettings
from fledge.target.settings import DeviceSettings


@dataclass(frozen=True, kw_only=True)
class PromptSourceSettings(RowSettings, LimitSettings):
    """What is asked."""

    data: str | None = None
    """Conversations whose user turns are asked: a file, a folder, or a hub data set (`org/name`)."""
    own_prompts: Count | None = None
    """No data at hand: have the target write so many prompts of at most 256 tokens, as if it were the user
    (--temperature 1.0 for variety). A second run answers them (--data OUTPUT_DIR --deduplicate). Chat models; in
    process, or by vLLM servers."""
    samples_per_prompt: Count = 1
    """Answers to every conversation, each with draws of its own; their rows are named ID#answer1, ID#answer2, ..."""
    system: str | None = None
    """System message for conversations that have none."""
    deduplicate: bool = False
    """Answer equal prompts (all user turns and the system message) once; the others are listed as rejects."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens of the tokenizer; a longer first turn rejects its row, a longer later turn ends it."""
    target: str | None = None
    """The target: a folder or hub name. --engine transformers loads it. With servers it is needed where their name for
    it is neither: --max-prompt-length counts with its tokenizer, --thinking follows its chat template, its
    generation_config is obeyed."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How it is answered."""

    max_new_tokens: Count = 2048
    """Longest answer in tokens."""
    temperature: str = "0.7"
    """One temperature, or a mixture drawn per row: "0.0:0.3,0.7:0.7" is 30 % greedy, 70 % at 0.7."""
    top_p: PositiveShare = 1.0
    """Nucleus of the sampled answers."""
    sample_top_k: Natural | None = None
    """Sample from so many likeliest tokens, 0 from all. None: what the target's generation_config asks for."""
    min_p: Share | None = None
    """Least probability of a sampled token, relative to the likeliest. None: as generation_config asks."""
    repetition_penalty: Positive | None = None
    """Divisor of the logits of tokens that prompt or answer hold already. None: as generation_config asks."""
    stop: tuple[str, ...] | None = None
    """Strings that end an answer; its text ends before them. None: as generation_config asks."""
    seed: Seed = 42
    """Draws of every row follow from this and the row's id."""
    thinking: Literal["default", "on", "off", "both"] = "default"
    """The chat template's own switch (enable_thinking, thinking, reasoning_effort); both: drawn per row, half and half.
    default: not set, or as the row's chat_template_kwargs say."""
    truncated: Literal["keep", "drop"] = "keep"
    """Rows whose answer was cut at the limit (finish_reason length), while reasoning too: kept, or listed as rejects.
    Counted either way."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings(TemplateSettings, DeviceSettings, ApiKeySettings):
    """Who answers."""

    engine: Literal["openai", "transformers"] = "openai"
    """openai: OpenAI-compatible servers (vLLM, SGLang, remote). transformers: in this process, CPU or GPU."""
    model: str | None = None
    """Name the servers serve the target under. None: ask them."""
    server: tuple[str, ...] = ()
    """Servers, as host:port or URL. None given: --max-clients ports from --base-port on this machine are tried."""
    base_port: Port = 6000
    """First port, as in `fledge serve`."""
    max_clients: Count = 8
    """How many ports from --base-port are tried."""
    num_threads: Count = 256
    """Requests in flight over all servers together."""
    concurrency: Count | None = None
    """Requests in flight per server, instead of --num-threads shared evenly."""
    request_timeout_s: Positive = 900.0
    """Seconds one answer may take before it is asked again elsewhere."""
    max_attempts: Count = 8
    """Failed attempts after which a row is rejected."""
    retry_rejects: bool = False
    """Ask rows again that an earlier run of this folder rejected after server errors."""
    batch_size: Count | None = None
    """Rows decoded at once by the transformers engine. None: chosen for the device."""
