"""Write configs/draft/*.json and configs/*.yaml from the table in targets.py: `python configs/make.py`.

A draft config is what `fledge train` derives from the target's own config, through the same function. A recipe is a
file for `fledge train --config`; its header is computed here, and says how. Nothing in either is written by hand.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from targets import TARGETS, Row

from fledge.draft.config import DraftConfig, derive, to_json
from fledge.target.record import default_tap_layers

HERE = Path(__file__).parent
TTT_STEPS = 7
DRAFT_VOCAB = 32_000
GIB = 2**30
H200_GIB = 139
H200_FLOPS = 989e12  # dense bf16, nominal
UTILISATION = 0.4  # assumed; the hours are no more than this assumption
TOKENS = 100e6


def text_config(row: Row, **changes: Any) -> Any:
    """The target's text config, as transformers builds it from the row's fields."""
    config_class = getattr(transformers, row.config_class)
    fields = {**row.fields, **changes}
    if "text_config" in getattr(config_class, "sub_configs", {}):
        return config_class(text_config=fields).get_text_config()
    return config_class(**fields)


def draft_config(row: Row) -> DraftConfig:
    """The draft config `fledge train` derives for this target."""
    config = text_config(row)
    return derive(
        config, vocab_size=config.vocab_size, tap_layers=default_tap_layers(config.num_hidden_layers),
        draft_vocab_size=DRAFT_VOCAB,
    )  # fmt: skip


def trained_parameters(config: DraftConfig) -> int:
    """fc, one decoder layer on 2H, its norms, lm_head; the embedding is the target's."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (heads + 2 * kv) + heads * hidden
    fc = len(config.tap_layers) * hidden * hidden
    return fc + attention + 3 * hidden * config.intermediate_size + config.draft_vocab_size * hidden + 4 * hidden


def offline(row: Row) -> bool:
    """Targets whose bf16 weights leave no room for training on one H200 are trained from stored states."""
    return 2e9 * row.params_b > 0.8 * H200_GIB * GIB


def header(name: str, row: Row) -> list[str]:
    """Hardware, memory, hours, expected tau."""
    lines = [f"{row.hub}: an EAGLE-3 head. Made by configs/make.py; change the table there.", ""]
    if offline(row):
        lines += [f"  fledge extract --model-name {row.hub} --device-map auto --dataset-path DATA \\",
                  f"      --output-dir outputs/{name}-states",
                  f"  fledge train --config configs/{name}.yaml"]  # fmt: skip
    else:
        lines += [f"  fledge train --config configs/{name}.yaml --train_data_path DATA"]
    lines += ["", "DATA: answers of this target itself (`fledge regenerate`)."]
    if row.vision:
        lines += ["A vision-language target: conversations may hold images; see docs/add-a-target.md."]
    lines += [""]
    weights = 2e9 * row.params_b / GIB
    if row.missing:
        lines += [f"No draft config: {', '.join(row.missing)} of this target could not be checked in a public source;",
                  "`fledge train` reads them from the checkpoint. Memory and hours: `fledge train` prints the draft's",
                  f"size; the target's weights take {weights:.0f} GiB in bf16."]  # fmt: skip
    else:
        lines += costs(row, weights)
    figure, _, origin = (row.tau or "unknown: no figure found, none measured").partition(" in docs")
    lines += ["", f"Expected tau: {figure}" + (f"\nin docs{origin}." if origin else ".")]
    if row.tau and "AngelSlim" in row.tau:
        lines += ["A chain of a length that page does not state: not comparable with a tree's tau."]
    return lines


def costs(row: Row, weights: float) -> list[str]:
    """Computed, not measured, each with its formula (docs/eagle3.md, 9)."""
    config = draft_config(row)
    draft = trained_parameters(config)
    state = 16 * draft / GIB
    active = 1e9 * (row.active_b or row.params_b)
    target_flops, draft_flops = 2 * active, 6 * draft * TTT_STEPS
    stored = 2 * 4 * config.hidden_size * 1e6 / GIB
    lines = [
        f"Trained parameters: {draft / 1e6:.0f} M. Computed, not measured:",
        f"  memory   target {weights:.0f} GiB (2 bytes x {row.params_b:g}e9, bf16) + draft {state:.1f} GiB (16 bytes x "
        f"{draft / 1e6:.0f} M: fp32 weights,",
        "           gradients, AdamW), activations on top",
    ]
    where = "extraction, once" if offline(row) else "target, each epoch"
    lines += [
        f"  hours    per 100M tokens on one H200: {hours(target_flops):.1f} ({where}) + {hours(draft_flops):.1f} "
        f"(draft, each epoch): 2 x {active / 1e9:g}e9",
        f"           and 6 x {draft / 1e6:.0f}e6 x {TTT_STEPS} FLOP per token at {UTILISATION:.0%} of 989 TFLOP/s, an "
        "assumption",
        f"  disk     {stored:.1f} GiB per 1M tokens of stored hidden states (2 bytes x 4 x {config.hidden_size})",
    ]
    gpus = -(-weights // (0.85 * H200_GIB))
    need = f"{gpus:.0f} x H200 to extract (weights only), 1 to train" if offline(row) else smallest(weights + state)
    return [f"Hardware: {need}", *lines]


def smallest(needed_gib: float) -> str:
    """The smallest usual GPU that leaves a third of its memory to activations."""
    for name, gib in (("24 GB", 22), ("48 GB", 44), ("80 GB", 74), ("H200 (141 GB)", H200_GIB)):
        if needed_gib <= 2 / 3 * gib:
            return f"one GPU of {name} or more"
    return "one H200 (141 GB), small batches"


def hours(flops_per_token: float) -> float:
    return TOKENS * flops_per_token / (UTILISATION * H200_FLOPS) / 3600


def recipe(name: str, row: Row) -> dict[str, Any]:
    """The flags."""
    source = {"train_hidden_path": [f"outputs/{name}-states"], "dataloader_num_workers": 2}
    if not offline(row):
        source = {"target_model_name_or_path": row.hub, "train_data_path": [f"outputs/{name}-answers"],
                  "eval_fraction": 0.02, "eval_strategy": "epoch"}  # fmt: skip
    return {
        **source, "output_dir": f"outputs/{name}-eagle3", "draft_vocab_size": DRAFT_VOCAB, "ttt_steps": TTT_STEPS,
        "model_max_length": row.context, "num_train_epochs": 10, "per_device_train_batch_size": 4,
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
