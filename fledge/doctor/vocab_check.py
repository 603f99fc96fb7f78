"""d2t against t2d: which of the two is broken, and what the other makes of it.

    d2t (D,) offsets: target_id = draft_id + d2t[draft_id]          all that engines read: a wrong one drafts nothing
    t2d (V,) membership: nonzero(t2d) == d2t + arange(D)            training reads it; engines pass over it

Each is a vocabulary by itself, so one that is broken can be rebuilt from the other. Where both are sound and disagree,
the files cannot say which is the head's own; both are handed on, to be tried.
"""

import torch
from torch import Tensor

from fledge.data.vocab import check_vocab
from fledge.doctor.findings import Finding
from fledge.drafters.eagle3.foreign import d2t_from, t2d_from
from fledge.drafters.eagle3.head import Head
from fledge.errors import UserError


def examine_vocab(head: Head, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Finding], Head]:
    """The candidate vocabularies by origin (as d2t), findings, and the head made consistent with the likeliest."""
    config = head.config
    if config.full_vocab or "d2t" not in head.tensors:
        return {}, [], head
    d2t, t2d, found = raw.get("d2t"), raw.get("t2d"), []
    if d2t is not None and t2d is not None and len(d2t) == config.vocab_size and len(t2d) == config.draft_vocab_size:
        d2t, t2d = t2d, d2t
        found.append(_error("d2t and t2d are exchanged: each lies under the other's name", "exchanged back"))
    candidates: dict[str, Tensor] = {}
    for name, tensor, read in (("t2d", t2d, _from_t2d), ("d2t", d2t, _from_d2t)):
        if tensor is not None:
            offsets, findings = read(tensor, config.draft_vocab_size, config.vocab_size, candidates.get("t2d"))
            found += findings
            if offsets is not None:
                candidates[name] = offsets
    if not candidates:
        raise UserError("neither d2t nor t2d names the head's draft vocabulary; it cannot be rebuilt from this file.")
    if len(candidates) == 2 and (differ := int((candidates["d2t"] != candidates["t2d"]).sum())):
        found.append(_error(f"d2t and t2d name different tokens ({differ} of {config.draft_vocab_size} rows): one is "
                            "of another head", "the one that measures better"))  # fmt: skip
    chosen = candidates.get("d2t", candidates.get("t2d"))
    assert chosen is not None
    mended = Head(config, head.tensors | {"d2t": chosen, "t2d": t2d_from(chosen, config.vocab_size)})
    check_vocab(mended.tensors["d2t"], mended.tensors["t2d"])
    return (candidates if found else {}), found, mended


def _from_t2d(t2d: Tensor, size: int, vocab_size: int, _: Tensor | None) -> tuple[Tensor | None, list[Finding]]:
    inside = int(t2d.bool().sum())
    if len(t2d) == vocab_size and inside == size:
        return d2t_from(t2d.bool()), []
    return None, [Finding("warning", "vocab", f"t2d holds {inside} tokens, {size} are needed",
                          "none in engines; training from it fails", "rebuilt from d2t")]  # fmt: skip


def _from_d2t(d2t: Tensor, size: int, vocab_size: int, other: Tensor | None) -> tuple[Tensor | None, list[Finding]]:
    """Offsets, or target ids where offsets are meant: certain when t2d names the same, or as offsets they are none."""
    values, places = d2t.long(), torch.arange(size)
    if len(values) == size and _is_vocabulary(values, vocab_size):
        same = other is not None and torch.equal(values, other + places)
        if same or (other is None and not _is_vocabulary(values + places, vocab_size)):
            return values - places, [_error("d2t holds target ids where offsets are meant", "offsets")]
    if len(values) == size and _is_vocabulary(values + places, vocab_size):
        return values, []
    repair = "" if other is None else "rebuilt from t2d"
    return None, [_error(f"d2t ({len(values)} entries) does not name {size} ascending ids of the vocabulary", repair)]


def _is_vocabulary(ids: Tensor, vocab_size: int) -> bool:
    """Inside the vocabulary and ascending, so no id twice."""
    return bool(((ids >= 0) & (ids < vocab_size)).all()) and bool((ids.diff() > 0).all())


def _error(what: str, repair: str) -> Finding:
    return Finding("error", "vocab", what, "engines translate draft tokens into wrong ones: acceptance 0", repair)
