"""`fledge train --init_from HEAD`: any layout, and rows of lm_head that follow their tokens."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from saved_target import save_target, write_conversations
from tiny import tiny_config, tiny_draft, tiny_target, tiny_vocab

from fledge.cli import run_command
from fledge.drafters.eagle3.checkpoint import draft_tensors, save_draft
from fledge.drafters.eagle3.head import Head, read_head
from fledge.drafters.eagle3.model import DraftModel
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.settings import ExportSettings
from fledge.target.record import TargetRecord
from fledge.train import eagle
from fledge.train.settings import DraftSettings
from fledge.train.warm_start import architecture_of, as_trained, continue_from, first_step, take_weights

LAYERS = 8


def fresh(draft_vocab_size: int, seed: int, eagle31: bool = False) -> DraftModel:
    target = tiny_target("llama")
    draft = DraftModel(tiny_config(target, draft_vocab_size, eagle31), target.embedding_weight)
    draft.set_vocab(*tiny_vocab(128, draft_vocab_size, seed))
    return draft


@pytest.mark.parametrize("size", [24, 48, 64, 127])
def test_rows_follow_their_tokens(size):
    """Smaller, equal and larger vocabularies of other tokens: kept rows by target id, new ones from the target."""
    target, before, draft = tiny_target("llama"), tiny_draft(tiny_target("llama")), fresh(size, seed=7)
    kept = take_weights(draft, Head(before.config, draft_tensors(before, torch.float32)), target.head_weight)
    old = {int(before.d2t[i]) + i: before.lm_head.weight[i] for i in range(48)}
    new = {int(draft.d2t[i]) + i: draft.lm_head.weight[i] for i in range(size)}
    assert kept == len(old.keys() & new.keys()) and 0 < kept < size
    for token, row in new.items():
        assert torch.equal(row, old.get(token, target.head_weight[token])), token
    for name, parameter in before.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(dict(draft.named_parameters())[name], parameter), name


def test_new_rows_go_where_training_took_the_others():
    """Rows that were trained to another scale and direction, as a lifted EAGLE-3.1 head's are: the target's own rows
    beside them would be four times as loud."""
    torch.manual_seed(0)
    rows = torch.randn(300, 32)
    moved = rows @ torch.randn(32, 32) / 24 + 0.01 * torch.randn(300, 32)
    torch.testing.assert_close(as_trained(rows[200:], rows[:200], moved[:200]), moved[200:], rtol=0.1, atol=0.06)
    assert (rows[200:] - moved[200:]).abs().mean() > 0.5
    assert torch.equal(as_trained(rows[200:], rows[:63], moved[:63]), rows[200:])  # too few to tell


def test_a_head_of_another_vocabulary_starts_as_good_as_it_was(monkeypatch):
    """The rows of a new vocabulary go through the same map, whichever token they belong to."""
    monkeypatch.setattr("fledge.train.warm_start.ROWS_PER_CHANNEL", 1)
    target_head = tiny_target("llama").head_weight.float()
    size = target_head.shape[1]
    moved = target_head @ (torch.randn(size, size, generator=torch.Generator().manual_seed(1)) / 4 / size**0.5)
    before, draft = fresh(110, seed=3), fresh(110, seed=7)
    before.lm_head.weight.data.copy_(moved[before.target_ids(torch.arange(110))])
    kept = take_weights(draft, Head(before.config, draft_tensors(before, torch.float32)), target_head)
    assert size < kept < 110
    torch.testing.assert_close(draft.lm_head.weight, moved[draft.target_ids(torch.arange(110))], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("layout", ["vllm", "sglang", "speculators"])
def test_every_layout_starts_a_run(tmp_path, layout):
    before = tiny_draft(tiny_target("llama"), eagle31=True)
    save_draft(before, tmp_path / "head", dtype=torch.float32)
    export_head(ExportSettings(head=str(tmp_path / "head"), to=layout, output_dir=tmp_path / "out", target="T"))
    assert architecture_of(tmp_path / "out", LAYERS, "eagle3")["fc_norm"] is True
    draft = fresh(48, seed=1, eagle31=True)
    continue_from(draft, tmp_path / "out", tiny_target("llama").head_weight, LAYERS, list)
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), before.parameters(), strict=True))


def test_what_does_not_fit_is_named(tmp_path):
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    save_draft(tiny_draft(tiny_target("llama"), eagle31=True), tmp_path / "head31")
    head_weight = tiny_target("llama").head_weight
    with pytest.raises(UserError, match="its fc_norm is True, this draft's False"):
        continue_from(fresh(48, 1), tmp_path / "head31", head_weight, LAYERS, list)
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eagle_aux_hidden_state_layer_ids": [1, 4, 5]}))
    with pytest.raises(UserError, match=r"inputs of layers \[1, 4, 5\].*--tap-layers 1 4 5"):
        continue_from(fresh(48, 1), tmp_path / "head", head_weight, LAYERS, list)


def sample(tap_sizes: tuple[float, ...]) -> TargetRecord:
    """Ten tokens whose tap a has rows of RMS tap_sizes[a], all of them."""
    generator = torch.Generator().manual_seed(5)
    taps = torch.randn(10, len(tap_sizes), tiny_target("llama").head_weight.shape[1], generator=generator)
    taps *= torch.tensor(tap_sizes)[:, None] / taps.pow(2).mean(-1, keepdim=True).sqrt()
    return TargetRecord(
        sample_id="s", input_ids=torch.arange(3, 13), loss_mask=torch.ones(10, dtype=torch.bool),
        position_ids=torch.arange(10), tap_hidden=taps, last_hidden=taps[:, 0],
    )  # fmt: skip


def test_an_eagle3_head_starts_an_eagle31_head(tmp_path):
    """Where all rows of a tap have one size the first logits are the same and the fed back state differs in size only,
    by as much as lm_head's weights; with norms of 1 they are not."""
    before, record = tiny_draft(tiny_target("llama")), sample((0.5, 3.0, 20.0))
    torch.nn.init.uniform_(before.norm.weight, 0.5, 2.0)
    save_draft(before, tmp_path / "head", dtype=torch.float32)
    overrides = architecture_of(tmp_path / "head", LAYERS, "eagle3.1")
    assert not overrides.keys() & {"fc_norm", "norm_output"} and "norm_before_residual" in overrides
    draft, naive = fresh(48, seed=1, eagle31=True), fresh(48, seed=1, eagle31=True)
    continue_from(draft, tmp_path / "head", tiny_target("llama").head_weight, LAYERS, lambda: [record])
    take_weights(naive, Head(before.config, draft_tensors(before, torch.float32)), tiny_target("llama").head_weight)

    old, new, bad = (first_step(model, record) for model in (before, draft, naive))
    size = float((draft.midlayer.mlp.down_proj.weight / before.midlayer.mlp.down_proj.weight).detach().mean())
    torch.testing.assert_close(new, size * old, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draft.logits(new), before.logits(old), rtol=1e-4, atol=1e-5)
    old, new = (model.feedback(state) for model, state in ((before, old), (draft, new)))
    assert torch.nn.functional.cosine_similarity(old, new).min() > 0.99999
    ratio = new.norm(dim=-1) / old.norm(dim=-1)
    assert float(ratio.detach().median()) == pytest.approx(size, rel=0.05)
    read = before.norm.weight.detach().square().mean().sqrt()
    assert float(read / draft.norm.weight[0].detach()) == pytest.approx(size, rel=0.05)
    assert torch.nn.functional.cosine_similarity(old, naive.feedback(bad)).max() < 0.999


