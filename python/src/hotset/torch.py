"""Leased components as the weights of torch modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ._memory import Component

if TYPE_CHECKING:
    import torch


def load_into(
    module: torch.nn.Module,
    component: Component,
    *,
    strict: bool = True,
    prefix: str = "",
    rename: Callable[[str], str] | None = None,
) -> torch.nn.Module:
    """Makes the leased tensors the module's parameters and buffers, without a copy; the module may be on `meta`.

    `prefix` is taken off the tensors' names (others are left out), `rename` maps what is left. With `strict`, names must match.
    The parameters are for inference: they want no gradients, and writing into them ends the process.
    """
    tensors = component.state_dict(prefix)
    if rename is not None:
        tensors = {rename(name): tensor for name, tensor in tensors.items()}
    module.requires_grad_(False)
    module.load_state_dict(tensors, strict=strict, assign=True)
    return module
