"""Which parameter is updated how: decay groups, and the optimizers over them.

    for group in parameter_groups(model, config.optim):
        print(group.name, len(group.names), group.count)     # decay 18 811,392 / no_decay 9 1,152
    optimizers = build_optimizers(model, config.optim)
    set_learning_rate(optimizers, factor)                    # factor in [0, 1] of each group's peak

Weight decay is for matrices that multiply activations: tensors of two or more dimensions. Biases and norm gains, of one
dimension, are left alone. Whether embedding tables decay is the config's choice (`optim.decay_embeddings`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.config import OptimConfig
from tinyllm.errors import CheckpointError

Optimizers = list[torch.optim.Optimizer]
# What they remember of each parameter: tensors of its shape, but for the number of steps.
PARTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


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


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """AdamW over its groups, and for `muon` a Muon (Jordan et al. 2024) over the matrices inside the blocks."""
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
        optimizers.append(torch.optim.Muon([muon], momentum=config.muon_momentum))
    if as_dicts:  # a model of one's own may be nothing but matrices
        # One fused kernel for all tensors; every device we run on (CPU, CUDA, MPS) has it.
        adamw = torch.optim.AdamW(list(as_dicts.values()), betas=config.betas, eps=config.eps, fused=True)
        optimizers.append(adamw)
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
        own = optimizer.state_dict()  # numbers the parameters; load_state_dict moves tensors to their devices
        # Copied, since load_state_dict keeps a tensor that is there already: steps would change the checkpoint's.
        numbered = {
            number: {key: v.clone() if isinstance(v, Tensor) else v for key, v in state[name].items()}
            for group in own["param_groups"]
            for number, name in zip(group["params"], group["names"], strict=True)
            if name in state
        }
        optimizer.load_state_dict(own | {"state": numbered})


def refuse_other_state(optimizers: Optimizers, state: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError unless each state is of a parameter there is, and has its parts, in its shape."""
    wanted = {
        name: dict.fromkeys(PARTS[type(optimizer)], parameter.shape)
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
    averages = {type(optimizer): 1 if isinstance(optimizer, torch.optim.Muon) else 2 for optimizer in optimizers}
    return sum(averages[type(o)] * p.nbytes for o in optimizers for group in o.param_groups for p in group["params"])
