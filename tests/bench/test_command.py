"""A tiny target with an untrained head: the documented command line, and every flag that decoding sees."""

import dataclasses
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fledge.bench.engine import EngineSpec, InProcessEngine, promised, refused_path
from fledge.bench.rows import read_rows
from fledge.bench.run import bench
from fledge.bench.settings import BenchSettings
from fledge.commands.parser import parse
from fledge.decoding.records import Generation, RoundTrace
from fledge.drafters.tree import TreeShape
from fledge.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "spec_benchmark.py"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined %}"
    "{{ '<think>' if enable_thinking else '<no think>' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Llama with a byte tokenizer, and a head of it, as files."""
    from tiny import tiny_draft, tiny_model
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fledge.drafters.eagle3.checkpoint import save_draft
    from fledge.target.model import Target

    root = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(root / "target")
    model = tiny_model("llama", vocab_size=258, max_position_embeddings=2048, eos_token_id=257, bos_token_id=256)
    model.save_pretrained(root / "target")
    target = Target(model, tokenizer)
    head = tiny_draft(target, draft_vocab_size=None)
    with torch.no_grad():
        head.warm_start_head(target.head_weight)
    save_draft(head, root / "head", dtype=torch.float32)
    return root / "target", root / "head"


@pytest.fixture
def run_bench(folders, tmp_path):
    """`fledge bench` with these flags; returns the rows and the figures of the first set."""

    def go(*flags: str, out: Path | None = None):
        args = parse_bench(folders, "--output-dir", str(out or tmp_path / "out"), *flags)
        bench(args)
        document = json.loads((args.output_dir / "summary.json").read_text())
        return read_rows(args.output_dir / "results.jsonl"), next(iter(document["sets"].values()))

    return go


def parse_bench(folders, *flags: str) -> BenchSettings:
    target, head = folders
    words = ["--base-model-path", str(target), "--eagle-model-path", str(head), "--model-id", "tiny"]
    words += ["--num-gpus-total", "0", "--bench-name", "quick", "--question-end", "2", "--max-new-token", "24"]
    return parse(BenchSettings, [*words, *flags], prog="bench", description="")


def spec_of(folders, *flags: str) -> EngineSpec:
    return EngineSpec.of(parse_bench(folders, *flags), TreeShape(), num_gpus=0)


@pytest.fixture(scope="module")
def engine(folders) -> InProcessEngine:
    return spec_of(folders, "--temperature", "0").load()


