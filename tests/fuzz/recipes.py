"""Recipes (`--config`) and draft configs: small files that people write by hand."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from tiny import tiny_target

from fledge.drafters.eagle3.config import derive, read_overrides
from fuzz.documents import NO_FLAG, NO_INT, NO_SIZE, broken_fields, broken_text, encoded
from fuzz.flags import value_of
from fuzz.harness import Case, WrongValue
from fuzz.stages import BASE, parse_words, run_stopped

AREA = "recipes and draft configs"

# A good recipe of a command, and values that its keys cannot have.
RECIPES: dict[str, dict[str, Any]] = {
    "regenerate": {"max_samples": 5, "top_p": 0.9, "deduplicate": True, "thinking": "off", "seed": 3},
    "train": {"ttt_steps": 3, "learning_rate": 0.001, "loss_average": "token", "model_max_length": 128, "seed": 3},
    "bench": {"repeats": 2, "temperature": 0.0, "dtype": "float32", "samples": 1, "no_metrics": True},
    "extract": {"shard_mb": 8.0, "model_max_length": 128, "tap_storage": "fp8", "num_proc": 1},
}
NO_VALUE: tuple[Any, ...] = ({"a": 1}, [{"a": 1}], [[1]], "nonsense", "a\0b", "x" * 100_000)
BAD_YAML: dict[str, bytes] = {
    "a list": b"- seed: 1\n",
    "a word": b"seed\n",
    "a number": b"5\n",
    "a bracket open": b"seed: [1\n",
    "a tab": b"seed:\t1\n\tmax: 2\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a key twice": b"seed: 1\nseed: 2\n",
    "Python objects": b"seed: !!python/object/apply:os.system [echo]\n",
    "an unknown tag": b"seed: !tag 1\n",
    "an unknown anchor": b"seed: *a\n",
    "aliases that multiply": b"".join(
        [b"a0: &a0 [x]\n", *(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12))]),
    "an endless alias": b"seed: &a [*a]\n",
    "a month 13": b"seed: 2026-13-01\n",
    "not UTF-8": b"seed: 1\nnote: \xff\xfe\n",
    "NUL bytes": b"\0" * 20,
    "nested without end": b"seed: " + b"[" * 5000,
    "a key that is a list": b"[seed]: 1\n",
    "a key that is a number": b"5: 1\n",
    "a key that is null": b"~: 1\n",
    "a misspelt key": b"seeed: 1\n",
    "a key with dashes at the front": b"--seed: 1\n",
    "an empty key": b"'': 1\n",
    "the recipe itself": b"config: other.yaml\n",
}  # fmt: skip

OVERRIDES = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
             "draft_vocab_size": 48, "norm_output": False, "fc_norm": False}  # fmt: skip
WRONG_OVERRIDES: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("intermediate_size",): NO_SIZE,
    ("num_attention_heads",): (*NO_SIZE, 3),
    ("num_key_value_heads",): (*NO_SIZE, 3, 8),
    ("head_dim",): (*NO_SIZE, 7),
    ("draft_vocab_size",): (*NO_INT, -1, 129, 10**9),
    ("norm_output",): NO_FLAG,
    ("fc_norm",): NO_FLAG,
}


def recipe(command: str, rule: str | None, content: bytes, expected: dict[str, Any]) -> Case:
    def act(folder: Path) -> None:
        (folder / "recipe.yaml").write_bytes(content)
        words = [*BASE[command](folder, leave_out=""), "--config", str(folder / "recipe.yaml")]
        if rule is None:
            args = parse_words(command, words)
            for name, value in expected.items():
                if (found := value_of(args, name)) != value:
                    raise WrongValue(f"{name} is {found!r}, not {value!r}")
        run_stopped(command, words)

    return Case(AREA, rule and f"{command} recipe: {rule}", act, shown=repr(content[:200]))


def overrides(rule: str | None, content: bytes, expected: dict[str, Any]) -> Case:
    def act(folder: Path) -> None:
        path = folder / "draft.json"
        path.write_bytes(content)
        target = tiny_target("llama")
        config = derive(target.text_config, vocab_size=target.vocab_size, tap_layers=target.tap_layers,
                        overrides=read_overrides(path))  # fmt: skip
        found = {name: dataclasses.asdict(config)[name] for name in expected}
        if rule is None and found != expected:
            raise WrongValue(f"{found}, not {expected}")

    return Case(AREA, rule and f"draft config: {rule}", act, shown=repr(content[:200]))


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "unknown key": lambda document: {**document, "no_such_size": 5},
    "misspelt key": lambda document: {**document, "head_dimm": 16},
    "empty key": lambda document: {**document, "": 5},
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A recipe or a draft config, right or wrong in one place."""
    if draw(st.booleans()):
        return draw(recipes())
    kind = draw(st.sampled_from(["valid", "field", "field", "text", "key"]))
    if kind == "valid":
        names = draw(st.sets(st.sampled_from(["intermediate_size", "draft_vocab_size", "norm_output"])))
        document = {"model_type": "llama", **{name: OVERRIDES[name] for name in sorted(names)}}
        return overrides(None, encoded(document), {name: OVERRIDES[name] for name in names})
    if kind == "field":
        rule, document = draw(broken_fields(OVERRIDES, WRONG_OVERRIDES))
        return overrides(rule, encoded(document), {})
    if kind == "text":
        rule, content = draw(broken_text(encoded({"model_type": "llama", "architectures": ["x"], **OVERRIDES})))
        return overrides(rule, content, {})
    rule = draw(st.sampled_from(list(CHANGES)))
    return overrides(rule, json.dumps(CHANGES[rule](OVERRIDES)).encode(), {})


@st.composite
def recipes(draw: st.DrawFn) -> Case:
    command = draw(st.sampled_from(list(RECIPES)))
    good = RECIPES[command]
    kind = draw(st.sampled_from(["valid", "value", "text"]))
    if kind == "valid":
        chosen = {name: good[name] for name in sorted(draw(st.sets(st.sampled_from(list(good)))))}
        text = yaml.safe_dump({name.replace("_", draw(st.sampled_from("_-"))): value for name, value in chosen.items()})
        return recipe(command, None, (text if chosen else "").encode(), chosen)
    if kind == "text":
        name = draw(st.sampled_from(list(BAD_YAML)))
        return recipe(command, name, BAD_YAML[name], {})
    name = draw(st.sampled_from([name for name in good if isinstance(good[name], (int, float)) or name == "dtype"]))
    value = draw(st.sampled_from(NO_VALUE))
    return recipe(command, f"{name} is {str(value)[:12]}", yaml.safe_dump({**good, name: value}).encode(), {})
