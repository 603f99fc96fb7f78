"""fledge train's flags: AngelSlim's names, the Trainer's own, recipes, and errors that name the nearest flag."""

import pickle

import pytest

from fledge.commands.plan import PlanArgs
from fledge.commands.train import TrainArgs, parse_args
from fledge.errors import UserError
from fledge.target.linear import multiplies_bf16
from fledge.train.arguments import TrainerArguments, TrainSettings


def parse(*words: str) -> TrainSettings:
    return parse_args(TrainArgs, words, prog="fledge train", description="")


def test_angelslim_command_line(tmp_path):
    args = parse(
        "--target_model_name_or_path", "T", "--draft_model_config_path", "c.json", "--train_data_path", "a.jsonl",
        "--eval_data_path", "b.jsonl", "--output_dir", str(tmp_path), "--num_train_epochs", "20",
        "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1", "--gradient_accumulation_steps", "1",
        "--save_strategy", "steps", "--save_steps", "20", "--learning_rate", "1e-4", "--weight_decay", "0.0",
        "--warmup_ratio", "0.1", "--lr_scheduler_type", "constant", "--logging_steps", "20", "--model_max_length",
        "2048", "--chat_template_type", "qwen3", "--report_to", "none", "--run_name", "r", "--num_proc", "4", "--bf16",
    )  # fmt: skip
    assert (args.inputs.target, args.inputs.data) == ("T", ("a.jsonl",))
    assert (args.inputs.model_max_length, args.inputs.chat_template_type, args.inputs.num_proc) == (2048, "qwen3", 4)
    assert (args.trainer.num_train_epochs, args.trainer.save_steps, args.trainer.run_name) == (20, 20, "r")
    assert (
        args.trainer.warmup_steps == 0.1
        and args.trainer.bf16 == multiplies_bf16()
        and args.trainer.learning_rate == 1e-4
    )


def test_dashes_and_underscores_are_the_same(tmp_path):
    assert parse("--output-dir", str(tmp_path), "--ttt-steps", "5").draft.ttt_steps == 5


def test_unknown_flag_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown flag '--ttt_stepz'.*'--ttt-steps'"):
        parse("--output_dir", str(tmp_path), "--ttt_stepz", "5")


def test_no_warm_up_can_be_asked_for(tmp_path):
    """`--warmup_steps 0` was once taken for "not given", and the default ratio warmed up all the same."""
    flags = ("--output_dir", str(tmp_path))
    given = ((), 0.03), (("--warmup_steps", "0"), 0), (("--warmup_steps", "7"), 7), (("--warmup_ratio", "0"), 0)
    for words, steps in given:
        assert parse(*flags, *words).trainer.warmup_steps == steps


def test_a_flag_is_not_cut_short(tmp_path):
    """The parser once took `--ttt_step` for --ttt_steps, and would have taken it for a newer flag tomorrow."""
    with pytest.raises(UserError, match="unknown flag '--ttt_step'.*'--ttt-steps'"):
        parse("--output_dir", str(tmp_path), "--ttt_step", "5")


@pytest.mark.parametrize(("words", "said"), [
    (("--report_to", "wand"), "wand: unknown .did you mean 'wandb'"),
    (("--report_to", "tensorboard,wand"), "wand: unknown .did you mean 'wandb'"),
    (("--report_to", "flyte"), "flyte: it cannot be used here"),
    (("--deepspeed", "none.json"), "'deepspeed.*' distribution was not found. Install it, or leave its flag out"),
])  # fmt: skip
def test_what_is_not_installed_is_one_line(words, said, tmp_path):
    with pytest.raises(UserError, match=said):
        parse("--output_dir", str(tmp_path), *words)


def test_several_trackers(tmp_path):
    assert parse("--output_dir", str(tmp_path), "--report_to", "tensorboard").trainer.report_to == ["tensorboard"]
    again = parse("--output_dir", str(tmp_path), "--report_to", "tensorboard, tensorboard").trainer
    assert again.report_to == ["tensorboard", "tensorboard"]


def test_pickled_arguments_hold_no_token(tmp_path):
    """With --push_to_hub the library pickles them into `training_args.bin`, which it uploads."""
    trainer = parse("--output_dir", str(tmp_path), "--hub_token", "hunter2-hunter2", "--seed", "3").trainer
    saved = pickle.loads(pickle.dumps(trainer))
    assert (trainer.hub_token, saved.hub_token, saved.seed) == ("hunter2-hunter2", None, 3)


