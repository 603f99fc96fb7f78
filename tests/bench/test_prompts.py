"""Where questions come from, and what happens when they are not there."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fledge.bench import hub
from fledge.bench.prompts import (
    QUICK_FILE,
    dataset_label,
    load_questions,
    read_question_file,
    turn_text,
)
from fledge.bench.questions import NAMED_SETS, SPEED_BENCH
from fledge.data.image_urls import read_image
from fledge.data.images import decode
from fledge.errors import UserError


def write_set(folder, name, count=5):
    path = folder / name / "question.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"question_id": 100 + i, "category": "c", "turns": [f"question {i}", "and then?"]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_quick_set_is_in_the_package():
    questions = load_questions("quick")
    assert len(questions) >= 40 and QUICK_FILE.parent.name == "bench"
    assert sum(len(question.turns) > 1 for question in questions) >= 5
    assert len({question.turns[0] for question in questions}) == len(questions)


def test_named_set_comes_from_bench_dir(tmp_path):
    write_set(tmp_path, "gsm8k")
    questions = load_questions("gsm8k", bench_dir=tmp_path)
    assert [question.id for question in questions] == ["100", "101", "102", "103", "104"]
    assert questions[0].turns == ("question 0", "and then?")


def test_bench_dir_from_the_environment(tmp_path, monkeypatch):
    write_set(tmp_path, "qa")
    monkeypatch.setenv("FLEDGE_BENCH_DIR", str(tmp_path))
    assert len(load_questions("qa")) == 5


def test_question_begin_and_end_cut_the_set(tmp_path):
    write_set(tmp_path, "sum")
    chosen = load_questions("sum", bench_dir=tmp_path, begin=1, end=3)
    assert [question.id for question in chosen] == ["101", "102"]
    with pytest.raises(UserError, match="no question left of 5"):
        load_questions("sum", bench_dir=tmp_path, begin=7)


def test_missing_set_names_the_path_and_what_is_there(tmp_path):
    write_set(tmp_path, "gsm8k")
    with pytest.raises(UserError, match=r"alpaca.question.jsonl: no such file .* has gsm8k"):
        load_questions("alpaca", bench_dir=tmp_path)


@pytest.mark.parametrize("name", NAMED_SETS)
def test_without_folder_and_hub_the_error_says_how_to_provide_the_set(name, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.delenv("FLEDGE_BENCH_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(hub, "human_eval_problems", list)
    with pytest.raises(UserError, match=f"DIR/{name}/question.jsonl"):
        load_questions(name)


DOT = Image.new("RGB", (2, 2))
HUB_ROWS = {
    "mt_bench": {"prompt": ["one", "two"], "category": "writing", "reference": []},
    "humaneval": {"prompt": "def f():\n", "canonical_solution": "", "test": "def check(c): c()", "entry_point": "f"},
    "gsm8k": {"question": "1+1?", "answer": "#### 2"},
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
    "qa": {"question": "who?", "answer": ["me", "I"]},
    "sum": {"article": "long", "highlights": "short"},
    "math500": {"problem": "1+1", "answer": "2", "subject": "algebra"},
    "textvqa": {"question": "which brand?", "image": DOT, "answers": ["acme", "acme", "ACME inc"]},
    "mmmu": {"id": "validation_Art_7", "question": "Is <image 1> left of <image 2>?", "options": "['yes', 'no']",
             "image_1": DOT, "image_2": DOT, "image_3": None, "answer": "B"},
    "mmstar": {"question": "What? A: this B: that", "image": DOT, "answer": "A", "category": "math"},
    **{name: {"turns": ["hi", "and?"], "category": "qa"} for name in SPEED_BENCH},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_sets_become_80_questions_always_the_same(name, monkeypatch):
    import datasets

    rows = [{**HUB_ROWS[name], "n": number} for number in range(200)]
    monkeypatch.delenv("FLEDGE_BENCH_DIR", raising=False)
    monkeypatch.setattr(hub, "human_eval_problems", list)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: rows)
    questions = load_questions(name)
    assert len(questions) == len({question.id for question in questions}) == (200 if name in SPEED_BENCH else 80)
    assert questions == load_questions(name)
    assert all(turn for question in questions for turn in question.turns)
    if name == "humaneval":
        assert questions[0].code_check == {key: HUB_ROWS[name][key] for key in ("prompt", "test", "entry_point")}


def test_picture_sets_ask_about_their_pictures(monkeypatch):
    """As `datasets` decodes them; MMMU's pictures stand where its text names them, whatever the set's case."""
    import datasets

    monkeypatch.delenv("FLEDGE_BENCH_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: [HUB_ROWS[path.split("/")[1].lower()]])
    asked = {name: load_questions(name)[0] for name in ("textvqa", "MMMU", "mmstar")}
    assert [turn_text(question.turns[0]).split("\n")[0] for question in asked.values()] == [
        "[image]which brand?",
        "Is [image] left of [image]?",
        "[image]What? A: this B: that",
    ]
    assert asked["textvqa"].reference == ("acme",) and asked["MMMU"].category == "Art"
    assert "A. yes\nB. no" in turn_text(asked["MMMU"].turns[0]) and asked["MMMU"].dataset == "mmmu"
    source = asked["mmstar"].turns[0][0]["image"]
    assert decode(read_image(source), "dot").size == (2, 2)


def test_questions_with_pictures_from_a_file(tmp_path):
    """Image parts in turns or messages, LLaVA's marks with the row's picture; paths count from the file."""
    DOT.save(tmp_path / "dot.png")
    part, here = {"type": "image", "image": "dot.png"}, str((tmp_path / "dot.png").resolve())
    rows = [
        {"question_id": 1, "turns": [[part, {"type": "text", "text": "what?"}], "and now?"]},
        {"question_id": 2, "messages": [{"role": "user", "content": [{"type": "text", "text": "see "}, part]}]},
        {"question_id": 3, "turns": ["<image>\nwhat?"], "image": "dot.png"},
        {"question_id": 4, "turns": [[{"type": "text", "text": "only "}, {"type": "text", "text": "words"}]]},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = load_questions(str(path))
    assert [turn_text(q.turns[0]) for q in questions] == ["[image]what?", "see [image]", "[image]what?", "only words"]
    assert questions[0].turns[1] == "and now?" and questions[3].turns[0] == "only words"
    pictures = [part["image"] for q in questions[:3] for part in q.turns[0] if part["type"] == "image"]
    assert pictures == [here] * 3
    for bad, message in (([{"type": "video"}], "type 'video'"), (["x"], "needed a non-empty")):
        path.write_text(json.dumps({"turns": [bad]}) + "\n")
        with pytest.raises(UserError, match=message):
            load_questions(str(path))


def test_human_eval_package_serves_humaneval_and_its_tests(tmp_path, monkeypatch):
    """The package needs no hub; questions in EAGLE's format find their unit tests in it by the function's text."""
    data = tmp_path / "human_eval" / "data"
    data.mkdir(parents=True)
    (data.parent / "__init__.py").touch()
    problem = {**HUB_ROWS["humaneval"], "task_id": "HumanEval/0"}
    with gzip.open(data / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(problem) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("FLEDGE_BENCH_DIR", raising=False)
    assert load_questions("humaneval")[0].code_check["entry_point"] == "f"

    path = tmp_path / "sets" / "humaneval" / "question.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"turns": ["Complete the code I provided.\ndef f():\n"]}, {"turns": ["Complete the code.\ndef g():\n"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_questions("humaneval", bench_dir=tmp_path / "sets")
    assert found[0].code_check["test"] == problem["test"] and found[1].code_check is None


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["hi"]},
        {"prompt": "hi"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}]},
        {"instruction": "hi", "output": "no"},
        {"question": "hi", "response": "no"},
        {"text": "### Human: hi### Assistant: no"},
        {"data": ["hi", "no"]},
        {"message_id": "1", "role": "prompter", "text": "hi", "parent_id": None, "message_tree_id": "1"},
    ],
)
def test_a_file_may_have_any_format_that_training_reads(tmp_path, row):
    """Only four spellings of jsonl were read: a data file of training had to be rewritten to be benchmarked."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n\n")
    (question,) = load_questions(str(path))
    assert question.turns == ("hi",) and question.dataset == "mine"


