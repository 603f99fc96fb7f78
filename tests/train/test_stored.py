"""Training from files equals training online: the same losses and the same head, bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from saved_target import save_target, write_conversations

from fledge.commands.train import TrainArgs, parse_args
from fledge.drafters.eagle3.head import WEIGHTS, read_tensors
from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.storage.states.describe import plain_config
from fledge.storage.states.manifest import read_manifest
from fledge.storage.states.reader import HiddenStore
from fledge.target.head import TargetEnds, TargetHead
from fledge.target.model import Target
from fledge.train import run
from fledge.train.arguments import TrainSettings
from fledge.train.live import live_source
from fledge.train.run import open_source

STEPS = 20


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny target, two files of conversations, a store of each, and the head trained online on the first."""
    folder = tmp_path_factory.mktemp("work")
    save_target(folder / "target")
    for name, seed in (("first", 1), ("second", 2)):
        write_conversations(folder / f"{name}.jsonl", 24, seed=seed, prefix=name)
        store(folder, folder / name, [f"{name}.jsonl"])
    return folder


def store(work: Path, into: Path, data: list[str], **changes) -> Path:
    paths = [str(work / name) for name in data]
    extract(ExtractSettings(target=str(work / "target"), data=paths, output_dir=into, shard_mb=0.25, **changes))
    return into


def arguments(output: Path, *flags: str) -> TrainSettings:
    plain = [
        "--output_dir", str(output), "--max_steps", str(STEPS), "--per_device_train_batch_size", "2",
        "--ttt_steps", "3", "--draft_vocab_size", "64", "--bf16", "False", "--logging_steps", "1",
        "--save_strategy", "no", "--seed", "7", "--save_dtype", "float32", "--disable_tqdm", "True",
        "--learning_rate", "1e-3", "--use_cpu", "True",
    ]  # fmt: skip
    return parse_args(TrainArgs, [*plain, *map(str, flags)], prog="train", description="")


def trained(output: Path, *flags) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run the command; every step's loss, and the final head."""
    run.train(arguments(output, *flags))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS
    return losses, read_tensors(output / WEIGHTS)


def same(a, b) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][key], b[1][key]) for key in a[1])


@pytest.fixture(scope="module")
def online(work, tmp_path_factory):
    data = ("--train_data_path", work / "first.jsonl", work / "second.jsonl")
    return trained(tmp_path_factory.mktemp("online"), "--target_model_name_or_path", work / "target", *data)


def test_offline_equals_online(work, online, tmp_path):
    assert same(trained(tmp_path / "a", "--train_hidden_path", work / "first", work / "second"), online)
    assert not same(trained(tmp_path / "b", "--train_hidden_path", work / "second", work / "first"), online)  # control


def test_supervised_rows_are_enough(work, online, tmp_path):
    """Rows of last_hidden outside the answers teach nothing: leaving them out changes no bit."""
    both = store(work, tmp_path / "small", ["first.jsonl", "second.jsonl"], last_storage="supervised")
    flags = ("--train_hidden_path", both, "--dataloader_num_workers", 2)
    assert same(trained(tmp_path / "out", *flags), online)


def test_a_store_in_front_of_the_target(work, online, tmp_path, monkeypatch):
    """Half of it stored: the rest is extracted and kept; the second time the target is not even loaded."""
    folder = shutil.copytree(work / "first", tmp_path / "cache")
    flags = ("--target_model_name_or_path", work / "target", "--train_hidden_path", folder,
             "--train_data_path", work / "first.jsonl", work / "second.jsonl")  # fmt: skip
    assert same(trained(tmp_path / "a", *flags), online)
    assert len(HiddenStore(folder)) == 48

    def load(*_args, **_kwargs):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(Target, "from_pretrained", load)
    source = open_source(arguments(tmp_path / "b", *flags))
    assert len(source.train) == 48 and source.train[47].sample_id.startswith("second")


@pytest.mark.parametrize("stored_before", [False, True], ids=["extracted-now", "in-the-store"])
def test_held_out_conversations_are_neither_trained_on_nor_counted(work, tmp_path, stored_before):
    """--train_hidden_path and --eval_data_path alone: the store gets the held-out samples, the training does not."""
    data = ["first.jsonl", "second.jsonl"] if stored_before else ["first.jsonl"]
    folder = store(work, tmp_path / "store", data)
    source = open_source(arguments(
        tmp_path, "--target_model_name_or_path", work / "target", "--train_hidden_path", folder, "--eval_data_path",
        work / "second.jsonl",
    ))  # fmt: skip
    alone = open_source(arguments(tmp_path, "--train_hidden_path", work / "first"))
    trained_on, wanted, held_out = (
        [records[i].sample_id for i in range(len(records))] for records in (source.train, alone.train, source.eval)
    )
    assert len(HiddenStore(folder)) == 48 and len(held_out) == 24 and trained_on == wanted
    assert torch.equal(source.counts, alone.counts) and list(source.always) == list(alone.always)
    with pytest.raises(UserError, match="no records to train on are left"):
        open_source(arguments(
            tmp_path, "--target_model_name_or_path", work / "target", "--train_hidden_path", work / "second",
            "--eval_data_path", work / "second.jsonl",
        ))  # fmt: skip