def test_the_documented_command_line_gives_a_report_on_the_first_try(folders, tmp_path):
    """Word for word, from a folder that is no checkout, with every documented flag, on a machine without GPU."""
    target, head = folders
    done = subprocess.run(
        [sys.executable, str(TOOL),
         "--base-model-path", str(target), "--eagle-model-path", str(head), "--model-id", "tiny",
         "--bench-name", "mt_bench", "--mode", "both", "--output-dir", "results", "--temperature", "1.0",
         "--max-new-token", "12", "--total-token", "60", "--depth", "5", "--top-k", "10", "--num-gpus-per-model", "1",
         "--num-gpus-total", "1", "--seed", "42", "--question-begin", "1", "--question-end", "3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**environment(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stderr
    for name in ("results.jsonl", "summary.json", "report.md", "report.html"):
        assert (tmp_path / "results" / name).stat().st_size > 500
    settings = json.loads((tmp_path / "results" / "summary.json").read_text())["settings"]
    assert settings["tree"] == {"total_token": 60, "depth": 5, "top_k": 10} and settings["temperature"] == 1.0


def environment(folder: Path) -> dict[str, str]:
    """A bench folder with an mt_bench of our own."""
    import os

    path = folder / "sets" / "mt_bench" / "question.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"question_id": n, "category": "c", "turns": [f"Say {n}.", "And again."]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**os.environ, "FLEDGE_BENCH_DIR": str(folder / "sets"), "OMP_NUM_THREADS": "1"}


def test_documented_defaults():
    """Of tools/spec_benchmark.py; its temperature and its tree are set there (`test_the_tool_samples`)."""
    words = ["--base-model-path", "a", "--eagle-model-path", "b", "--model-id", "c"]
    args = parse(BenchSettings, words, prog="", description="")
    found = (
        args.prompts.bench_name, args.model.mode, args.sampling.temperature, args.sampling.max_new_tokens,
        args.model.total_token, args.model.depth, args.model.top_k, args.workers.num_gpus_per_model,
        args.workers.num_gpus_total, args.sampling.seed, args.output.no_metrics,
    )  # fmt: skip
    assert found == (("mt_bench",), "both", 0.0, 1024, None, None, None, 1, 1, 42, False)
    short = parse(BenchSettings, ["--target", "a", "--draft", "b"], prog="", description="")
    assert (short.model.target, short.model.draft) == ("a", "b")


@pytest.mark.parametrize(("given", "temperature"), [([], 1.0), (["--temperature", "0.5"], 0.5)])
def test_the_tool_samples(given, temperature, monkeypatch):
    """AngelSlim documents a temperature of 1.0 and a tree of 60/5/10 for it, whatever is the default elsewhere."""
    ran = []
    monkeypatch.setattr("fledge.cli.run_command", lambda name, words: ran.append((name, words)) or 0)
    monkeypatch.setattr("sys.argv", [str(TOOL), "--target", "a", "--mode", "baseline", *given])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    ((name, words),) = ran
    assert name == "bench"
    args = parse(BenchSettings, words, prog="", description="")
    assert args.sampling.temperature == temperature
    assert (args.model.total_token, args.model.depth, args.model.top_k) == (60, 5, 10) and not args.model.own_choice


def test_greedy_outputs_are_identical_and_the_costs_add_up(run_bench):
    rows, figures = run_bench(
        "--temperature", "0", "--question-end", "3", "--total-token", "8", "--depth", "2", "--top-k", "2"
    )
    assert figures["quality"]["identical"] == figures["quality"]["compared"] == 4
    assert 1 <= figures["acceptance"]["tau"] <= 7
    assert figures["speedup"]["value"] == pytest.approx(figures["model"]["predicted"], rel=1e-6)
    sample = rows[0]["turns"][0]["sample"]
    assert all(set(one) == {"kept", "refused", "bonus", "promised"} for one in sample)
    chances = [chance for one in sample for chance in one["promised"]]
    assert chances and all(0 < chance < 1.0001 for chance in chances)


def test_coloured_rounds_spell_the_answer(engine):
    """Kept drafts and bonus tokens are the answer, piece by piece; a letter of two bytes shows with its second."""
    ids = engine.target.tokenizer.encode("hé, you!")
    other = engine.target.tokenizer.encode("?")[0]
    rounds = [
        RoundTrace([ids[0], ids[1], other], [0, 0, 1], accepted=[0, 1], bonus=ids[2]),
        RoundTrace([ids[2], other, other], [0, 0, 1], accepted=[0], bonus=ids[3]),
        RoundTrace([ids[3], *ids[4:8]], [0, 0, 1, 2, 3], accepted=[0, 1, 2, 3, 4], bonus=ids[8]),
    ]
    made = Generation(ids, [1, 0, 4], 2, "length", 0.0, 0.0, {}, 3, rounds)
    assert engine.coloured_rounds(made) == [
        {"kept": [], "refused": "", "bonus": "h", "promised": []},
        {"kept": [""], "refused": "\ufffd?", "bonus": "é", "promised": []},
        {"kept": [], "refused": "??", "bonus": ",", "promised": []},
        {"kept": [" ", "y", "o", "u"], "refused": "", "bonus": "!", "promised": []},
    ]


def test_a_round_promises_what_its_scores_say():
    """root -> a b; a -> c: by level the sum of the chances. A round that was cut promised more than it could keep."""
    scores = [0.0, math.log(0.5), math.log(0.25), math.log(0.125)]
    one = RoundTrace([1, 10, 20, 30], [0, 0, 0, 1], accepted=[0], bonus=9, scores=scores)
    assert promised(one) == pytest.approx([0.75, 0.125])
    assert promised(dataclasses.replace(one, bonus=None)) == []
    assert promised(dataclasses.replace(one, scores=None)) == []


def test_tree_flags_change_the_tree(run_bench, tmp_path):
    for number, (flags, depth) in enumerate(
        [(("--depth", "1", "--top-k", "2"), 2), (("--depth", "3"), 4), (("--total-token", "3"), 2)]
    ):
        rows, figures = run_bench("--temperature", "0", *flags, out=tmp_path / str(number))
        assert figures["acceptance"]["drafted_depth"] == depth


def test_sampling_flags_change_the_answers(run_bench, tmp_path):
    """A nucleus of one token, or one token kept, is greedy decoding whatever the temperature."""
    texts = {}
    for name, flags in {
        "greedy": ("--temperature", "0"), "sampled": ("--temperature", "1"),
        "seed": ("--temperature", "1", "--seed", "7"),
        "nucleus": ("--temperature", "1", "--top-p", "1e-6"), "one": ("--temperature", "1", "--sample-top-k", "1"),
    }.items():  # fmt: skip
        rows, _ = run_bench(*flags, "--mode", "baseline", out=tmp_path / name)
        texts[name] = [turn["baseline"]["text"] for row in rows for turn in row["turns"]]
    assert texts["greedy"] == texts["nucleus"] == texts["one"]
    assert len({tuple(text) for text in texts.values()}) == 3


def test_both_sides_follow_the_targets_generation_config(folders, tmp_path, capsys):
    """A repetition penalty that the target asks for was ignored: its greedy answers were others than served ones."""
    target = shutil.copytree(folders[0], tmp_path / "target")
    path, texts = target / "generation_config.json", {}
    before = json.loads(path.read_text()) if path.is_file() else {}
    for name, config in {"plain": {}, "asked": {"repetition_penalty": 1.7, "top_k": 9}}.items():
        path.write_text(json.dumps({**before, **config}))
        args = parse_bench(
            (target, folders[1]), "--temperature", "0", "--output-dir", str(tmp_path / name), "--question-end", "1"
        )
        bench(args)
        turns = [turn for row in read_rows(args.output_dir / "results.jsonl") for turn in row["turns"]]
        assert all(turn["baseline"]["text"] == turn["eagle"]["text"] for turn in turns)
        texts[name] = [turn["baseline"]["text"] for turn in turns]
        settings = json.loads((args.output_dir / "summary.json").read_text())["settings"]
        assert settings.get("repetition_penalty") == config.get("repetition_penalty")
        assert settings["sample_top_k"] == config.get("top_k", 0)
    assert texts["plain"] != texts["asked"]
    assert "sampling: greedy, repetition_penalty 1.7" in " ".join(capsys.readouterr().err.split())


def test_thinking_and_template_flags_change_the_prompt(folders):
    messages = [{"role": "user", "content": "hi"}]
    prompts = {}
    for name, flags in {
        "default": (), "on": ("--thinking", "on"), "off": ("--thinking", "off"),
        "named": ("--chat-template-type", "smollm2"),
    }.items():  # fmt: skip
        loaded = spec_of(folders, *flags).load()
        prompts[name] = loaded.target.tokenizer.decode(loaded.prompt(messages).ids)
    assert prompts["default"].endswith("<|im_start|>assistant\n")  # the generation prompt
    assert prompts["on"].endswith("<think>") and prompts["off"].endswith("<no think>")
    assert len(set(prompts.values())) >= 3


def test_dtype_flag(folders):
    assert spec_of(folders, "--dtype", "float32").load().target.dtype == torch.float32
    assert spec_of(folders, "--dtype", "bfloat16").load().target.dtype == torch.bfloat16


def test_gpu_memory_and_group_flags_place_the_target(folders, monkeypatch):
    args = parse_bench(folders, "--num-gpus-total", "2", "--num-gpus-per-model", "2", "--max-gpu-memory", "40GiB")
    assert EngineSpec.of(args, TreeShape(), num_gpus=2).placement() == {
        "device_map": "auto", "max_memory": {0: "40GiB", 1: "40GiB"}
    }  # fmt: skip
    args = parse_bench(folders, "--num-gpus-total", "1")
    assert EngineSpec.of(args, TreeShape(), num_gpus=1).placement() == {"device": "cuda:0"}
    assert EngineSpec.of(args, TreeShape(), num_gpus=0).placement() == {"device": "cpu"}


def test_what_the_engine_says_about_answers(engine):
    prompt = engine.prompt([{"role": "user", "content": "hi"}])
    ids = torch.tensor([[*prompt.ids, 5, 6, 7]])
    log_probs = engine.target.model(ids).logits.log_softmax(-1)[0]
    expected = sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate((5, 6, 7))) / 3
    assert engine.mean_log_likelihood(prompt, [5, 6, 7]) == pytest.approx(expected, abs=1e-5)
    best = engine.target.model(ids).logits[0, -1].topk(2)
    top = engine.top2(prompt, [5, 6, 7])
    assert engine.top2(prompt, [5, 6, 7], best.indices.tolist())["behind"] == top["behind"] == pytest.approx(top["gap"])
    assert engine.top2(prompt, [5, 6, 7], [int(log_probs[-1].argmin())])["behind"] > top["gap"]
    assert top["gap"] == pytest.approx((best.values[0] - best.values[1]).item(), abs=1e-5)
    assert top["noise"] < 1e-4  # fp32


def test_rounding_of_a_text_is_measured(engine, monkeypatch):
    """Coarser numbers move the same gaps further."""
    prompt = engine.prompt([{"role": "user", "content": "hi"}])
    exact = engine.top2(prompt, [5, 6, 7])
    real = InProcessEngine._logits_one_by_one
    monkeypatch.setattr(InProcessEngine, "_logits_one_by_one", lambda *words: real(*words).bfloat16())
    assert engine.top2(prompt, [5, 6, 7])["noise"] > 100 * exact["noise"]


def test_refused_path_follows_first_children():
    """root -> a b; a -> c d: kept root and a, so c was refused there."""
    one = RoundTrace(token_ids=[1, 10, 20, 30, 40], parents=[0, 0, 0, 1, 1], accepted=[0, 1], bonus=9)
    assert refused_path(one) == [30]
    assert refused_path(RoundTrace([1], [0], [0], 9)) == []


def test_tune_writes_a_profile_that_auto_reads(run_bench, folders, tmp_path, monkeypatch):
    from fledge.decoding import costs, tune

    monkeypatch.setattr(tune, "NODES", (2, 4, 8))
    monkeypatch.setattr(tune, "WIDTHS", (1, 3))
    monkeypatch.setattr(costs, "TURNS", 1)
    monkeypatch.setattr(tune, "POSITIONS_PER_ANSWER", 4)
    path = tmp_path / "profile.json"
    flags = ("--profile-path", str(path), "--temperature", "0", "--max-new-token", "20")
    with pytest.raises(UserError, match="fledge bench --tune"):
        run_bench(*flags, "--total-token", "auto")
    bench(parse_bench(folders, *flags, "--tune"))
    profile = json.loads(path.read_text())["profile"]
    assert set(profile["measured"]) == {"plain", "chosen", "default"}
    rows, figures = run_bench(*flags, "--total-token", "auto")
    tree = TreeShape(**profile["tree"])
    assert figures["acceptance"]["drafted_depth"] == tree.levels


def write_costs(path: Path, overhead_s: float) -> None:
    """A profile of a machine on which a round of drafting costs so much beside one second of plain decoding."""
    from fledge import provenance
    from fledge.decoding.tree_profile import TreeProfile, write_profile

    costs = {"verify_s": {str(n): 1.0 + 0.001 * n for n in (2, 8, 64)}, "overhead_s": overhead_s,
             "draft_s": {f"3x{level}": 0.001 * level for level in range(1, 9)}}  # fmt: skip
    write_profile(path, TreeProfile(
        tree=TreeShape(8, 2, 3), tau=1.5, tokens_per_s=1.2, plain_tokens_per_s=1.0, temperature=0.0, measured={},
        curve=[], costs=costs, hardware=provenance.hardware(),
    ))  # fmt: skip


def test_adaptive_drafts_where_it_pays(run_bench, tmp_path, monkeypatch):
    """Same answers; where a round costs fifty plain tokens, hardly any is drafted."""
    from fledge.drafters.eagle3.propose import EagleProposer

    trees, real = [], EagleProposer.propose
    monkeypatch.setattr(EagleProposer, "propose", lambda self, *args: (trees.append(args[-1]), real(self, *args))[1])
    flags = ("--temperature", "0", "--max-new-token", "40", "--question-end", "1", "--total-token", "8", "--depth", "2",
             "--top-k", "3", "--samples", "0")  # fmt: skip
    drafted, rounds = {}, {}
    for name, overhead_s in (("always", None), ("pays", 0.0), ("dear", 50.0)):
        more = ("--adaptive", "--profile-path", str(tmp_path / "costs.json")) if overhead_s is not None else ()
        if overhead_s is not None:
            write_costs(tmp_path / "costs.json", overhead_s)
        trees.clear()
        rows, figures = run_bench(*flags, *more, out=tmp_path / name)
        assert figures["quality"]["identical"] == figures["quality"]["compared"]
        drafted[name] = len(trees)
        rounds[name] = sum(turn["eagle"]["num_forwards"] for row in rows for turn in row["turns"])
        assert all((budget is None) == (name == "always") for budget in trees)
    assert drafted["always"] >= rounds["always"] - 2 and drafted["pays"] > 10 > drafted["dear"]


def test_fixed_shapes_measure_the_same_answers(run_bench, tmp_path):
    flags = ("--temperature", "0", "--max-new-token", "20", "--question-end", "2")
    texts = {}
    for shapes in ("exact", "fixed"):
        rows, figures = run_bench(*flags, "--shapes", shapes, out=tmp_path / shapes)
        assert figures["quality"]["identical"] == figures["quality"]["compared"] == 3
        assert figures["speedup"]["value"] == pytest.approx(figures["model"]["predicted"], rel=1e-6)
        texts[shapes] = [turn[side]["token_ids"] for row in rows for turn in row["turns"] for side in turn["order"]]
        assert rows[0]["turns"][0]["sample"], "coloured samples are traced in exact shapes"
    assert texts["fixed"] == texts["exact"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--adaptive", "--mode", "baseline"), "--mode baseline has none to adapt"),
        (("--adaptive", "--tune"), "--tune has none to adapt"),
        (("--adaptive", "--backend", "server"), "--adaptive is about decoding in this process"),
        (("--shapes", "fixed", "--backend", "server"), "--shapes is about decoding in this process"),
        (("--exact", "--backend", "server"), "--exact is about decoding in this process"),
        (("--draft", "lookup", "--tune"), "--tune measures trees, and lookup proposes chains"),
    ],
)
def test_what_adaptive_shapes_and_tune_do_not_go_with(folders, flags, message):
    with pytest.raises(UserError, match=message):
        bench(parse_bench(folders, *flags))
