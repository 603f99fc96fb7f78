"""The flags of `fledge regenerate`, by what they are about: prompts, answers, engines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fledge.config import Overwrite
from fledge.data.conversations import COLUMNS_HELP, REPEATED_IDS_HELP, DataFormat, RepeatedIds
from fledge.data.image_urls import AllowImageUrls
from fledge.data.rejects import MAX_REJECT_SHARE
from fledge.ranges import Count, Natural, NotNegative, Port, Positive, PositiveShare, Seed, Share


@dataclass(kw_only=True)
class PromptSourceArgs:
    data_name_or_path: str
    """Conversations whose user turns are asked: a file, a folder, or a hub data set (`org/name`)."""
    data_format: DataFormat = "auto"
    """sharegpt (`conversations`), ultrachat or OpenAI `messages`; auto looks at each row. Output follows it."""
    split: str = "train"
    """Split of a hub data set."""
    columns: Annotated[tuple[str, ...], tyro.conf.arg(help=COLUMNS_HELP)] = ()
    repeated_ids: Annotated[RepeatedIds, tyro.conf.arg(help=REPEATED_IDS_HELP)] = "reject"
    max_samples: Count | None = None
    """Use only the first so many conversations."""
    samples_per_prompt: Count = 1
    """Answers to every conversation, each with draws of its own; their rows are named ID#answer1, ID#answer2, ..."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    deduplicate: bool = False
    """Answer equal prompts (all user turns and the system message) once; the others are listed as rejects."""
    max_prompt_length: Count | None = None
    """Longest prompt in tokens of the tokenizer; a longer first turn rejects its row, a longer later turn ends it."""
    tokenizer: str | None = None
    """Folder or hub name of the target, where the name the servers use is neither: --max-prompt-length counts with its
    tokenizer, --thinking follows its chat template, its generation_config is obeyed."""
    allow_image_urls: AllowImageUrls = False
    max_reject_share: Share = MAX_REJECT_SHARE
    """Fail when more than this share of the rows could not be read or answered (chosen drops not counted)."""


@dataclass(kw_only=True)
class AnswerArgs:
    max_tokens: Count = 2048
    """Longest answer in tokens."""
    temperature: str = "0.7"
    """One temperature, or a mixture drawn per row: "0.0:0.3,0.7:0.7" is 30 % greedy, 70 % at 0.7."""
    top_p: PositiveShare = 1.0
    """Nucleus of the sampled answers."""
    top_k: Natural | None = None
    """Sample from so many likeliest tokens, 0 from all. None: what the target's generation_config asks for."""
    min_p: Share | None = None
    """Least probability of a sampled token, relative to the likeliest. None: as generation_config asks."""
    repetition_penalty: Positive | None = None
    """Divisor of the logits of tokens that prompt or answer hold already. None: as generation_config asks."""
    seed: Seed = 42
    """Draws of every row follow from this and the row's id."""
    thinking: Literal["default", "on", "off", "both"] = "default"
    """The chat template's own switch (enable_thinking, thinking, reasoning_effort); both: drawn per row, half and half.
    default: not set, or as the row's chat_template_kwargs say."""
    truncated: Literal["keep", "drop"] = "keep"
    """Rows whose answer was cut at the limit (finish_reason length), while reasoning too: kept, or listed as rejects.
    Counted either way."""


@dataclass(kw_only=True)
class EngineArgs:
    engine: Literal["openai", "transformers"] = "openai"
    """openai: OpenAI-compatible servers (vLLM, SGLang, remote). transformers: in this process, CPU or GPU."""
    model: str | None = None
    """Name the servers serve the target under (None: ask them); for transformers its folder or hub name."""
    endpoints: tuple[str, ...] = ()
    """Servers, as host:port or URL. None given: --max-clients ports from --base-port on this machine are tried."""
    base_port: Port = 6000
    """First port, as in `fledge serve`."""
    max_clients: Count = 8
    """How many ports from --base-port are tried."""
    num_threads: Count = 256
    """Requests in flight over all servers together."""
    concurrency: Count | None = None
    """Requests in flight per server, instead of --num-threads shared evenly."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key."""
    request_timeout_s: Positive = 900.0
    """Seconds one answer may take before it is asked again elsewhere."""
    max_attempts: Count = 8
    """Failed attempts after which a row is rejected."""
    give_up_after_s: NotNegative = 300.0
    """Seconds without any usable server after which the run stops (it can be continued)."""
    retry_rejects: bool = False
    """Ask rows again that an earlier run of this folder rejected after server errors."""
    batch_size: Count | None = None
    """Rows decoded at once by the transformers engine. None: chosen for the device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the transformers engine; auto: the checkpoint's."""
    chat_template_type: str | None = None
    """Named chat template of the transformers engine, instead of the tokenizer's own. Servers have theirs."""
    device: str | None = None
    """Device of the transformers engine. None: the GPU if there is one."""


@dataclass(kw_only=True)
class RegenerateArgs:
    prompts: PromptSourceArgs
    output_dir: Path
    """Folder of the shards, manifest.json and rejects.jsonl. An unfinished run there is continued."""
    overwrite: Overwrite = False
    data_shard_size: Count = 50_000
    """Input rows per shard; row i is in shard i // size."""
    answers: AnswerArgs = field(default_factory=AnswerArgs)
    engines: EngineArgs = field(default_factory=EngineArgs)
