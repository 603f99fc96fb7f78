"""Evaluation by decoding while training: tau is what decoding gives, the best is kept, training is not disturbed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from saved_target import save_target, write_conversations

from fledge.commands.train import TrainArgs, parse_args
from fledge.decoding.generate import generate
from fledge.decoding.records import Sampling
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.head import WEIGHTS, read_tensors
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.target.model import Target
from fledge.train import evaluate, live, run
from fledge.train.arguments import TrainSettings
from fledge.train.evaluate import held_out_prompts, read_best

TREE, TOKENS = TreeShape(8, 2, 3), 12


@pytest.fixture(autouse=True)
def small_trees(monkeypatch):
    """A tiny target's answers are short."""
    monkeypatch.setattr(evaluate, "TREE", TREE)
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", TOKENS)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_target(folder / "target", num_hidden_layers=8)
    write_conversations(folder / "train.jsonl", 12, seed=1)
    write_conversations(folder / "eval.jsonl", 3, seed=2, prefix="eval")
    return folder


def arguments(work: Path, output: Path, *flags: object, steps: int = 4) -> TrainSettings:
    plain = [
        "--target_model_name_or_path", work / "target", "--train_data_path", work / "train.jsonl",
        "--eval_data_path", work / "eval.jsonl", "--output_dir", output, "--max_steps", steps,
        "--per_device_train_batch_size", 2, "--ttt_steps", 2, "--draft_vocab_size", 64, "--bf16", False,
        "--logging_steps", 1, "--save_steps", 2, "--seed", 7, "--disable_tqdm", True, "--learning_rate", 1e-3,
        "--save_dtype", "float32", "--warmup_steps", 1, "--use_cpu", True,
    ]  # fmt: skip
    return parse_args(TrainArgs, [str(word) for word in (*plain, *flags)], prog="train", description="")


def decoding(*flags: object) -> tuple[object, ...]:
    return ("--eval_decode_steps", 2, "--eval_decode_prompts", 3, *flags)


def history(output: Path) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def test_tau_is_that_of_decoding_and_training_is_not_disturbed(work, tmp_path):
    run.train(arguments(work, tmp_path / "plain"))
    run.train(arguments(work, tmp_path / "with", *decoding("--eval_decode_load_best", False)))
    losses = [[e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("plain", "with")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    heads = [read_tensors(tmp_path / name / WEIGHTS) for name in ("plain", "with")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])

    logged = {entry["step"]: entry for entry in history(tmp_path / "with") if "decode_tau" in entry}
    assert sorted(logged) == [2, 4]
    target = Target.from_pretrained(str(work / "target"))
    source = live.live_source(arguments(work, tmp_path / "again"))
    prompts = held_out_prompts(source.eval, 3, 400)
    tokens = forwards = 0
    for prompt in prompts:
        head = load_draft(tmp_path / "with", target.embedding_weight)
        made = generate(target, head, prompt.ids, tree=TREE, max_new_tokens=TOKENS, sampling=Sampling())
        tokens, forwards = tokens + len(made.token_ids) - 1, forwards + made.num_forwards
    assert logged[4]["decode_tau"] == tokens / forwards and logged[4]["decode_tokens"] == tokens


def test_prompts_are_first_turns(work, tmp_path):
    source = live.live_source(arguments(work, tmp_path))
    tokenizer = Target.from_pretrained(str(work / "target")).tokenizer
    prompts = held_out_prompts(source.eval, 2, 400)
    assert len(prompts) == 2
    for prompt in prompts:
        text = tokenizer.decode(prompt.ids)
        assert text.startswith("<|im_start|>user") and text.endswith("<|im_start|>assistant\n")
    assert held_out_prompts(source.eval, 2, 3) == []  # none is that short


def test_the_best_head_is_kept_and_becomes_the_final_one(work, tmp_path, monkeypatch):
    """Scripted taus with the peak in the middle: best/ holds step 4 of 8, through a stop and a resume."""
    taus = {2: 1.1, 4: 1.6, 6: 1.4, 8: 1.2}
    monkeypatch.setattr(
        evaluate.DecodingEvaluation, "run", lambda self, draft, step, bar: evaluate.Decoded(step, taus[step], 10, 0.1)
    )
    run.train(arguments(work, tmp_path, *decoding(), steps=4))
    best = read_best(tmp_path)
    assert best is not None and (best.step, best.tau) == (4, 1.6)
    run.train(arguments(work, tmp_path, *decoding(), steps=8))
    assert (read_best(tmp_path) or best).step == 4
    steps = {n: read_tensors(tmp_path / f"checkpoint-{n}" / WEIGHTS)["fc.weight"] for n in (6, 8)}
    final, kept = (read_tensors(folder / WEIGHTS)["fc.weight"] for folder in (tmp_path, tmp_path / "best"))
    assert torch.equal(final, kept)
    assert not torch.equal(kept, steps[6]) and not torch.equal(kept, steps[8])  # control: the last ones differ
    run.train(arguments(work, tmp_path, *decoding("--resume_from_checkpoint", False, "--overwrite", True), steps=2))
    assert (read_best(tmp_path) or best).step == 2  # a fresh run does not inherit the best of another


def test_stored_states_need_the_target_for_decoding(work, tmp_path):
    store = tmp_path / "store"
    extract(ExtractSettings(target=str(work / "target"), data=[str(work / "train.jsonl")], output_dir=store))
    stored = ["--train_hidden_path", str(store), "--eval_fraction", "0.3", "--output_dir", str(tmp_path / "out"),
              "--max_steps", "2", "--ttt_steps", "2", "--draft_vocab_size", "64", "--bf16", "False",
              "--save_steps", "2", "--disable_tqdm", "True", "--use_cpu", "True", *map(str, decoding())]  # fmt: skip
    with pytest.raises(UserError, match="does not load. Give --target"):
        run.train(parse_args(TrainArgs, stored, prog="train", description=""))
    named = [*stored, "--target_model_name_or_path", str(work / "target")]
    run.train(parse_args(TrainArgs, named, prog="train", description=""))
    assert [entry["decode_tau"] >= 1 for entry in history(tmp_path / "out") if "decode_tau" in entry] == [True]


def test_without_held_out_data_it_says_what_is_needed(work, tmp_path):
    args = arguments(work, tmp_path, *decoding())
    args.inputs = replace(args.inputs, eval_data=())
    with pytest.raises(UserError, match="decodes held-out conversations, and there are none"):
        run.train(args)
