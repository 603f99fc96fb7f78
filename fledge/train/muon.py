"""Muon for the draft's matrices and another optimizer for the rest, as one optimizer.

Muon steps along the orthogonalised momentum of a matrix (https://kellerjordan.github.io/posts/muon/), scaled so that
the learning rate of AdamW serves (arXiv 2502.16982). The algorithm is `torch.optim.Muon`; here is only what one Trainer
needs to drive two optimizers: shared groups and state, so that schedules, clipping and checkpoints see a single one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

TABLES = {"lm_head", "markov_head", "confidence_head"}


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the layers and fc, everything else): heads are tables of tokens, which Muon is not for."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [
        parameter for name, parameter in named if parameter.dim() == 2 and not TABLES.intersection(name.split("."))
    ]
    chosen = {id(parameter) for parameter in matrices}
    return matrices, [parameter for _, parameter in named if id(parameter) not in chosen]


class MuonWithAuxiliary(Optimizer):
    """`matrices` by Muon, `rest` by the optimizer that `make_rest` makes of them."""

    def __init__(
        self, matrices: Sequence[nn.Parameter], rest: Sequence[nn.Parameter],
        make_rest: Callable[[Sequence[nn.Parameter]], Optimizer], *, lr: float, weight_decay: float,
    ) -> None:  # fmt: skip
        self._muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._rest = make_rest(rest)
        self._muon_groups = len(self._muon.param_groups)
        super().__init__([*self._muon.param_groups, *self._rest.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Loading a checkpoint makes new groups and a new state: hand them on."""
        self._muon.param_groups = self.param_groups[: self._muon_groups]
        self._rest.param_groups = self.param_groups[self._muon_groups :]
        self._muon.state = self._rest.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Tensor | None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "the Trainer computes its loss before the step"
        self._share()
        self._muon.step()
        self._rest.step()
        return None
