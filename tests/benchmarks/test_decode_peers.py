"""The benchmarks of decoding run on a tiny target: our engines agree, a peer that answers otherwise is found out."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from benchmark_scripts import load_script
from saved_target import save_target
from tiny import tiny_draft

from fledge.drafters.eagle3.checkpoint import save_draft
from fledge.target.model import Target

FAKE_PEER = """
import json, sys
print(json.dumps({"fake": "1"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    tokens = [5] * (asked["new_tokens"] - 1)
    print(json.dumps({"token_ids": tokens, "accepted": [1, 1], "prefill_s": 1.0, "decode_s": 2.0}), flush=True)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_target(folder / "target")
    target = Target.from_pretrained(str(folder / "target"), dtype=torch.float32, device="cpu")
    save_draft(tiny_draft(target), folder / "head", dtype=torch.float32)
    rows = [{"question_id": number, "turns": [f"the quick brown fox {number}"]} for number in range(2)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(script: types.ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> dict:
    common = [
        folder / "target", folder / "head", "--sets", folder / "asked.jsonl", "--prompts", 2, "--rounds", 1,
        "--threads", torch.get_num_threads(), "--dtype", "float32", "--out", folder / script.__name__,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in (script.__name__, *common, *words)])
    script.main()
    assert (folder / f"{script.__name__}.md").read_text().startswith("# ")
    return json.loads((folder / f"{script.__name__}.json").read_text())


def test_our_shapes_agree_and_another_answer_is_seen(folders, monkeypatch, tmp_path):
    script = load_script("decode_peers")
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_PEER)
    monkeypatch.setattr(script, "WORKER", worker)
    found = run(script, folders, monkeypatch, "--tree", 8, 2, 3, "--new-tokens", 12, "--peer-python", sys.executable,
                "--as-released")  # fmt: skip
    rows = found["results"]["float32"]
    ours, peer = rows["8/2/3 exact"], rows["8/2/3 peer"]
    assert rows["8/2/3 fixed"]["against_plain"]["same_tokens"] == ours["against_plain"]["same_tokens"] == 2
    assert peer["against_plain"]["same_tokens"] == ours["against_peer"]["same_tokens"] == 0
    assert peer["tau"] == peer["tok_per_s"] == 5.5 and found["peer"] == {"fake": "1"}  # 11 tokens, 2 rounds, 2 seconds
    assert "PYTHON" not in json.dumps(found["config"]) and str(folders) not in json.dumps(found)


def test_every_beam_row_has_its_own_scores(monkeypatch):
    """AngelSlim 0.5.0 gives all rows the scores of the first; `as_released` keeps that."""
    worker = load_script("decode_peers_worker")

    class Released:
        top_k = 2
        logsoftmax = torch.nn.LogSoftmax(dim=-1)

        def norm(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

        lm_head = norm

        def _get_topk_tokens(self, hidden: torch.Tensor) -> str:
            return "as released"

    head = worker.with_eagle_scores(types.SimpleNamespace(Llama3Eagle3Drafter=Released))()
    hidden = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 1.0]])
    ids, scores = head._get_topk_tokens(hidden)
    assert ids.tolist() == [[0, 1], [2, 1]] and torch.equal(scores, hidden.log_softmax(-1).gather(1, ids))
    assert head._get_topk_tokens(hidden[1:])[1].shape == (2,)  # the root's children: one row
    head.as_released = True
    assert head._get_topk_tokens(hidden) == "as released"


def test_the_engines_choice_answers_as_plain_decoding_does(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    load_script("decode_peers")
    found = run(load_script("decode_adaptive"), folders, monkeypatch, "--new-tokens", 12, "--tree", 6, 1, 2)
    rows = found["results"]
    assert set(rows) == {
        "plain",
        "given head, fixed tree",
        "no head",
        *(f"{n} head{alone}" for n in ("given", "untrained", "wrong") for alone in ("", " alone")),
    }
    assert all(row["same_tokens"] == row["prompts"] == 2 for row in rows.values())
    assert rows["plain"]["time_over_plain"]["rounds"] == [1.0]
