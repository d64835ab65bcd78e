"""Which parameter is updated how: decay groups, and the optimizers over them.

    for group in parameter_groups(model, config.optim):
        print(group.name, len(group.names), group.count)     # decay 18 811,392 / no_decay 9 1,152
    optimizers = build_optimizers(model, config.optim)
    set_learning_rate(optimizers, factor)                    # factor in [0, 1] of each group's peak

Weight decay is for matrices that multiply activations: tensors of two or more dimensions. Biases and norm gains, of one
dimension, are left alone. Whether embedding tables decay is the config's choice (`optim.decay_embeddings`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tinyllm.config import OptimConfig
from tinyllm.errors import CheckpointError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the steepest quintic that stays near one
STACK = 1 << 22  # values of matrices that Muon takes together


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are treated alike."""

    name: str  # decay, no_decay, muon
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    weight_decay: float
    peak_lr: float

    @property
    def count(self) -> int:
        return sum(p.numel() for p in self.parameters)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[ParameterGroup]:
    """Every trainable parameter of the model in exactly one group; empty groups are left out."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = head_of(model)
    members: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "decay": {}, "no_decay": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_embedding = id(parameter) in embeddings
        is_head = head is not None and parameter is head.weight
        if config.name == "muon" and parameter.dim() == 2 and not is_embedding and not is_head:
            members["muon"][name] = parameter
        elif parameter.dim() >= 2 and (config.decay_embeddings or not is_embedding):
            members["decay"][name] = parameter
        else:
            members["no_decay"][name] = parameter
    return [
        ParameterGroup(
            group,
            tuple(named),
            tuple(named.values()),
            weight_decay=0.0 if group == "no_decay" else config.weight_decay,
            peak_lr=config.muon_lr if group == "muon" else config.lr,
        )
        for group, named in members.items()
        if named
    ]


def head_of(model: nn.Module) -> nn.Linear | None:
    """The output head: the last nn.Linear with as many outputs as the first nn.Embedding has rows.

    One inside an nn.ModuleList is a layer like others, however wide; None where the head is the embedding itself.
    """
    rows = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    layers = {id(m) for each in model.modules() if isinstance(each, nn.ModuleList) for m in each.modules()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in layers]
    return next((m for m in reversed(linears) if rows in (None, m.out_features)), None)


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) by torch's fused kernel, which CPU, CUDA and MPS have.

    The function of torch.optim.AdamW; that class imports the compiler, which takes a second of every start.
    """

    parts = ("step", "exp_avg", "exp_avg_sq")  # what it remembers of a parameter: tensors of its shape, but the first

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            states = [self.state_of(p) for p in given]
            steps, averages, squares = ([state[part] for state in states] for part in self.parts)
            adamw(
                given,
                [p.grad for p in given],
                averages,
                squares,
                [],
                steps,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
            )

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self.state:
            zeros = (torch.zeros((), device=p.device), torch.zeros_like(p), torch.zeros_like(p))
            self.state[p] = dict(zip(self.parts, zeros, strict=True))
        return self.state[p]


class Muon:
    """Muon (Jordan et al. 2024): momentum whose singular values are all brought near one, for matrices.

    The formula of torch.optim.Muon, but matrices of one shape go through it together: those of a small model are done
    sooner than asked for one by one.
    """

    parts = ("momentum_buffer",)

    def __init__(self, groups: list[dict[str, Any]], momentum: float, dtype: torch.dtype = torch.bfloat16) -> None:
        self.param_groups, self.momentum, self.dtype = groups, momentum, dtype
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            for matrices in stacks(given):
                grads = [p.grad for p in matrices]
                averages = [self.state_of(p)["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(averages, grads, 1 - self.momentum)
                nesterov = torch._foreach_lerp(grads, averages, self.momentum)
                moves = orthogonal(torch.stack(nesterov).to(self.dtype)).to(grads[0].dtype)
                rows, columns = matrices[0].shape
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, moves.unbind(), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def state_of(self, p: Tensor) -> dict[str, Tensor]:
        if p not in self.state:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        return self.state[p]


def stacks(matrices: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those of one shape and type together, as many as cost little memory."""

    def kind(p: Tensor) -> tuple[torch.Size, str]:
        return p.shape, str(p.dtype)

    for (shape, _), alike in groupby(sorted(matrices, key=kind), key=kind):
        rest, size = list(alike), max(1, STACK // max(1, shape.numel()))
        yield from (rest[first : first + size] for first in range(0, len(rest), size))


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with all singular values brought to 0.7-1.2.

    Five Newton-Schulz iterations X <- a X + b (X X^T) X + c (X X^T)^2 X.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # no singular value is above one
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


Optimizers = list[AdamW | Muon]


def build_optimizers(model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.bfloat16) -> Optimizers:
    """AdamW over its groups, and for `muon` a Muon over the matrices inside the blocks, which multiplies in `dtype`."""
    groups = parameter_groups(model, config)
    as_dicts = {
        group.name: {
            "params": list(group.parameters),
            "names": list(group.names),
            "lr": group.peak_lr,
            "peak_lr": group.peak_lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    }
    optimizers: Optimizers = []
    if muon := as_dicts.pop("muon", None):
        optimizers.append(Muon([muon], config.muon_momentum, dtype))
    if as_dicts:  # a model of one's own may be nothing but matrices
        optimizers.append(AdamW(list(as_dicts.values()), config.betas, config.eps))
    return optimizers


def set_learning_rate(optimizers: Optimizers, factor: float) -> None:
    """Give *every* group its peak rate times `factor`."""
    for group in all_groups(optimizers):
        group["lr"] = group["peak_lr"] * factor


def all_groups(optimizers: Optimizers) -> Iterable[dict[str, Any]]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


def state_by_name(optimizers: Optimizers) -> dict[str, dict[str, Any]]:
    """The optimizers' state keyed by parameter name, as a checkpoint keeps it."""
    return {
        name: dict(optimizer.state[parameter])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def load_state_by_name(optimizers: Optimizers, state: dict[str, dict[str, Any]]) -> None:
    """Copy what `state_by_name` returned into optimizers built for the same model and config.

    Raises CheckpointError for a state that does not fit.
    """
    refuse_other_state(optimizers, state)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if name in state:  # a copy: steps must not change the checkpoint's
                    own = {key: value.to(p.device, copy=True) for key, value in state[name].items()}
                    optimizer.state[p] = own


def refuse_other_state(optimizers: Optimizers, state: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError unless each state is of a parameter there is, and has its parts, in its shape."""
    wanted = {
        name: dict.fromkeys(optimizer.parts, parameter.shape)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    for name, values in state.items():
        what = f"there is no {name} to train" if name not in wanted else ""
        for key in () if what else sorted(values.keys() | wanted[name].keys()):
            here = tuple(values[key].shape) if isinstance(values.get(key), Tensor) else "no tensor"
            asked = () if key == "step" else tuple(wanted[name].get(key, ("not there",)))
            what = what or (f"{name}.{key} is {here}, and must be {asked}" if here != asked else "")
        if what:
            raise CheckpointError(f"the checkpoint's optimizer state does not fit its config: {what}")


def state_bytes(optimizers: Optimizers) -> int:
    """Bytes of the optimizers' state after the first step: two averages a parameter, for Muon one."""
    averages = {AdamW: 2, Muon: 1}
    return sum(averages[type(o)] * p.nbytes for o in optimizers for group in o.param_groups for p in group["params"])
