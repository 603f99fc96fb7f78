"""Three AdamW steps of a TTTModule under FSDP2 on CPU (gloo): OUTPUT_FILE. Under torchrun, or alone and not sharded.

Each rank takes its part of four documents; gradients are averaged over ranks, so a rank's loss counts them twice. Rank
0 writes the weights.
"""

import os
import sys

import torch
import torch.distributed as dist
from tiny import tiny_config, tiny_target, tiny_vocab
from tiny_trainer import samples

from fledge.drafters.batch import pack
from fledge.drafters.eagle3.model import DraftModel
from fledge.drafters.loss import LossSettings
from fledge.target.live import LiveSource
from fledge.train.module import TTTModule
from fledge.train.run import leave


def main(path: str) -> None:
    """Take the steps."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    target = tiny_target("qwen3")
    torch.manual_seed(0)
    draft = DraftModel(tiny_config(target), target.embedding_weight)
    draft.set_vocab(*tiny_vocab(target.vocab_size, draft.config.draft_vocab_size))
    draft.warm_start_head(target.head_weight)
    module = TTTModule(draft, target.head, 3, LossSettings())
    documents = samples(4)
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
        assert all(type(parameter).__name__ == "DTensor" for parameter in module.parameters())
        documents = documents[rank::world]
    batch = pack([LiveSource(target).record(document) for document in documents])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(3):
        (module(batch).loss * world / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: p.full_tensor() if world > 1 else p for name, p in module.named_parameters()}  # type: ignore
    if rank == 0:
        torch.save({name: weight.detach().clone() for name, weight in whole.items()}, path)
    leave(torch.device("cpu"))


if __name__ == "__main__":
    main(sys.argv[1])
