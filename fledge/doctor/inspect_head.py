"""`fledge inspect HEAD`: files first, then tokenizer and data, then trial decoding, then the repair."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fledge import provenance
from fledge.bench.prompts import load_questions
from fledge.console import say, show_table, warn
from fledge.data.tokenize import ChatTemplate, load_tokenizer
from fledge.doctor.check import Examination, examine
from fledge.doctor.findings import Finding
from fledge.doctor.inspect_block import block_readings, inspect_block, layers_of
from fledge.doctor.readings import CHAIN, Diagnosis, Score, diagnose, layers_to_tap
from fledge.doctor.repair import repaired
from fledge.drafters.dspark.foreign import block_origin_of, read_any_block
from fledge.drafters.eagle3.config import to_json
from fledge.drafters.eagle3.foreign import read_config
from fledge.drafters.layer_config import HINT, JSON
from fledge.errors import UserError
from fledge.export.convert import HEAD_FILES, write_head
from fledge.export.engines import ENGINES, file_shapes, problems
from fledge.export.layouts import LAYOUTS
from fledge.outputs import Output, check, document_has, write_figures, written
from fledge.parsing import read_json

if TYPE_CHECKING:
    from fledge.target.model import Target

MEASURED_TOKENS = 64  # longest answer to a prompt of the trial
USELESS_TAU = 1.05  # a head below this proposes nothing that its target would say
REPAIRED = Output(
    "inspect", (*HEAD_FILES, "repair.json"), lambda folder: document_has(folder / "repair.json", "changes")
)


class InspectHeadArgs(Protocol):
    """What this command needs of `fledge inspect`'s flags."""

    path: str
    target: str | None
    fix: Path | None
    overwrite: bool
    measure: bool
    measure_prompts: int
    data: str | None
    chat_template_type: str | None
    json: Path | None


def inspect_head(args: InspectHeadArgs) -> None:
    """Show a head and everything that does not fit its target; errors end with status 1 unless --fix mended them."""
    folder = Path(args.path).expanduser()
    if args.fix is not None:
        if args.fix.resolve() == folder.resolve():
            raise UserError(f"--fix {args.fix} is the head itself. Name another folder; the original is kept.")
        check(args.fix, REPAIRED, overwrite=args.overwrite)
    text_config: Any = _text_config(args)
    if block_origin_of(read_json(folder / "config.json", JSON, hint=HINT)) is not None:
        _inspect_block(folder, args, text_config)
        return
    seen = examine(folder, text_config)
    _show(seen)
    _show_engines(seen, text_config)
    if args.target is None:
        say("give --target to compare it with the model it drafts for, and to try it")
        _conclude(args, seen.findings, None)
        return
    found = [*seen.findings, *_tokenizer_findings(seen, args), *_coverage(seen, args)]
    diagnosis = (
        None
        if any(f.topic == "target" and f.severity == "error" for f in found)
        else _try(seen, args, text_config.num_hidden_layers)
    )
    if diagnosis is not None:
        _show_diagnosis(diagnosis)
        settled = diagnosis.settled() | ({"vocab"} if seen.vocabularies else set())
        found = [f for f in found if f.topic not in settled or f.topic == "vocab"] + measured_findings(diagnosis)
    if args.fix is not None:
        _fix(args, seen, text_config, diagnosis)
    _conclude(args, found, diagnosis)


def _inspect_block(folder: Path, args: InspectHeadArgs, text_config: Any) -> None:
    """The same of a block draft."""
    target, prompts = None, []
    if args.target is not None and args.measure:
        from fledge.target.model import Target

        taps = layers_of(list(block_readings(read_any_block(folder).config, text_config.num_hidden_layers)))
        target = Target.from_pretrained(args.target, tap_layers=taps)
        prompts = _prompts(target, args)
    inspect_block(
        folder, target, prompts, MEASURED_TOKENS, fix=args.fix, repaired=REPAIRED, overwrite=args.overwrite
    )  # fmt: skip


def _prompts(target: "Target", args: InspectHeadArgs) -> list[list[int]]:
    """The first questions of the quick set in the target's template."""
    template = ChatTemplate(
        target.tokenizer, args.chat_template_type, eos_token_ids=target.eos_token_ids, vision=target.vision
    )
    questions = load_questions("quick", end=args.measure_prompts)
    return [template.prompt_ids([{"role": "user", "content": question.turns[0]}]) for question in questions]


