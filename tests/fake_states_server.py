"""A stand-in for a vLLM server that extracts hidden states: its protocol, a tiny target's states."""

import fcntl
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import save_file

from fledge.target.model import Target


class FakeStatesServer:
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
                path = folder / f"cmpl-{body['request_id']}-0-{next(counter)}.safetensors"
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
