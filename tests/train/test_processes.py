"""Training in processes of its own: several ranks, ranks that die, runs that are killed, disks that are full."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launching import torchrun

SCRIPT = Path(__file__).parent.parent / "tiny_trainer.py"
COMMON = {
    "samples": 20, "max_steps": 10, "per_device_train_batch_size": 2, "save_strategy": "no", "matrix_optim": "same"
}  # fmt: skip
SAVING = {"save_strategy": "steps", "save_steps": 4}


def settings(**changes) -> str:
    return json.dumps({**COMMON, **changes})


def outcome(folder: Path, rank: int = 0) -> dict:
    return torch.load(folder / f"rank-{rank}.pt")


def distance(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def two_ranks(launch, tmp_path_factory) -> Path:
    """Ten steps of two ranks, one sequence each."""
    folder = tmp_path_factory.mktemp("two")
    launch([SCRIPT, folder, settings(per_device_train_batch_size=1, **SAVING)], ranks=2)
    return folder


@pytest.fixture(scope="module")
def one_process(launch, tmp_path_factory) -> Path:
    """Ten steps of one process: of two sequences, of one, of two with Muon, of two to depths at random."""
    folder = tmp_path_factory.mktemp("one")
    runs = {"one": {}, "alone": {"per_device_train_batch_size": 1}, "muon": {"matrix_optim": "muon"},
            "depths": {"survival": 0.6}}  # fmt: skip
    launch([SCRIPT, *(word for name, changes in runs.items() for word in (folder / name, settings(**changes)))])
    return folder


def test_two_processes_take_the_steps_of_one(two_ranks, one_process):
    """2 processes x batch 1 == 1 process x batch 2 after 10 steps; each rank alone would be far from it."""
    first, second, one = outcome(two_ranks, 0), outcome(two_ranks, 1), outcome(one_process / "one")
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], one["weights"]) < 2e-5
    torch.testing.assert_close(first["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    control = outcome(one_process / "alone")  # half the data per step ends elsewhere
    assert distance(control["weights"], one["weights"]) > 1e-3


def test_two_processes_draw_the_depths_of_one(launch, one_process, tmp_path):
    """A document's depth depends on its id, the seed and the step: not on the process that holds it."""
    launch([SCRIPT, tmp_path, settings(per_device_train_batch_size=1, survival=0.6)], ranks=2)
    two, one = outcome(tmp_path), outcome(one_process / "depths")
    assert distance(two["weights"], one["weights"]) < 2e-5
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    assert distance(one["weights"], outcome(one_process / "one")["weights"]) > 1e-3  # control: other depths


def test_two_processes_of_one_sequence_take_the_steps_of_one(launch, tmp_path):
    """--sequence-parallel 2. Every step takes all samples, so that the orders of the runs do not matter."""
    changes = {
        "samples": 3, "longest": 200, "gradient_accumulation_steps": 3, "max_steps": 5, "survival": 0.7,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    launch([SCRIPT, one, settings(**changes), other, settings(**{**changes, "samples": 2})])
    launch([SCRIPT, two, settings(sequence_parallel=2, **changes)], ranks=2)
    first, second, alone = outcome(two, 0), outcome(two, 1), outcome(one)
    assert distance(first["weights"], second["weights"]) == 0.0
    assert distance(first["weights"], alone["weights"]) < 2e-5
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-5, atol=1e-5)
    assert distance(outcome(other)["weights"], alone["weights"]) > 1e-3  # control: a sample less


def test_two_processes_take_the_same_steps_with_muon(launch, one_process, tmp_path):
    """Every rank orthogonalises for itself: the same bits. Muon rounds to bf16, so one process is near, not equal."""
    launch([SCRIPT, tmp_path, settings(per_device_train_batch_size=1, matrix_optim="muon")], ranks=2)
    first, second = outcome(tmp_path, 0), outcome(tmp_path, 1)
    one, control = outcome(one_process / "muon"), outcome(one_process / "one")
    assert distance(first["weights"], second["weights"]) == 0.0
    torch.testing.assert_close(first["losses"], one["losses"], rtol=2e-3, atol=2e-3)
    assert distance(first["weights"], one["weights"]) < 0.2 * distance(control["weights"], one["weights"])


def test_sharded_steps_equal_whole_ones(launch, tmp_path):
    """FSDP2 over two CPU ranks: every weight sharded, the same weights after three steps."""
    for ranks in (1, 2):
        launch([SCRIPT.with_name("sharded_steps.py"), tmp_path / f"{ranks}.pt"], ranks=ranks)
    assert distance(torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")) < 2e-6


def test_ranks_leave_without_hanging_or_aborting(launch):
    launch([SCRIPT.with_name("leaving.py"), 10])


needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="no deepspeed here (docs/scaling.md)")