def test_depths_are_drawn_at_random_by_default(tmp_path):
    """`fledge plan` counts what `fledge train` does."""
    planned = PlanArgs(target="T").depth_survival
    assert parse("--output_dir", str(tmp_path)).draft.depth_survival == planned < 1
    with pytest.raises(UserError, match="--depth-survival is 1.5; it must be"):
        parse("--output_dir", str(tmp_path), "--depth_survival", "1.5")


@pytest.mark.parametrize(("name", "value"), [
    ("loss_type", "lk"), ("step_decay", "0.9"), ("head_rank", "64"), ("sliding_window", "512"),
    ("eval_decode_max_new_tokens", "32"),
])  # fmt: skip
def test_a_removed_flag_says_what_to_do(name: str, value: str, tmp_path):
    """Recipes of earlier versions may still set them; `unknown flag` alone would not say that the option is gone."""
    (tmp_path / "old.yaml").write_text(f"{name}: {value}\n")
    for words in ((f"--{name}", value), (f"--{name.replace('_', '-')}={value}",),
                  ("--config", str(tmp_path / "old.yaml"))):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name} {value} is no longer an option: .*Leave --{name} out"):
            parse("--output_dir", str(tmp_path), *words)


def test_an_older_resolved_config_with_the_values_of_today_runs(tmp_path):
    """Negative control: these values ask for what is done anyway."""
    (tmp_path / "old.yaml").write_text(
        "loss_type: kl\nstep_decay: null\nhead_rank: null\nttt_steps: 5\neval_decode_tree: [60, 5, 10]\n"
    )
    words = ("--output_dir", str(tmp_path), "--config", str(tmp_path / "old.yaml"))
    assert parse(*words).draft == parse("--output_dir", str(tmp_path), "--ttt_steps", "5").draft
    assert parse(*words, "--loss_type", "kl", "--step_decay", "0.8").draft == parse(*words).draft


def test_recipe_below_flags(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("ttt_steps: 4\ntrain_data_path: [a, b]\nbf16: false\nlearning_rate: 0.002\n")
    args = parse("--config", str(recipe), "--output_dir", str(tmp_path), "--ttt_steps", "6")
    assert (args.draft.ttt_steps, args.inputs.data) == (6, ("a", "b"))
    assert args.trainer.bf16 is False and args.trainer.learning_rate == 0.002


def test_recipe_with_unknown_key(tmp_path):
    (tmp_path / "r.yaml").write_text("tt_steps: 4\n")
    with pytest.raises(UserError, match="r.yaml: unknown key 'tt_steps'.*'ttt_steps'"):
        parse("--config", str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path))


def test_output_dir_is_needed():
    with pytest.raises(UserError, match="--output-dir is needed"):
        parse("--ttt_steps", "4")


def test_resolved_config_repeats_the_run(tmp_path):
    """What is written beside a head can be fed back as a recipe."""
    import yaml

    first = parse("--output_dir", str(tmp_path), "--ttt_steps", "5", "--train_data_path", "x",
                  "--position_weights", "fixed")  # fmt: skip
    own = {
        k: v
        for k, v in first.resolved().items()
        if k in ("ttt_steps", "data", "position_weights", "step_decay", "tap_layers")
    }
    recipe = tmp_path / "again.yaml"
    recipe.write_text(yaml.safe_dump({k: v for k, v in own.items() if v not in (None, ())}))
    again = parse("--config", str(recipe), "--output_dir", str(tmp_path))
    assert (again.draft, again.inputs) == (first.draft, first.inputs)


@pytest.mark.parametrize("able", [True, False])
def test_bf16_where_the_processor_has_it(able, monkeypatch, tmp_path, capsys):
    """Without AVX-512 a training step in bf16 took minutes, in fp32 seconds."""
    monkeypatch.setattr("fledge.train.arguments.multiplies_bf16", lambda: able)
    assert TrainerArguments(output_dir=str(tmp_path), use_cpu=True).bf16 == able
    assert ("training in fp32" in capsys.readouterr().err) == (not able)
