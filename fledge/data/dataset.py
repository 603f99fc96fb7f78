"""A whole data path, tokenised once and kept on disk.

Tokens and masks are two flat memory-mapped files with offsets, so a million rows cost disk, not memory. The folder is
keyed by everything that could change its content (data, tokenizer, template, length): same key, same samples, no second
run.
Splitting goes by a hash of the conversation's id, so a conversation stays on its side whatever else is in the data.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from fledge.console import progress, say, warn
from fledge.data.conversations import HOPELESS_ROWS, Conversation, DataFormat, RepeatedIds, read_conversations
from fledge.data.encoding import encode_batches
from fledge.data.image_table import ImageTable
from fledge.data.images import ImageRef, picture_state
from fledge.data.rejects import MAX_REJECT_SHARE, Reject, Rejects
from fledge.data.rows import content_hash, count_rows, is_local
from fledge.data.samples import MIN_SUPERVISED, TURN_MARK, Drop, Sample, conversation_id
from fledge.data.sealed import verify_sealed
from fledge.data.tokenize import ChatTemplate
from fledge.data.vocab import control_ids, count_tokens
from fledge.errors import UserError
from fledge.outputs import cache_folder, write_json
from fledge.parsing import read_json

LAYOUT = 2  # raise it when samples would come out differently
ARRAYS = ("offsets", "truncated", "cut")
LARGEST_IDS = 16 << 30  # bytes; ours, and as long as the data has rows
AGAIN = "Delete this folder and run again."


@dataclass
class Report:
    """What became of the rows. Rejected rows are bad; dropped ones are sound but empty at this length."""

    rows: int = 0
    kept: int = 0  # conversations with at least one sample
    samples: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    untraced: dict[str, int] = field(default_factory=dict)  # rows kept without a field the template does not render
    truncated: int = 0
    split_turns: int = 0  # samples made of one turn, because the template forgets how earlier turns were written
    tokens: int = 0
    supervised: int = 0
    supervised_cut: int = 0
    without_stop: int = 0  # samples, not truncated, that end with no token at which the target stops

    def line(self) -> str:
        """One line for the log."""
        parts = [f"{self.kept} of {self.rows} conversations", f"{self.samples} samples", f"{self.tokens} tokens"]
        parts.append(f"{self.supervised} supervised ({self.supervised / max(self.tokens, 1):.0%})")
        if self.truncated:
            parts.append(f"{self.truncated} truncated ({self.supervised_cut} supervised tokens cut)")
        kept_without = ("with fields that were not rendered", self.untraced)
        for word, kinds in (("rejected", self.rejected), ("dropped", self.dropped), kept_without):
            if kinds:
                parts.append(f"{sum(kinds.values())} {word} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})")
        return ", ".join(parts)


class ReportFile(msgspec.Struct):
    """report.json, as far as it is read again."""

    report: Report
    crc32: int | None = None  # of tokens and masks; folders made before it was recorded have none


class TokenizedData(Sequence[Sample]):
    """Samples of a data path, in the order of its rows. A slice of it made by `split` or `select` is one, too."""

    def __init__(self, folder: Path, template: ChatTemplate, indices: np.ndarray | None = None) -> None:
        self.folder, self.template = folder, template
        try:
            self._offsets, self._truncated, self._cut = (np.load(folder / f"{name}.npy") for name in ARRAYS)
            self._tokens = _memory_map(folder / "tokens.bin", np.int32)
            self._mask = _memory_map(folder / "mask.bin", np.bool_)
            self._images = ImageTable(folder) if template.vision else None
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{folder}: the tokenised data cannot be read ({error}). {AGAIN}") from None
        self._ids = read_json(folder / "ids.json", list[str], hint=AGAIN, largest=LARGEST_IDS)
        sizes = (len(self._offsets) - 1, len(self._truncated), len(self._cut))
        if set(sizes) != {len(self._ids)} or not self._offsets[-1] == len(self._tokens) == len(self._mask):
            raise UserError(f"{folder}: the tokenised data is incomplete. {AGAIN}")
        self.indices = np.arange(len(self._ids)) if indices is None else indices
        self.facts = read_json(folder / "report.json", ReportFile, hint=AGAIN)
        self.report = self.facts.report
        self._temporary: tempfile.TemporaryDirectory | None = None

    @classmethod
    def from_path(
        cls, path_or_name: str, template: ChatTemplate, *, max_length: int | None = None,
        data_format: DataFormat = "auto", split: str = "train", min_supervised: int = MIN_SUPERVISED,
        max_reject_share: float = MAX_REJECT_SHARE, cache_dir: str | Path | None = "default", num_proc: int = 1,
        columns: Sequence[str] = (), repeated_ids: RepeatedIds = "reject",
    ) -> "TokenizedData":  # fmt: skip
        """Tokenise a file, folder or hub data set, or reopen what an earlier run with the same inputs left.

        `cache_dir` None keeps the result for this process only; hub data sets, whose content cannot be hashed before it
        is read, are never reused.
        """
        if is_local(path_or_name):
            verify_sealed(Path(path_or_name).expanduser())
        settings = {
            "layout": LAYOUT, "template": template.fingerprint, "tokenizer": tokenizer_digest(template),
            "stop_token_ids": template.stop_token_ids, "max_length": max_length, "min_supervised": min_supervised,
            "data_format": data_format, "split": split, "max_reject_share": max_reject_share,
            "columns": list(columns), "repeated_ids": repeated_ids, "untraced": template.untraced,
        }  # fmt: skip
        temporary = None
        if cache_dir is None or not is_local(path_or_name):
            temporary = tempfile.TemporaryDirectory(prefix="fledge-tokens-", ignore_cleanup_errors=True)
            folder = Path(temporary.name) / "data"
        else:
            state = {"data": content_hash(path_or_name)}
            if template.vision is not None:
                rows = read_conversations(
                    path_or_name, data_format=data_format, rejects=Rejects(max_share=1.0), columns=columns,
                    repeated_ids=repeated_ids,
                )  # fmt: skip
                state["pictures"] = picture_state(rows)
            key = json.dumps({**settings, **state}, sort_keys=True)
            folder = _cache_root(cache_dir) / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        if (folder / "report.json").is_file():
            data = cls(folder, template)
            data.check_content()
            say(f"{path_or_name}: tokenised before ({folder}): {data.report.line()}")
        else:
            listed = None if temporary else folder.with_name(folder.name + ".rejects.jsonl")
            rejects = Rejects(listed, max_reject_share)
            conversations = read_conversations(
                path_or_name, data_format=data_format, rejects=rejects, split=split, columns=columns,
                repeated_ids=repeated_ids,
            )  # fmt: skip
            _build(
                folder, conversations, rejects, template, max_length, min_supervised, num_proc, path_or_name, settings
            )
            data = cls(folder, template)
            say(f"{path_or_name}: {data.report.line()}")
        if data.report.rejected:
            where = "" if temporary else f" See {folder}.rejects.jsonl."
            warn(f"{path_or_name}: {sum(data.report.rejected.values())} rows rejected.{where}")
        for name, count in data.report.untraced.items():
            warn(f"{path_or_name}: chat template {template.name!r} does not render {name}, which {count} rows have.")
        if data.report.without_stop == data.report.samples:
            stops = ", ".join(map(repr, template.stop_tokens)) or "none is known"
            warn(f"{path_or_name}: no answer ends with a token at which the target stops ({stops}).")
        data._temporary = temporary
        return data

    def check_content(self) -> None:
        """Refuse tokens and masks that are no longer what was written; a second for 500 million tokens."""
        if self.facts.crc32 not in (None, _crc32(self.folder)):
            raise UserError(f"{self.folder}: the tokenised data was damaged. {AGAIN}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = int(self.indices[index])
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        ids = torch.from_numpy(self._tokens[begin:end].astype(np.int64))
        mask = torch.from_numpy(self._mask[begin:end].copy())
        images = self._images[row] if self._images is not None else ()
        return Sample(self._ids[row], ids, mask, bool(self._truncated[row]), int(self._cut[row]), images)

    def loaded(self) -> Sequence[Sample]:
        """The same samples with their pixels, read when one is asked for: by whichever worker asks."""
        return _Loaded(self) if self._images is not None else self

    @property
    def images(self) -> list[tuple[ImageRef, ...]]:
        """The pictures of each sample; nothing for text targets."""
        return [self._images[int(row)] for row in self.indices] if self._images is not None else []

    @property
    def ids(self) -> list[str]:
        return [self._ids[row] for row in self.indices]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, without reading any."""
        return np.diff(self._offsets)[self.indices]

    @cached_property
    def counts(self) -> Tensor:
        """How often each token id is supervised in these samples. (V,) int64."""
        return self._count()[0]

    @cached_property
    def supervised_lengths(self) -> np.ndarray:
        """Supervised tokens of each sample."""
        return self._count()[1]

    @property
    def always(self) -> tuple[int, ...]:
        """Ids every draft vocabulary for this data must hold: stop tokens, and special tokens the assistant writes."""
        tokenizer = self.template.tokenizer
        special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
        return control_ids(self.counts, special, self.template.stop_token_ids)

    def select(self, positions: Iterable[int]) -> "TokenizedData":
        """The samples at these positions, sharing the files."""
        part = TokenizedData(self.folder, self.template, self.indices[list(positions)])
        part._temporary = self._temporary
        return part

    def split(self, eval_fraction: float, seed: int = 0) -> tuple["TokenizedData", "TokenizedData"]:
        """(train, eval). The same conversation falls on the same side in every run and every superset of the data."""
        if not 0 < eval_fraction < 1:
            raise UserError(f"eval_fraction={eval_fraction}: needed is a share between 0 and 1, for example 0.02.")
        held_out = np.array([hash_share(conversation_id(id), seed) < eval_fraction for id in self.ids], dtype=bool)
        if held_out.all() or not held_out.any():
            raise UserError(
                f"eval_fraction={eval_fraction} of {len(self)} samples leaves {int(held_out.sum())} for evaluation and "
                f"{int((~held_out).sum())} for training. Give more data or another fraction."
            )
        return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))

    def _count(self) -> tuple[Tensor, np.ndarray]:
        counts = torch.zeros(self.template.vocab_size, dtype=torch.int64)
        lengths = np.zeros(len(self), dtype=np.int64)
        for begin in range(0, len(self), 1024):
            rows = self.indices[begin : begin + 1024]
            spans = [slice(self._offsets[row], self._offsets[row + 1]) for row in rows]
            chosen = [self._tokens[span][self._mask[span]] for span in spans]
            lengths[begin : begin + len(rows)] = [len(ids) for ids in chosen]
            counts += count_tokens(torch.from_numpy(np.concatenate(chosen)), len(counts))
        return counts, lengths


