"""A second device that is not there: what is made without a device lies on the host, and may not meet what lies with the models.

A GPU refuses tensors of two devices in one operation; on a CPU nobody notices. Under `TwoDevices` each tensor carries where it would lie,
all arithmetic stays on the CPU, and a mixture raises as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

AWAY = torch.device("cuda")
"""What `.device` says of tensors that lie with the models."""


class TwoDevices(TorchFunctionMode):
    """As a context. `place` puts a module's weights away; so does `device=AWAY`, and `.to(AWAY)`.

    May mix, as on a GPU: host tensors without dimensions, indices, and the two sides of a copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.makers, self.met = _device_constructors(), 0

    @staticmethod
    def place(*modules: torch.nn.Module) -> None:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.away = True  # type: ignore[attr-defined]

    def __enter__(self) -> TwoDevices:
        from_numpy = self.from_numpy = torch.from_numpy  # torch tells no mode of this one

        def on_host(array: Any) -> torch.Tensor:
            tensor = from_numpy(array)
            tensor.away = False  # type: ignore[attr-defined]
            return tensor

        torch.from_numpy = on_host
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.from_numpy = self.from_numpy
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors((args, kwargs)))
        away, host = ([t for t in tensors if getattr(t, "away", None) is side] for side in (True, False))
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return AWAY if away else func(*args, **kwargs)
        if func == torch.Tensor.numpy and away:
            raise TypeError("numpy() of a tensor on a device")
        name = getattr(func, "__name__", "")
        wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if func is torch.Tensor.to and len(tensors) == 2:  # x.to(other)
            wanted = [AWAY if getattr(args[1], "away", False) else torch.device("cpu")]
            args = (args[0], args[1].dtype)
        args = tuple(torch.device("cpu") if isinstance(x, torch.device) else x for x in args)
        kwargs = {k: torch.device("cpu") if isinstance(x, torch.device) else x for k, x in kwargs.items()}
        moved = bool(wanted) or name == "cpu"
        if moved:
            side = wanted == [AWAY]
        elif func in self.makers or not tensors:
            side = False
        else:
            if name not in ("copy_", "__getitem__", "set_"):
                indices = [] if name != "__setitem__" else list(_tensors(args[1]))
                far = [t for t in host if t.dim() and not any(t is i for i in indices)]
                self.met += bool(away)
                if away and far:
                    raise RuntimeError(f"{name}: a tensor of shape {tuple(far[0].shape)} was made without the device of the models")
            first = getattr(tensors[0], "away", None)
            side = first if name in ("copy_", "__getitem__", "set_") else True if away else False if host else None
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            if moved and any(tensor is t for t in tensors) and getattr(tensor, "away", None) is not side:
                out = tensor = tensor.clone()  # .to() gave the tensor itself
            tensor.away = side
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
