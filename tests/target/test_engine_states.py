"""The client of vLLM's hidden-state extraction: against a fake that keeps its protocol, and against a real server."""

import dataclasses
import json

import pytest
import torch
from fake_states_server import FakeStatesServer

from fledge.errors import UserError
from fledge.extraction.extract import Samples, extract, open_served, open_target
from fledge.servers.hidden_states import EngineSource, server_flags
from fledge.storage.states.reader import HiddenStore
from fledge.target.live import LiveSource

TOLERANCE = 1e-5  # fp32, and the norm applied to all rows at once


@pytest.fixture
def serve(saved_target, tmp_path):
    servers: list[FakeStatesServer] = []

    def start(layers=(2, 4, 5, 8), **more) -> str:
        folder = tmp_path / "states"
        folder.mkdir(exist_ok=True)
        servers.append(FakeStatesServer(saved_target, folder, list(layers), **more))
        return servers[-1].url

    yield start
    for server in servers:
        server.close()


def test_extraction_through_a_server(serve, extract_args, store, tmp_path):
    """Two servers, answers out of order: the records of the transformers path, and no file left behind."""
    servers = [serve(), f"{serve(delay_s=0.02)}/v1"]
    extract(extract_args(tmp_path / "store", target_backend="vllm", server=servers, server_folder=tmp_path / "states"))
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
    args = extract_args(tmp_path, target_backend="vllm", server=[serve()], server_folder=tmp_path / "states")
    live = open_target(extract_args(tmp_path))
    assert isinstance(live.producer, LiveSource)
    sample = next(iter(Samples.read(args, live.template)))
    expected = live.producer.target.forward(sample.input_ids[None]).last_hidden[0]
    raw = EngineSource(args.server, torch.nn.Identity(), 3, 64, folder=args.server_folder).record(sample).last_hidden
    assert (raw - expected).abs().max() > 0.1 * expected.abs().max()
    served = open_served(args).producer
    assert isinstance(served, EngineSource)
    normed = served.record(sample).last_hidden
    assert (normed - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_what_a_server_gets_wrong(serve, extract_args, tmp_path):
    args = extract_args(tmp_path / "store", target_backend="vllm", server_folder=tmp_path / "states")
    with pytest.raises(UserError, match="needs --server.*vllm serve .*extract_hidden_states.*vllm_connector"):
        extract(args)
    with pytest.raises(UserError, match="no vLLM server answers there"):
        extract(dataclasses.replace(args, server=["http://127.0.0.1:9"]))
    with pytest.raises(UserError, match=r"needed are floats of shape \(\d+, 4, 64\)"):
        extract(dataclasses.replace(args, server=[serve(layers=(2, 4, 5))]))
    with pytest.raises(UserError, match="--server is for --target-backend vllm"):
        extract(extract_args(tmp_path / "store", server=["http://127.0.0.1:9"]))


def test_flags_are_json_that_vllm_reads():
    flags = server_flags([2, 4, 5, 8], "/shared")
    method, connector = json.loads(flags[1]), json.loads(flags[3])
    assert method["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5, 8]
    assert connector["kv_connector_extra_config"] == {"shared_storage_path": "/shared"}
