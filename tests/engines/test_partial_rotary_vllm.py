"""A target that turns half of each head, in a real vLLM server: the head that was trained for it drafts there as here.

No small model of such an architecture can be had, so a tiny MiniMax-M2 learns a little from SmolLM2's answers (four
minutes, kept in pytest's cache). One expert, because vLLM routes on a CPU by softmax only and this architecture by
sigmoid: of one expert both make the same. The draft's queries and keys are made larger, so that its attention, and with
it its rope, decides what it drafts.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MiniMaxM2Config, MiniMaxM2ForCausalLM
from vllm_chains import NEAR_TIE, UNROLLED, Reference, answers_of, deviation, run, same_rounds, served

from fledge.drafters.eagle3.config import from_json, to_json
from fledge.drafters.head_files import WEIGHTS

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]
TAPS, CHAIN = (1, 3, 5), 3
STEPS, ROWS, LENGTH = 200, 8, 128
SHARPER = 5**0.5


@pytest.fixture(scope="module")
def target(request, smollm2_dir) -> Path:
    folder = Path(request.config.cache.mkdir("partial-rotary"))
    if not (folder / "target" / "config.json").is_file():
        learned(answers_of(folder, str(smollm2_dir)), smollm2_dir, folder / "target")
    return folder / "target"


def learned(answers: Path, tokenizer_dir: Path, out: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = MiniMaxM2ForCausalLM(MiniMaxM2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=49152, num_local_experts=1, num_experts_per_tok=1,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ))  # fmt: skip
    rows = [json.loads(line) for path in sorted(answers.glob("shard-*.jsonl")) for line in path.open()]
    texts = [[{"role": role, "content": turn["value"]} for role, turn in
              zip(("user", "assistant"), row["conversations"], strict=True)] for row in rows]  # fmt: skip
    ids = torch.tensor(tokenizer.encode("".join(tokenizer.apply_chat_template(text, tokenize=False) for text in texts)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (ROWS,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for_vllm = {"rotary_dim": 16, "scoring_func": "softmax", "use_routing_bias": True}
    (out / "config.json").write_text(json.dumps({**config, **for_vllm}))


@pytest.fixture(scope="module")
def head(target) -> Path:
    folder = target.parent / "head"
    if not (folder / "provenance.json").is_file():  # written last
        answers = target.parent / "own-answers"
        run(
            "regenerate", "--data", str(target.parent / "prompts.jsonl"), "--output-dir", str(answers), "--engine",
            "transformers", "--target", str(target), "--max-tokens", "64", "--temperature", "0.5", "--dtype", "float32",
        )  # fmt: skip
        run(
            "train", "--target", str(target), "--data", str(answers), "--output-dir", str(folder), "--tap-layers",
            *map(str, TAPS), "--draft-vocab-size", "4096", *UNROLLED, "--num-train-epochs", "12", "--model-max-length",
            "192", "--save-strategy", "no",
        )  # fmt: skip
    return folder


@pytest.fixture
def sharp(head, tmp_path) -> Path:
    """The head with an attention that is sure of itself."""
    tensors, out = load_file(head / WEIGHTS), tmp_path / "sharp"
    for name in "qk":
        tensors[f"midlayer.self_attn.{name}_proj.weight"] *= SHARPER
    out.mkdir()
    save_file(tensors, out / WEIGHTS)
    (out / "config.json").write_text((head / "config.json").read_text())
    return out


def test_vllm_drafts_as_we_do(target, sharp, vllm_program, tmp_path, capsys):
    reference = Reference(target, TAPS)
    answers, theirs = served(vllm_program, sharp, CHAIN, reference, tmp_path)
    for prompt, answer, ours in zip(reference.prompts, answers, reference.answers, strict=True):
        assert answer == ours or reference.gap(prompt, ours, answer) < NEAR_TIE
    mine = reference.chain(sharp, CHAIN)
    with capsys.disabled():
        same_rounds(mine, theirs, f"half of each head turned, chain of {CHAIN}")
    config = from_json(sharp / "config.json")
    whole = {**config.rope_parameters, "partial_rotary_factor": 1.0}
    (sharp / "config.json").write_text(json.dumps(to_json(dataclasses.replace(config, rope_parameters=whole))))
    wrong = reference.chain(sharp, CHAIN)  # the control: what an engine would do that turns whole heads
    with capsys.disabled():
        print(f"  whole heads turned: position 2 {wrong.at(1):.4f}")
    assert max(deviation(mine, wrong, position) for position in range(CHAIN)) > 3
