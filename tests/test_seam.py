"""The seam of drafters: what there is of each outside its folder is a row of the registry and a row below.

A new drafter is a folder in fledge/drafters, a row of `DRAFTERS` there, and a row of `MADE` here.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from block_reference import tiny_block
from tiny import prompt, tiny_draft, tiny_target

from fledge.decoding.generate import generate, generate_batch
from fledge.drafters.base import TreeProposer
from fledge.drafters.lookup.propose import PromptLookup
from fledge.drafters.registry import DRAFTERS, kind_of, proposer_of
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError
from fledge.target.model import Target

PACKAGE = Path(__file__).parent.parent / "fledge"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("drafters/*/__init__.py"))

# What may name a drafter, and why.
EXCEPTIONS = {
    "__init__.py": "the package's description",
    "cli.py": "the package's description",
    "bench": "the side with a drafter is called eagle in AngelSlim's flags and in reports; help of --draft",
    "commands": "help of --draft; quickstart and plan are about training a head",
    "decoding/settings.py": "help of --draft",
    "doctor": "examines files of heads",
    "drafters/registry.py": "the table of drafters",
    "export": "engines' layouts of heads",
    "servers": "vLLM's own names of its settings",
    "train": "trains EAGLE-3 heads",
}  # fmt: skip

# A drafter of every folder, for a tiny target.
MADE: dict[str, Callable[[Target], Any]] = {
    "dspark": lambda target: tiny_block(target, "dspark"),
    "eagle3": lambda target: tiny_draft(target),
    "lookup": lambda target: PromptLookup(),
}  # fmt: skip
CHAIN = TreeShape(6, 4, 1)


def names_of(folders: list[str]) -> re.Pattern[str]:
    """A drafter's name (eagle3: any word with eagle), but no LookupError."""
    stems = [folder.rstrip("0123456789") for folder in folders]
    words = [rf"(\b_?(?i:{stem})|{stem.capitalize()})(?!Error)" for stem in stems]
    return re.compile("|".join([*words, r"\bDraftModel\b"]))


def mentions(package: Path, folders: list[str]) -> Iterator[tuple[str, str]]:
    """(file, line) of everything outside the drafters' folders that names one."""
    pattern = names_of(folders)
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] == "drafters" and name.parts[1] in folders:
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            if pattern.search(line):
                yield str(name), line.strip()


def excepted(name: str) -> str | None:
    return next((place for place in EXCEPTIONS if name == place or name.startswith(f"{place}/")), None)


def test_no_stage_names_a_drafter():
    found = list(mentions(PACKAGE, FOLDERS))
    assert not [one for one in found if excepted(one[0]) is None]
    assert {excepted(name) for name, _ in found} == set(EXCEPTIONS), "an exception that nothing needs any more"


def test_a_name_would_be_found(tmp_path):
    """Negative control: imports, isinstance, strings and flags; what only looks like a name is none."""
    (tmp_path / "drafters" / "lookup").mkdir(parents=True)
    (tmp_path / "drafters" / "lookup" / "propose.py").write_text("class LookupProposer: ...\n")
    named = [
        "from fledge.drafters.eagle3.model import Head", "isinstance(drafter, DraftModel)", "EagleProposer(draft)",
        'reason = "prompt lookup reads the tokens"', "args.eagle_model_path", "PromptLookup()", "run(EAGLE)",
    ]  # fmt: skip
    (tmp_path / "named.py").write_text("\n".join(named))
    (tmp_path / "clean.py").write_text("except ProcessLookupError:\nexcept LookupError:\ntable = look_up(drafter)\n")
    assert [line for _, line in mentions(tmp_path, ["eagle3", "lookup"])] == named


def test_every_folder_has_its_rows():
    assert sorted(MADE) == FOLDERS
    assert sorted(kind.drafter.__module__.split(".")[2] for kind in DRAFTERS) == FOLDERS


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_drafter_is_what_it_says_and_lossless(name):
    """Taps and trees as stated, and the target's own text: alone, in a batch, as a tree, as a chain."""
    target = tiny_target("llama")
    drafter, prompts = MADE[name](target), [prompt(9), prompt(14), prompt(6) * 3]
    proposer = proposer_of(drafter, CHAIN, 1, 0)
    assert proposer is not None and proposer.needs_taps == (drafter.tap_layers is not None)
    assert drafter.tap_layers in (None, target.tap_layers) and drafter.devices <= {target.device}
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": ()}
    plain = [generate(target, None, ids, **options).token_ids for ids in prompts]
    shapes = [CHAIN, TreeShape(12, 3, 3)] if isinstance(proposer, TreeProposer) else [CHAIN]
    for shape in shapes:
        assert [generate(target, drafter, ids, tree=shape, **options).token_ids for ids in prompts] == plain
        together = generate_batch(target, drafter, prompts, tree=shape, **options)
        assert [one.token_ids for one in together] == plain


def test_what_is_no_drafter_is_refused():
    with pytest.raises(UserError, match="a dict is no drafter.*PromptLookup"):
        kind_of({})
