"""What is in a data set, as the training will see it: one sample in colour, counts, lengths, repetition, coverage.

Reads everything once for the text (finish reasons, duplicates, loops) and once through the tokenised cache. Prints for
people; `figures` is the same as one JSON-ready document for programs.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.text import Text

from fledge.console import console, say, show_table
from fledge.data.columns import TOKEN_COLUMNS
from fledge.data.conversations import Conversation, DataFormat, RepeatedIds, read_conversations
from fledge.data.dataset import TokenizedData
from fledge.data.rejects import Rejects
from fledge.data.tokenize import ChatTemplate, Sample
from fledge.data.traces import UNTRACED_REASON
from fledge.data.vocab import coverage

COVERAGE_SIZES = (8_192, 16_384, 32_000)
QUANTILES = (0.05, 0.5, 0.95)
LOOP_CHARACTERS = 60  # a tail of at least this many characters ...
LOOP_TURNS = 4  # ... that is the same piece at least this many times
LONGEST_PIECE = 200
SIZES_SHOWN = 5
SAMPLES_SHOWN = 3
RENDERED_COLUMNS = frozenset((  # columns that stay in the meta of a conversation and are used from there
    "tools", "chat_template_kwargs", "finish_reason", "id", *TOKEN_COLUMNS, "prompt_token_ids", "prompt_ids",
    "loss_mask", "labels", "attention_mask",
))  # fmt: skip
RENDERED_KEYS = frozenset(
    ("role", "content", "reasoning_content", "tool_calls", "train", "name", "tool_call_id", "finish_reason")
)
FATES = {
    "used": "used", "not_shown": "not shown to the model", "dropped": "not in the template",
    "rejected": "rows rejected for it",
}  # fmt: skip
SUPERVISED, CONTEXT, PICTURE = "bold green", "dim", "cyan"


def figures(
    data: TokenizedData, path_or_name: str, data_format: DataFormat = "auto", split: str = "train",
    columns: Sequence[str] = (), repeated_ids: RepeatedIds = "reject",
) -> dict:  # fmt: skip
    """Every figure of a data set, JSON-ready."""
    rejects = Rejects(max_share=1.0)
    text = TextFigures()
    fields = FieldCounts()
    for conversation in read_conversations(
        path_or_name, data_format=data_format, rejects=rejects, split=split, columns=columns, repeated_ids=repeated_ids
    ):
        text.add(conversation)
        fields.add(conversation)
    return {
        "data": path_or_name,
        "template": {"name": data.template.name, "fingerprint": data.template.fingerprint},
        "stop_token_ids": list(data.template.stop_token_ids),
        "report": asdict(data.report),
        "fields": fields.summary(data.report.untraced, data.report.rejected),
        "length": _quantiles(data.lengths),
        "supervised_length": _quantiles(data.supervised_lengths),
        "coverage": {str(size): share for size, share in coverage(data.counts, COVERAGE_SIZES, data.always).items()},
        "distinct_supervised_tokens": int((data.counts > 0).sum()),
        "always_in_draft_vocab": list(data.always),
        **({"images": image_figures(data)} if data.template.vision else {}),
        **text.summary(),
    }


def image_figures(data: TokenizedData) -> dict[str, Any]:
    """Pictures of a data set: how many, how large, what each costs in tokens."""
    images = [image for sample in data.images for image in sample]
    tokens = np.array([image.num_tokens for image in images])
    document = {
        "images": len(images),
        "samples_without": sum(not sample for sample in data.images),
        "per_sample": {str(count): n for count, n in sorted(Counter(map(len, data.images)).items())},
        "share_of_tokens": int(tokens.sum()) / max(int(data.lengths.sum()), 1),
    }
    if images:
        sizes = Counter((image.width, image.height) for image in images)
        document |= {
            "tokens": _quantiles(tokens),
            "width": _quantiles(np.array([image.width for image in images])),
            "height": _quantiles(np.array([image.height for image in images])),
            "sizes": {f"{width} x {height}": count for (width, height), count in sizes.most_common(SIZES_SHOWN)},
        }
    return document


class FieldCounts:
    """What became of the fields of rows and messages: read into the text, kept beside it, not rendered, or rejected."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def add(self, conversation: Conversation) -> None:
        self.used.update(conversation.used | (conversation.meta.keys() & RENDERED_COLUMNS))
        self.kept.update(name for name in conversation.meta if name not in RENDERED_COLUMNS)
        in_messages = {name for message in conversation.messages for name in message}
        self.used.update(f"message.{name}" for name in in_messages & RENDERED_KEYS)
        self.kept.update(f"message.{name}" for name in in_messages - RENDERED_KEYS)

    def summary(self, untraced: dict[str, int], rejected: dict[str, int]) -> dict[str, dict[str, int]]:
        """Rows by field, one dictionary per fate."""
        refused = {
            reason.removeprefix(UNTRACED_REASON): count
            for reason, count in rejected.items()
            if reason.startswith(UNTRACED_REASON)
        }
        return {
            "used": dict(self.used.most_common()), "not_shown": dict(self.kept.most_common()), "dropped": untraced,
            "rejected": refused,
        }  # fmt: skip


