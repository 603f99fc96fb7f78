"""Settings of servers that are asked or started."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fledge.ranges import Count

SERVER_FOLDER = Path("/dev/shm/fledge")  # also in the command that `fledge extract --target-backend vllm` prints


@dataclass(frozen=True, kw_only=True)
class ApiKeySettings:
    """The servers' key."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key."""


@dataclass(frozen=True, kw_only=True)
class SpeculationSettings:
    """How a server drafts."""

    num_speculative_tokens: Count = 3
    """Tokens that the head of a server started here drafts per round."""


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """Where the target runs."""

    target_backend: Literal["hf", "vllm"] = "hf"
    """hf: the target in this process. vllm: on the servers of --server, which extract hidden states."""
    server: tuple[str, ...] = ()
    """With --target-backend vllm: base URLs of the servers, e.g. http://localhost:8000."""
    server_folder: Path = SERVER_FOLDER
    """With --target-backend vllm: the folder where the servers write states. Files anywhere else are neither read nor
    removed."""
