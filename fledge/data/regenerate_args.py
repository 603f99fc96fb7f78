"""The flags of `fledge regenerate`, by what they are about: prompts, answers, engines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fledge.data.conversations import DataFormat
from fledge.data.image_urls import AllowImageUrls
from fledge.data.rejects import MAX_REJECT_SHARE


@dataclass(kw_only=True)
class PromptArgs:
    data_name_or_path: str
    """Conversations whose user turns are asked: a file, a folder, or a hub data set (`org/name`)."""
    data_format: DataFormat = "auto"
    """sharegpt (`conversations`), ultrachat or OpenAI `messages`; auto looks at each row. Output follows it."""
    split: str = "train"
    """Split of a hub data set."""
    max_samples: int | None = None
    """Use only the first so many conversations."""
    system_prompt: str | None = None
    """System message for conversations that have none."""
    deduplicate: bool = False
    """Answer equal prompts (all user turns and the system message) once; the others are listed as rejects."""
    max_prompt_length: int | None = None
    """Longest prompt in tokens of the tokenizer; a longer first turn rejects its row, a longer later turn ends it."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer that --max-prompt-length counts with. None: that of the model."""
    allow_image_urls: AllowImageUrls = False
    max_reject_share: float = MAX_REJECT_SHARE
    """Fail when more than this share of the rows could not be read or answered (chosen drops not counted)."""


@dataclass(kw_only=True)
class AnswerArgs:
    max_tokens: int = 2048
    """Longest answer in tokens."""
    temperature: str = "0.7"
    """One temperature, or a mixture drawn per row: "0.0:0.3,0.7:0.7" is 30 % greedy, 70 % at 0.7."""
    top_p: float = 1.0
    """Nucleus of the sampled answers."""
    seed: int = 42
    """Draws of every row follow from this and the row's id."""
    thinking: Literal["default", "on", "off", "both"] = "default"
    """`enable_thinking` of the chat template; both: drawn per row, half and half. default: not set."""
    truncated: Literal["keep", "drop"] = "keep"
    """Rows whose answer was cut at the limit (finish_reason length): kept, or listed as rejects. Counted either way."""


@dataclass(kw_only=True)
class EngineArgs:
    engine: Literal["openai", "transformers"] = "openai"
    """openai: OpenAI-compatible servers (vLLM, SGLang, remote). transformers: in this process, CPU or GPU."""
    model: str | None = None
    """Name the servers serve the target under (None: ask them); for transformers its folder or hub name."""
    endpoints: tuple[str, ...] = ()
    """Servers, as host:port or URL. None given: --max-clients ports from --base-port on this machine are tried."""
    base_port: int = 6000
    """First port, as in `fledge serve`."""
    max_clients: int = 8
    """How many ports from --base-port are tried."""
    num_threads: int = 256
    """Requests in flight over all servers together."""
    concurrency: int | None = None
    """Requests in flight per server, instead of --num-threads shared evenly."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key."""
    request_timeout_s: float = 900.0
    """Seconds one answer may take before it is asked again elsewhere."""
    max_attempts: int = 8
    """Failed attempts after which a row is rejected."""
    give_up_after_s: float = 300.0
    """Seconds without any usable server after which the run stops (it can be continued)."""
    retry_rejects: bool = False
    """Ask rows again that an earlier run of this folder rejected after server errors."""
    batch_size: int | None = None
    """Rows decoded at once by the transformers engine. None: chosen for the device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the transformers engine; auto: the checkpoint's."""
    chat_template_type: str | None = None
    """Named chat template of the transformers engine, instead of the tokenizer's own. Servers have theirs."""
    device: str | None = None
    """Device of the transformers engine. None: the GPU if there is one."""


@dataclass(kw_only=True)
class RegenerateArgs:
    prompts: PromptArgs
    output_dir: Path
    """Folder of the shards, manifest.json and rejects.jsonl. An unfinished run there is continued."""
    data_shard_size: int = 50_000
    """Input rows per shard; row i is in shard i // size."""
    answers: AnswerArgs = field(default_factory=AnswerArgs)
    engines: EngineArgs = field(default_factory=EngineArgs)
