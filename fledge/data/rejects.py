"""Rows that cannot be used: counted by reason, written to a file, and fatal above a stated share.

Knows rows only by the place they came from. A bad row never disappears in silence: it is in the counts, in
`rejects.jsonl` when a path is given, and it stops the run when too many of its kind turn up.
"""

import json
from collections import Counter
from pathlib import Path
from typing import IO

from fledge.errors import UserError
from fledge.redaction import redact

MAX_REJECT_SHARE = 0.05


class Reject(Exception):
    """One row cannot be used: `reason` is the kind (few, counted), `detail` what was found in this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return Reject, (self.reason, self.detail)  # survives the way back from a worker process


class Rejects:
    """Counts of rejected rows by reason; `seen` is the number of rows read so far, good ones included."""

    def __init__(self, path: Path | None = None, max_share: float = MAX_REJECT_SHARE) -> None:
        self.path, self.max_share = path, max_share
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # reason -> the first row of that kind, as `file:line: detail`
        self._file: IO[str] | None = None

    @property
    def num_rejected(self) -> int:
        return self.counts.total()

    def add(self, id: str, reason: str, detail: str, where: str | None = None) -> None:
        """Count one rejected row and write it to the rejects file."""
        detail = redact(detail)
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{where or id}: {detail}")
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "w", encoding="utf-8", errors="backslashreplace")
        line = {"id": id, "where": where, "reason": reason, "detail": detail}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def check(self, total: int | None = None, max_share: float | None = None) -> None:
        """Stop the run when more than `max_share` of `total` rows (default: those seen) were rejected."""
        self.flush()
        total = self.seen if total is None else total
        max_share = self.max_share if max_share is None else max_share
        if not total or self.num_rejected <= max_share * total:
            return
        kinds = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        listed = f" All are listed in {self.path}." if self.path else ""
        raise UserError(
            f"{next(iter(self.first.values())).rstrip('.')}. In all {self.num_rejected} of {total} rows "
            f"({self.num_rejected / total:.1%}) are rejected ({kinds}), more than the {max_share:.0%} allowed. "
            f"Fix or remove these rows, or raise --max-reject-share.{listed}"
        )

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> dict[str, object]:
        """JSON-ready counts and first examples."""
        return {"seen": self.seen, "counts": dict(self.counts.most_common()), "first": dict(self.first)}