class _Loaded(Sequence[Sample]):
    """Samples of tokenised data, their pictures decoded on access."""

    def __init__(self, data: TokenizedData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index):  # type: ignore[override]
        return self._data.template.load(self._data[int(index)])


def _build(
    folder: Path, conversations: Iterator[Conversation], rejects: Rejects, template: ChatTemplate,
    max_length: int | None, min_supervised: int, num_proc: int, source: str, settings: dict,
) -> None:  # fmt: skip
    """Write the folder under a temporary name, then rename: an interrupted run leaves nothing that looks finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        report = _write_samples(
            building, conversations, rejects, template, max_length, min_supervised, num_proc, source
        )
        facts = {"report": asdict(report), "crc32": _crc32(building), "settings": settings, "data": source}
        write_json(building / "report.json", facts)
        if not report.samples:
            kinds = {**report.rejected, **report.dropped}
            raise UserError(
                f"{source}: nothing left to train on; {report.rows} rows gave {kinds or 'no samples'}. "
                f"Check the chat template and --model-max-length ({max_length})."
            )
        try:
            os.replace(building, folder)
        except OSError:  # another process finished the same work first
            if not (folder / "report.json").is_file():
                raise
    finally:
        rejects.close()
        shutil.rmtree(building, ignore_errors=True)


def _write_samples(
    folder: Path, conversations: Iterator[Conversation], rejects: Rejects, template: ChatTemplate,
    max_length: int | None, min_supervised: int, num_proc: int, source: str,
) -> Report:  # fmt: skip
    report = Report()
    ids: list[str] = []
    lengths, truncated, cut = [0], [], []
    with (
        open(folder / "tokens.bin", "wb") as tokens,
        open(folder / "mask.bin", "wb") as masks,
        ImageTable.writer(folder, template.vision is not None) as images,
        progress("tokenising", count_rows(source)) as bar,
    ):
        for batch, results in encode_batches(conversations, template, max_length, min_supervised, num_proc):
            for conversation, result in zip(batch, results, strict=True):
                if isinstance(result, Drop):
                    report.dropped[result.reason] = report.dropped.get(result.reason, 0) + 1
                elif isinstance(result, Reject):
                    rejects.add(conversation.id, result.reason, result.detail, conversation.where)
                else:
                    report.kept += 1
                    for sample in result:
                        tokens.write(sample.input_ids.numpy().astype(np.int32).tobytes())
                        masks.write(sample.loss_mask.numpy().tobytes())
                        images.add(sample.images)
                        ids.append(sample.id)
                        lengths.append(len(sample.input_ids))
                        truncated.append(sample.truncated)
                        cut.append(sample.num_cut)
                        report.supervised += int(sample.loss_mask.sum())
                        report.without_stop += not (sample.truncated or sample.ends_with(template.stop_token_ids))
                        report.split_turns += TURN_MARK in sample.id
                        for name in sample.untraced:
                            report.untraced[name] = report.untraced.get(name, 0) + 1
            bar.advance(len(batch), f"{len(ids)} samples")
            if not ids and rejects.num_rejected >= HOPELESS_ROWS:
                rejects.check(rejects.num_rejected)
    rejects.check()
    report.rows, report.samples, report.rejected = rejects.seen, len(ids), dict(rejects.counts)
    report.truncated, report.tokens, report.supervised_cut = sum(truncated), sum(lengths), sum(cut)
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    np.save(folder / "truncated.npy", np.array(truncated, dtype=bool))
    np.save(folder / "cut.npy", np.array(cut, dtype=np.int64))
    (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    return report


def hash_share(id: str, seed: int) -> float:
    """A number in [0, 1) that depends on the id and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _cache_root(cache_dir: str | Path) -> Path:
    if cache_dir != "default":
        return Path(cache_dir).expanduser()
    return cache_folder("tokens")


def tokenizer_digest(template: ChatTemplate) -> str:
    """A digest of the tokenizer's whole definition."""
    return hashlib.blake2b(template.tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest()


def _crc32(folder: Path) -> int:
    crc = 0
    for name in ("tokens.bin", "mask.bin"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
    return crc


def _memory_map(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)
