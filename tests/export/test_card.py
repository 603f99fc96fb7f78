"""The model card: only what is known, no local paths, commands that match the layout; and its way to the hub."""

import json
import re
import sys
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from pages import ROOT, run_python
from safetensors.torch import load_file
from tiny import tiny_draft, tiny_target

from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.layouts import LAYOUTS
from fledge.export.settings import ExportSettings

RUN = {
    "target": "/home/me/models/Tiny-1B", "steps": 440, "versions": {"fledge": "0.1.0"},
    "config": {"train_data_path": ["/home/me/data/answers.jsonl"], "train_hidden_path": [], "ttt_steps": 4,
               "model_max_length": 512, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
               "position_weights": "dynamic"},
    "metrics": {"epoch": 3.0, "eval_tau": 1.7779, "eval_acc_0": 0.4347, "eval_acc_1": 0.382, "eval_coverage": 0.966},
}  # fmt: skip


@pytest.fixture
def head(tmp_path):
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    (tmp_path / "head" / "provenance.json").write_text(json.dumps(RUN))
    return tmp_path / "head"


def card(head, to="vllm", **more) -> str:
    export_head(ExportSettings(head=str(head), to=to, output_dir=head.parent / f"out-{to}", **more))
    return (head.parent / f"out-{to}" / "README.md").read_text(encoding="utf-8")


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_facts_of_the_run(head):
    text = card(head, target="org/Tiny-1B", license="apache-2.0")
    assert header(text) == {
        "license": "apache-2.0", "base_model": "org/Tiny-1B", "base_model_relation": "adapter",
        "pipeline_tag": "text-generation", "library_name": "fledge",
        "tags": ["eagle3", "speculative-decoding", "draft-model"],
    }  # fmt: skip
    for fact in ("| steps | 440 |", "| data | answers.jsonl |", "| accept length (tau) | 1.78 |", "held-out data",
                 "| top-1 at draft step 1 | 38.2% |", "inputs of the target's decoder layers 2, 4, 5",
                 "48 of the target's 128 tokens", "under apache-2.0"):  # fmt: skip
        assert fact in text, fact
    assert "/home/me" not in text and str(head.parent) not in text


def test_nothing_is_made_up(tmp_path):
    """A head without provenance, licence or target has a card that says less, not more."""
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    text = card(tmp_path / "head")
    assert "## Training" not in text and "## Acceptance" not in text and "No licence is stated" in text
    assert "license" not in header(text) and "base_model" not in header(text)


@pytest.mark.parametrize(("to", "here", "other"), [
    ("vllm", '"model": "out-vllm"', "--speculative-draft-model-path out-vllm-sglang"),
    ("sglang", "--speculative-draft-model-path out-sglang", '"model": "out-sglang-vllm"'),
    ("speculators", "vllm serve out-speculators", "--speculative-draft-model-path out-speculators-sglang"),
    ("llama.cpp", "out-llama.cpp --target-model-dir org/Tiny-1B", '"model": "out-llama.cpp-vllm"'),
])  # fmt: skip
def test_commands_belong_to_the_layout(head, to, here, other):
    blocks = re.findall(r"```bash\n(.*?)\n```", card(head, to, target="org/Tiny-1B"), re.S)
    assert len(blocks) == 2 and here in blocks[0] and other in blocks[1]


def test_figures_of_a_stopped_run_and_of_a_benchmark(head, tmp_path):
    (head / "provenance.json").unlink()
    state = {"log_history": [{"tau": 1.1, "acc_0": 0.1}, {"tau": 1.3, "acc_0": 0.25}]}
    (head / "trainer_state.json").write_text(json.dumps(state))
    assert "| accept length (tau) | 1.30 |" in (text := card(head)) and "last logged training batches" in text
    summary = {"settings": {"temperature": 0.0, "tree": {"total_token": 8, "depth": 2, "top_k": 3},
                            "hardware": {"cpu": "EPYC", "gpus": []}},
               "sets": {"quick": {"questions": 4, "speedup": {"value": 1.2, "low": 1.1, "high": 1.3},
                                  "acceptance": {"tau": 1.64}}}}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = card(head, report=tmp_path / "summary.json")
    assert "| quick | 4 | 1.64 | 1.20 (1.10 to 1.30) |" in text and "tree of 8 nodes" in text and "on EPYC" in text
    with pytest.raises(UserError, match="not the summary.json"):
        card(head, report=head / "trainer_state.json")


