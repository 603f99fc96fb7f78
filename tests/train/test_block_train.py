"""`fledge train --draft_type dspark | dflash`: stored as live, resumed as uninterrupted, and learned."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_target import save_target, write_conversations
from tiny import prompt

import fledge
from fledge.commands.train import TrainArgs, parse_args
from fledge.data.tokenize import Sample
from fledge.decoding.generate import generate
from fledge.doctor.inspect_block import best_reading
from fledge.doctor.readings import RecordedAnswers
from fledge.drafters.dspark.checkpoint import BlockHead, read_block
from fledge.drafters.dspark.config import from_json
from fledge.drafters.head_files import WEIGHTS, read_tensors
from fledge.drafters.registry import read_drafter
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.target.model import Target
from fledge.train import live, run
from fledge.train.block import unused_token

TAPS = ("2", "4", "6", "7")
STEPS = 4

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_target(folder / "target")
    write_conversations(folder / "data.jsonl", 24, seed=1)
    taps = tuple(map(int, TAPS))
    extract(
        ExtractSettings(
            target=str(folder / "target"), data=(str(folder / "data.jsonl"),), output_dir=folder / "store",
            tap_layers=taps,
        )
    )  # fmt: skip
    return folder


def train(output: Path, *flags: object, steps: int = STEPS) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run the command; every step's loss, and the final draft."""
    plain = [
        "--output_dir", output, "--max_steps", steps, "--per_device_train_batch_size", 2, "--bf16", False,
        "--logging_steps", 1, "--save_steps", 2, "--seed", 7, "--save_dtype", "float32", "--disable_tqdm", True,
        "--learning_rate", 1e-3, "--use_cpu", True, "--num_anchors", 5, "--block_size", 4,
    ]  # fmt: skip
    words = [str(word) for word in (*plain, *flags)]
    run.train(parse_args(TrainArgs, words, prog="train", description=""))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], read_tensors(output / WEIGHTS)


def same(a, b) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def online(work: Path) -> tuple[object, ...]:
    return ("--target_model_name_or_path", work / "target", "--train_data_path", work / "data.jsonl",
            "--tap_layers", *TAPS)  # fmt: skip


@pytest.mark.parametrize("draft_type, flags", [("dspark", ()), ("dflash", ("--draft_vocab_size", 64))])
def test_offline_is_online_and_resumed_is_uninterrupted(work, tmp_path, draft_type, flags, capsys):
    """The same losses and weights from a store of any taps, and from a run that lost its last steps."""
    flags = ("--draft_type", draft_type, *flags)
    whole = train(tmp_path / "a", *online(work), *flags)
    assert len(whole[0]) == STEPS and "predicted" not in capsys.readouterr().err
    assert same(train(tmp_path / "b", "--train_hidden_path", work / "store", *flags), whole)
    shutil.rmtree(tmp_path / "b" / f"checkpoint-{STEPS}")
    assert same(train(tmp_path / "b", "--train_hidden_path", work / "store", *flags), whole)
    assert not same(train(tmp_path / "c", *online(work), *flags, "--seed", 8), whole)  # control: other anchors
    config = from_json(tmp_path / "a" / "config.json")
    assert config.tap_layers == tuple(map(int, TAPS)) and config.sample_from_anchor is (draft_type == "dspark")
    assert ("lm_head.weight" in whole[1]) is (draft_type == "dflash")


def test_the_metrics_are_by_slot_and_tau_is_decoded(work, tmp_path):
    train(
        tmp_path / "a", *online(work), "--draft_type", "dspark", "--eval_fraction", 0.2, "--eval_decode_steps", 3,
        "--eval_decode_prompts", 2,
    )  # fmt: skip
    history = json.loads((tmp_path / "a" / "trainer_state.json").read_text())["log_history"]
    last = {key: value for entry in history for key, value in entry.items()}
    assert {"tau", "coverage", *(f"acc_{k}" for k in range(4))} <= last.keys() and "acc_4" not in last
    assert last["decode_tau"] >= 1 and last["eval_tau"] >= 1 and last["coverage"] == 1
    assert (tmp_path / "a" / "best" / WEIGHTS).is_file()


def test_a_dflash_draft_starts_a_dspark_one(work, tmp_path):
    shape = ("--train_hidden_path", work / "store", "--draft_layers", 1)
    before = train(tmp_path / "a", *shape, "--draft_type", "dflash", steps=2)[1]
    after = train(tmp_path / "b", *shape, "--draft_type", "dspark", "--init_from", tmp_path / "a", "--learning_rate", 0,
                  steps=1)[1]  # fmt: skip
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"markov_head", "confidence_head"}
    assert from_json(tmp_path / "b" / "config.json").sample_from_anchor is False  # as it was trained
    wide = write(tmp_path / "wide.json", intermediate_size=80)
    with pytest.raises(UserError, match=r"mlp.gate_proj.weight is \(96, 64\) there, \(80, 64\) here"):
        train(tmp_path / "c", *shape, "--draft_type", "dflash", "--init_from", tmp_path / "a",
              "--draft_model_config_path", wide)  # fmt: skip


