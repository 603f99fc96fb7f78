"""Targets given as GGUF files, unpacked once into a model folder that every command, library and engine reads.

The weights are de-quantised to bf16: transformers keeps some GGUF kinds packed and cannot save them, and vLLM, Trainer
and our own loaders all read safetensors. The unpacked folder is cached; a file that has changed is unpacked again.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

from fledge.console import say
from fledge.errors import UserError
from fledge.outputs import Output, cache_folder, written

UNPACKED = Output("unpacked GGUF", ("*",))
CONFIG, SUFFIX = "config.json", ".gguf"


def model_folder(name_or_path: str) -> str:
    """What to load: the name as it is, or the unpacked form of a .gguf file (or of a folder with one and no config)."""
    gguf = gguf_of(Path(name_or_path))
    return name_or_path if gguf is None else str(unpacked(gguf.resolve()))


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path names; None where it names none."""
    if path.suffix == SUFFIX:
        if not path.is_file():
            raise UserError(f"{path}: no such file.")
        return path
    if not path.is_dir() or (path / CONFIG).is_file():
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise UserError(f"{path}: {len(found)} GGUF files there ({names}). Name the one to use.")
    return found[0] if found else None


@functools.cache
def unpacked(gguf: Path) -> Path:
    """The model folder made of a GGUF file, made now unless it lies in the cache."""
    about = gguf.stat()
    key = hashlib.sha256(f"{gguf}|{about.st_size}|{about.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder("gguf") / f"{gguf.stem}-{key}"
    if not (folder / CONFIG).is_file():
        say(f"unpacking {gguf.name} ({about.st_size / 2**20:.0f} MiB) as bf16 into {folder}")
        with written(folder, UNPACKED) as building:
            unpack(gguf, building)
    return folder


def unpack(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF into a plain bf16 checkpoint whose tokenizer ends turns where the model does."""
    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise UserError(f"{gguf}: reading GGUF files needs the package gguf: `pip install gguf`.") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors  # a bar that no setting turns off
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # it advises float32, in which packed weights compute; these are unpacked
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the library raises many types: a torn file, an architecture that it does not know
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"{gguf}: transformers cannot read this GGUF ({type(error).__name__}: {reason}). Give the model's original "
            f"folder or hub name instead."
        ) from error
    finally:
        logging.set_verbosity(loud)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # it is de-quantised: save plain tensors
    model.save_pretrained(folder)
    if isinstance(ends := model.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends)
    tokenizer.save_pretrained(folder)
