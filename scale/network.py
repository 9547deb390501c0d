"""Which network the ranks talk over, and one line where they cannot reach each other.

gloo listens on the address that this machine's name stands for, or on the interface that GLOO_SOCKET_IFNAME names; NCCL chooses
among those that NCCL_SOCKET_IFNAME allows ("ib,eth": beginnings of names; "=eth0": a whole name; "^docker": all others). Where a
machine's name stands for 127.0.1.1, as Debian's installer leaves it, the other ranks wait in vain: refused before anybody waits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence

from tppo_ref.method.errors import UserError, refusal

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def check_interfaces(
    environment: Mapping[str, str] = os.environ, there: Sequence[str] | None = None, own_address: Callable[[], str] | None = None
) -> None:
    """UserError where a variable names no interface of this machine, or where gloo would listen where only this machine hears it.

    there         names of this machine's interfaces
    own_address   the address that this machine's name stands for
    """
    there = [name for _, name in socket.if_nameindex()] if there is None else there
    choice = f"one of this machine's interfaces ({', '.join(there)})"
    gloo, nccl = environment.get(GLOO, ""), environment.get(NCCL, "")
    for name in filter(None, gloo.split(",")):
        if name not in there:
            raise UserError(refusal(GLOO, gloo, choice, "name the one that the machines share"))
    if nccl and not any(_nccl_takes(nccl, name) for name in there):
        raise UserError(refusal(NCCL, nccl, choice, "name the one that the machines share"))
    several = int(environment.get("LOCAL_WORLD_SIZE", "1")) < int(environment.get("WORLD_SIZE", "1"))
    if several and not gloo and (address := (own_address or _own_address)()).startswith("127."):
        got = f"nothing, and {socket.gethostname()} stands for {address}, which other machines cannot reach"
        raise UserError(refusal(GLOO, got, choice, f"export {GLOO}=NAME on every machine"))


def ranks_here(world: int) -> list[dict[str, str]]:
    """What torchrun says to each rank of a job that has this machine alone: environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for rank in range(world)]  # fmt: skip


def _nccl_takes(setting: str, name: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME allows an interface."""
    names = setting.lstrip("^=").split(",")
    if setting.lstrip("^").startswith("="):
        found = name in names
    else:
        found = any(name.startswith(beginning) for beginning in names if beginning)
    return found != setting.startswith("^")


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a name that stands for nothing: gloo takes the loopback interface
        return "127.0.0.1"


def join(init: Callable[[], None], first_word: Callable[[], None]) -> None:
    """Make the process group and exchange one number over each of its networks. UserError, in one line, where ranks do not meet.

    init, first_word   the two, which fail or wait until the group's own time limit
    """
    try:
        init()
        first_word()
    except (RuntimeError, ValueError, OSError) as error:
        rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        used = ", ".join(f"{name}={os.environ.get(name) or 'not set'}" for name in (GLOO, NCCL))
        raise UserError(
            f"network: rank {rank} of {world} did not reach the others through {where} ({used}): "
            f"{' '.join(str(error).split())[:160]}; expected every machine to reach every other; set both variables to the "
            f"interface that the machines share (ip -br address), and open its ports"
        ) from None


def first_word(devices: Sequence[str]) -> None:
    """One number over each network: a group that was made may still not carry anything."""
    import torch

    for device in devices:
        word = torch.ones((), device=device)
        torch.distributed.all_reduce(word)
        if int(word) != torch.distributed.get_world_size():
            raise RuntimeError(f"{int(word)} ranks answered on {device}")
