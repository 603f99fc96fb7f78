"""Training on pictures: a record is its sample's alone, files are as good as the live target, rows of several axes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from block_reference import block_states, tiny_block
from saved_target import equal_records
from tiny import tiny_draft
from tiny_vlm import MULTIMODAL_ROPE, NAMES, TAPS, save_vlm, tiny_template, tiny_vlm, write_image_conversations

from fledge.commands.train import TrainArgs, parse_args
from fledge.data.dataset import TokenizedData
from fledge.drafters.batch import pack
from fledge.drafters.dspark import training
from fledge.drafters.dspark.blocks import draw_blocks
from fledge.drafters.eagle3.checkpoint import load_draft
from fledge.drafters.eagle3.config import from_json
from fledge.drafters.eagle3.head import WEIGHTS, read_tensors
from fledge.drafters.eagle3.propose import DraftCache
from fledge.drafters.eagle3.ttt import align, unroll
from fledge.errors import UserError
from fledge.extraction.extract import extract
from fledge.extraction.settings import ExtractSettings
from fledge.storage.states.reader import HiddenStore
from fledge.target.head import TargetEnds, TargetHead
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.target.record import TargetRecord
from fledge.train import run

STEPS = 6
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "hunyuan_vl", "gemma3")


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    return write_image_conversations(tmp_path_factory.mktemp("data") / "talk.jsonl", 8)


@pytest.fixture(scope="module")
def records(conversations):
    """Live records of the table's targets: with one picture, with two, of text alone."""
    made: dict[str, list[TargetRecord]] = {}

    def get(name: str) -> list[TargetRecord]:
        if name not in made:
            data = TokenizedData.from_path(str(conversations), tiny_template(name))
            made[name] = list(LiveSource(tiny_vlm(name)).records(data.loaded()[index] for index in range(4)))
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_the_librarys_forward(name, records, conversations):
    """Teacher logits of every row, from the record alone; and the next position the library would use."""
    target = tiny_vlm(name)
    samples = TokenizedData.from_path(str(conversations), tiny_template(name)).loaded()
    for record, index in zip(records(name), range(4), strict=True):
        inputs = samples[index].model_inputs
        with torch.inference_mode():
            expected = target.model(input_ids=record.input_ids[None], use_cache=False, **inputs).logits[0]
        torch.testing.assert_close(target.head(record.last_hidden), expected, rtol=1e-5, atol=1e-5)
        if inputs and name in MULTIMODAL_ROPE:
            _, deltas = target.model.model.get_rope_index(
                record.input_ids[None], **{key: inputs[key] for key in ("mm_token_type_ids", "image_grid_thw")}
            )
            assert record.rope_delta == int(deltas) and record.position_ids.shape == (target.rope_axes, len(record))
        else:
            assert record.rope_delta == 0 and record.position_ids.dim() == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_with_text_is_each_alone(name, records):
    """Rows of several axes beside rows of one."""
    draft, steps, some = tiny_draft(tiny_vlm(name)), 4, records(name)
    whole = pack(some)
    together = draft.lm_head(torch.stack(unroll(draft, whole, align(whole, steps), steps)))
    begin = 0
    for record in some:
        batch = pack([record])
        alignment = align(batch, steps)
        alone = draft.lm_head(torch.stack(unroll(draft, batch, alignment, steps)))
        end = begin + len(alignment.rows)
        torch.testing.assert_close(together[:, begin:end], alone, rtol=1e-5, atol=1e-5)
        begin = end


