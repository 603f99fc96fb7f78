"""The target's two ends without its middle: embedding, head and what is done to the logits.

Offline training, an engine's client and foreign stores need no more of a target. Taken from a loaded `Target`, or read
from its safetensors files by name, so that a target of any size costs two tensors.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fledge.errors import UserError, nearest
from fledge.offline import stop_asking_an_unknown_hub
from fledge.parsing import parse_json
from fledge.target.linear import head_linear
from fledge.target.model import Target, auto_class
from fledge.target.quantised import stored_matrix
from fledge.target.quirks import LogitQuirks, logit_quirks

# V target vocab, H hidden

ENTRY = "fledge"


class HeadFacts(msgspec.Struct):
    """What `TargetHead.save` writes beside the tensors."""

    identity: str
    quirks: LogitQuirks
    keys: list[str]


@dataclass(frozen=True, kw_only=True)
class TargetHead:
    """`head(last_hidden)` gives exactly the target's logits."""

    embedding: Tensor  # (V, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    quirks: LogitQuirks
    keys: tuple[str, ...]  # names of `weight` in the target: two where it is tied to the embedding

    def __call__(self, last_hidden: Tensor) -> Tensor:
        """(..., H) after the final norm -> (..., V)."""
        return self.quirks.apply(head_linear(last_hidden, self.weight, self.bias))

    def rows(self, ids: Tensor) -> "Callable[[Tensor], Tensor] | None":
        """The same head for these token ids only; None for weights that cannot be cut (quantised, or a process's
        part)."""
        if type(self.weight.data) is not Tensor or not self.weight.is_floating_point():
            return None
        weight = self.weight.detach()[ids]
        bias = None if self.bias is None else self.bias.detach()[ids]
        return lambda last_hidden: self.quirks.apply(head_linear(last_hidden, weight, bias))

    @property
    def tied(self) -> bool:
        return self.embedding.data_ptr() == self.weight.data_ptr()

    @classmethod
    def of(cls, target: Target) -> "TargetHead":
        """The ends of a loaded target; shares its tensors."""
        head = target.model.get_output_embeddings()
        parameters = target.model.named_parameters(remove_duplicate=False)
        keys = tuple(name for name, parameter in parameters if parameter is getattr(head, "weight", None))
        return cls(
            embedding=target.embedding_weight, weight=target.head_weight, bias=getattr(head, "bias", None),
            quirks=target.quirks, keys=keys,
        )  # fmt: skip

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "TargetHead":
        embedding = self.embedding.to(device, dtype)
        weight = embedding if self.tied else self.weight.to(device, dtype)
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return dataclasses.replace(self, embedding=embedding, weight=weight, bias=bias)

    def digest(self) -> str:
        """A digest of the numbers: two fine-tunes of one model rarely share it."""
        digest = hashlib.sha256()
        for tensor in self._tensors().values():
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(as_bytes(tensor))
        return digest.hexdigest()

    def save(self, path: Path, identity: str) -> None:
        """Write the file; atomic renaming is the caller's."""
        facts = {"identity": identity, "quirks": dataclasses.asdict(self.quirks), "keys": self.keys}
        save_file(self._tensors(), path, metadata=one_entry(facts))

    @classmethod
    def load(cls, path: Path, device: torch.device, identity: str) -> "TargetHead":
        """Read what `save` wrote, for the store whose identity it is."""
        try:
            with safe_open(path, "pt") as file:
                facts = parse_json((file.metadata() or {}).get(ENTRY, "{}"), HeadFacts, str(path))
            tensors = load_file(path, device=str(device))
        except SafetensorError as error:
            raise UserError(
                f"{path}: not a complete safetensors file ({error}). Delete it and run the same `fledge extract` "
                f"again: only this file is made anew."
            ) from None
        if facts.identity != identity:
            raise UserError(
                f"{path}: belongs to another target or other settings than the manifest beside it. Put the right "
                f"manifest back, or extract into a new folder."
            )
        return cls(
            embedding=tensors["embedding"], weight=tensors.get("head", tensors["embedding"]),
            bias=tensors.get("head_bias"), quirks=facts.quirks,
            keys=tuple(facts.keys),
        )  # fmt: skip

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"embedding": self.embedding.detach().cpu().contiguous()}
        if not self.tied:
            tensors["head"] = self.weight.detach().cpu().contiguous()
        if self.bias is not None:
            tensors["head_bias"] = self.bias.detach().cpu().contiguous()
        return tensors