def measured_findings(diagnosis: Diagnosis) -> list[Finding]:
    """Where another reading of the files accepts more than the stated one, and heads that accept nothing."""
    stated, best = diagnosis.stated, diagnosis.best
    if best.tau < USELESS_TAU:  # the best explanation of noise is none
        return [Finding("error", "target", f"tau is {best.tau:.2f} under every reading of the files",
                        "it drafts nothing: another target's head, or its vocabulary, or untrained")]  # fmt: skip
    found = []
    changes = {
        "taps": ("tap_layers",), "norms": ("norm_output", "norm_before_residual"), "rope": ("rope_parameters",),
    }  # fmt: skip
    (gain, error), (drafts, drafts_error) = best.gain_over(stated), best.drafts_over(stated)
    costs = drafts > 2 * drafts_error
    for topic, names in changes.items():
        for name in names:
            before, after = getattr(stated.reading.config, name), getattr(best.reading.config, name)
            if before != after:
                found.append(Finding(
                    "error" if costs else "warning", topic,  # type: ignore[arg-type]
                    f"{name} is {before}; measured, the head knows {after} ({gain:+.3f} +- {error:.3f} nats per token)",
                    f"tau {stated.tau:.2f} instead of {best.tau:.2f}" + ("" if costs else ": none on texts this short"),
                    str(after)))  # fmt: skip
    return found


def _try(seen: Examination, args: InspectHeadArgs, num_layers: int) -> Diagnosis | None:
    """Load the target and try every reading; a target without weights here is not measured, and that is said."""
    if not args.measure:
        say("not measured (--no-measure): a wrong rope base or tap convention may be hidden in files that agree")
        return None
    from fledge.target.model import Target

    assert args.target is not None
    config = seen.head.config
    try:
        target = Target.from_pretrained(args.target, tap_layers=layers_to_tap(config, num_layers))
    except UserError as error:
        warn(f"not measured, since the target cannot be loaded here: {error}")
        return None
    return diagnose(
        target, seen.head, _prompts(target, args), max_new_tokens=MEASURED_TOKENS, vocabularies=seen.vocabularies
    )  # fmt: skip


def _fix(args: InspectHeadArgs, seen: Examination, text_config: Any, diagnosis: Diagnosis | None) -> None:
    assert args.fix is not None
    if diagnosis is None or diagnosis.best.tau < USELESS_TAU:
        head, changes = repaired(seen, text_config, None, None)
    else:
        best = diagnosis.best.reading
        head, changes = repaired(seen, text_config, best.config, best.d2t)
    with written(args.fix, REPAIRED, overwrite=args.overwrite) as building:
        write_head(head, building, LAYOUTS["eagle"], args.target or "")
        provenance.write(building / "repair.json", source=str(seen.folder), target=args.target, changes=changes)
    say(f"repaired copy: {args.fix}")
    for change in changes or ["nothing had to be changed"]:
        say(f"  {change}")


def _conclude(args: InspectHeadArgs, found: list[Finding], diagnosis: Diagnosis | None) -> None:
    """The findings as a table (and JSON), and the exit status."""
    if args.json is not None:
        document = {"findings": [dataclasses.asdict(f) for f in found], "measured": diagnosis and _figures(diagnosis)}
        write_figures(args.json, document, overwrite=args.overwrite)
    if not found:
        say(f"fits {args.target}" if args.target else "nothing wrong in the files by themselves")
        return
    show_table("findings", ["severity", "what", "cost", "repair"],
               [[f.severity, f.what, f.cost, f.repair or "-"] for f in found])  # fmt: skip
    errors = [f for f in found if f.severity == "error"]
    if errors and args.fix is None:
        mend = " `--fix OUT` writes a repaired copy." if any(f.repair for f in errors) else ""
        fits = f"fit {args.target}" if args.target else "agree with itself"
        raise UserError(f"{args.path}: does not {fits} ({errors[0].what}). The table says what each costs.{mend}")


def _show(seen: Examination) -> None:
    head = seen.head
    fields = [[key, value] for key, value in to_json(head.config).items() if value is not None]
    show_table(str(seen.folder), ["field", "value"], [["origin", seen.origin], *fields])
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in head.tensors.values() if t.is_floating_point()})
    size = sum(tensor.numel() for tensor in head.tensors.values()) / 1e6
    say(f"{size:.1f} M values, {', '.join(dtypes)}; complete and finite")


