"""Numbers in flags: every command's have a declared range, and what lies outside is one line that names it."""

import dataclasses
import importlib
from typing import Annotated, Literal

import msgspec
import pytest

from fledge.cli import COMMANDS, run_command
from fledge.commands.parser import parse
from fledge.errors import UserError
from fledge.ranges import Count, Natural, PositiveShare, Seed, check_ranges, declared, numbers_in


@dataclasses.dataclass
class Inner:
    top_p: PositiveShare = 1.0
    nodes: Count | Literal["auto"] = 5


@dataclasses.dataclass
class Flags:
    layers: list[Natural] = dataclasses.field(default_factory=list)
    seed: Seed | None = None
    plain: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)


def args_class(name: str) -> type:
    return getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].args)


def without_range(flags: type) -> list[str]:
    return [name for name, kind in declared(flags) if any(range_ is None for _, range_ in numbers_in(kind))]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_of_every_command_has_a_range(name):
    assert without_range(args_class(name)) == []


def test_every_number_that_we_set_of_the_trainer_has_a_range():
    from fledge.train.arguments import TrainerArguments

    ours = set(TrainerArguments.__annotations__) | set(TrainerArguments.RANGES)
    assert ours.isdisjoint(without_range(TrainerArguments))


def test_a_number_without_range_is_found():
    """Negative control of the walk: also inside lists and unions."""

    @dataclasses.dataclass
    class Bare:
        a: int = 1
        b: list[float] | None = None
        c: Annotated[int, "no range"] | Literal[3] = 3
        d: Count | None = None
        e: bool = True

    assert without_range(Bare) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Flags(layers=[0, -1]), r"^--layers is -1; it must be at least 0\.$"),
        (Flags(seed=-1), "--seed is -1; it must be at least 0 and below 4294967296"),
        (Flags(seed=2**32), "--seed"),
        (Flags(inner=Inner(top_p=0.0)), "--top-p is 0.0; it must be above 0 and at most 1"),
        (Flags(inner=Inner(top_p=float("nan"))), "--top-p is nan; it must be above 0"),
        (Flags(inner=Inner(nodes=0)), "--nodes is 0; it must be at least 1"),
        (Flags(inner=Inner(nodes=10**30)), "--nodes is 10+; it must be at least 1 and at most 9007199254740992"),
    ],
)
def test_outside_is_named(flags, message):
    with pytest.raises(UserError, match=message):
        check_ranges(flags)


def test_inside_is_accepted():
    """Negative control: the ends of the ranges, a word instead of a number, and what is not given."""
    check_ranges(Flags())
    check_ranges(Flags(layers=[0], seed=0, plain=True, inner=Inner(1.0, "auto")))
    with pytest.raises(UserError, match="--seed_a"):
        check_ranges(dataclasses.make_dataclass("F", [("seed_a", Seed)])(-1), separator="_")


def test_a_record_from_a_file_obeys_the_same_ranges():
    assert msgspec.convert(0.5, PositiveShare) == 0.5
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(float("nan"), PositiveShare)


# Each was accepted once, and failed (or trained) much later.
WRONG = {
    "train": ["--max_samples -1", "--learning_rate -0.1", "--weight_decay nan", "--adam_beta1 1.5", "--adam_beta2 -1",
              "--warmup_steps -3", "--warmup_ratio 2", "--max_reject_share nan", "--ttt_steps 0", "--seed -1",
              "--num_train_epochs nan", "--tap_layers -2", "--depth_survival 0", "--dataloader_num_workers -1",
              "--eval_fraction 1", "--max_grad_norm -1", "--dtype int8", "--data_format csv"],
    "bench": ["--temperature nan", "--top-p 0", "--top-p 1.5", "--depth -1", "--total-token 1", "--concurrency 0",
              "--concurrency", "--seed -5", "--question-begin -1"],
    "decode": ["--temperature -1", "--temperature nan", "--max-new-tokens 0", "--sample-top-k -1", "--batch-size 0",
               "--depth -1", "--top-p 2"],
    "regenerate": ["--max-samples -1", "--max-reject-share nan", "--max-new-tokens 0", "--request-timeout-s nan",
                   "--base-port 70000", "--data-shard-size 0", "--temperature nan", "--temperature 0:nan,1:nan"],
    "extract": ["--max-samples 0", "--shard-mb nan", "--batch-tokens -1", "--num-gpus-per-model -1", "--tap-layers -1"],
    "plan": ["--num-gpus-total 0", "--tflops inf", "--draft-type eagle4"],
    "inspect": ["--sample -1", "--max-reject-share 2"],
    "serve": ["--base-port 0"],
    "quickstart": ["--max-samples 0", "--num-train-epochs -1"],
    "convert": ["--rope-theta 0"],
}  # fmt: skip
NEEDED = {
    "train": "--output_dir OUT", "bench": "--target T --draft D", "decode": "--target T --prompt x",
    "regenerate": "--data-name-or-path D --output-dir OUT", "plan": "--target-model-name-or-path T",
    "extract": "--model-name T --dataset-path D --output-dir OUT", "inspect": "PATH", "serve": "--model-name-or-path T",
    "convert": "HEAD --output-dir OUT",
}  # fmt: skip


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, flags in WRONG.items() for flag in flags])
def test_a_wrong_flag_ends_the_command_before_it_starts(name, flag, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    try:
        status = run_command(name, [*NEEDED.get(name, "").split(), *flag.split()])
    except SystemExit as end:  # tyro and argparse end the process themselves
        status = int(str(end.code))
    error = " ".join(capfd.readouterr().err.split())
    assert flag.split()[0].lstrip("-").replace("_", "-") in error.replace("_", "-") and "Traceback" not in error
    assert status == 2 or (status == 1 and flag in ("--concurrency", "--temperature nan", "--temperature 0:nan,1:nan"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(WRONG.keys() - {"train", "serve"}))
def test_the_same_command_without_it_is_parsed(name):
    """Negative control: what stands around the wrong flags is right."""
    assert parse(args_class(name), NEEDED.get(name, "").split(), prog="fledge", description="")