def test_notes_of_the_author_stand_before_the_licence(head, tmp_path):
    (tmp_path / "notes.md").write_text("## Training data\n\nOur own words.\n")
    assert "\n\n## Training data\n\nOur own words.\n\n## Licence" in card(head, notes=tmp_path / "notes.md")
    with pytest.raises(UserError, match="--notes .*absent.md: no such file"):
        card(head, notes=tmp_path / "absent.md")


def test_another_licence_has_a_name_and_a_place(head):
    for unnamed in ("other", "tiny-1=", "=https://example.org"):
        with pytest.raises(UserError, match="NAME=URL"):
            card(head, license=unnamed)
    text = card(head, license="tiny-1=https://example.org?a=b")
    fields = {"license": "other", "license_name": "tiny-1", "license_link": "https://example.org?a=b"}
    assert header(text).items() >= fields.items() and "The head is under tiny-1." in text


# -- the hub -----------------------------------------------------------------------------------------------------------


class FakeApi:
    """What HfApi would be asked."""

    calls: list = []
    fails: Exception | None = None

    def create_repo(self, repo_id, **more):
        if self.fails:
            raise self.fails
        self.calls.append(("create", repo_id, more))
        return f"https://hub/{repo_id}"

    def upload_folder(self, **more):
        self.calls.append(("upload", more))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    FakeApi.calls, FakeApi.fails = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return FakeApi


def test_an_export_goes_up_without_local_files(head, hub, capsys):
    card(head, push_to_hub="me/tiny-head", private=True)
    (create, upload) = hub.calls
    assert create == ("create", "me/tiny-head", {"private": True, "exist_ok": True})
    assert upload[1]["allow_patterns"] == ["config.json", "model.safetensors", "README.md"]
    assert upload[1]["repo_id"] == "me/tiny-head" and upload[1]["folder_path"].endswith("out-vllm")
    assert "https://hub/me/tiny-head" in capsys.readouterr().err


def test_without_a_token_nothing_is_asked(head, hub, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub"], "get_token", lambda: None)
    with pytest.raises(UserError, match="no hub token.*hf auth login.*HF_TOKEN.*complete in"):
        card(head, push_to_hub="me/tiny-head")
    assert hub.calls == [] and (head.parent / "out-vllm" / "model.safetensors").is_file()


def test_errors_of_the_network_and_of_the_hub(head, hub):
    from huggingface_hub.errors import HfHubHTTPError

    hub.fails = OSError("Name or service not known")
    with pytest.raises(UserError, match="hub cannot be reached.*Name or service not known.*upload it later"):
        card(head, push_to_hub="me/tiny-head")
    hub.fails = type("ConnectError", (type("TransportError", (Exception,), {}),), {})("no route")
    with pytest.raises(UserError, match="hub cannot be reached"):
        card(head, push_to_hub="me/tiny-head")
    response: Any = SimpleNamespace(status_code=403, headers={}, request=None)
    hub.fails = HfHubHTTPError("Forbidden", response=response)
    with pytest.raises(UserError, match="refused me/tiny-head .403: .*HF_TOKEN"):
        card(head, push_to_hub="me/tiny-head")
    hub.fails = ZeroDivisionError("ours to fix")
    with pytest.raises(ZeroDivisionError):
        card(head, push_to_hub="me/tiny-head")


def test_a_repository_has_an_owner(head, hub):
    with pytest.raises(UserError, match="named NAME/HEAD. Nothing was uploaded"):
        card(head, push_to_hub="tiny-head")
    assert hub.calls == []


def test_a_layout_is_added_as_the_guide_says(head, monkeypatch):
    """The card had tables of layouts of its own, so a head in a new layout ended in a KeyError."""
    monkeypatch.setitem(LAYOUTS, "myengine", LAYOUTS["vllm"])  # taken out again after the test
    run_python(ROOT / "docs" / "add-an-engine-layout.md")
    text = card(head, "myengine", target="org/Tiny-1B")
    assert "written for MyEngine" in text and "myengine serve org/Tiny-1B --draft out-myengine" in text
    assert "For vLLM" in text and "--to vllm" in text
    tensors = load_file(head.parent / "out-myengine" / "model.safetensors")
    assert "layers.0.mlp.up_proj.weight" in tensors and not any(name.startswith("midlayer") for name in tensors)


def test_the_flag_names_every_layout():
    assert sorted(get_args(get_type_hints(ExportSettings)["to"])) == sorted(LAYOUTS)
