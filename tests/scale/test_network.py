"""Which interface the ranks talk over: what is refused before anybody waits, and the one line of ranks that do not meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from scale_helpers import ROOT, environment

from scale.network import check_interfaces, join
from tppo_ref.method.errors import UserError

THERE = ["lo", "eth0", "ib0", "ib1", "docker0"]
SEVERAL = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"GLOO_SOCKET_IFNAME": "eth0"},
        {"GLOO_SOCKET_IFNAME": "eth0,ib0"},
        {"NCCL_SOCKET_IFNAME": "ib"},
        {"NCCL_SOCKET_IFNAME": "=ib1"},
        {"NCCL_SOCKET_IFNAME": "^docker,lo"},
        {"NCCL_SOCKET_IFNAME": "^=eth0"},
        SEVERAL | {"GLOO_SOCKET_IFNAME": "ib0"},
    ],
)
def test_an_interface_that_is_there_is_taken(variables):
    check_interfaces(variables, THERE, own_address=lambda: "127.0.1.1")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GLOO_SOCKET_IFNAME", "eth1"),
        ("GLOO_SOCKET_IFNAME", "eth0,eth1"),
        ("GLOO_SOCKET_IFNAME", "eth"),  # gloo wants whole names
        ("NCCL_SOCKET_IFNAME", "bond"),
        ("NCCL_SOCKET_IFNAME", "=ib"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib,docker"),
    ],
)
def test_an_interface_that_is_not_there_is_one_line_that_names_those_that_are(variable, value):
    with pytest.raises(UserError) as error:
        check_interfaces({variable: value}, THERE)
    assert str(error.value).startswith(
        f"{variable}: got {value}; expected one of this machine's interfaces (lo, eth0, ib0, ib1, docker0)"
    )


def test_a_machine_whose_name_is_the_loopback_is_refused_among_several_and_not_alone():
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME: got nothing, and \S+ stands for 127.0.1.1, which other machines"):
        check_interfaces(SEVERAL, THERE, own_address=lambda: "127.0.1.1")
    check_interfaces(SEVERAL, THERE, own_address=lambda: "10.0.0.7")
    check_interfaces({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, THERE, own_address=lambda: "127.0.1.1")


@pytest.mark.parametrize("fails", ["the group", "the first number"])
def test_ranks_that_do_not_meet_are_one_line_with_rank_address_and_variables(fails, monkeypatch):
    """A stand-in of both failures: NCCL's needs GPUs on two machines."""
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "eth0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)

    def unreachable():
        raise RuntimeError("connectFullMesh failed\nwith many lines")

    def well():
        pass

    with pytest.raises(UserError) as error:
        join(unreachable, well) if fails == "the group" else join(well, unreachable)
    line = str(error.value)
    assert line.startswith("network: rank 3 of 16 did not reach the others through node0:29500 "
                           "(GLOO_SOCKET_IFNAME=eth0, NCCL_SOCKET_IFNAME=not set): connectFullMesh failed with many lines")  # fmt: skip
    assert "\n" not in line


def test_a_rank_whose_master_is_not_there_says_so_within_the_time_limit_that_it_is_given():
    """torch's own limits are five and thirty minutes."""
    with socket.socket() as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        program = "from scale.distributed import start\nstart(device='cpu', timeout_s=0.2)"
        ranks = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(taken.getsockname()[1])}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", program], env=environment(**ranks), cwd=ROOT, capture_output=True, text=True,
                              timeout=120)  # fmt: skip
    assert done.returncode == 1
    assert f"UserError: network: rank 1 of 2 did not reach the others through 127.0.0.1:{ranks['MASTER_PORT']}" in done.stderr


def test_the_interfaces_of_this_machine_are_read():
    check_interfaces({"GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1]})
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME: got nosuch0"):
        check_interfaces(dict(os.environ) | {"GLOO_SOCKET_IFNAME": "nosuch0"})
