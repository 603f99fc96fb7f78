"""The tree that suits one machine and head, as a small JSON file: `fledge bench --tune` writes it, `--total-token auto`
reads it. Knows the file and the flags it stands for; how the tree was found is `fledge.decoding.tune`'s business.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from fledge import provenance
from fledge.console import say, warn
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError

NAME = "tree_profile.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TreeProfile:
    """A chosen tree, what it should bring, and the measurements behind the choice."""

    tree: TreeShape
    tau: float  # expected tokens per round
    tokens_per_s: float  # expected
    plain_tokens_per_s: float
    temperature: float
    measured: dict[str, float]  # tokens per second of real decoding: plain, chosen, default
    curve: list[dict[str, float]]  # the best tree of every total_token
    costs: dict[str, Any]  # verify_s by nodes, draft_s by top_k and levels, overhead_s
    hardware: dict[str, Any]


def profile_path(head: str | None, given: Path | None) -> Path:
    """Where the profile is: as given, else beside the head."""
    if given is None and head is None:
        raise UserError("a tree profile lies beside the head, but no head was given. Give the head or --profile-path.")
    return given or Path(str(head)) / NAME


def write_profile(path: Path, profile: TreeProfile) -> None:
    """Write the profile with its provenance."""
    provenance.write(path, None, format=FORMAT, profile=dataclasses.asdict(profile))


def read_profile(path: Path) -> TreeProfile:
    """Read a profile; one of another machine is used with a warning."""
    if not path.is_file():
        raise UserError(f"{path}: no tree profile there. Make one with `fledge bench --tune`, or give --total-token.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        values = document["profile"]
        profile = TreeProfile(**{**values, "tree": TreeShape(**values["tree"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tree profile of this version ({error}). Run `fledge bench --tune`.") from None
    here = provenance.hardware()
    different = [key for key in ("cpu", "gpus", "torch_threads") if here.get(key) != profile.hardware.get(key)]
    if different:
        found = ", ".join(f"{key} {profile.hardware.get(key)} (here {here.get(key)})" for key in different)
        warn(f"{path}: the tree was tuned on another machine: {found}. `fledge bench --tune` adapts it to this one.")
    return profile


def resolve_tree(
    total_token: int | Literal["auto"], depth: int, top_k: int, *, head: str | None, path: Path | None = None
) -> TreeShape:
    """The tree the flags ask for; `auto` takes all three numbers from the profile."""
    if total_token != "auto":
        return TreeShape(total_token, depth, top_k)
    file = profile_path(head, path)
    tree = read_profile(file).tree
    say(f"tree of {file}: --total-token {tree.total_token} --depth {tree.depth} --top-k {tree.top_k}")
    return tree
