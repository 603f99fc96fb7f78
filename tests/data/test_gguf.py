"""Targets given as GGUF files: unpacked once, read by every command; what cannot be read is said in one line."""

import gguf
import numpy as np
import pytest

from fledge.cli import run_command
from fledge.commands.parser import with_model_folder
from fledge.data.gguf import gguf_of, model_folder, unpacked
from fledge.errors import UserError
from fledge.target.model import Target
from fledge.target.settings import TargetSettings

SIZE, HEADS, INNER, LAYERS = 32, 2, 64, 7


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    unpacked.cache_clear()
    return tmp_path / "cache"


def byte_characters():
    """The printable characters that stand for the 256 bytes in GPT-2's tokenizer."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny random Llama with a byte tokenizer, as other programs write it."""
    path = tmp_path / "given" / "tiny-Q8.gguf"
    path.parent.mkdir()
    characters = byte_characters()
    tokens = [*characters, "<s>", "</s>", characters[0] + characters[1]]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), SIZE), "output_norm": (SIZE,), "output": (len(tokens), SIZE)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (SIZE, SIZE) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (SIZE,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.ffn_gate": (INNER, SIZE), f"blk.{layer}.ffn_up": (INNER, SIZE),
                   f"blk.{layer}.ffn_down": (SIZE, INNER)}  # fmt: skip
    for name, shape in shapes.items():
        values = draw.standard_normal(shape).astype(np.float32) * 0.3
        if len(shape) == 2:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_unpacked_once(gguf_file, capsys):
    folder = model_folder(str(gguf_file))
    assert model_folder(str(gguf_file.parent)) == folder
    unpacked.cache_clear()
    assert model_folder(str(gguf_file)) == folder
    assert capsys.readouterr().err.count("unpacking") == 1
    target = Target.from_pretrained(folder)
    assert target.vocab_size == 259 and target.eos_token_ids == (257,)
    embedding = gguf.GGUFReader(str(gguf_file)).get_tensor(0)
    values = gguf.dequantize(embedding.data, embedding.tensor_type)
    assert np.abs(values - target.embedding_weight.float().numpy()).max() < 0.01


def test_a_changed_file_is_unpacked_again(gguf_file):
    before = model_folder(str(gguf_file))
    gguf_file.touch()
    unpacked.cache_clear()
    assert model_folder(str(gguf_file)) != before


def test_other_names_stay_as_they_are(tiny_model_dir, tmp_path):
    for name in ("Qwen/Qwen3-8B", str(tiny_model_dir), str(tmp_path / "nowhere")):
        assert model_folder(name) == name


def test_a_command_takes_it(gguf_file, capsys):
    assert (
        run_command("decode", ["--target", str(gguf_file), "--prompt", "hello", "--raw", "--max-new-tokens", "4"]) == 0
    )
    settings = TargetSettings(target="Qwen/Qwen3-8B")
    assert with_model_folder(settings) is settings


def test_what_cannot_be_read_is_said(tmp_path, gguf_file):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[:200])
    with pytest.raises(UserError, match="transformers cannot read this GGUF"):
        model_folder(str(torn))
    with pytest.raises(UserError, match="no such file"):
        model_folder(str(tmp_path / "absent.gguf"))
    (tmp_path / "given" / "other.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="2 GGUF files there .*Name the one to use"):
        gguf_of(tmp_path / "given")
    assert not any((tmp_path / "cache").rglob("config.json"))
