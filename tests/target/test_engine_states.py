"""The client of vLLM's hidden-state extraction: against a fake that keeps its protocol, and against a real server."""

import dataclasses
import fcntl
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fledge.errors import UserError
from fledge.target.engine_states import EngineSource, open_engine, server_flags
from fledge.target.extract import Samples, extract, open_target
from fledge.target.model import Target
from fledge.target.store.reader import HiddenStore

TOLERANCE = 1e-5  # fp32, and the norm applied to all rows at once


class FakeServer:
    """Answers as vLLM does: the path at once, a lock held until the file is written, states *before* the final norm."""

    def __init__(self, model_folder: Path, folder: Path, layers: list[int], delay_s: float = 0.0) -> None:
        target = Target.from_pretrained(str(model_folder))
        last: list[torch.Tensor] = []
        keep = lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        target.layers[-1].register_forward_hook(keep)
        counter, one_at_a_time = iter(range(10**6)), threading.Lock()

        def states(ids: list[int]) -> torch.Tensor:
            with one_at_a_time, torch.inference_mode():
                last.clear()
                every = target.model.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
                chosen = [every[layer] if layer < target.num_layers else last[0] for layer in layers]
                return torch.stack([state.reshape(len(ids), -1) for state in chosen], dim=1).clone()

        def write(path: Path, ids: list[int], lock: int) -> None:
            time.sleep(delay_s)
            save_file({"hidden_states": states(ids), "token_ids": torch.tensor(ids)}, path)
            os.close(lock)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert body["model"] == "tiny" and body["max_tokens"] == 1
                path = folder / f"{self.server.server_port}-{next(counter)}.safetensors"
                lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
                fcntl.flock(lock, fcntl.LOCK_EX)
                threading.Thread(target=write, args=(path, body["prompt"], lock)).start()
                self.answer({"choices": [{}], "kv_transfer_params": {"hidden_states_path": str(path)}})

            def answer(self, document: dict) -> None:
                content = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(saved_target, tmp_path):
    servers: list[FakeServer] = []

    def start(layers=(2, 4, 5, 8), **more) -> str:
        folder = tmp_path / "states"
        folder.mkdir(exist_ok=True)
        servers.append(FakeServer(saved_target, folder, list(layers), **more))
        return servers[-1].url

    yield start
    for server in servers:
        server.close()


def test_extraction_through_a_server(serve, extract_args, store, tmp_path):
    """Two servers, answers out of order: the records of the transformers path, and no file left behind."""
    servers = [serve(), f"{serve(delay_s=0.02)}/v1"]
    extract(extract_args(tmp_path / "store", target_backend="vllm", server=servers))
    theirs, ours = HiddenStore(tmp_path / "store"), HiddenStore(store)
    assert theirs.ids == ours.ids and theirs.identity.backend == "vllm"
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.input_ids, other.input_ids) and torch.equal(mine.loss_mask, other.loss_mask)
        for name in ("tap_hidden", "last_hidden"):
            a, b = getattr(mine, name), getattr(other, name)
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max(), name
    assert theirs.identity.differences(ours.identity) == ['backend "vllm", not "hf"']
    assert not list((tmp_path / "states").iterdir())


def test_the_final_norm_matters(serve, extract_args, tmp_path):
    """Control: with no norm applied, last_hidden is far from the target's."""
    args = extract_args(tmp_path, target_backend="vllm", server=[serve()])
    live = open_target(extract_args(tmp_path))
    sample = next(iter(Samples.read(args, live.template)))
    expected = live.producer.target.forward(sample.input_ids[None]).last_hidden[0]
    raw = EngineSource(args.server, torch.nn.Identity(), 3).record(sample).last_hidden
    assert (raw - expected).abs().max() > 0.1 * expected.abs().max()
    normed = open_engine(args).producer.record(sample).last_hidden
    assert (normed - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_what_a_server_gets_wrong(serve, extract_args, tmp_path):
    args = extract_args(tmp_path / "store", target_backend="vllm")
    with pytest.raises(UserError, match="needs --server.*vllm serve .*extract_hidden_states.*vllm_connector"):
        extract(args)
    with pytest.raises(UserError, match="no vLLM server answers there"):
        extract(dataclasses.replace(args, server=["http://127.0.0.1:9"]))
    with pytest.raises(UserError, match="needed are 4 layers"):
        extract(dataclasses.replace(args, server=[serve(layers=(2, 4, 5))]))
    with pytest.raises(UserError, match="--server is for --target-backend vllm"):
        extract(extract_args(tmp_path / "store", server=["http://127.0.0.1:9"]))


def test_flags_are_json_that_vllm_reads():
    flags = server_flags([2, 4, 5, 8], "/shared")
    method, connector = json.loads(flags[1]), json.loads(flags[3])
    assert method["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5, 8]
    assert connector["kv_connector_extra_config"] == {"shared_storage_path": "/shared"}
