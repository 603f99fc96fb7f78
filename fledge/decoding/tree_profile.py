"""The tree that suits one machine and head, as a small JSON file: `fledge bench --tune` writes it, `--total-token auto`
reads it. Knows the file and the flags it stands for; how the tree was found is `fledge.decoding.tune`'s business.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fledge import provenance
from fledge.console import say, warn
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.parsing import convert, read_python_json
from fledge.ranges import NotNegative, Positive

NAME = "tree_profile.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TreeProfile:
    """A chosen tree, what it should bring, and the measurements behind the choice."""

    tree: TreeShape
    tau: Positive  # expected tokens per round
    tokens_per_s: Positive  # expected
    plain_tokens_per_s: Positive
    temperature: NotNegative
    measured: dict[str, float]  # tokens per second of real decoding: plain, chosen, default
    curve: list[dict[str, float]]  # the best tree of every total_token
    costs: dict[str, Any]  # verify_s by nodes, draft_s by top_k and levels, overhead_s
    hardware: dict[str, Any]


class ProfileCosts(msgspec.Struct):
    """Seconds of the parts of a round."""

    verify_s: dict[Annotated[str, msgspec.Meta(pattern=r"^\d+$")], NotNegative]  # by number of nodes
    draft_s: dict[Annotated[str, msgspec.Meta(pattern=r"^\d+x\d+$")], NotNegative]  # by top_k x levels
    overhead_s: float


class ProfileFile(msgspec.Struct):
    """The whole file; what it says of its provenance is not read."""

    format: Literal[1]
    profile: TreeProfile


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
    hint = "It is not a tree profile of this version: run `fledge bench --tune`."
    profile = read_python_json(path, ProfileFile, hint=hint).profile
    convert(profile.costs, ProfileCosts, str(path), hint=hint)
    here = provenance.hardware()
    different = [key for key in ("cpu", "gpus", "torch_threads") if here.get(key) != profile.hardware.get(key)]
    if different:
        found = ", ".join(f"{key} {profile.hardware.get(key)} (here {here.get(key)})" for key in different)
        warn(f"{path}: the tree was tuned on another machine: {found}. `fledge bench --tune` adapts it to this one.")
    return profile


def resolve_tree(
    total_token: int | Literal["auto"] | None, depth: int | None, top_k: int | None, *, head: str | None,
    path: Path | None = None,
) -> TreeShape:  # fmt: skip
    """The tree the flags ask for; `auto` takes all three numbers from the profile."""
    if total_token != "auto":
        named = {"total_token": total_token, "depth": depth, "top_k": top_k}
        return TreeShape(**{name: number for name, number in named.items() if number is not None})
    file = profile_path(head, path)
    tree = read_profile(file).tree
    say(f"tree of {file}: --total-token {tree.total_token} --depth {tree.depth} --top-k {tree.top_k}")
    return tree
