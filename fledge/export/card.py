"""The model card beside every exported head: README.md with what a stranger needs to serve it and to trust it.

Facts come from the files that training left beside the head (provenance.json, trainer_state.json) and, where given,
from a benchmark's summary.json. What is not known is not written; local paths are cut to file names.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from fledge.errors import UserError
from fledge.escaping import markdown
from fledge.export.forms import form_of_config
from fledge.export.summary import read_summary
from fledge.parsing import convert, decode_text, read_bytes, read_python_json

CARD = "README.md"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PLAIN_NAME = re.compile(r"[\w./@:+][\w./@:+-]*")


class TrainedOn(msgspec.Struct):
    """What the card reads of the flags of a training run; the last two are the names of earlier versions."""

    data: list[str] | None = None
    states: list[str] | None = None
    train_data_path: list[str] | None = None
    train_hidden_path: list[str] | None = None


class TrainingRun(msgspec.Struct):
    """provenance.json that training wrote."""

    target: str | None = None
    config: TrainedOn | None = None
    steps: int | None = None
    metrics: dict[str, float] | None = None
    versions: dict[str, str] | None = None


class TrainerState(msgspec.Struct):
    """trainer_state.json, the library's."""

    log_history: list[dict[str, Any]] | None = None


def model_card(
    config: Any, source: Path, name: str, *, layout: str, target: str, licence: str | None,
    report: Path | None = None, notes: Path | None = None,
) -> str:  # fmt: skip
    """The README.md of an exported head, in a folder of this name. `source` is what training wrote, `notes` markdown
    of the author."""
    run, form = _json_or_empty(source / "provenance.json", TrainingRun), form_of_config(config)
    target = target or str(run.get("target") or "")
    sections = [
        _header(target, licence, form.tag(config)),
        f"# {form.title(config)} for {markdown(_public(target)) or 'its target'}", _introduction(config),
        _serving(name, layout, target, config),
        _training(run, config), _acceptance(run, _state(source), report), _notes(notes),
        _licence_note(licence, target),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(target: str, licence: str | None, tag: str) -> str:
    """The YAML the hub reads. base_model only where it is a hub name."""
    fields: dict[str, Any] = {"license": licence} if licence else {}
    if licence and (licence == "other" or "=" in licence):
        name, _, link = licence.partition("=")
        if not (name and link):
            raise UserError(f"--license {licence}: name it and say where its text is, as NAME=URL; the hub shows both.")
        fields = {"license": "other", "license_name": name, "license_link": link}
    if HUB_NAME.fullmatch(target):
        fields |= {"base_model": target, "base_model_relation": "adapter"}
    fields |= {"pipeline_tag": "text-generation", "library_name": "fledge"}
    fields["tags"] = [tag, "speculative-decoding", "draft-model"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _introduction(config: Any) -> str:
    network = form_of_config(config).network(config)
    return (
        f"A speculative decoding head: it proposes tokens that its target model checks, several per target forward. "
        f"Answers are the target's own, whatever the head proposes; only speed depends on it.\n\n"
        f"{network} the target's decoder layers {', '.join(map(str, config.tap_layers))}; it may propose "
        f"{config.draft_vocab_size:,} of the target's "
        f"{config.vocab_size:,} tokens. It works with this target only."
    )


def _serving(name: str, layout: str, target: str, config: Any) -> str:
    layouts = form_of_config(config).layouts
    reader = layouts[layout].reader
    other = next(one for one in layouts.values() if one.reader != reader)
    return (
        f"## Serving\n\nThese files are written for {reader} (tap ids, names):\n\n"
        f"```bash\n{_command(layouts[layout].command(config), target, name)}\n```\n\n"
        f"For {other.reader}, `fledge export` the head with `--to {other.name}` first; read as they are, tap ids or "
        f"names would be wrong and the head would draft next to nothing.\n\n"
        f"```bash\n{_command(other.command(config), target, f'{name}-{other.name}')}\n```"
    )


def _command(serve: str, target: str, head: str) -> str:
    """A command to copy into a shell; a name that means something else to a shell stays a placeholder."""
    names = {"TARGET": _public(target), "HEAD": head}
    plain = {word: name if PLAIN_NAME.fullmatch(name) else word for word, name in names.items()}
    return re.sub("TARGET|HEAD", lambda match: plain[match.group()], serve)


def _training(run: dict[str, Any], config: Any) -> str:
    settings = run.get("config") or {}
    if not settings:
        return ""
    data = [path for name in TrainedOn.__struct_fields__ for path in settings.get(name) or []]
    rows: list[tuple[str, Any]] = [
        ("target", _public(str(run.get("target") or ""))), ("data", ", ".join(_public(str(path)) for path in data)),
        ("steps", run.get("steps")), ("epochs", _figure((run.get("metrics") or {}).get("epoch"))),
        ("sequences per step", settings.get("per_device_train_batch_size")),
        ("longest sample", settings.get("model_max_length")), ("learning rate", settings.get("learning_rate")),
        ("unrolled draft steps", settings.get("ttt_steps")), ("position weights", settings.get("position_weights")),
        ("rope base", (config.rope_parameters or {}).get("rope_theta")),
        ("trained with", f"fledge {(run.get('versions') or {}).get('fledge', '')}".strip()),
    ]  # fmt: skip
    return "## Training\n\n" + _table(("", ""), [row for row in rows if row[1] not in (None, "")])


def _acceptance(run: dict[str, Any], state: dict[str, Any], report: Path | None) -> str:
    """Measured by decoding where a report is given, else predicted on held-out data, and said so."""
    if report is not None:
        return _measured(report)
    metrics = {**state, **(run.get("metrics") or {})}
    prefix = "eval_" if "eval_tau" in metrics else ""
    if f"{prefix}tau" not in metrics:
        return ""
    steps = [key for key in metrics if re.fullmatch(rf"{prefix}acc_\d+", key)]
    rows = [("accept length (tau)", _figure(metrics[f"{prefix}tau"]))]
    rows += [(f"top-1 at draft step {key.rpartition('_')[2]}", f"{metrics[key]:.1%}") for key in sorted(steps)]
    if f"{prefix}coverage" in metrics:
        rows.append(("tokens inside the draft vocabulary", f"{metrics[f'{prefix}coverage']:.2%}"))
    where = "held-out data" if prefix else "the last logged training batches"
    return (
        f"## Acceptance\n\nPredicted on {where} for a greedy chain (not a benchmark; tokens per target forward, bonus "
        f"included):\n\n{_table(('', ''), rows)}"
    )


def _measured(report: Path) -> str:
    summary = read_summary(report)
    settings = summary.get("settings") or {}
    tree = settings.get("tree") or {}
    shape = f"tree of {tree['total_token']} nodes, depth {tree['depth']}, top-k {tree['top_k']}" if tree else (
        f"chain of {settings.get('num_speculative_tokens')}"
    )  # fmt: skip
    rows = []
    for name, result in summary["sets"].items():
        speed = result.get("speedup") or {}
        known = speed.get("low") is not None and speed.get("high") is not None
        interval = f"{speed['value']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if known else "-"
        rows.append((name, result.get("questions"), _figure((result.get("acceptance") or {}).get("tau")), interval))
    hardware = settings.get("hardware") or {}
    machine = ", ".join(hardware.get("gpus") or []) or hardware.get("cpu") or "unknown hardware"
    return (
        f"## Acceptance\n\nMeasured by `fledge bench`: temperature {markdown(settings.get('temperature'))}, "
        f"{markdown(shape)}, on {markdown(machine)}.\n\n"
        f"{_table(('set', 'questions', 'tau', 'speed-up (95 % interval)'), rows)}"
    )


def _notes(notes: Path | None) -> str:
    if notes is None:
        return ""
    if not notes.is_file():
        raise UserError(f"--notes {notes}: no such file.")
    return decode_text(read_bytes(notes), f"--notes {notes}").strip()


def _licence_note(licence: str | None, target: str) -> str:
    name = (licence or "").partition("=")[0]
    own = f"The head is under {markdown(name)}. " if name else "No licence is stated for the head. "
    return f"## Licence\n\n{own}The target and the training data have licences of their own."


def _state(source: Path) -> dict[str, Any]:
    """The last logged figures of a run that was stopped before its provenance was written."""
    merged: dict[str, Any] = {}
    for entry in _json_or_empty(source / "trainer_state.json", TrainerState).get("log_history") or []:
        merged |= entry
    return merged


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *(map(markdown, row) for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _public(name: str) -> str:
    """A hub name as it is; of a local path the last part only."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name


def _figure(value: Any) -> str | None:
    return f"{value:.2f}" if isinstance(value, (int, float)) else None


def _json_or_empty(path: Path, kind: type) -> dict[str, Any]:
    """The document as it stands, its fields checked; nothing where there is no file."""
    if not path.is_file():
        return {}
    document = read_python_json(path, dict[str, Any], hint="Repair or remove it.")
    convert(document, kind, str(path), hint="Repair or remove it.")
    return document
