"""A real vLLM server: `fledge serve` -> `fledge regenerate` -> rows that train. Run by `make test-engines`.

vLLM lives in an environment of its own; FLEDGE_VLLM names its program (default: .venv-vllm/bin/vllm, which
`tests/engines/setup_vllm.sh` makes).
"""

import json
import os
import shutil
import urllib.request
from pathlib import Path

import pytest

from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.data.conversations import read_conversations
from fledge.data.rejects import Rejects
from fledge.data.tokenize import ChatTemplate
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings
from fledge.servers.processes import ServerSettings, plan, running, visible_gpus

pytestmark = pytest.mark.vllm
PORT = 8151
QUESTIONS = [
    "Name three colours of the rainbow.", "What is two plus two?", "Write one sentence about the sea.",
    "Say hello in French.", "What do cows drink?", "Give me a word that rhymes with cat.",
]  # fmt: skip


@pytest.fixture(scope="module")
def vllm() -> str:
    beside = Path(__file__).resolve().parents[2] / ".venv-vllm" / "bin" / "vllm"
    program = os.environ.get("FLEDGE_VLLM") or str(beside)
    if not shutil.which(program):
        pytest.skip(f"no vLLM at {program}: run tests/engines/setup_vllm.sh or set FLEDGE_VLLM")
    return program


@pytest.fixture(scope="module")
def url(vllm, smollm2_dir, tmp_path_factory):
    """A served target; the environment keeps vLLM's CPU build small and offline."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    args = ServerSettings(
        target=str(smollm2_dir), num_servers=1, base_port=PORT, max_model_len=512, vllm=vllm,
        output_dir=tmp_path_factory.mktemp("logs"),
        vllm_args=("--dtype", "bfloat16", "--enforce-eager", "--served-model-name", "target"),
    )  # fmt: skip
    with running(plan(args, visible_gpus(None)), 400):
        yield f"127.0.0.1:{PORT}"


def test_serve_regenerate_and_rows_that_train(url, smollm2_dir, tmp_path):
    rows = [{"id": f"r{i}", "conversations": [{"from": "human", "value": q}]} for i, q in enumerate(QUESTIONS)]
    rows.append({"id": "two turns", "conversations": [
        {"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "OLD"},
        {"from": "human", "value": "Say it again."}, {"from": "gpt", "value": "OLD"}]})  # fmt: skip
    rows.append({"id": "too long", "conversations": [{"from": "human", "value": "word " * 2000}]})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    regenerate(
        RegenerateArgs(
            prompts=PromptSourceSettings(data=str(tmp_path / "in.jsonl"), max_reject_share=0.2),
            output_dir=tmp_path / "out",
            answers=AnswerSettings(max_new_tokens=4096, temperature="0.0:0.5,0.6:0.5"),  # more than the context: capped
            engines=EngineSettings(server=(url,), concurrency=4),
        )
    )
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["reason"]) for entry in rejects] == [("too long", "context length")]
    template = ChatTemplate.from_pretrained(str(smollm2_dir))
    conversations = list(read_conversations(str(tmp_path / "out"), rejects=Rejects()))
    assert [conversation.id for conversation in conversations] == [row["id"] for row in rows[:-1]]
    for conversation in conversations:
        assert "OLD" not in str(conversation.messages)
        sample = template.encode(conversation)
        supervised = sample.input_ids[sample.loss_mask].tolist()
        assert len(supervised) == conversation.meta["num_output_tokens"] > 0  # every token vLLM wrote, and no other
        if conversation.meta["finish_reason"] == "stop":
            assert supervised[-1] in template.stop_token_ids


def test_vllms_own_health_page_is_what_serve_waited_for(url):
    with urllib.request.urlopen(f"http://{url}/health", timeout=10) as response:
        assert response.status == 200


def test_it_writes_prompts_of_its_own(url, smollm2_dir, tmp_path):
    """Text completion behind the beginning of a user's turn; what comes back are questions, which it then answers."""
    engines, open_law = EngineSettings(server=(url,), concurrency=4), AnswerSettings(temperature="1.0")
    asked = PromptSourceSettings(own_prompts=12, target=str(smollm2_dir), max_reject_share=0.9)
    regenerate(RegenerateArgs(prompts=asked, output_dir=tmp_path / "own", answers=open_law, engines=engines))
    prompts = list(read_conversations(str(tmp_path / "own"), rejects=Rejects()))
    assert len(prompts) >= 4
    for prompt in prompts:
        (message,) = prompt.messages
        assert message["role"] == "user" and message["content"].strip() and "<|im_" not in message["content"]
    again = PromptSourceSettings(data=str(tmp_path / "own"))
    greedy = AnswerSettings(max_new_tokens=16)
    regenerate(RegenerateArgs(prompts=again, output_dir=tmp_path / "out", answers=greedy, engines=engines))
    answered = list(read_conversations(str(tmp_path / "out"), rejects=Rejects()))
    assert [one.messages[0] for one in answered] == [one.messages[0] for one in prompts]