def _show_engines(seen: Examination, text_config: Any | None) -> None:
    """Which engines would draft with these very files. A head for one is not for the other: the tap ids differ."""
    document, shapes = read_config(seen.folder), file_shapes(seen.folder)
    for engine in ENGINES.values():
        found = problems(engine, document, shapes, text_config)
        needed = "".join(f"; start it with {option}" for option in LAYOUTS[engine.name].options(seen.head.config))
        verdict = f"reads these files{needed}"
        if found:
            own = f"`fledge export {seen.folder} --to {engine.name} ...` writes what it reads"
            verdict = f"{own}; as these files are, it would not draft: {'; '.join(found)}"
        say(f"{engine.title} {engine.version}: {verdict}")


def _show_diagnosis(diagnosis: Diagnosis) -> None:
    stated = diagnosis.stated
    show_table(
        f"tried on {diagnosis.positions} positions of the target's greedy answers, chains of {CHAIN}, in "
        f"{diagnosis.seconds:.0f} s",
        ["reading", "topic", "tau", "drafts kept, difference", "log-probability, difference"],
        [
            ["as the files say", "-", f"{stated.tau:.3f}", "-", "-"],
            *(_row(score, stated) for score in diagnosis.scores),
        ],
    )
    if diagnosis.best is stated:
        say("no other reading of the files explains the head better")


def _row(score: Score, stated: Score) -> list[str]:
    pairs = [f"{value:+.3f} +- {error:.3f}" for value, error in (score.drafts_over(stated), score.gain_over(stated))]
    return [score.reading.label, score.reading.topic, f"{score.tau:.3f}", *pairs]


def _figures(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "positions": diagnosis.positions, "seconds": diagnosis.seconds, "tau_stated": diagnosis.stated.tau,
        "tau_best": diagnosis.best.tau, "best": to_json(diagnosis.best.reading.config),
        "readings": [
            {"topic": s.reading.topic, "reading": s.reading.label, "tau": s.tau,
             "log_prob_gain": s.gain_over(diagnosis.stated), "drafts_gain": s.drafts_over(diagnosis.stated)}
            for s in diagnosis.scores
        ],
    }  # fmt: skip


def _text_config(args: InspectHeadArgs) -> Any | None:
    if args.target is None:
        return None
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(args.target).get_text_config()


def _tokenizer_findings(seen: Examination, args: InspectHeadArgs) -> list[Finding]:
    """The vocabulary against the tokenizer, where the target has one here."""
    assert args.target is not None
    try:
        tokens = len(load_tokenizer(args.target))
    except (UserError, OSError) as error:
        say(f"vocabulary not compared with a tokenizer: {error}")
        return []
    config = seen.head.config
    if tokens > config.vocab_size:
        what = f"the tokenizer has {tokens} tokens, the head's vocabulary {config.vocab_size}"
        return [Finding("error", "target", what, "it is the head of another tokenizer")]
    beyond = int((seen.head.target_ids >= tokens).sum())
    if beyond and not config.full_vocab:
        return [Finding("warning", "vocab", f"{beyond} draft tokens lie beyond the tokenizer's {tokens}",
                        "rows of lm_head that never help")]  # fmt: skip
    return []


def _coverage(seen: Examination, args: InspectHeadArgs) -> list[Finding]:
    """The share of a data set's supervised tokens the head can propose at all."""
    if args.data is None:
        return []
    from fledge.data.dataset import TokenizedData

    assert args.target is not None
    template = ChatTemplate.from_pretrained(args.target, args.chat_template_type)
    data = TokenizedData.from_path(args.data, template)
    counts = data.counts
    ids = seen.head.target_ids
    inside = int(counts[ids[ids < len(counts)]].sum())
    share = inside / max(int(counts.sum()), 1)
    say(f"draft vocabulary: {share:.2%} of {int(counts.sum())} supervised tokens of {args.data}")
    if share >= 0.95:
        return []
    return [Finding("warning", "vocab", f"only {share:.1%} of the supervised tokens of {args.data} are draft tokens",
                    "a ceiling on acceptance; train with a larger or newer draft vocabulary")]  # fmt: skip
