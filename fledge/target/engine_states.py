"""Records from a vLLM server: the client of its hidden-state extraction.

The server runs with `--speculative-config '{"method": "extract_hidden_states", ...}'` and a connector that writes each
prompt's states to a file (`server_flags` says how); a completion of one token returns the file's path. vLLM's layer i
is the state entering block i, and layer N the state after the last block, *before* the final norm: the target's own
norm module is applied here, so `last_hidden` means what it means everywhere else. Client and server share a folder.
"""

import fcntl
import itertools
import json
import os
import shlex
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fledge.data.tokenize import ChatTemplate, Sample
from fledge.errors import UserError
from fledge.target.head import TargetEnds
from fledge.target.record import TargetRecord, default_tap_layers
from fledge.target.store.describe import describe_states
from fledge.target.store.manifest import Identity, LastStorage, TapStorage

if TYPE_CHECKING:
    from fledge.target.extract import ExtractArgs, OpenTarget

# T tokens, A taps, L layers asked for (A taps and the last), H hidden

IN_FLIGHT = 16  # requests per server: its scheduler batches them
TIMEOUT_S = 600.0
CONNECTOR = ("FledgeHiddenStates", "fledge.target.vllm_connector")


def server_flags(layers: Sequence[int], folder: str) -> list[str]:
    """What `vllm serve MODEL` needs beside its own flags, to be started where `import fledge` works."""
    method = {
        "method": "extract_hidden_states", "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}},
    }  # fmt: skip
    connector = {
        "kv_connector": CONNECTOR[0], "kv_connector_module_path": CONNECTOR[1], "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": folder},
    }  # fmt: skip
    return ["--speculative-config", json.dumps(method), "--kv-transfer-config", json.dumps(connector)]


class EngineSource:
    """Asks servers for the states of samples, several at a time. `record` and `records` wait for them, `ask` not."""

    def __init__(self, servers: Sequence[str], norm: nn.Module, num_taps: int, *, in_flight: int = IN_FLIGHT) -> None:
        self.servers, self.norm, self.num_taps = list(servers), norm, num_taps
        self.in_flight = in_flight * len(self.servers)
        self._turn = itertools.cycle(self.servers)
        self._models = {server: served_model(server) for server in self.servers}
        self._pool = ThreadPoolExecutor(self.in_flight)

    def records(self, samples: Iterable[Sample]) -> Iterator[TargetRecord]:
        """One record per sample, in order."""
        under_way: deque[Future[TargetRecord]] = deque()
        for sample in samples:
            under_way.append(self.ask(sample))
            if len(under_way) >= 2 * self.in_flight:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()

    def ask(self, sample: Sample) -> "Future[TargetRecord]":
        """Start one request; its record comes later."""
        if sample.images:
            raise UserError(
                f"sample {sample.id!r} has pictures: hidden states from vLLM are of token ids alone. Use "
                f"--target-backend hf for data with pictures."
            )
        return self._pool.submit(self._record, next(self._turn), sample)

    def record(self, sample: Sample) -> TargetRecord:
        """One sample alone."""
        return self.ask(sample).result()

    @torch.no_grad()  # not inference_mode: training saves these tensors for its backward
    def _record(self, server: str, sample: Sample) -> TargetRecord:
        states = self._states(server, sample)  # (T, L, H)
        return TargetRecord(
            sample_id=sample.id,
            input_ids=sample.input_ids,
            loss_mask=sample.loss_mask,
            position_ids=torch.arange(len(states)),
            tap_hidden=states[:, : self.num_taps].clone(),
            last_hidden=self.norm(states[:, self.num_taps]),
        )

    def _states(self, server: str, sample: Sample) -> Tensor:
        body = {"model": self._models[server], "prompt": sample.input_ids.tolist(), "max_tokens": 1, "temperature": 0.0}
        answer = post(f"{server}/v1/completions", body)
        path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
        if not path:
            raise UserError(
                f"{server}: answered without a path of hidden states. Start it with the flags that `fledge extract "
                f"--target-backend vllm` prints (docs/formats.md)."
            )
        return self._checked(take_file(Path(path), server), sample, server)

    def _checked(self, saved: dict[str, Tensor], sample: Sample, server: str) -> Tensor:
        states, wanted = saved["hidden_states"], self.num_taps + 1
        if saved["token_ids"].tolist() != sample.input_ids.tolist():
            raise UserError(f"{server}: sent the states of other tokens than asked for (sample {sample.id!r}).")
        if states.dim() != 3 or states.shape[1] != wanted:
            raise UserError(
                f"{server}: sent {tuple(states.shape)} for {len(sample.input_ids)} tokens; needed are {wanted} layers, "
                f"the taps and the last. Start it with the flags that `fledge extract --target-backend vllm` prints."
            )
        return states


