"""The sweep: what fledge does with each architecture of the tests, from training to an engine's files.

A head is trained until it knows one answer of a tiny random target, drafts for that target, and is exported. The table
of docs/targets.md is written from all rows (`python tests/sweep.py`); `make sweep` compares it.
"""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from more_targets import MORE
from odd_targets import ODD, found, librarys_answer, odd_target, target_of_row
from tiny import HYBRIDS, TARGETS, prompt, tiny_config

from fledge.data.tokenize import Sample
from fledge.decoding.generate import TreeShape, generate
from fledge.drafters.batch import pack
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.head_files import save_draft
from fledge.drafters.loss import LossSettings
from fledge.errors import UserError
from fledge.export.convert import export_head
from fledge.export.engines import ENGINES, check_servable
from fledge.export.settings import ExportSettings
from fledge.target.live import LiveSource
from fledge.target.model import Target
from fledge.train.module import TTTModule

PAGE = Path(__file__).parent.parent / "docs" / "targets.md"
BEGIN, END = "<!-- sweep -->\n", "<!-- /sweep -->\n"
ORDER = ("trees", "chains", "plain", "refused")
STEPS, RATE, NEW = 40, 3e-3, 13
NAMES = (*TARGETS, *HYBRIDS, *ODD, *MORE)
# Compared by `make test`: one row of each kind of outcome and of the families asked for most.
FAST = ("llama", "qwen3_moe", "gpt_oss", "gemma4", "gemma3n", "glm4_moe", "deepseek_v3", "deepseek_v32", "minimax_m2",
        "llama4", "smollm3", "qwen3_next", "qwen3_5", "nemotron_h", "jamba", "minimax")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A row of the page."""

    decodes: str  # trees, chains, plain or refused
    head: str  # what became of the head
    why: str  # in the self-test's words, why it does not decode trees


def line(name: str, found: Outcome) -> str:
    """The row of the page."""
    cells = (name, found.decodes, found.head, found.why)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def target_of(name: str) -> Target:
    """The tiny target of a row of any table."""
    if name in TARGETS or name in HYBRIDS:
        return tiny.tiny_target(name)
    return odd_target(name) if name in ODD else target_of_row(name, *MORE[name])


def outcome(name: str) -> Outcome:
    """Train, decode, export. A wrong answer or a head that learns nothing is an error, a refusal a result."""
    try:
        target = target_of(name)
    except UserError as refusal:
        return Outcome("refused", "none", str(refusal).removeprefix(f"tiny-{name}: ").split(". ")[0])
    decodes, why = found(target)
    ids = prompt(22)
    answer = librarys_answer(target, ids, NEW)
    try:
        draft = trained(target, ids, answer)
    except UserError as refusal:
        return Outcome(decodes, "none", "; ".join(filter(None, (why, _short(refusal, target)))))
    if decodes == "refused":
        return Outcome(decodes, f"{exported(draft, target)}; not decoded", why)
    made = generate(target, draft, ids, tree=TreeShape(8, 3, 3), max_new_tokens=NEW, eos_token_ids=())
    assert made.token_ids == answer, f"{name}: decoding with a head is not the library's own"
    assert decodes == "plain" or made.tau > 1, f"{name}: the head drafts nothing of what it was trained on"
    return Outcome(decodes, exported(draft, target), why)


def trained(target: Target, ids: list[int], answer: list[int]) -> DraftModel:
    """A head that has read one answer until it knows it."""
    text = torch.tensor(ids + answer)
    batch = pack([LiveSource(target).record(Sample("one", text, torch.arange(len(text)) >= len(ids)))])
    torch.manual_seed(1)
    draft = DraftModel(tiny_config(target, None), target.embedding_weight)
    module = TTTModule(draft, target.head, 3, LossSettings())
    optimizer = torch.optim.AdamW([one for one in draft.parameters() if one.requires_grad], lr=RATE)
    losses: list[float] = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = module(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"{target.name}: the loss went from {losses[0]:.2f} to {losses[-1]:.2f}"
    return draft.eval().requires_grad_(False)


def exported(draft: DraftModel, target: Target) -> str:
    """The engines that read the exported head as it was trained; why not, where one does not."""
    words = []
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head"
        save_draft(draft, head)
        for name, engine in ENGINES.items():
            try:
                out = Path(folder) / name
                export_head(ExportSettings(head=str(head), to=name, output_dir=out, target=target.name))
                check_servable(out, engine, target.text_config)
                words.append(engine.title)
            except UserError as refusal:
                reason = re.sub(r" \{[^}]*\}", "", str(refusal)).split(f"in {engine.title}")[-1].split(". ")[0]
                words.append(f"not {engine.title}{reason.lstrip(' 0123456789.')}")
    return ", ".join(words)


def _short(refusal: UserError, target: Target) -> str:
    return str(refusal).removeprefix(f"{target.name}: ").split(". ")[0]


# -- the page ----------------------------------------------------------------------------------------------------------


def rows_of_page() -> dict[str, str]:
    """The table's lines as the page has them, by architecture."""
    table = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def write_page() -> None:
    """All rows again."""
    outcomes = {name: outcome(name) for name in NAMES}
    names = sorted(outcomes, key=lambda name: (ORDER.index(outcomes[name].decodes), name))
    head = "| architecture | decodes with | its head is read by | why not more |\n|---|---|---|---|\n"
    table = head + "".join(line(name, outcomes[name]) + "\n" for name in names)
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table + "\n" + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write_page()