def zero_config(folder: Path, **settings) -> str:
    path = folder / "zero.json"
    path.write_text(json.dumps({
        "zero_optimization": settings, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    }))  # fmt: skip
    return str(path)


@needs_deepspeed
def test_zero_3_that_would_save_no_head_is_refused(launch, tmp_path):
    done = launch([SCRIPT, tmp_path, settings(deepspeed=zero_config(tmp_path, stage=3))], check=False)
    assert done.returncode and "stage3_gather_16bit_weights_on_model_save" in done.stderr


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_the_steps_of_one_process_and_resumes(launch, one_process, tmp_path, stage):
    """ZeRO over two CPU ranks: the weights of one process, also when it stops at step 4 and continues."""
    gathers = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    sharded = {"per_device_train_batch_size": 1, "deepspeed": zero_config(tmp_path, stage=stage, **gathers), **SAVING}
    launch([SCRIPT, tmp_path / "whole", settings(**sharded)], ranks=2)
    launch([SCRIPT, tmp_path / "halves", settings(**sharded, die_at=6, die_rank=1)], ranks=2, check=False)
    assert not (tmp_path / "halves" / "rank-0.pt").exists() and (tmp_path / "halves" / "checkpoint-4").is_dir()
    launch([SCRIPT, tmp_path / "halves", settings(**sharded)], ranks=2)
    one, whole, halves = outcome(one_process / "one"), outcome(tmp_path / "whole"), outcome(tmp_path / "halves")
    assert distance(one["weights"], whole["weights"]) < 2e-5
    torch.testing.assert_close(whole["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    assert distance(whole["weights"], halves["weights"]) == 0.0 and whole["losses"] == halves["losses"]


def test_uneven_data_and_untrainable_samples_do_not_hang(launch, tmp_path):
    """8 samples and one that teaches nothing, batches of one on 2 ranks, over several epochs."""
    launch([SCRIPT, tmp_path, settings(per_device_train_batch_size=1, samples=8, untrainable=True)], ranks=2)
    first, second = outcome(tmp_path, 0), outcome(tmp_path, 1)
    assert distance(first["weights"], second["weights"]) == 0.0 and len(first["losses"]) == 10


def test_a_killed_rank_is_restarted_and_resumes_exactly(two_ranks, tmp_path):
    """torchrun --max-restarts 1: rank 1 dies at step 5, both start again from the checkpoint of step 4."""
    dying = settings(per_device_train_batch_size=1, die_at=5, die_rank=1, **SAVING)
    done = torchrun([SCRIPT, tmp_path, dying], ranks=2, restarts=1)
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr[-3000:]
    whole, killed = outcome(two_ranks), outcome(tmp_path)
    assert distance(whole["weights"], killed["weights"]) == 0.0 and whole["losses"] == killed["losses"]


def test_killed_at_random_moments_equals_uninterrupted(launch, tmp_path):
    """SIGKILL a random time after a random step, thrice in one run with depths at random: equal to the last bit."""
    chance = random.Random()
    saving = {**SAVING, "save_steps": 2, "save_total_limit": 2, "max_steps": 12, "survival": 0.6}
    moments = [(chance.randint(low, low + 2), chance.uniform(0, 0.1)) for low in (1, 4, 7)]
    pairs = [tmp_path / "whole", settings(**saving)]
    for step, after_s in moments:
        pairs += [tmp_path / "killed", settings(**saving, die_at=step, die_after_s=after_s)]
    done = launch([SCRIPT, *pairs, tmp_path / "killed", settings(**saving)])
    assert done.stdout.count("killed: -9") >= 1 and done.stdout.endswith("killed: 0\n"), (moments, done.stdout)
    whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert whole["losses"] == killed["losses"] and len(whole["losses"]) == 12, moments
    assert distance(whole["weights"], killed["weights"]) == 0.0, moments


def test_files_that_cannot_grow_stop_the_run_with_the_last_checkpoint_intact(launch, tmp_path):
    """A limit on file sizes stands for a full disk: the head's weights fit, the optimizer's moments do not."""
    saving = {**SAVING, "save_steps": 2, "max_steps": 6}
    launch([SCRIPT, tmp_path / "whole", settings(**saving), tmp_path / "full", settings(**saving, die_at=3)])
    weights, moments = (
        (tmp_path / "whole" / "checkpoint-6" / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")
    )
    assert weights < moments
    limited = settings(**saving, file_bytes=(weights + moments) // 2)
    done = launch([SCRIPT, tmp_path / "full", limited, tmp_path / "full", settings(**saving)])
    assert [line for line in done.stdout.splitlines() if line.startswith("full: ")] == ["full: 1", "full: 0"]
    assert "checkpoint-4: the checkpoint could not be written" in done.stderr and "make room" in done.stderr
    assert outcome(tmp_path / "full")["losses"] == outcome(tmp_path / "whole")["losses"]