def write(path: Path, **document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_config_file_chooses_the_shape(work, tmp_path):
    chosen = write(tmp_path / "shape.json", num_hidden_layers=2, block_size=3, markov_rank=8, sliding_window=16,
                   sample_from_anchor=False, intermediate_size=48, mask_token_id=9)  # fmt: skip
    flags = ("--train_hidden_path", work / "store", "--draft_type", "dspark", "--draft_model_config_path", chosen)
    train(tmp_path / "a", *flags, steps=1)
    config = from_json(tmp_path / "a" / "config.json")
    found = (config.num_layers, config.block_size, config.markov_rank, config.sliding_window, config.mask_token_id)
    assert found == (2, 4, 8, 16, 9) and not config.sample_from_anchor  # --block_size 4 wins over the file
    wrong = write(tmp_path / "wrong.json", blok_size=3)
    with pytest.raises(UserError, match="unknown key 'blok_size'.*block_size"):
        train(tmp_path / "b", *flags[:-1], wrong)


def test_an_unused_token_masks():
    counts = torch.tensor([3, 0, 0, 2, 0, 1])
    assert unused_token(counts, [4]) == 2 and unused_token(counts, []) == 4
    with pytest.raises(UserError, match="mask_token_id"):
        unused_token(torch.ones(4), [])


@pytest.fixture(scope="module")
def sure(work) -> Path:
    """The target, sure of its choices: a random one's distribution is nearly even, and its argmax hard to learn."""
    target = Target.from_pretrained(str(work / "target"))
    target.model.get_output_embeddings().weight.data.mul_(30)
    target.model.save_pretrained(work / "sure")
    target.tokenizer.save_pretrained(work / "sure")
    return work / "sure"


def test_a_trained_draft_beats_its_first_slot(work, sure, tmp_path, monkeypatch):
    """Learned from the target's own answers to a few prompts: blocks are accepted deeper than their first token, the
    text is the target's, as chain and as tree, and the folder is read by its name."""
    target = Target.from_pretrained(str(sure), tap_layers=[int(tap) for tap in TAPS])
    prompts = [prompt(6, seed=seed) for seed in range(3)]
    answers = [generate(target, None, ids, max_new_tokens=16, eos_token_ids=()).token_ids for ids in prompts]
    samples = []
    for number, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        mask = torch.arange(len(ids) + len(answer)) >= len(ids)
        samples.append(Sample(f"s{number}", torch.tensor([*ids, *answer]), mask))
    counts = torch.bincount(torch.tensor(sum(answers, [])), minlength=target.vocab_size)
    monkeypatch.setattr(live, "conversations", lambda *_: (samples * 60, None, counts, []))
    train(tmp_path / "head", "--target_model_name_or_path", sure, "--train_data_path", work / "data.jsonl",
          "--tap_layers", *TAPS, "--draft_type", "dspark", "--num_anchors", 24, "--learning_rate", 3e-3,
          "--save_strategy", "no", steps=60)  # fmt: skip
    draft = read_drafter(tmp_path / "head").bind(target)

    def tau(tree: TreeShape) -> float:
        made = [generate(target, draft, ids, tree=tree, max_new_tokens=16, eos_token_ids=()) for ids in prompts]
        assert [one.token_ids for one in made] == answers
        return sum(len(one.token_ids) - 1 for one in made) / sum(one.num_forwards for one in made)

    first, chain, tree = tau(TreeShape(2, 0, 1)), tau(TreeShape(5, 3, 1)), tau(TreeShape(12, 3, 3))
    assert first > 1.5 and chain > first + 0.5 and tree >= chain, (first, chain, tree)
    check_readings(sure, read_block(tmp_path / "head"), prompts, answers)
    by_name = fledge.load(str(sure), str(tmp_path / "head"))
    assert by_name.generate(prompts[0], max_new_tokens=16).token_ids[:4] == answers[0][:4]


def check_readings(folder: Path, head: BlockHead, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """The doctor names how a draft was trained, whichever block layout its files state. Of taps one layer off, the
    right ones are the likeliest; in so small a target the others explain it nearly as well."""
    target = Target.from_pretrained(str(folder), tap_layers=range(1, 8))
    recorded = RecordedAnswers(target, prompts, 16, answers)
    right = "sample_from_anchor True, taps [2, 4, 6, 7]"
    for stated, expected in (({}, "as the files say"), ({"sample_from_anchor": False}, right)):
        wrong = BlockHead(dataclasses.replace(head.config, **stated), head.tensors)
        *tried, best = best_reading(wrong, recorded, target.num_layers)
        assert best.label == expected, [(reading.label, reading.tau) for reading in tried]
        assert tried[0].label == "as the files say" and (best is tried[0] or best.tau > tried[0].tau + 0.5)
    shifted = BlockHead(dataclasses.replace(head.config, tap_layers=(1, 3, 5, 6)), head.tensors)
    *tried, _ = best_reading(shifted, recorded, target.num_layers)
    likeliest = max(tried, key=lambda reading: reading.tau).config
    taus = [(reading.label, reading.tau) for reading in tried]
    assert likeliest.tap_layers == (2, 4, 6, 7) and likeliest.sample_from_anchor, taus