def one_entry(facts: dict[str, Any]) -> dict[str, str]:
    """Metadata of a safetensors file as a single entry: the library writes several in random order."""
    return {ENTRY: json.dumps(facts, ensure_ascii=False, sort_keys=True)}


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array) if array.size else memoryview(b"")


class TargetEnds:
    """A target of which only embedding, final norm and head are in memory."""

    def __init__(self, name: str, config: Any, head: TargetHead, norm: nn.Module | None) -> None:
        self.name, self.config, self.head, self.norm = name, config, head, norm
        self.text_config = config.get_text_config()

    @classmethod
    def from_files(
        cls, name_or_path: str, *, lm_head_key: str | None = None, dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "TargetEnds":  # fmt: skip
        """Read them from the safetensors files of a folder or hub name."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(name_or_path, revision=revision)
            with torch.device("meta"):
                skeleton = auto_class(config).from_config(config)
        except Exception as error:  # the library's types vary: no folder, no network, unknown architecture
            raise UserError(
                f"{name_or_path}: no config of a causal LM or image-text model could be loaded "
                f"({type(error).__name__}: {str(error).strip()[:200]}). Give the target's folder or hub name."
            ) from error
        files = _tensor_files(name_or_path, revision)
        names: dict[int, list[str]] = {}
        for name, parameter in skeleton.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        output: Any = skeleton.get_output_embeddings()
        text_config = config.get_text_config()
        read = _Reader(name_or_path, files, dtype or text_config.dtype)
        embedding_names = names[id(skeleton.get_input_embeddings().weight)]
        head_names = [lm_head_key] if lm_head_key else names[id(output.weight)]
        if getattr(config, "tie_word_embeddings", text_config.tie_word_embeddings) and not lm_head_key:
            head_names = list(dict.fromkeys([*embedding_names, *head_names]))
        embedding = read(embedding_names)
        weight = embedding if set(head_names) & set(embedding_names) else read(head_names)
        bias = read(names[id(output.bias)]) if getattr(output, "bias", None) is not None else None
        keys = tuple(head_names)
        quirks = logit_quirks(config.get_text_config())
        head = TargetHead(embedding=embedding, weight=weight, bias=bias, quirks=quirks, keys=keys)
        return cls(name_or_path, config, head, _read_norm(skeleton, names, read))


def _read_norm(skeleton: Any, names: dict[int, list[str]], read: "_Reader") -> nn.Module | None:
    """The decoder's final norm, as the architecture's own module (Gemma's multiplies by 1 + w)."""
    norm = getattr(skeleton.get_decoder(), "norm", None)
    if norm is None:
        return None
    found = {name: read(names[id(parameter)]) for name, parameter in norm.named_parameters()}
    norm = norm.to_empty(device="cpu")
    norm.load_state_dict(found, assign=True)
    return norm.eval().requires_grad_(False)


class _Reader:
    def __init__(self, name: str, files: dict[str, Path], dtype: torch.dtype | None) -> None:
        self._name, self._files, self._dtype = name, files, dtype

    def __call__(self, names: Sequence[str]) -> Tensor:
        """The tensor that goes by one of these names (tied tensors have several, one of them in the files)."""
        key = next((name for name in names if name in self._files), None) or self._renamed(names[0])
        if key is None:
            raise UserError(
                f"{self._name}: its files hold no tensor {names[0]!r}{nearest(names[0], self._files)}. Name the head's "
                f"with --lm_head_key."
            )
        with opened(self._files[key]) as file:
            tensor = stored_matrix(file, key, self._name)
        return tensor.to(self._dtype) if self._dtype is not None else tensor

    def _renamed(self, name: str) -> str | None:
        """Image-text checkpoints carry the prefixes of the library that wrote them (`model.`, `language_model.model.`):
        the one tensor outside layers and vision tower that ends alike."""
        tail = name.split(".")[-2:]
        alike = [
            key for key in self._files
            if key.split(".")[-2:] == tail and not any(part.isdigit() or "vis" in part for part in key.split("."))
        ]  # fmt: skip
        return alike[0] if len(alike) == 1 else None


def _tensor_files(name_or_path: str, revision: str | None) -> dict[str, Path]:
    """Tensor name -> file."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        stop_asking_an_unknown_hub()
        try:
            folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=["*.safetensors"]))
        except Exception as error:
            raise UserError(f"{name_or_path}: could not be downloaded ({str(error).strip()[:200]}).") from error
    return dict(_names_in(folder))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file of the target; a cut or damaged one is a user error."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}). Copy or download it again.") from None


def _names_in(folder: Path) -> Iterator[tuple[str, Path]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors files there. Save the target with save_pretrained.")
    for path in files:
        with opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, path
