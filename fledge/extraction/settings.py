"""How hidden states are made and stored."""

from dataclasses import dataclass

from fledge.data.settings import LimitSettings, SampleSettings
from fledge.outputs import OutputSettings
from fledge.ranges import Count, Natural, Positive
from fledge.servers.settings import BackendSettings
from fledge.storage.settings import StorageSettings
from fledge.target.settings import DtypeSettings, PrefillSettings, TapSettings, TargetSettings


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(
    TargetSettings, DtypeSettings, TapSettings, OutputSettings, SampleSettings, LimitSettings, BackendSettings,
    StorageSettings, PrefillSettings,
):  # fmt: skip
    """The states."""

    data: tuple[str, ...]
    """Conversations: files, folders or hub names, one or more."""
    batch_tokens: Natural = 0
    """Most tokens of a forward pass, padding included; samples of similar length share one. 0: one sample per pass, and
    states equal to online training's bit for bit (with batches: to rounding)."""
    device_map: str | None = None
    """`auto` spreads a target over all visible GPUs (and the CPU)."""
    tp_plan: str | None = None
    """`auto` cuts every layer over the processes of torchrun (tensor parallel): one target on all of them."""
    shard_mb: Positive = 256
    """Size of a shard; at most one shard of work is lost when the run is killed."""
    num_workers: Count = 1
    """Processes, each with its own copy of the target, spread over GPUs and nodes by Ray."""
    num_gpus_per_model: Natural = 1
    """GPUs of each worker (0: CPU). More than one needs --device-map auto."""
