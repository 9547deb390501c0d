"""The weights that an update moves: in float32 also where a model computes in bfloat16.

A bfloat16 number has 8 significant bits: added to a weight, what is smaller than its 512th part is lost, and most updates with a
useful learning rate are. So optimiser and averages move float32 weights, of which the model holds the rounding, and gradients are
added up in float32. scale/ does the same by FSDP2, whose parameters are float32 and are rounded as they are gathered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Masters:
    """The float32 weights of `module`, by name; where it holds float32 or float64 itself, its own parameters.

    A tied weight is there once. Where a model's weights are not its masters, a checkpoint needs `apart`, too.
    """

    def __init__(self, module: nn.Module):
        self.parameters = dict(module.named_parameters())
        self.tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self.tensors[name] = parameter
            if parameter.dtype != dtype:
                self.tensors[name] = parameter.detach().to(dtype)
                parameter.grad_dtype = dtype

    @property
    def apart(self) -> dict[str, Tensor]:
        """The masters that are no parameters of the model."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor is not self.parameters[name]}

    def take_gradients(self) -> None:
        """The model's gradients become the masters', of the same memory."""
        for name, tensor in self.tensors.items():
            tensor.grad = self.parameters[name].grad

    def drop_gradients(self) -> None:
        for tensor in (*self.tensors.values(), *self.parameters.values()):
            tensor.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """The model's weights become the masters', rounded."""
        for name, tensor in self.apart.items():
            self.parameters[name].copy_(tensor)

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        """Masters that were saved, and the model's weights with them.

        LookupError for one that is missing, ValueError for one of another shape.
        """
        for name, tensor in self.tensors.items():
            if saved[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(saved[name].shape)}, not {list(tensor.shape)}")
            tensor.copy_(saved[name])
        self.round()