@pytest.mark.parametrize("eagle31", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_unrolled_is_decoding_with_a_cache(name, eagle31, records):
    """What training computes for a row at step k, decoding computes k drafts after that row, behind pictures too."""
    draft, record, steps = tiny_draft(tiny_vlm(name), eagle31=eagle31), records(name)[1], 3
    batch = pack([record])
    alignment = align(batch, steps)
    logits = draft.lm_head(torch.stack(unroll(draft, batch, alignment, steps)))
    ids = record.input_ids
    for index in (0, len(alignment.rows) // 2):
        row = int(alignment.rows[index])
        rope = draft.rope(record.position_ids[..., : row + 1])
        cache = DraftCache(draft, 1)
        cache.reserve(len(ids) + steps)
        cache.open(torch.arange(row + 1)[None], row + 1)
        hidden = draft.fuse(record.tap_hidden[: row + 1])
        out = draft.step(ids[None, 1 : row + 2], hidden[None], None, cache, rope=rope, output_row=torch.tensor([row]))
        for step in range(steps):
            if not (alignment.row_index[step] == index).any():
                break
            torch.testing.assert_close(draft.logits(out)[0, 0], logits[step, index], rtol=1e-4, atol=1e-4)
            position = record.position_ids[..., row : row + 1] + step + 1
            token = ids[row + 2 + step]
            cache.open(torch.tensor([[row + 1 + step]]), row + 2 + step)
            out = draft.step(token[None, None], draft.feedback(out), None, cache, rope=draft.rope(position))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_blocks_behind_pictures_are_each_alone(name, records):
    """Slots stand at the anchor's rope position and on, whatever its axes say; a block sees the picture's states."""
    draft, some = tiny_block(tiny_vlm(name), "dspark"), records(name)[:3]
    batch = pack(some)
    blocks = draw_blocks(batch, draft.config.num_drafts, 4, (0,))
    found = training.block_states(draft, batch, blocks)
    assert len(blocks) > 3
    for states, row, first in zip(found, blocks.rows.tolist(), blocks.first.tolist(), strict=True):
        record = some[int((torch.tensor(batch.lengths).cumsum(0) <= first).sum())]
        expected = block_states(draft, record.input_ids, record.tap_hidden, record.position_ids, row - first)
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen3_vl", "gemma3"))
def work(request, tmp_path_factory, conversations) -> Path:
    """A saved target, with conversations beside it and a store of them."""
    folder = tmp_path_factory.mktemp(request.param)
    save_vlm(folder / "target", request.param)
    (folder / "data").symlink_to(conversations.parent)
    store(folder, folder / "store")
    return folder


def store(work: Path, into: Path, **changes) -> None:
    options = {"target": str(work / "target"), "data": [str(work / "data" / "talk.jsonl")],
               "output_dir": into, "tap_layers": list(TAPS), "shard_mb": 0.05, **changes}  # fmt: skip
    extract(ExtractSettings(**options))


def trained(output: Path, *flags) -> tuple[list[float], dict[str, torch.Tensor]]:
    plain = [
        "--output_dir", str(output), "--max_steps", str(STEPS), "--per_device_train_batch_size", "2",
        "--ttt_steps", "3", "--draft_vocab_size", "64", "--bf16", "False", "--logging_steps", "1",
        "--save_strategy", "no", "--seed", "7", "--save_dtype", "float32", "--disable_tqdm", "True",
        "--learning_rate", "1e-3", "--use_cpu", "True",
    ]  # fmt: skip
    run.train(parse_args(TrainArgs, [*plain, *map(str, flags)], prog="train", description=""))
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], read_tensors(output / WEIGHTS)


def test_offline_is_online_whoever_reads_the_pictures(work, tmp_path):
    """Stored by one process and by reading threads; trained on files, and live with pictures decoded by workers."""
    store(work, tmp_path / "again", num_proc=2)
    first, second = HiddenStore(work / "store"), HiddenStore(tmp_path / "again")
    assert len(first) == 8 and first.ids == second.ids
    assert all(equal_records(a, b) for a, b in zip(first, second, strict=True))
    live = ("--target_model_name_or_path", work / "target", "--train_data_path", work / "data" / "talk.jsonl",
            "--tap_layers", *TAPS)  # fmt: skip
    online = trained(tmp_path / "a", *live)
    for other in (trained(tmp_path / "b", "--train_hidden_path", work / "store"),
                  trained(tmp_path / "c", *live, "--dataloader_num_workers", 2)):  # fmt: skip
        assert other[0] == online[0] and len(set(online[0])) > 2
        assert all(torch.equal(other[1][key], value) for key, value in online[1].items())


def test_block_drafts_train_on_pictures(work, tmp_path):
    flags = ("--draft_type", "dspark", "--num_anchors", 4)
    live = ("--target_model_name_or_path", work / "target", "--train_data_path", work / "data" / "talk.jsonl",
            "--tap_layers", *TAPS)  # fmt: skip
    online = trained(tmp_path / "a", *live, *flags)
    stored = trained(tmp_path / "b", "--train_hidden_path", work / "store", *flags)
    assert stored[0] == online[0] and all(torch.equal(stored[1][key], value) for key, value in online[1].items())


def test_a_store_keeps_positions_and_the_head_its_rope(work, tmp_path):
    """Written and read again: rows of axes in the store, the target's layout in the head's config."""
    trained(tmp_path / "head", "--train_hidden_path", work / "store")
    target = Target.from_pretrained(str(work / "target"), tap_layers=TAPS)
    draft = load_draft(tmp_path / "head", target.embedding_weight)
    record = HiddenStore(work / "store")[1]
    assert record.position_ids.shape == ((target.rope_axes, len(record)) if target.rope_axes > 1 else (len(record),))
    rotary = next(module for name, module in target.model.named_modules()
                  if name.endswith("language_model.rotary_emb"))  # fmt: skip
    if target.rope_axes > 1:
        expected = rotary(torch.zeros(1), record.position_ids[:, None])[0][0]
        torch.testing.assert_close(draft.rope(record.position_ids)[0], expected, rtol=1e-6, atol=1e-6)
        written = from_json(tmp_path / "head" / "config.json").rope_parameters
        assert written["mrope_section"] == list(target.text_config.rope_parameters["mrope_section"])
        assert written["mrope_interleaved"] == ("qwen3" in target.config.model_type)


def test_embedding_and_head_are_found_by_asking(work):
    """From the files alone, whatever prefixes the checkpoint carries."""
    target = Target.from_pretrained(str(work / "target"), tap_layers=TAPS)
    ends = TargetEnds.from_files(str(work / "target"))
    assert torch.equal(ends.head.embedding, target.embedding_weight)
    assert torch.equal(ends.head.weight, target.head_weight)
    state = HiddenStore(work / "store")[0].last_hidden
    assert torch.equal(TargetHead.of(target)(state), ends.head(state))


def test_another_picture_is_another_sample(work, tmp_path):
    """A store is not continued with a picture swapped under the same id, though every token is the same."""
    data = write_image_conversations(tmp_path / "talk.jsonl", 8)
    options = {"data": [str(data)]}
    store(work, tmp_path / "store", **options)
    lines = data.read_text().replace("picture-0-", "picture-3-").splitlines()
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="sample 'row-0'"):
        store(work, tmp_path / "store", **options)


def test_pixels_are_an_input_of_the_states(work, conversations):
    """The negative control: records of the same tokens without their pixels differ."""
    target = Target.from_pretrained(str(work / "target"), tap_layers=TAPS)
    record = HiddenStore(work / "store")[0]
    blind = target.forward(record.input_ids[None]).last_hidden[0]
    assert F.cosine_similarity(blind[-1], record.last_hidden[-1], dim=0) < 0.99