def test_held_out_conversations_that_are_trained_on_are_said(work, tmp_path, capsys):
    for train, eval, said in (("first", "second", False), ("first", "first", True)):
        open_source(arguments(tmp_path, "--train_hidden_path", work / train, "--eval_hidden_path", work / eval))
        assert ("24 of 24 held-out conversations have the id" in capsys.readouterr().err) is said
        live = ("--target_model_name_or_path", work / "target", "--train_data_path", work / f"{train}.jsonl")
        live_source(arguments(tmp_path, *live, "--eval_data_path", work / f"{eval}.jsonl"))
        assert ("24 of 24 held-out conversations have the id" in capsys.readouterr().err) is said


def test_the_split_and_the_counts_are_those_of_online(work, tmp_path):
    more = ("--eval_fraction", 0.2, "--max_samples", 11)
    live = live_source(arguments(
        tmp_path, "--target_model_name_or_path", work / "target", "--train_data_path", work / "first.jsonl", *more
    ))  # fmt: skip
    stored = open_source(arguments(tmp_path, "--train_hidden_path", work / "first", *more))
    for name in ("train", "eval"):
        mine, theirs = getattr(stored, name), getattr(live, name)
        assert [mine[i].sample_id for i in range(len(mine))] == [theirs[i].id for i in range(len(theirs))]
    assert torch.equal(stored.counts, live.counts) and list(stored.always) == list(live.always)
    assert plain_config(stored.text_config) == plain_config(live.text_config) and stored.tap_layers == live.tap_layers


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--chat_template_type", "qwen3"], "chat template 'own', not 'qwen3'"),
     (["--train_last_turn_only"], "all turns supervised, not the last alone"),
     (["--target_dtype", "bfloat16"], "dtype float32, not bfloat16"),
     (["--tap_layers", "1", "2", "3"], r"the inputs of layers \[2, 4, 5\], without \[1, 3\].*among \[2, 4, 5\]"),
     (["--lm_head_key", "model.wte.weight"], "lm_head.weight"),
     (["--target_model_name_or_path", "meta/other"], "target .*target, not meta/other"),
     (["--eval_data_path", "x.jsonl"], "--target is needed beside conversations")],
)  # fmt: skip
def test_flags_that_contradict_the_store(work, tmp_path, flags, says):
    with pytest.raises(UserError, match=says) as raised:
        open_source(arguments(tmp_path, "--train_hidden_path", work / "first", *flags))
    assert "\n" not in str(raised.value)


def test_stores_of_different_taps_mix_where_they_have_those_that_are_wanted(work, online, tmp_path):
    more = store(work, tmp_path / "more", ["second.jsonl"], tap_layers=(1, 2, 4, 5))
    flags = ("--train_hidden_path", work / "first", more)
    assert same(trained(tmp_path / "out", *flags), online)  # the first store's taps, unless others are named
    back = ("--train_hidden_path", more, work / "first")
    with pytest.raises(UserError, match=r"first: .*layers \[2, 4, 5\], without \[1\].*Choose among \[2, 4, 5\]"):
        open_source(arguments(tmp_path, *back))
    source = open_source(arguments(tmp_path, *back, "--tap_layers", 2, 4, 5, "--eval_hidden_path", more))
    assert source.tap_layers == (2, 4, 5)
    for records, folder in ((source.train, work / "second"), (source.eval, work / "second")):
        assert torch.equal(records[0].tap_hidden, HiddenStore(folder)[0].tap_hidden)
    assert torch.equal(source.train[24].tap_hidden, HiddenStore(work / "first")[0].tap_hidden)


def test_a_draft_reads_the_taps_it_wants(work, tmp_path):
    """Of a store of more taps: those that are named, in their order, else all."""
    whole = store(work, tmp_path / "states", ["first.jsonl"], tap_layers=(1, 2, 3, 4, 5))

    def source(*flags: str):
        return open_source(arguments(tmp_path, "--train_hidden_path", whole, *flags))

    everything = HiddenStore(whole)[0].tap_hidden
    for flags, taps in (((), (1, 2, 3, 4, 5)), (("--tap_layers", "4", "1"), (4, 1))):
        found = source(*flags)
        assert found.tap_layers == taps, flags
        record = found.to_record(found.train[0])
        assert torch.equal(record.tap_hidden, everything[:, [layer - 1 for layer in taps]])


def test_conversations_are_added_to_a_store_with_its_own_taps(work, tmp_path):
    whole = store(work, tmp_path / "states", ["first.jsonl"], tap_layers=(1, 2, 3, 4, 5))
    found = open_source(arguments(
        tmp_path, "--train_hidden_path", whole, "--train_data_path", work / "second.jsonl",
        "--target_model_name_or_path", work / "target", "--tap_layers", "4", "1",
    ))  # fmt: skip
    assert len(found.train) == 24 and found.tap_layers == (4, 1)
    assert HiddenStore(whole)[47].tap_hidden.shape[1] == 5
    assert found.to_record(found.train[0]).tap_hidden.shape[1] == 2