class TextFigures:
    """Shares over answers that need no tokenizer: finish reasons, duplicates, repetition loops, turns."""

    def __init__(self) -> None:
        self.finish_reasons: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.num_answers = self.num_loops = self.num_conversations = 0
        self._prompts: set[bytes] = set()
        self._answers: set[bytes] = set()
        self.first_loop: str | None = None

    def add(self, conversation: Conversation) -> None:
        self.num_conversations += 1
        self.finish_reasons[str(conversation.meta.get("finish_reason", "not stated"))] += 1
        self.turns[conversation.num_answers] += 1
        first = next((m for m in conversation.messages if m["role"] == "user"), None)
        self._prompts.add(_digest(first["content"] if first else conversation.meta.get("prompt_token_ids")))
        for message in conversation.messages:
            if message["role"] != "assistant":
                continue
            self.num_answers += 1
            self._answers.add(_digest(message["content"]))
            if isinstance(message["content"], str) and ends_in_loop(message["content"]):
                self.num_loops += 1
                self.first_loop = self.first_loop or conversation.where or conversation.id

    def summary(self) -> dict[str, Any]:
        rows, answers = max(self.num_conversations, 1), max(self.num_answers, 1)
        return {
            "finish_reasons": {reason: count / rows for reason, count in self.finish_reasons.most_common()},
            "answers_per_conversation": {str(turns): count for turns, count in sorted(self.turns.items())},
            "duplicate_prompts": 1 - len(self._prompts) / rows if self.num_conversations else 0.0,
            "duplicate_answers": 1 - len(self._answers) / answers if self.num_answers else 0.0,
            "repetition_loops": self.num_loops / answers,
            "first_repetition_loop": self.first_loop,
        }


def ends_in_loop(text: str) -> bool:
    """Whether the text runs out in one piece said over and over: a model that got stuck, usually until the limit."""
    text = text.rstrip()
    for period in range(1, LONGEST_PIECE + 1):
        same = max((LOOP_TURNS - 1) * period, LOOP_CHARACTERS - period)  # characters that equal those one period before
        if len(text) < same + period:
            return False
        if text[-1] == text[-1 - period] and text[-same:] == text[-same - period : -period]:
            return True
    return False


