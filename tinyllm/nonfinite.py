"""Where a number went wrong first: in a weight, in a module's output, in the loss, or in a gradient.

    with first_bad(model) as found:
        loss = ...                    # one micro-batch, forward
        loss.backward()
    found                             # ["the output of blocks.1.mlp"], or [] if all is finite

A NaN spreads: one in the first block is everywhere a moment later. So the pass is made once more, watched, and the
first that is not finite is named. It costs as much as the pass, and is done when a step has failed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_finite(value: Any) -> bool:
    """Whether a tensor, or each of several, is finite; what is no tensor of floats is."""
    if isinstance(value, tuple | list):
        return all(map(is_finite, value))
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def bad_tensor(named: Mapping[str, Any]) -> str:
    """The name of the first that is not finite; '' if all are."""
    return next((name for name, value in named.items() if not is_finite(value)), "")


@contextmanager
def first_bad(model: nn.Module) -> Iterator[list[str]]:
    """Watch a forward and a backward pass; the list gets, in words, each thing that was not finite, the first first."""
    found: list[str] = []
    handles: list[Any] = []

    def note(what: str, value: Any) -> None:
        if not is_finite(value):
            found.append(what)

    def watch(name: str, module: nn.Module) -> None:
        parent = name.rpartition(".")[0]
        what, inside = name or "the model", f"inside {parent or 'the model'}, before {name}"

        def before(_: nn.Module, args: Any) -> None:
            note(f"what is computed {inside}", args)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            note(f"the output of {what}", output)
            for part in output if isinstance(output, tuple | list) else (output,):
                if isinstance(part, Tensor) and part.requires_grad:
                    part.register_hook(lambda gradient: note(f"the gradient of the output of {what}", gradient))

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        watch(name, module)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook
            handles.append(hook(lambda p, name=name: note(f"the gradient of {name}", p.grad)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
