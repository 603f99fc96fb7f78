"""A data path tokenised once: the same samples from cache and from several processes; a split that holds still."""

import json

import pytest
import torch

from fledge.data import dataset, encoding
from fledge.data.dataset import TokenizedData
from fledge.data.tokenize import ChatTemplate
from fledge.errors import UserError


@pytest.fixture
def template(make_tokenizer) -> ChatTemplate:
    return ChatTemplate(make_tokenizer())


@pytest.fixture
def rows(talk) -> list[dict]:
    return [{"id": f"r{i}", "messages": talk(f"question {i}", f"answer {i} " * (i % 5 + 1))} for i in range(60)]


@pytest.fixture
def load(template, tmp_path):
    return lambda path, **kwargs: TokenizedData.from_path(
        str(path), template, **{"cache_dir": tmp_path / "cache", **kwargs}
    )


def same(one: TokenizedData, other: TokenizedData) -> bool:
    return len(one) == len(other) and all(
        a.id == b.id and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.loss_mask, b.loss_mask)
        and (a.truncated, a.num_cut) == (b.truncated, b.num_cut)
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip


def test_samples_come_back_as_they_were_encoded(load, write_rows, rows, template, talk):
    data = load(write_rows(rows), max_length=60)
    assert len(data) == 60 and data.ids[:2] == ["r0", "r1"]
    sample = data[-1]
    assert sample.truncated and len(sample.input_ids) == 60
    assert template.tokenizer.decode(data[0].input_ids[data[0].loss_mask]) == "answer 0 <|im_end|>"
    assert data.report.tokens == sum(len(s.input_ids) for s in data) == data.lengths.sum()
    assert data.report.supervised == sum(int(s.loss_mask.sum()) for s in data) == data.supervised_lengths.sum()
    assert data.report.truncated == sum(s.truncated for s in data) > 0
    assert data.report.supervised_cut == sum(s.num_cut for s in data) > 0
    with pytest.raises(IndexError):
        data[60]


def test_counts_are_those_of_the_supervised_tokens(load, write_rows, rows):
    data = load(write_rows(rows))
    slow = torch.cat([s.input_ids[s.loss_mask] for s in data])
    assert torch.equal(data.counts, torch.bincount(slow, minlength=len(data.counts)))
    assert int(data.counts[data.template.end_of_turn]) == 60 and data.always == (data.template.end_of_turn,)
    half = data.select(range(30))
    assert int(half.counts[data.template.end_of_turn]) == 30


def test_the_second_time_nothing_is_tokenised(load, write_rows, rows, monkeypatch):
    path = write_rows(rows)
    first = load(path)
    monkeypatch.setattr(dataset, "read_conversations", None)  # reading again would fail
    assert same(load(path), first)


@pytest.mark.parametrize("change", ["content", "length", "template"])
def test_whatever_changes_the_samples_changes_the_key(load, write_rows, rows, change, make_tokenizer, tmp_path):
    first = load(write_rows(rows))
    if change == "content":
        second = load(write_rows(rows[:-1]))
    elif change == "length":
        second = load(write_rows(rows), max_length=50)
    else:
        other = ChatTemplate(make_tokenizer(), "smollm2")
        second = TokenizedData.from_path(str(write_rows(rows)), other, cache_dir=tmp_path / "cache")
    assert second.folder != first.folder and not same(first, second)


def test_several_processes_give_the_same_data(load, write_rows, rows, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 16)
    path = write_rows([*rows, {"id": "bad", "messages": rows[0]["messages"][:1]}])
    one, two = load(path), load(path, cache_dir=None, num_proc=2)
    assert same(one, two) and one.report == two.report and two.report.rejected == {"no answer": 1}


def test_a_run_that_dies_leaves_nothing_behind(load, write_rows, rows, monkeypatch, tmp_path):
    path = write_rows(rows)
    monkeypatch.setattr(dataset, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(path)
    assert not any(entry.is_dir() for entry in (tmp_path / "cache").iterdir())
    monkeypatch.undo()
    assert len(load(path)) == 60


def test_files_that_were_cut_are_noticed(load, write_rows, rows):
    path = write_rows(rows)
    folder = load(path).folder
    tokens = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(tokens[:-8])
    with pytest.raises(UserError, match="the tokenised data is incomplete. Delete this folder"):
        load(path)


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin"])
def test_other_tokens_of_the_same_number_are_noticed(load, write_rows, rows, name):
    """Zeros, as a crash of the machine may leave them, were trained on in silence."""
    path = write_rows(rows)
    damaged = load(path).folder / name
    content = damaged.read_bytes()
    damaged.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match="the tokenised data was damaged. Delete this folder"):
        load(path)
    damaged.write_bytes(content)
    assert len(load(path)) == 60  # control


def test_the_split_goes_by_id_alone(load, write_rows, rows):
    data = load(write_rows(rows))
    train, held_out = data.split(0.25, seed=1)
    assert sorted(train.ids + held_out.ids) == sorted(data.ids) and 5 <= len(held_out) <= 25
    fewer = load(write_rows(rows[::-2]))
    assert set(fewer.split(0.25, seed=1)[1].ids) == set(held_out.ids) & set(fewer.ids)
    assert data.split(0.25, seed=2)[1].ids != held_out.ids


