"""Muon for the draft's matrices and another optimizer for the rest, as one optimizer.

Muon steps along the orthogonalised momentum of a matrix (https://kellerjordan.github.io/posts/muon/), scaled so that
the learning rate of AdamW serves (arXiv 2502.16982). The algorithm is `torch.optim.Muon`; here is only what one Trainer
needs to drive two optimizers: shared groups and state, so that schedules, clipping and checkpoints see a single one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer
from torch.optim import _muon as torch_muon

from fledge.target.linear import multiplies_bf16

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
        with _orthogonalising(self.param_groups[0]["params"][0].device):
            self._muon.step()
        self._rest.step()
        return None


@contextmanager
def _orthogonalising(device: torch.device) -> Iterator[None]:
    """PyTorch's iteration rounds to bf16. A CPU without products of bf16 iterates in fp32: seconds a step less."""
    if device.type != "cpu" or multiplies_bf16():
        yield
        return
    theirs: Any = torch_muon
    before, theirs._zeropower_via_newtonschulz = theirs._zeropower_via_newtonschulz, orthogonalised
    try:
        yield
    finally:
        theirs._zeropower_via_newtonschulz = before


def orthogonalised(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """What `torch.optim.Muon` makes of a matrix (Newton-Schulz iteration), in fp32."""
    a, b, c = coefficients
    flat = grad.float() if grad.shape[0] <= grad.shape[1] else grad.float().T
    flat = flat / flat.norm().clamp(min=eps)
    for _ in range(steps):
        gram = flat @ flat.T
        flat = torch.addmm(flat, torch.addmm(gram, gram, gram, beta=b, alpha=c), flat, beta=a)
    return flat if grad.shape[0] <= grad.shape[1] else flat.T
