"""`fledge inspect`, as a user calls it: what it prints, what it writes, and one line for whatever is wrong."""

import json

import pytest

from fledge.cli import run_command
from fledge.data.inspect import colour, ends_in_loop
from fledge.data.tokenize import ChatTemplate, Sample


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def inspect(target_dir, capsys):
    def run(*flags: str) -> tuple[int, str]:
        code = run_command("inspect", [*flags, "--target", str(target_dir)])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def data(write_rows, talk):
    loop = "and so on, " * 30
    rows = [{"id": i, "messages": talk(f"q{i}", f"answer {i}"), "finish_reason": "stop"} for i in range(8)]
    rows.append({"id": "same", "messages": talk("q0", "answer 0"), "finish_reason": "stop"})
    rows.append({"id": "stuck", "messages": talk("q9", loop), "finish_reason": "length"})
    return write_rows(rows)


def test_figures_for_programs(inspect, data, tmp_path):
    code, _ = inspect(str(data), "--json", str(tmp_path / "out.json"))
    document = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert document["report"]["kept"] == 10 and document["finish_reasons"] == {"stop": 0.9, "length": 0.1}
    assert document["duplicate_prompts"] == pytest.approx(0.1) and document["duplicate_answers"] == pytest.approx(0.1)
    assert document["repetition_loops"] == 0.1 and document["first_repetition_loop"].endswith("data.jsonl:10")
    assert document["coverage"] == {"8192": 1.0, "16384": 1.0, "32000": 1.0}
    assert document["supervised_length"]["max"] == 329 and document["supervised_length"]["min"] == 9


def test_a_foreign_file_is_not_replaced(inspect, data, tmp_path):
    """`--json data.jsonl`, a slip of the keyboard, cost the data."""
    before, mine = data.read_bytes(), tmp_path / "mine.json"
    mine.write_text('{"mine": 1}')
    for path in (data, mine):
        code, shown = inspect(str(data), "--json", str(path))
        assert code == 1 and "was not written by this command" in shown
    assert data.read_bytes() == before and mine.read_text() == '{"mine": 1}'
    assert inspect(str(data), "--json", str(mine), "--overwrite")[0] == 0 == inspect(str(data), "--json", str(mine))[0]
    assert "report" in json.loads(mine.read_text())


def test_tables_for_people(inspect, data):
    code, shown = inspect(str(data), "--model-max-length", "100", "--sample", "3")
    assert code == 0
    for text in ("Sample 3", "answer 3<|im_end|>", "truncated", "finish reason: length", "coverage", "end in a loop"):
        assert text in shown


def test_three_samples_and_what_became_of_each_field(inspect, write_rows, talk, tmp_path):
    """A system column, a country and reasoning looked the same in the figures: like nothing at all."""
    rows = [{"id": i, "messages": talk(f"q{i}", f"answer {i}"), "country": "NO"} for i in range(5)]
    rows.append({"id": "s", "messages": talk("q", "answer"), "system": "Be brief."})
    rows.append({"id": "r", "messages": [*talk("q"), {"role": "assistant", "content": "a", "thinking": "Hm."}]})
    rows.append({"id": "k", "messages": talk("q", "k"), "chat_template_kwargs": {"mood": "glad"}})
    path, out = str(write_rows(rows)), str(tmp_path / "out.json")
    code, shown = inspect(path, "--json", out, "--max-reject-share", "0.5")
    assert code == 0 and all(f"Sample {index}:" in shown for index in range(3)) and "Sample 3:" not in shown
    fields = json.loads((tmp_path / "out.json").read_text())["fields"]
    assert fields["used"]["system"] == 1 and fields["not_shown"] == {"country": 5}
    assert fields["used"]["chat_template_kwargs"] == 1, "a column that is decoded was counted twice"
    mood = {"chat_template_kwargs.mood": 1}
    assert fields["dropped"] == mood and fields["rejected"] == {"reasoning_content": 1}
    inspect(path, "--json", out, "--untraced", "train")
    fields = json.loads((tmp_path / "out.json").read_text())["fields"]
    assert fields["dropped"] == {"reasoning_content": 1, **mood} and fields["rejected"] == {}


def test_the_column_map_of_the_command_line(inspect, write_rows, talk):
    path = str(write_rows([{"dialog": talk("q", "answer"), "persona": "Be brief."}]))
    code, shown = inspect(path, "--columns", "system=persona", "messages=dialog")
    assert code == 0 and "Be brief." in shown
    assert inspect(path)[0] != 0


def test_supervised_tokens_are_coloured_and_characters_stay_whole(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer("é<|im_end|>é", add_special_tokens=False, return_tensors="pt").input_ids[0]
    text = colour(Sample("c", ids, ids == tokenizer.eos_token_id), tokenizer)
    assert text.plain == "é<|im_end|>é" and [str(span.style) for span in text.spans] == ["dim", "bold green", "dim"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["DATA", "--chat-template-type", "quen3"], "did you mean 'qwen3'?"),
        (["DATA", "--chat-template-type", "llama3"], "does not fit this tokenizer"),
        (["DATA", "--sample", "10"], "--sample 10: the data has samples 0 to 9"),
        (["BROKEN"], "broken.jsonl:2: not valid JSON"),
        (["EMPTY"], "empty.jsonl: no conversations (0 rows read)"),
        (["DATA", "--model-max-length", "5"], "nothing left to train on"),
    ],
)
def test_bad_input_is_one_line_and_a_status(inspect, data, write_rows, talk, flags, message):
    paths = {
        "DATA": data,
        "BROKEN": write_rows([{"messages": talk("a", "bc")}, "{"], "broken.jsonl"),
        "EMPTY": write_rows([""], "empty.jsonl"),
    }
    code, shown = inspect(*[str(paths.get(flag, flag)) for flag in flags])
    assert code == (2 if "quen3" in flags else 1)  # what the flags say by themselves is told by the parser
    assert message in shown and "Traceback" not in shown
    assert [line for line in shown.splitlines() if line.startswith("error: ")] == [shown.splitlines()[-1]]


def test_data_needs_a_target(data, capsys):
    assert run_command("inspect", [str(data)]) == 1
    assert "give --target MODEL" in capsys.readouterr().err


def test_folders_of_other_stages_are_recognised(inspect, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text('{"kind": "something"}')
    assert "no data files in this folder" in inspect(str(tmp_path / "store"))[1]
    (tmp_path / "store" / "manifest.json").write_text("{")
    assert "manifest.json:1: not valid JSON" in inspect(str(tmp_path / "store"))[1]


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("the end. " * 20, True),
        ("A start. " + "no " * 30, True),
        ("x" * 80, True),
        ("Once. " + "A longer sentence that comes back again and again, word for word. " * 4, True),
        ("the end. " * 3, False),
        ("0123456789" * 3, False),
        ("Every sentence here says something else, so nothing is said twice at the very end of it all.", False),
        ("", False),
    ],
)
def test_loops(text, loop):
    assert ends_in_loop(text) is loop


def test_a_template_is_needed_once(target_dir):
    assert ChatTemplate.from_pretrained(str(target_dir)).name == "own"