def take_file(path: Path, server: str) -> dict[str, Tensor]:
    """Wait for the writer's lock, read the file, remove both."""
    lock = Path(f"{path}.lock")
    try:
        if lock.exists():
            with open(lock) as handle:
                fcntl.flock(handle, fcntl.LOCK_SH)
        saved = load_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: {server} names this file but it is not here. Client and server must share the folder; without "
            f"CUDA the server needs fledge's connector ({CONNECTOR[1]})."
        ) from None
    os.unlink(path)
    lock.unlink(missing_ok=True)
    return saved


def served_model(server: str) -> str:
    """The name under which the server serves its model."""
    try:
        with urllib.request.urlopen(f"{server}/v1/models", timeout=30) as answer:
            return json.load(answer)["data"][0]["id"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{server}: no vLLM server answers there ({error}). Start it, or correct --server.") from None


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: {error.code} {error.read().decode(errors='replace')[:300]}") from None
    except OSError as error:
        raise UserError(f"{url}: {error}. What is extracted is kept; run the same command again.") from None


@dataclass(frozen=True)
class EngineTarget:
    """A target that servers run: its two ends are read here, its states come from there."""

    ends: TargetEnds
    tap_layers: tuple[int, ...]
    source: EngineSource

    @classmethod
    def open(
        cls, name: str, servers: Sequence[str], *, dtype: str = "auto", tap_layers: Sequence[int] | None = None,
        revision: str | None = None,
    ) -> "EngineTarget":  # fmt: skip
        """Read the ends from the files of `name` and find the servers (base URLs, with or without /v1)."""
        ends = TargetEnds.from_files(name, dtype=None if dtype == "auto" else getattr(torch, dtype), revision=revision)
        num_layers = ends.text_config.num_hidden_layers
        taps = tuple(tap_layers or default_tap_layers(num_layers))
        if not servers:
            flags = shlex.join(server_flags([*taps, num_layers], "/dev/shm/fledge"))
            raise UserError(f"--target-backend vllm needs --server URL. Start one: vllm serve {name} {flags}")
        if ends.norm is None:
            raise UserError(f"{name}: its decoder has no `norm` for vLLM's last state. Use the hf backend.")
        urls = [server.rstrip("/").removesuffix("/v1") for server in servers]
        return cls(ends, taps, EngineSource(urls, ends.norm, len(taps)))

    def identity(
        self, template: ChatTemplate, *, max_length: int, tap_storage: TapStorage, last_storage: LastStorage,
        revision: str | None = None,
    ) -> Identity:  # fmt: skip
        """What states of these servers depend on."""
        return describe_states(
            self.ends.name, revision, self.ends.text_config, self.ends.head, self.tap_layers, template,
            dtype=str(self.ends.head.weight.dtype).removeprefix("torch."), max_length=max_length,
            tap_storage=tap_storage, last_storage=last_storage, backend="vllm",
        )  # fmt: skip


def open_engine(args: "ExtractArgs") -> "OpenTarget":
    """The client of `fledge extract --target-backend vllm`."""
    from fledge.target.extract import OpenTarget

    target = EngineTarget.open(
        args.model_name, args.server or (), dtype=args.dtype, tap_layers=args.tap_layers, revision=args.revision
    )
    template = ChatTemplate.from_pretrained(
        args.model_name, args.chat_template_type or None, untraced=args.untraced,
        last_turn_only=args.train_last_turn_only,
    )  # fmt: skip
    identity = target.identity(
        template, max_length=args.model_max_length, tap_storage=args.tap_storage, last_storage=args.last_storage,
        revision=args.revision,
    )  # fmt: skip
    return OpenTarget(template, identity, target.ends.head, target.source, False)
