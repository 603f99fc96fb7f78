"""Commands that start at once are the commands: their status, streams, folder and signals."""

import os
import subprocess
from pathlib import Path

import fledge


def typed(script: str, path: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path, **variables}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


def test_status_and_streams_are_the_commands(warm_path, tmp_path):
    done = typed(
        "fledge --version; fledge nothing; echo $?; python3 -m fledge inspect absent; echo $?", warm_path, tmp_path
    )
    assert done.stdout.split("\n")[:3] == [f"fledge {fledge.__version__}", "2", "1"]
    assert "unknown command 'nothing'" in done.stderr and "absent" in done.stderr


def test_a_pipe_the_folder_and_variables_are_the_shells(warm_path, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "recipe.yaml").write_text("nonsense: 1\n")
    script = "fledge --version | cat > out; cd below; COLUMNS=300 fledge decode --config recipe.yaml; echo $?"
    done = typed(script, warm_path, tmp_path)
    assert (tmp_path / "out").read_text() == f"fledge {fledge.__version__}\n"
    assert done.stdout.strip() in ("1", "2") and "nonsense" in done.stderr, "a recipe of the folder it was changed to"


def test_a_signal_reaches_the_command(warm_path, tmp_path):
    """One that waits for somebody to write is interrupted; another Python than `-m fledge` is not ours."""
    os.mkfifo(tmp_path / "recipe.yaml")
    done = typed("timeout --preserve-status -s INT 2 fledge decode --config recipe.yaml; echo $?", warm_path, tmp_path)
    assert done.stdout.strip().split("\n")[-1] == "130", done
    assert typed("python3 -c 'print(6 * 7)'", warm_path, tmp_path).stdout == "42\n"
