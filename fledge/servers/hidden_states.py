"""Records from a vLLM server: the client of its hidden-state extraction.

The server runs with `--speculative-config '{"method": "extract_hidden_states", ...}'` and a connector that writes each
prompt's states to a file (`server_flags` says how); a completion of one token returns the file's path. vLLM's layer i
is the state entering block i, and layer N the state after the last block, *before* the final norm: the target's own
norm module is applied here, so `last_hidden` means what it means everywhere else. Client and server share a folder.
"""

import itertools
import json
import shlex
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fledge.console import warn
from fledge.data.tokenize import ChatTemplate, Sample
from fledge.errors import UserError
from fledge.http_client import Client, Limits, ServerError, base_url, blocking, post
from fledge.servers.replies import StatesReply, check_status, read_reply, served_model
from fledge.servers.settings import SERVER_FOLDER
from fledge.servers.states_folder import take_states
from fledge.storage.states.describe import describe_states
from fledge.storage.states.manifest import Identity, LastStorage, TapStorage
from fledge.target.head import TargetEnds
from fledge.target.record import TapChoice, TargetRecord, chosen_taps

# T tokens, A taps, L layers asked for (A taps and the last), H hidden

IN_FLIGHT = 16  # requests per server: its scheduler batches them
LIMITS = Limits(total_s=600.0, body_bytes=4 << 20)
MAX_ATTEMPTS = 3
CONNECTOR = ("FledgeHiddenStates", "fledge.servers.vllm_connector")


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

    def __init__(
        self, servers: Sequence[str], norm: nn.Module, num_taps: int, hidden_size: int, *,
        folder: Path = SERVER_FOLDER, in_flight: int = IN_FLIGHT,
    ) -> None:  # fmt: skip
        self.servers, self.norm, self.num_taps, self.hidden_size = list(servers), norm, num_taps, hidden_size
        self.folder, self.in_flight = folder, in_flight * len(self.servers)
        self._turn = itertools.cycle(self.servers)
        self._models = {server: model_of(server) for server in self.servers}
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
        return self._pool.submit(self._record, sample)

    def record(self, sample: Sample) -> TargetRecord:
        """One sample alone."""
        return self.ask(sample).result()

    @torch.no_grad()  # not inference_mode: training saves these tensors for its backward
    def _record(self, sample: Sample) -> TargetRecord:
        states = self._states(sample)  # (T, L, H)
        return TargetRecord(
            sample_id=sample.id,
            input_ids=sample.input_ids,
            loss_mask=sample.loss_mask,
            position_ids=torch.arange(len(states)),
            tap_hidden=states[:, : self.num_taps].clone(),
            last_hidden=self.norm(states[:, self.num_taps]),
        )

    def _states(self, sample: Sample) -> Tensor:
        """Asked of one server after another: one bad answer is no end, several in a row are."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            server = next(self._turn)
            try:
                return self._attempt(server, sample)
            except ServerError as error:
                if attempt == MAX_ATTEMPTS or error.kind == "connection refused":
                    raise UserError(
                        f"{server}: {error.detail.rstrip('.')} (sample {sample.id!r}, attempt {attempt}). What is "
                        f"extracted is kept; run the same command again."
                    ) from None
                warn(f"{server}: {error}; sample {sample.id!r} is asked again.")
        raise AssertionError("unreachable")

    def _attempt(self, server: str, sample: Sample) -> Tensor:
        token_ids, request_id = sample.input_ids.tolist(), uuid.uuid4().hex
        body = {
            "model": self._models[server], "prompt": token_ids, "max_tokens": 1, "temperature": 0.0,
            "request_id": request_id,  # part of the file's name: no server can name another one
        }  # fmt: skip
        reply = post(f"{server}/v1/completions", body, limits=LIMITS)
        check_status(reply, server)
        transfer = read_reply(reply.content, StatesReply).kv_transfer_params
        if transfer is None or transfer.hidden_states_path is None:
            raise ServerError(
                "no states",
                "answered without a path of hidden states. Start it with the flags that `fledge extract "
                "--target-backend vllm` prints (docs/formats.md)",
            )
        return take_states(
            transfer.hidden_states_path, request_id, token_ids, self.num_taps + 1, self.hidden_size, folder=self.folder
        )


def model_of(server: str) -> str:
    """The name under which the server serves its model."""

    async def ask() -> str:
        async with Client() as client:
            return await served_model(client, server)

    try:
        return blocking(ask())
    except ServerError as error:
        raise UserError(
            f"{server}: no vLLM server answers there ({error.detail}). Start it, or correct --server."
        ) from None


@dataclass(frozen=True)
class EngineTarget:
    """A target that servers run: its two ends are read here, its states come from there."""

    ends: TargetEnds
    tap_layers: tuple[int, ...]
    source: EngineSource

    @classmethod
    def open(
        cls, name: str, servers: Sequence[str], *, dtype: str = "auto", tap_layers: TapChoice = None,
        revision: str | None = None, folder: Path = SERVER_FOLDER,
    ) -> "EngineTarget":  # fmt: skip
        """Read the ends from the files of `name` and find the servers (base URLs, with or without /v1)."""
        ends = TargetEnds.from_files(name, dtype=None if dtype == "auto" else getattr(torch, dtype), revision=revision)
        num_layers = ends.text_config.num_hidden_layers
        taps = chosen_taps(tap_layers or None, num_layers)
        if not servers:
            flags = shlex.join(server_flags([*taps, num_layers], str(folder)))
            raise UserError(f"--target-backend vllm needs --server URL. Start one: vllm serve {name} {flags}")
        if ends.norm is None:
            raise UserError(f"{name}: its decoder has no `norm` for vLLM's last state. Use the hf backend.")
        urls = [base_url(server) for server in servers]
        hidden_size = ends.text_config.hidden_size
        return cls(ends, taps, EngineSource(urls, ends.norm, len(taps), hidden_size, folder=folder))

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