def test_another_rope_base_is_said(tmp_path, capsys):
    save_draft(tiny_draft(tiny_target("llama")), tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}))
    continue_from(fresh(48, 1), tmp_path / "head", tiny_target("llama").head_weight, LAYERS, list)
    assert "the head has to learn it anew" in capsys.readouterr().err


def test_the_command_continues_a_head(tmp_path):
    """Two steps; then a run at rate 0 from the speculators export, with other data and so another vocabulary."""
    target = save_target(tmp_path / "target")
    head_rows = load_file(target / "model.safetensors")["lm_head.weight"].bfloat16()
    common = ["--target_model_name_or_path", str(target), "--max_steps", "2", "--bf16", "False", "--save_strategy",
              "no", "--disable_tqdm", "True", "--ttt_steps", "2"]  # fmt: skip

    def train(name: str, size: int, *flags: str) -> Head:
        data = write_conversations(tmp_path / f"{name}.jsonl", 12, seed=size)
        assert run_command("train", [*common, "--train_data_path", str(data), "--output_dir", str(tmp_path / name),
                                     "--draft_vocab_size", str(size), *flags]) == 0  # fmt: skip
        return read_head(tmp_path / name)

    first = train("first", 20, "--learning_rate", "0.01")
    export_head(ExportSettings(head=str(tmp_path / "first"), to="speculators", output_dir=tmp_path / "out", target="T"))
    second = train("second", 26, "--learning_rate", "0", "--init_from", str(tmp_path / "out"))
    old = dict(zip(first.target_ids.tolist(), first.tensors["lm_head.weight"], strict=True))
    new = dict(zip(second.target_ids.tolist(), second.tensors["lm_head.weight"], strict=True))
    assert 6 <= len(new.keys() - old.keys()) < len(new)
    for token, row in new.items():
        assert torch.equal(row, old.get(token, head_rows[token])), token
    same = first.tensors.keys() - {"lm_head.weight", "d2t", "t2d"}
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in same)

    third = train("third", 20, "--init_from", str(tmp_path / "first"), "--draft_type", "eagle3.1", "--learning_rate",
                  "0")  # fmt: skip
    assert third.config.fc_norm and third.config.norm_output
    kept = "midlayer.mlp.gate_proj.weight"
    assert torch.equal(third.tensors[kept], first.tensors[kept])


@pytest.mark.parametrize("window", [4, 3])
def test_a_head_with_a_window_is_continued_with_it(window, monkeypatch):
    """A row's later steps must lie inside the window, or a step would see no key of the target's."""
    target = tiny_target("qwen3")
    source = SimpleNamespace(
        text_config=target.text_config, head_weight=target.head_weight, tap_layers=target.tap_layers
    )
    monkeypatch.setattr(eagle, "architecture_of", lambda *_: {"sliding_window": window})
    args = DraftSettings(init_from="HEAD", ttt_steps=3, draft_vocab_size=48)
    if window > args.ttt_steps:
        assert eagle.draft_config(args, source).sliding_window == window
    else:
        with pytest.raises(UserError, match="reaches 3 positions back, which must be more than --ttt-steps 3"):
            eagle.draft_config(args, source)
