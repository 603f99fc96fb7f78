"""Write configs/draft/*.json and configs/*.yaml from the table in targets.py: `python configs/make.py`.

A draft config is what `fledge train` derives from the target's own config, through the same function. A recipe is a
file for `fledge train --config`; the figures in its header are those of `fledge plan`. Nothing is written by hand.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from targets import TARGETS, Row

from fledge.commands.plan import HARDWARE, ROOM, PlanArgs, estimate
from fledge.drafters.eagle3.config import DraftConfig, derive, to_json
from fledge.target.record import default_tap_layers

HERE = Path(__file__).parent
TTT_STEPS = 7
DRAFT_VOCAB = 32_000
EPOCHS = 10
TOKENS = 100_000_000
GIB = 2**30


def full_config(row: Row) -> Any:
    """The target's config, as transformers builds it from the row's fields."""
    config_class = getattr(transformers, row.config_class)
    vision = "text_config" in config_class.sub_configs
    config = config_class(text_config=row.fields) if vision else config_class(**row.fields)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = row.fields["tie_word_embeddings"]
    config.dtype = "bfloat16"
    return config


def draft_config(row: Row) -> DraftConfig:
    """The draft config `fledge train` derives for this target."""
    config = full_config(row).get_text_config()
    return derive(
        config, vocab_size=config.vocab_size, tap_layers=default_tap_layers(config.num_hidden_layers),
        draft_vocab_size=DRAFT_VOCAB,
    )  # fmt: skip


def offline(row: Row) -> bool:
    """Targets whose bf16 weights leave no room for training on one H200 are trained from stored states."""
    return 2e9 * row.params_b > 0.8 * HARDWARE["h200"][0] * GIB


def header(name: str, row: Row) -> list[str]:
    """Hardware, memory, hours, expected tau."""
    lines = [f"{row.hub}: an EAGLE-3 head. Made by configs/make.py; change the table there.", ""]
    if offline(row):
        lines += [f"  fledge extract --target {row.hub} --device-map auto --data DATA \\",
                  f"      --output-dir outputs/{name}-states",
                  f"  fledge train --config configs/{name}.yaml"]  # fmt: skip
    else:
        lines += [f"  fledge train --config configs/{name}.yaml --data DATA"]
    lines += ["", "DATA: answers of this target itself (`fledge regenerate`)."]
    if row.vision:
        lines += ["A vision-language target: conversations may hold images; see docs/add-a-target.md."]
    lines += [""]
    if row.missing:
        lines += [f"No draft config and no plan: {', '.join(row.missing)} of this target could not be checked in a",
                  "public source. `fledge train` and `fledge plan` read them from the checkpoint."]  # fmt: skip
    else:
        lines += costs(row)
    figure, _, origin = (row.tau or "unknown: no figure found, none measured").partition(" in docs")
    lines += ["", f"Expected tau: {figure}" + (f"\nin docs{origin}." if origin else ".")]
    if row.tau and "AngelSlim" in row.tau:
        lines += ["A chain of a length that page does not state: not comparable with a tree's tau."]
    return [*lines, "", *as_block_draft(name, row)]


def as_block_draft(name: str, row: Row) -> list[str]:
    """The flags that make a DSpark draft of the same recipe, and what changes by them."""
    lines = ["As a block draft (docs/block-drafters.md), every token of the vocabulary proposed:", "",
             f"  fledge train --config configs/{name}.yaml --draft-type dspark --draft-vocab-size 0 \\",
             f"      --output-dir outputs/{name}-dspark{'' if offline(row) else ' --data DATA'}"]  # fmt: skip
    if row.missing:
        return lines
    document = planned(row, "dspark", 0)
    run, memory = document["run"], document["memory_gib"]
    online = "" if offline(row) else f"{memory['online']['peak']:.1f} GiB online, "
    hours = "" if offline(row) else f"{run['hours_online']:.1f} online, "
    return [
        *lines, "",
        f"  memory    {online}{memory['offline']['peak']:.1f} GiB from stored states, blocks of 7, 512 of a sample",
        f"  hours     {hours}{run['hours_offline']:.1f} from stored states",
        f"  draft     {run['draft_parameters'] / 1e6:.0f} M trained parameters",
    ]  # fmt: skip


def planned(row: Row, draft_type: str, draft_vocab_size: int) -> dict[str, Any]:
    """What `fledge plan` says: arithmetic, not measurements."""
    with tempfile.TemporaryDirectory() as folder:
        full_config(row).save_pretrained(folder)
        return estimate(
            PlanArgs(
                target=folder, num_tokens=TOKENS, hardware="h200", num_train_epochs=EPOCHS, draft_type=draft_type,
                model_max_length=row.context, ttt_steps=TTT_STEPS, draft_vocab_size=draft_vocab_size,
            )
        )  # fmt: skip


def costs(row: Row) -> list[str]:
    """What training an EAGLE-3 head takes."""
    document = planned(row, "eagle3", DRAFT_VOCAB)
    run, memory = document["run"], document["memory_gib"]
    weights = memory["online"]["target"]
    need = f"{smallest(memory['offline']['peak'])} to train from stored states"
    if offline(row):
        need += f"; {-(-weights // (0.85 * HARDWARE['h200'][0])):.0f} x H200 to extract them (the weights alone)"
    else:
        need = f"{smallest(memory['online']['peak'])} to train online; {need}"
    online = "" if offline(row) else f"{memory['online']['peak']:.1f} GiB online (target {weights:.1f}), "
    stored = f"{memory['offline']['peak']:.1f} GiB from stored states"
    hours = "" if offline(row) else f"{run['hours_online']:.1f} online, "
    return [
        f"Computed, not measured: fledge plan --num-tokens {TOKENS} --hardware h200 --model-max-length {row.context}",
        f"  hardware  {need}",
        f"  memory    {online}{stored}, 4 samples of {row.context} tokens",
        f"  hours     {hours}{run['hours_offline']:.1f} from stored states (extraction included): {TOKENS // 10**6}M",
        f"            tokens, {EPOCHS} epochs, one H200 at an assumed 35 % of its peak (the target's forward: 45 %)",
        f"  disk      {run['store_gib']:.0f} GiB for the states, if stored",
        f"  draft     {run['draft_parameters'] / 1e6:.0f} M trained parameters",
    ]


def smallest(peak_gib: float) -> str:
    """The smallest usual GPU it fits on."""
    usual = [("24 GB", "rtx4090"), ("48 GB", "l40s"), ("80 GB", "h100"), ("141 GB (H200)", "h200")]
    fitting = (name for name, key in usual if peak_gib <= ROOM * HARDWARE[key][0])
    return f"one GPU of {next(fitting)}"


def recipe(name: str, row: Row) -> dict[str, Any]:
    """The flags."""
    source = {"states": [f"outputs/{name}-states"], "dataloader_num_workers": 2}
    if not offline(row):
        source = {"target": row.hub, "data": [f"outputs/{name}-answers"],
                  "eval_fraction": 0.02, "eval_strategy": "epoch"}  # fmt: skip
    return {
        **source, "output_dir": f"outputs/{name}-eagle3", "draft_vocab_size": DRAFT_VOCAB, "ttt_steps": TTT_STEPS,
        "model_max_length": row.context, "num_train_epochs": EPOCHS, "per_device_train_batch_size": 4,
        "save_strategy": "epoch",
    }  # fmt: skip


def recipe_text(name: str, row: Row) -> str:
    comment = "".join(f"# {line}".rstrip() + "\n" for line in "\n".join(header(name, row)).split("\n"))
    lines = [f"{key}: {json.dumps(value)}" for key, value in recipe(name, row).items()]
    return comment + "\n" + "\n".join(lines) + "\n"


def draft_text(row: Row) -> str:
    return json.dumps(to_json(draft_config(row)), indent=2) + "\n"


def files() -> dict[str, str]:
    """Every generated file, by its path below configs/."""
    made = {f"{name}.yaml": recipe_text(name, row) for name, row in TARGETS.items()}
    made |= {f"draft/{name}-eagle3.json": draft_text(row) for name, row in TARGETS.items() if not row.missing}
    return made


def main() -> None:
    for path, text in files().items():
        (HERE / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
