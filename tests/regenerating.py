"""`fledge regenerate` in tests: rows in, a run against a fake server, rows and rejects out."""

import json
from pathlib import Path

from fledge.commands.regenerate import RegenerateArgs, regenerate
from fledge.regeneration.settings import AnswerSettings, EngineSettings, PromptSourceSettings


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(path: Path, *questions: str) -> Path:
    return write(path, [{"id": f"r{i}", "conversations": [{"from": "human", "value": q}]}
                        for i, q in enumerate(questions)])  # fmt: skip


def run(data: Path, out: Path, url: str, *, shard_size: int = 4, prompt=None, answer=None, engine=None) -> list[dict]:
    """Regenerate and return the rows of all shards."""
    regenerate_only(data, out, url, shard_size=shard_size, prompt=prompt, answer=answer, engine=engine)
    return rows_of(out)


def regenerate_only(data: Path, out: Path, url: str, *, shard_size: int = 4, prompt=None, answer=None, engine=None):
    regenerate(
        RegenerateArgs(
            prompts=PromptSourceSettings(data=str(data), **(prompt or {})),
            output_dir=out,
            data_shard_size=shard_size,
            answers=AnswerSettings(**{"max_new_tokens": 64, **(answer or {})}),
            engines=EngineSettings(server=(url,), concurrency=8, max_attempts=2, **(engine or {})),
        )
    )


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("shard-*.jsonl")) for line in path.read_text().splitlines()]


def rejects_of(out: Path) -> list[tuple[str, str]]:
    lines = (out / "rejects.jsonl").read_text().splitlines()
    return [(entry["id"], entry["reason"]) for entry in map(json.loads, lines)]
