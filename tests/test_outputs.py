"""Whose an output folder is, one writer at a time, and files that appear whole or not at all."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from disks import filled, make_read_only, small_disk
from kills import finish, kill_again_and_again, start, tree
from safetensors.torch import save_file

from fledge import outputs
from fledge.errors import UserError, explained, naming
from fledge.outputs import (
    Output,
    cached,
    check,
    claim,
    delete,
    document_has,
    is_own,
    mark,
    replacing,
    staged,
    write_file,
    written,
)

HEAD = Output(
    "export", ("config.json", "model.safetensors"), lambda folder: document_has(folder / "old.json", "source")
)
OTHER = Output("train", ("config.json", "checkpoint-*"))


@pytest.fixture
def foreign(tmp_path) -> Path:
    folder = tmp_path / "lora"
    (folder / "checkpoint-1000").mkdir(parents=True)
    (folder / "checkpoint-1000" / "adapter.bin").write_bytes(b"weeks of work")
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_files_of_others_are_refused_by_name_and_left_alone(foreign):
    before = tree(foreign)
    for attempt in (check, claim):
        with pytest.raises(UserError, match="holds checkpoint-1000, config.json, which `fledge train`.*--overwrite"):
            attempt(foreign, OTHER)
    assert tree(foreign) == before


def test_what_is_not_in_the_way_is_no_reason_to_refuse(foreign):
    """Negative control: the refusal is about names, not about a folder that has files."""
    with claim(foreign, Output("bench", ("results.jsonl",))):
        assert is_own(foreign, Output("bench", ()))
    assert (foreign / "notes.txt").read_text() == "mine"


def test_a_command_knows_its_own_folder_and_not_that_of_another(tmp_path):
    with claim(tmp_path, HEAD) as first:
        (tmp_path / "config.json").write_text("{}")
    with claim(tmp_path, HEAD) as again:
        assert again.run == first.run
    with pytest.raises(UserError, match="holds config.json, which `fledge train`"):
        check(tmp_path, OTHER)


def test_folders_from_before_there_were_markers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="did not write"):
        check(tmp_path, HEAD)
    (tmp_path / "old.json").write_text('{"source": "head"}')
    check(tmp_path, HEAD)


def test_overwrite_deletes_what_is_in_the_way_and_nothing_else(foreign):
    with claim(foreign, OTHER, overwrite=True):
        assert sorted(path.name for path in foreign.iterdir()) == [".fledge.json", ".fledge.lock", "notes.txt"]


def test_a_damaged_marker_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / outputs.MARKER).write_text("{")
    with pytest.raises(UserError, match=r"\.fledge\.json.*not valid JSON.*Remove it"):
        check(tmp_path, HEAD)


def test_one_writer_at_a_time(tmp_path):
    with claim(tmp_path, HEAD):
        before = tree(tmp_path)
        with pytest.raises(UserError, match=f"another run is writing there .fledge export, process {os.getpid()} on"):
            claim(tmp_path, OTHER)
        assert tree(tmp_path) == before
    claim(tmp_path, OTHER).release()


@pytest.mark.parametrize("inherited", [False, True])
def test_the_lock_of_a_dead_process_is_free_at_once(tmp_path, monkeypatch, inherited):
    """A data loader's worker outlives a killed trainer by seconds; it must not hold the folder. Without the release in
    the child (the control) it does."""

    def work() -> None:
        claim(tmp_path, HEAD)
        if inherited:
            outputs.Claim._held.clear()
        worker = start(lambda: time.sleep(2))
        (tmp_path / "worker").write_text(str(worker))
        time.sleep(20)

    child = start(work)
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if inherited:
        with pytest.raises(UserError, match="another run"):
            claim(tmp_path, HEAD)
    else:
        claim(tmp_path, HEAD).release()
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def write_pair(folder: Path, value: int) -> None:
    """A head whose two files say the same number."""
    with written(folder, HEAD) as building:
        save_file({"value": torch.full((1000,), value)}, str(building / "model.safetensors"))
        write_file(building / "config.json", str(value))


def pair_in(folder: Path) -> tuple[int, int]:
    from safetensors.torch import load_file

    return int((folder / "config.json").read_text()), int(load_file(folder / "model.safetensors")["value"][0])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "head"
    with pytest.raises(ZeroDivisionError), written(folder, HEAD) as building:
        (building / "config.json").write_text("half")
        raise ZeroDivisionError
    assert not folder.exists() and not list(folder.parent.iterdir())
    write_pair(folder, 1)
    with pytest.raises(ZeroDivisionError), written(folder, HEAD) as building:
        (building / "config.json").write_text("half")
        raise ZeroDivisionError
    assert pair_in(folder) == (1, 1)
    (folder / "notes.txt").write_text("mine")
    write_pair(folder, 2)
    assert pair_in(folder) == (2, 2) and (folder / "notes.txt").read_text() == "mine"


def test_killed_while_writing_a_folder(tmp_path):
    """Each attempt writes another number; whenever it is killed, both files say the same one after the next start."""
    folder, numbers = tmp_path / "head", iter(range(1, 1000))
    write_pair(folder, 0)  # on a busy machine no attempt may get as far as its first

    def work() -> None:
        for value in range(next(numbers) * 100, 10**9):
            write_pair(folder, value)

    assert kill_again_and_again(work, longest_s=0.1)
    with claim(folder, HEAD):
        pass
    one, other = pair_in(folder)
    assert one == other
    assert {path.name for path in folder.iterdir()} == {*HEAD.names, outputs.MARKER, outputs.LOCK}


def test_a_replacement_that_was_interrupted_is_finished(tmp_path):
    """Killed after the first of two renames: the next writer does the second. What was incomplete is removed."""
    write_pair(tmp_path / "head", 1)
    ready = tmp_path / "head" / outputs.READY
    ready.mkdir()
    save_file({"value": torch.full((1000,), 2)}, str(ready / "model.safetensors"))
    (tmp_path / "head" / "config.json").write_text("2")
    (tmp_path / "head" / outputs.STAGING).mkdir()
    (tmp_path / "head" / ".old.fledge-deleting").mkdir()
    claim(tmp_path / "head", HEAD).release()
    assert pair_in(tmp_path / "head") == (2, 2)
    assert not [path for path in (tmp_path / "head").iterdir() if path.is_dir()]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    """A head was written readable by its owner alone, and a server in a container could not load it."""

    def work() -> None:
        os.umask(umask)
        write_pair(tmp_path / "head", 1)
        with replacing(tmp_path / "shard.safetensors") as temporary:
            save_file({"value": torch.zeros(2)}, str(temporary))
        save_file({"value": torch.zeros(2)}, str(tmp_path / "plain.safetensors"))

    assert finish(work) == 0
    for path in [*(tmp_path / "head" / name for name in HEAD.names), tmp_path / "shard.safetensors"]:
        assert path.stat().st_mode & 0o777 == mode, path
    assert (tmp_path / "head").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "plain.safetensors").stat().st_mode & 0o777 == 0o600  # control: what safetensors does


def test_deleting_a_folder_leaves_no_half_of_it_under_its_name(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2").mkdir()
    monkeypatch.setattr(outputs.shutil, "rmtree", lambda *args, **kwargs: None)  # killed before it starts
    delete([tmp_path / "checkpoint-2"])
    assert not (tmp_path / "checkpoint-2").exists()


def test_markers_name_several_commands_and_runs(tmp_path):
    mark(tmp_path, HEAD, "first")
    mark(tmp_path, OTHER, "second")
    assert [outputs.owner(tmp_path, name).run for name in ("export", "train")] == ["first", "second"]
    assert mark(tmp_path, HEAD).run == "first" and mark(tmp_path, HEAD, "third").run == "third"


def test_a_full_disk_leaves_what_was_there_and_says_what_is_needed(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        write_pair(disk / "head", 1)
        write_file(disk / "list.txt", "short")
        with filled(disk, 40_000):
            with pytest.raises(OSError) as caught, written(disk / "head", HEAD) as building:
                tensor = torch.zeros(100_000)
                with naming(disk / "head", needed_bytes=tensor.nbytes):
                    save_file({"value": tensor}, str(building / "model.safetensors"))
            said = explained(caught.value)
            assert (
                str(disk / "head") in said
                and "no space left" in said
                and "390.6 KiB are needed, " in said
                and " free)" in said
            )
            with pytest.raises(OSError, match="list.txt") as caught:
                write_file(disk / "list.txt", "long" * 100_000)
            assert "390.6 KiB are needed" in explained(caught.value)
        assert pair_in(disk / "head") == (1, 1) and (disk / "list.txt").read_text() == "short"
        write_pair(disk / "head", 2)  # room again
        assert pair_in(disk / "head") == (2, 2)


def test_a_read_only_disk_is_named(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "head").mkdir()
        make_read_only(disk)
        for folder in (disk / "head", disk / "new"):
            with pytest.raises(OSError) as caught:
                write_pair(folder, 1)
            assert str(disk) in explained(caught.value) and "read-only" in explained(caught.value)


def test_errors_of_the_system_as_sentences(tmp_path):
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    assert explained(denied) == (
        f"{tmp_path / 'x'}: permission denied. User {os.getuid()} needs the right to it; give it, or choose another "
        f"folder."
    )
    with pytest.raises(OSError) as caught, naming(tmp_path / "y"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and "y: cannot be written, no space left" in explained(caught.value)
    with pytest.raises(RuntimeError, match="another"), naming(tmp_path / "y"):  # control: other errors stay themselves
        raise RuntimeError("another")


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file, a folder is needed"):
        check(tmp_path / "out", HEAD)


def test_staged_files_need_no_claim(tmp_path):
    with staged(tmp_path / "best") as building:
        (building / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["config.json"]


def test_a_command_that_writes_every_name_does_not_refuse_its_own_lock(tmp_path):
    """`fledge quickstart` refused the folder it had just made: `*` matched the lock that it had taken."""
    everything = Output("quickstart", ("*",))
    with written(tmp_path / "target", everything) as folder:
        (folder / "model.txt").write_text("whole")
    assert (tmp_path / "target" / "model.txt").read_text() == "whole"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.txt").write_text("theirs")
    with pytest.raises(UserError, match="holds model.txt"), written(tmp_path / "foreign", everything):
        pass


def test_the_cache_may_be_lost(monkeypatch, tmp_path):
    """What is cached is made once; a damaged file, another kind of value or a folder that cannot be written costs
    making it again."""
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    made: list[int] = []

    def make() -> dict[int, float]:
        made.append(1)
        return {1: 0.5}

    for expected in (1, 1):
        assert cached("costs", "a key", dict[int, float], make) == {1: 0.5}
        assert len(made) == expected
    cached("costs", "another key", dict[int, float], make)
    assert len(made) == 2
    for file in (tmp_path / "costs").iterdir():
        file.write_text('{"1": "a word"}')
    assert cached("costs", "a key", dict[int, float], make) == {1: 0.5}
    assert len(made) == 3
    monkeypatch.setenv("FLEDGE_CACHE", str(next((tmp_path / "costs").iterdir())))
    assert cached("costs", "a key", dict[int, float], make) == {1: 0.5}
    assert len(made) == 4
