"""The identity of states that are about to be made: from a target, its template and the storage settings."""

import json
from collections.abc import Sequence
from typing import Any

from fledge.data.dataset import tokenizer_digest
from fledge.data.tokenize import ChatTemplate
from fledge.storage.states.manifest import Identity, LastStorage, TapStorage
from fledge.target.head import TargetHead

VOLATILE = {"transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype", "id2label", "label2id"}


def describe_states(
    name: str, revision: str | None, text_config: Any, head: TargetHead, tap_layers: Sequence[int],
    template: ChatTemplate, *, dtype: str, max_length: int | None, tap_storage: TapStorage = "same",
    last_storage: LastStorage = "all", backend: str = "hf",
) -> Identity:  # fmt: skip
    """Everything the stored states will depend on."""
    special = [id for id, token in template.tokenizer.added_tokens_decoder.items() if token.special]
    return Identity(
        target=name, revision=revision, weights=head.digest(), text_config=plain_config(text_config),
        vocab_size=head.weight.shape[0],
        hidden_size=head.weight.shape[1], head_keys=list(head.keys), tap_layers=list(tap_layers), dtype=dtype,
        tap_storage=tap_storage, last_storage=last_storage, template=template.name,
        template_fingerprint=template.fingerprint, tokenizer=tokenizer_digest(template), max_length=max_length,
        stop_token_ids=list(template.stop_token_ids), special_token_ids=special, backend=backend,
        last_turn_only=template.last_turn_only,
    )  # fmt: skip


def plain_config(text_config: Any) -> dict[str, Any]:
    """A config as JSON would give it back, without what is no part of the numbers."""
    known = {key: value for key, value in text_config.to_dict().items() if key not in VOLATILE}
    return json.loads(json.dumps(known, default=str))


def read_text_config(identity: Identity) -> Any:
    """The target's text config again, as transformers' object."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[identity.text_config["model_type"]].from_dict(dict(identity.text_config))
