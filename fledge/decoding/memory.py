"""The memory of keys and values, stated before it is taken.

It is what grows with the number of sequences and their lengths; weights are there already when a session opens.
"""

import torch

from fledge.decoding.cache import layout_of
from fledge.decoding.probe import ability_of
from fledge.errors import UserError, gib
from fledge.target.model import Target
from fledge.target.products import free_memory


def bytes_per_token(target: Target) -> int:
    """Keys and values of one token in all layers; 0 where the library's cache holds them, which grows by itself."""
    if not ability_of(target).own_cache:
        return 0
    slabs = [slab for keys_and_values in layout_of(target).values() for slab in keys_and_values]
    return sum(slab.num_heads * slab.head_dim * slab.dtype.itemsize for slab in slabs)


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device, torch's own unused blocks included."""
    if device.type != "cuda":
        return free_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(target: Target, batch: int, num_tokens: int) -> None:
    """Refuse a batch of sequences of so many tokens whose keys and values do not fit."""
    need, found = bytes_per_token(target) * batch * num_tokens, free_bytes(target.device)
    if need > found:
        raise UserError(
            f"{target.name}: keys and values of {batch} sequences of {num_tokens} tokens need {gib(need)}, and "
            f"{gib(found)} of memory are free. Decode fewer at once (--batch-size), or shorter answers."
        )


def described(target: Target, batch: int) -> str:
    """What a batch will take, for the log."""
    need = bytes_per_token(target) * batch * 1000
    return f"{gib(need)} of keys and values for every 1000 tokens of theirs, {gib(free_bytes(target.device))} free"
