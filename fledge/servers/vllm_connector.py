"""vLLM's hidden-state connector for servers without CUDA; with CUDA it is the stock one, unchanged.

vLLM loads this file by name (`kv_connector_module_path`), inside the server's own environment: it imports nothing of
fledge, and it is one of the two files that know vLLM (engine.py knows its command line). The stock connector copies
through CUDA streams; on the CPU build only its lock file appears. Here the copy is a plain one and the file is renamed
into place before the lock is released, so a reader finds all of it.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)


class FledgeHiddenStates(ExampleHiddenStatesConnector):
    """Writes a finished request's hidden states at once where there is no CUDA stream to write them behind."""

    def _submit_async_write(self, pending: Any) -> None:
        assert self._kv_cache is not None
        if self._kv_cache.is_cuda:
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        temporary = f"{pending.filename}.tmp"
        save_file({"hidden_states": states, "token_ids": pending.token_ids.clone()}, temporary)
        os.replace(temporary, pending.filename)
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is not None:
            os.close(lock)  # releases the exclusive lock a reader waits for
        self._req_copy_events[pending.req_id] = _Done()


class _Done:
    """The copy has been made."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None