def test_another_target_s_folder_is_found_by_its_config(work, tmp_path):
    other = save_target(tmp_path / "target", num_hidden_layers=9)
    with pytest.raises(UserError, match="num_hidden_layers differ"):
        open_source(arguments(tmp_path, "--train_hidden_path", work / "first", "--target_model_name_or_path", other))
    moved = shutil.copytree(work / "target", tmp_path / "moved")
    open_source(arguments(tmp_path, "--train_hidden_path", work / "first", "--target_model_name_or_path", moved))


def test_stores_of_different_settings_do_not_mix(work, tmp_path):
    other = store(work, tmp_path / "fp8", ["second.jsonl"], tap_storage="fp8")
    with pytest.raises(UserError, match='tap_storage "fp8", not "same"'):
        open_source(arguments(tmp_path, "--train_hidden_path", work / "first", other))


# -- AngelSlim's folders


def save_ckpts(work: Path, folder: Path) -> Path:
    """The store's records as AngelSlim's script would leave them, and the vocabulary of the head trained from them."""
    stored = HiddenStore(work / "first")
    for index, record in enumerate(stored):
        path = folder / "rank_0" / f"rows_{index // 10 * 10}-{index // 10 * 10 + 10}" / f"data_{index}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = {
            "input_ids": record.input_ids[None], "loss_mask": record.loss_mask[None].long(),
            "hidden_states": record.tap_hidden.flatten(1)[None], "target_hiddens": record.last_hidden[None],
        }  # fmt: skip
        torch.save(saved, path)
    return folder


def test_angelslim_folders(work, tmp_path):
    folder = save_ckpts(work, tmp_path / "ckpts")
    target = ("--target_model_name_or_path", work / "target")
    whole = ("--depth_survival", "1")  # depths depend on ids, which here are the files' names
    expected = trained(tmp_path / "a", "--train_hidden_path", work / "first", *whole)
    assert same(trained(tmp_path / "b", "--train_hidden_path", folder, *target, *whole), expected)
    head = expected[1]
    torch.save({"d2t": head["d2t"], "t2d": head["t2d"]}, folder / "vocab_mapping.pt")
    args = arguments(tmp_path / "c", "--train_hidden_path", folder, *target)
    args.draft = dataclasses.replace(args.draft, draft_vocab_size=None)
    source = open_source(args)
    assert list(source.always) == (head["d2t"] + torch.arange(64)).tolist() and args.draft.draft_vocab_size == 64


def test_angelslim_files_run_no_code_and_must_fit(work, tmp_path):
    folder = save_ckpts(work, tmp_path / "ckpts")
    flags = ("--train_hidden_path", folder, "--target_model_name_or_path", work / "target")
    with pytest.raises(UserError, match="--target is needed with .ckpt"):
        open_source(arguments(tmp_path, *flags[:2]))
    with pytest.raises(UserError, match="hold no tensor 'lm_head.wait'.*did you mean 'lm_head.weight'"):
        open_source(arguments(tmp_path, *flags, "--lm_head_key", "lm_head.wait"))
    first = folder / "rank_0" / "rows_0-10" / "data_0.ckpt"
    saved = torch.load(first)
    torch.save({**saved, "hidden_states": saved["hidden_states"][..., :-1]}, first)
    with pytest.raises(UserError, match="hidden_states is .*, needed is"):
        open_source(arguments(tmp_path, *flags))
    torch.save({**saved, "code": Path("/")}, first)
    with pytest.raises(UserError, match="cannot be loaded as plain tensors"):
        open_source(arguments(tmp_path, *flags))


@pytest.mark.parametrize("tied", [False, True])
def test_the_ends_of_a_target_from_its_files(tmp_path, tied):
    folder = save_target(tmp_path / "target", tie_word_embeddings=tied)
    target, ends = Target.from_pretrained(str(folder)), TargetEnds.from_files(str(folder))
    whole = TargetHead.of(target)
    assert ends.head.digest() == whole.digest() and ends.head.tied == whole.tied == tied
    ids = torch.arange(9)[None]
    states = target.model.base_model(ids, output_hidden_states=True).hidden_states
    raw: list[torch.Tensor] = []
    hook = target.layers[-1].register_forward_hook(lambda _m, _a, output: raw.append(output))
    assert torch.equal(target.forward(ids).last_hidden, states[-1])
    hook.remove()
    before_norm = raw[0][0] if isinstance(raw[0], tuple) else raw[0]
    assert ends.norm is not None and torch.equal(ends.norm(before_norm), states[-1])
    assert not torch.equal(before_norm, states[-1])


def test_a_store_says_what_it_is(work):
    manifest = read_manifest(work / "first")
    assert manifest.complete and dataclasses.asdict(manifest.identity)["tap_layers"] == [2, 4, 5]