def show(document: dict[str, Any], samples: Sequence[Sample], template: ChatTemplate) -> None:
    """Print samples in colour and the figures as tables."""
    for sample in samples:
        console.print(Text(f"Sample {sample.id}: supervised tokens in green", style="bold"))
        console.print(colour(sample, template.tokenizer))
    report = document["report"]
    rows: list[tuple[str, object]] = [
        ("conversations read", report["rows"]), ("kept", report["kept"]), ("samples", report["samples"]),
        ("  of split-off turns", report["split_turns"]),
        *((f"rejected: {reason}", count) for reason, count in report["rejected"].items()),
        *((f"dropped: {reason}", count) for reason, count in report["dropped"].items()),
        ("truncated", report["truncated"]), ("tokens", report["tokens"]),
        ("supervised tokens", f"{report['supervised']} ({report['supervised'] / max(report['tokens'], 1):.1%})"),
        ("supervised tokens cut off", report["supervised_cut"]),
        ("distinct supervised tokens", document["distinct_supervised_tokens"]),
    ]  # fmt: skip
    show_table(document["data"], ("", "count"), rows)
    show_fields(document["fields"])
    names = ("min", *(f"{q:.0%}" for q in QUANTILES), "max", "mean")
    lengths = [(label, *document[key].values()) for label, key in
               (("tokens per sample", "length"), ("supervised", "supervised_length"))]  # fmt: skip
    show_table("Lengths", ("", *names), lengths)
    if "images" in document:
        show_images(document["images"], names)
    shares = [(f"finish reason: {reason}", f"{share:.1%}") for reason, share in document["finish_reasons"].items()]
    shares += [
        ("identical prompts", f"{document['duplicate_prompts']:.1%}"),
        ("identical answers", f"{document['duplicate_answers']:.1%}"),
        ("answers that end in a loop", f"{document['repetition_loops']:.1%}"),
    ]
    show_table("Answers", ("", "share"), shares)
    show_table(
        "Draft vocabulary", ("size", "coverage"),
        [(size, f"{share:.2%}") for size, share in document["coverage"].items()],
    )  # fmt: skip
    if document["first_repetition_loop"]:
        say(f"first answer that ends in a loop: {document['first_repetition_loop']}")


def show_fields(fields: dict[str, dict[str, int]]) -> None:
    """Rows by field of the data and what became of it."""
    names = sorted({name for counts in fields.values() for name in counts})
    rows = [(name, *(fields[fate].get(name, "") for fate in FATES)) for name in names]
    show_table("Fields (rows)", ("", *FATES.values()), rows)


def show_images(figures: dict[str, Any], names: tuple[str, ...]) -> None:
    """The pictures, as tables."""
    rows: list[tuple[str, object]] = [("pictures", figures["images"]), ("samples without", figures["samples_without"])]
    rows += [(f"samples with {count}", n) for count, n in figures["per_sample"].items() if count != "0"]
    rows.append(("share of all tokens", f"{figures['share_of_tokens']:.1%}"))
    rows += [(f"of {size} pixels", count) for size, count in figures.get("sizes", {}).items()]
    show_table("Pictures", ("", "count"), rows)
    if figures["images"]:
        kinds = (("tokens", "tokens"), ("width", "width in pixels"), ("height", "height in pixels"))
        show_table("Each picture", ("", *names), [(label, *figures[key].values()) for key, label in kinds])


def colour(sample: Sample, tokenizer: Any) -> Text:
    """The sample's text, runs of equal mask decoded together so that characters of several tokens stay whole.

    A picture is one mark, not the hundreds of tokens that stand for it.
    """
    text = Text()
    ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    ends = {image.begin: image for image in sample.images}
    begin = 0
    for end in range(1, len(ids) + 1):
        if image := ends.get(begin):
            if end == image.end:
                text.append(f"[{image.width} x {image.height}, {image.num_tokens} tokens]", style=PICTURE)
                begin = end
            continue
        if end == len(ids) or end in ends or mask[end] != mask[begin]:
            text.append(tokenizer.decode(ids[begin:end]), style=SUPERVISED if mask[begin] else CONTEXT)
            begin = end
    return text


def _quantiles(lengths: np.ndarray) -> dict[str, float]:
    values = {"min": int(lengths.min()), **{f"p{int(q * 100)}": int(np.quantile(lengths, q)) for q in QUANTILES}}
    return {**values, "max": int(lengths.max()), "mean": round(float(lengths.mean()), 1)}


def _digest(content: Any) -> bytes:
    text = content if isinstance(content, str) else repr(content)
    return hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
