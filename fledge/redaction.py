"""Secrets are taken out of everything that is written or shown.

Applied where documents, rejects and terminal lines are made (`provenance`, `console`, `Rejects`, `Journal`), so that a
new writer need not think of it. Known are the values that `keep_secret` was told of and the environment's (HF_TOKEN,
OPENAI_API_KEY, ...), and the places where secrets stand: `user:password@` in a URL, keys in its query, authorization
headers, flags such as `--hub_token`, and the key formats of common services.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, quote_plus

MASK = "***"
SHORTEST = 6  # characters; shorter values are also ordinary words, and would be taken out of those

_NAMES = r"api[-_]?key|(?:hub|hf|access|auth|api|bearer|refresh|wandb|github)[-_]?token|passw(?:or)?d|client[-_]?secret"
_VARIABLE = re.compile(r"(?:TOKEN|API_?KEY|SECRET|SECRET_?(?:ACCESS_?)?KEY|PASSW(?:OR)?D)$", re.I)
_FIELD = re.compile(rf"(?:^|.*[-_.])(?:{_NAMES}|secret)$", re.I)
_PLACES = (
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#\"'<>]+@", re.I), rf"\1{MASK}@"),
    (
        re.compile(rf"([?&;](?:{_NAMES}|token|key|secret|sig|signature|x-amz-\w+)=)[^&#\s\"'<>]+", re.I),
        rf"\1{MASK}",
    ),
    (re.compile(r"(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}", re.I), rf"\1{MASK}"),
    (re.compile(rf"(--[\w.-]*(?:{_NAMES}|secret)(?:=|\s+))(?!--)(?:'[^']*'|\"[^\"]*\"|\S+)", re.I), rf"\1{MASK}"),
    (re.compile(rf"((?:{_NAMES}|secret)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&}}]{{6,}}", re.I), rf"\1{MASK}"),
    (
        re.compile(
            r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|"
            r"xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
        ),
        MASK,
    ),
)
_told: set[str] = set()


def keep_secret(value: str | None) -> None:
    """Never write or show this value, wherever it turns up (a server may echo it)."""
    if value and len(value) >= SHORTEST:
        _told.update({value, quote(value, safe=""), quote_plus(value)})


def redact(text: str) -> str:
    """The text with `***` in the place of every secret, and of what is not UTF-8 (in a path) its code."""
    of_environment = {
        value for name, value in os.environ.items() if len(value) >= SHORTEST and _VARIABLE.search(name)
    }  # fmt: skip
    for secret in sorted(_told | of_environment, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for place, replacement in _PLACES:
        text = place.sub(replacement, text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def redacted(value: Any) -> Any:
    """A document without its secrets; a field named like one (`hub_token`) loses its text, whatever it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: _field(name, inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return value


def _field(name: object, value: Any) -> Any:
    is_secret = isinstance(value, str) and value and isinstance(name, str) and _FIELD.match(name)
    return MASK if is_secret else redacted(value)