def test_turns_split_off_stay_on_their_conversations_side(make_tokenizer, talk, write_rows):
    rows = [{"id": f"r{i}", "messages": talk("a", "<think>x</think>b", "c", "d")} for i in range(20)]
    template = ChatTemplate(make_tokenizer(template=None, words=("<think>", "</think>")), "qwen3")
    data = TokenizedData.from_path(str(write_rows(rows)), template, cache_dir=None)
    assert len(data) == 40 and data.report.split_turns == 20 and data.report.kept == 20
    train, held_out = ([id.partition("#")[0] for id in side.ids] for side in data.split(0.5))
    assert not set(train) & set(held_out) and len(set(train)) * 2 == len(train)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1e-9])
def test_a_split_with_an_empty_side_is_an_error(load, write_rows, rows, fraction):
    with pytest.raises(UserError, match="eval_fraction"):
        load(write_rows(rows)).split(fraction)


def test_bad_rows_are_counted_dropped_ones_apart(load, write_rows, rows, tmp_path, capsys):
    path = write_rows([*rows, "{broken", {"id": "long", "messages": rows[0]["messages"]}])
    content = json.loads(path.read_text().splitlines()[-1])
    content["messages"][0]["content"] *= 50
    path = write_rows([*rows, "{broken", content])
    report = load(path, max_length=100).report
    assert (report.rows, report.kept, report.rejected, report.dropped) == (62, 60, {"broken row": 1}, {"cut off": 1})
    assert "1 rows rejected" in capsys.readouterr().err
    assert load(path, max_length=100).report == report  # the cache remembers


def test_too_many_bad_rows_stop_the_run(load, write_rows, rows, talk, tmp_path):
    unanswered = [{"id": f"u{i}", "messages": talk("x")} for i in range(10)]
    with pytest.raises(UserError, match=r"data.jsonl:61: it has no assistant message.*10 of 70 rows \(14.3%\)"):
        load(write_rows(rows + unanswered))
    assert load(write_rows(rows + unanswered), max_reject_share=0.2).report.kept == 60


def test_nothing_left_is_an_error(load, write_rows, rows):
    with pytest.raises(
        UserError, match=r"nothing left to train on; 60 rows gave \{'cut off': 60\}.*--model-max-length"
    ):
        load(write_rows(rows), max_length=10)


def test_hub_names_and_no_cache_leave_no_folder(load, write_rows, rows, tmp_path):
    data = load(write_rows(rows), cache_dir=None)
    part = data.select([1, 2])
    folder = data.folder
    del data
    assert folder.is_dir() and part[0].id == "r1"  # a part keeps the files alive
    assert not (tmp_path / "cache").exists()


def test_the_last_turn_only_is_part_of_the_key(load, write_rows, make_tokenizer, tmp_path, talk):
    path = write_rows([{"id": "r", "messages": talk("a", "bc", "d", "ef")}])
    last = ChatTemplate(make_tokenizer(), last_turn_only=True)
    every, one = load(path), TokenizedData.from_path(str(path), last, cache_dir=tmp_path / "cache")
    assert every.folder != one.folder and (every.report.supervised, one.report.supervised) == (6, 3)


def test_rows_judge_the_template_not_a_probe(load, write_rows, rows, make_tokenizer, tmp_path, talk):
    """When the first rows all fail, the run stops with the reason of the first and not after a million more."""
    other = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
    )
    template = ChatTemplate(make_tokenizer(template=other))
    many = [{"id": f"m{i}", "messages": talk(f"question {i}", "answer")} for i in range(2000)]
    with pytest.raises(UserError, match=r"data.jsonl:1: .*the prompt renders as .*In all (\d+) of \1 rows") as stop:
        TokenizedData.from_path(str(write_rows(many)), template, cache_dir=tmp_path / "cache")
    assert "2000" not in str(stop.value)
    with_ids = [{"id": f"i{i}", "prompt_token_ids": [5, 6], "token_ids": [7, 8, i]} for i in range(20)]
    assert len(TokenizedData.from_path(str(write_rows(with_ids, "ids.jsonl")), template, cache_dir=None)) == 20


def test_data_without_an_end_is_warned_of(write_rows, rows, make_tokenizer, capsys):
    tokenizer = make_tokenizer(("<|im_start|>", "<|im_end|>", "<|stop|>"))
    nowhere = ChatTemplate(tokenizer, eos_token_ids=[tokenizer.convert_tokens_to_ids("<|stop|>")])
    data = TokenizedData.from_path(str(write_rows(rows)), nowhere, cache_dir=None)
    assert data.report.without_stop == 60
    assert "no answer ends with a token at which the target stops" in capsys.readouterr().err
    TokenizedData.from_path(str(write_rows(rows)), ChatTemplate(tokenizer), cache_dir=None)
    assert "no answer ends" not in capsys.readouterr().err
