"""What training shows: short lines, one evaluation at the end, no bars of libraries, a closing command that runs."""

import json
import shlex

import pytest
from saved_target import write_conversations
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fledge.cli import run_command
from fledge.console import console, duration, progress
from fledge.train.shown import ShownProgress, figures

SHORT = (
    "--max_steps", "4", "--logging_steps", "2", "--ttt_steps", "3", "--save_strategy", "no", "--eval_strategy", "steps",
    "--eval_steps", "4", "--report_to", "tensorboard", "--run_name", "mine",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_conversations(folder / "train.jsonl", 8)
    write_conversations(folder / "eval.jsonl", 3, seed=1, prefix="other")
    return folder


@pytest.fixture
def words(tiny_model_dir, data, own_cache, tmp_path):
    return ["--target", str(tiny_model_dir), "--data", str(data / "train.jsonl"), "--eval_data",
            str(data / "eval.jsonl"), "--output_dir", str(tmp_path / "a head"), *SHORT]  # fmt: skip


def test_short_lines_and_a_command_that_runs(words, tmp_path, capsys):
    """It was a dict of 25 figures a step, a table of the config, tqdm's redrawings, each evaluation twice, and a
    closing command that lacked the target."""
    assert run_command("train", words) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and max(map(len, lines[:-1])) <= 160
    assert [line.split("  ")[0] for line in lines if "tok/s" in line] == ["step 2/4", "step 4/4"]
    assert all(part in lines[-5] for part in ("loss ", "tau ", "right ", " tok/s  ", " left"))
    assert shown.err.count("held out: loss") == 1
    for noise in ("{'", "it/s]", "Loading weights", "│", "Warning"):
        assert noise not in shown.err
    history = json.loads((tmp_path / "a head" / "trainer_state.json").read_text())["log_history"]
    assert {"acc_2", "cross_entropy_0", "coverage"} < set(history[0])  # which the lines leave out
    events = EventAccumulator(str(tmp_path / "a head" / "runs" / "mine")).Reload()
    assert len(events.Scalars("train/tau")) == 2
    command = shlex.split(lines[-1])
    assert command[:2] == ["fledge", "bench"]
    short = ["--question-end", "1", "--max-new-tokens", "4", "--output-dir", str(tmp_path / "bench")]
    assert run_command(command[1], [*command[2:], *short]) == 0


def test_verbose_shows_the_config_and_every_metric(words, capsys):
    assert run_command("train", [*words, "--verbose", "--max_steps", "2", "--report_to", "none"]) == 0
    said = capsys.readouterr().err
    assert "draft_vocab_size" in said and "cross_entropy_0" in said
    assert "--run_name mine names the run in a tracker, and none is asked for" in said


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", True)


def test_bars_on_a_terminal(words, terminal, capsys):
    assert run_command("train", [*words, "--max_steps", "2", "--eval_steps", "2"]) == 0
    said = capsys.readouterr().err
    assert "training" in said and "evaluation" in said and " left" not in said  # the bar has the time


def test_a_bar_within_another_ends_with_it(terminal, capsys):
    """Two displays at once are an error in rich."""
    with progress("whole", 2) as whole:
        with pytest.raises(KeyError), progress("part", 1):
            raise KeyError
        whole.advance(2)
    with progress("next", 1) as bar:
        bar.advance()
    assert "next" in capsys.readouterr().err


def test_long_drafts_and_times_are_cut_short():
    accuracies = {f"acc_{k}": 0.5 for k in range(15)}
    assert (
        figures({"loss": 1.0, "tau": 2.0, **accuracies}) == "loss 1.000  tau 2.00  right 50 50 50 50 50 50 50 50 ... %"
    )
    assert figures({"loss": 1.0}) == "loss 1.000"
    assert [duration(seconds) for seconds in (5, 300, 86400)] == ["5 s", "5 min", "24.0 h"]


def test_a_flag_that_equals_the_default_may_be_left_out(words, tmp_path, capsys):
    """A run was only continued with the same flags, even where one of them asked for what was derived without it."""
    given = ["--tap_layers", "2", "4", "5", "--dtype", "float32", "--max_steps", "2", "--save_strategy", "steps"]
    assert run_command("train", [*words, *given, "--save_steps", "2"]) == 0
    assert run_command("train", [*words, "--save_strategy", "steps", "--save_steps", "2"]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert run_command("train", [*words, "--tap_layers", "1", "2", "3"]) == 1  # another is another run
    assert "the run there has tap_layers=[2, 4, 5], this one [1, 2, 3]" in capsys.readouterr().err


@pytest.mark.parametrize(("save_steps", "kept"), [
    (2, "the same command continues from {folder}/checkpoint-2; 1 of 3 steps are lost"),
    (9, "no checkpoint was written yet (--save_steps): the 3 steps are lost, and the same command starts anew"),
])  # fmt: skip
def test_ctrl_c_says_what_continues_and_what_is_lost(words, save_steps, kept, tmp_path, monkeypatch, capsys):
    def press(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShownProgress, "on_step_end", press)
    assert run_command("train", [*words, "--save_strategy", "steps", "--save_steps", str(save_steps)]) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [kept.format(folder=tmp_path / "a head"), "interrupted"]


def test_a_draft_config_of_another_target_is_refused(words, tiny_model_dir, tmp_path, capsys):
    """Its sizes were ignored or used, by turns, and nothing was said."""
    sizes = {"hidden_size": 64, "vocab_size": 258, "num_attention_heads": 4}
    (tmp_path / "other.json").write_text(json.dumps({**sizes, "hidden_size": 2560}))
    (tmp_path / "mine.json").write_text(json.dumps(sizes))
    for name, said in (
        ("other.json", "its hidden_size is 2560, this target's 64"),
        ("none.json", "no such file. A draft"),
    ):
        assert run_command("train", [*words, "--draft_model_config_path", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
    assert run_command("train", [*words, "--draft_model_config_path", str(tmp_path / "mine.json")]) == 0