def test_a_file_may_be_of_any_kind_that_training_reads(tmp_path):
    rows = [{"prompt": "one", "id": "a"}, {"prompt": "two", "id": "b"}]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.table({"messages": [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    for name, label in (("array.json", "array"), ("packed.jsonl.gz", "packed"), ("table.parquet", "table")):
        questions = load_questions(str(tmp_path / name))
        assert [question.turns for question in questions] == [("one",), ("two",)]
        assert {question.dataset for question in questions} == {label}
    for name in ("array.json", "packed.jsonl.gz"):
        (tmp_path / name).unlink()
    assert len(load_questions(str(tmp_path))) == 2  # a folder
    (tmp_path / "notes.txt").write_text("one")
    with pytest.raises(UserError, match="unknown file type"):
        load_questions(str(tmp_path / "notes.txt"))


def test_questions_without_answers_between_them_are_turns(tmp_path):
    """SPEED-Bench's prepared files hold a dialogue as user messages alone; training would join them to one."""
    path = tmp_path / "qualitative.jsonl"
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    path.write_text(json.dumps({"messages": messages, "category": "writing", "system": "be brief"}) + "\n")
    (question,) = load_questions(str(path))
    assert question.turns == ("one", "two") and question.category == "writing" and question.system == "be brief"


def test_placeholders_of_speed_bench_are_left_out(tmp_path, capsys):
    path = tmp_path / "qualitative.jsonl"
    masked = {"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"turns": ["hi"]}, masked)))
    assert [question.turns for question in load_questions(str(path))] == [("hi",)]
    assert "1 of 2 questions are placeholders" in "".join(capsys.readouterr())
    path.write_text(json.dumps(masked) + "\n")
    with pytest.raises(UserError, match="all 1 questions are placeholders.*prepare_data.py"):
        load_questions(str(path))


def test_spec_bench_has_six_tasks(tmp_path, monkeypatch):
    """Its first 80 questions carry MT-bench's eight categories, which it counts as one task."""
    path = tmp_path / "spec_bench" / "question.jsonl"
    path.parent.mkdir()
    categories = ["writing", "humanities", "translation", "summarization", "qa", "math_reasoning", "rag"]
    rows = [{"question_id": i, "category": name, "turns": ["hi"]} for i, name in enumerate(categories)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"}
    assert {question.category for question in load_questions("spec_bench", bench_dir=tmp_path)} == tasks
    assert {question.category for question in load_questions(str(path))} == tasks
    other = tmp_path / "other" / "question.jsonl"
    path.parent.rename(other.parent)
    assert "writing" in {question.category for question in load_questions(str(other))}  # negative control


def test_system_prompt_is_kept(tmp_path):
    path = tmp_path / "mine.jsonl"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": messages}))
    assert load_questions(str(path))[0].system == "be brief"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"turns": ["a"]}\n{"turns": ', ":2: not valid JSON"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', ":2: question id '1' was already"),
        ('{"title": "a"}', "bad.jsonl:1: a row needs a list named .*columns of other names"),
        ('{"turns": [""]}', "needed a non-empty `turns`"),
        ('{"question_id": null, "turns": ["a"]}', "bad.jsonl:1: Expected .*got `null`"),
        ('{"prompt": "a", "completion": "b"}\n[1]', "bad.jsonl:2: a row is a JSON object, found list"),
        ('{"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}', "has tools, which a benchmark"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}', "has tools, which a benchmark"),
        ("\n", "no questions"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_question_file(path, "bad")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        load_questions("gsm8")


def test_a_question_file_is_called_by_its_folder(tmp_path):
    assert dataset_label(str(tmp_path / "mine" / "question.jsonl")) == "mine"
    assert dataset_label("x/y/own.jsonl") == "own"
