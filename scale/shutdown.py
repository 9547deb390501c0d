"""How ranks leave when one of them fails: which one says why, in one line, and what makes the others go, too.

`python scale/launch.py` watches its own workers. Under torchrun the agent ends all ranks with SIGTERM as soon as one has gone, and
keeps the store in which the ranks agree on who speaks.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time

QUIET_S = 10.0  # how long a rank keeps quiet about what another one should tell
CLAIM_S = 5.0  # how long it waits for the others' word on who tells
REMEDY = "start again with --algo.run.resume true to go on from the last checkpoint"
report_lock = threading.Lock()


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def claim_the_report() -> bool:
    """True on the first rank that calls it: several ranks fail of one cause, and one line is enough.

    The store in which they agree may be gone with rank 0: then whoever started the ranks tells, and where nobody did, each of them.
    Or it stands still with rank 0, and answers nobody for ever: then each tells.
    """
    try:
        claims = _claims(1, within_s=CLAIM_S)
    except queue.Empty:
        return True
    if claims is None:
        return int(os.environ.get("RANK", "0")) == 0 or not (under_torchrun() or "TPPO_PARENT_PIPE" in os.environ)
    return claims == 1


def keep_quiet() -> None:
    """Wait until the rank that failed has said why: at most QUIET_S, in which the launcher finds out whether one was killed.

    Where rank 0 has left and the store with it, a second is enough for the launcher to see which one was first.
    """
    end = time.monotonic() + QUIET_S
    while (left_s := end - time.monotonic()) > 0:
        try:
            claims = _claims(0, within_s=left_s)
        except queue.Empty:
            return
        if claims:
            return
        if claims is None:
            end = min(end, time.monotonic() + 1.0)
        time.sleep(0.1)


def _claims(more: int, *, within_s: float) -> int | None:
    """How often the report has been claimed, `more` times now; None where there is no store. queue.Empty where it does not answer
    in time: it stands still with rank 0, and torch would wait for it as long as for any other rank."""
    import torch.distributed as dist

    answers: queue.Queue[int | None] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(dist.distributed_c10d._get_default_store().add("tppo/failures", more))
        except Exception:  # no process group yet, or its store has gone with rank 0
            answers.put(None)

    threading.Thread(target=ask, daemon=True).start()
    return answers.get(timeout=within_s)


def tells_before_the_start() -> bool:
    """Whether this rank should tell a mistake that was found before the ranks know of each other, and that most likely all find.

    Rank 0 tells it. The others leave after it: torchrun ends every rank as soon as one has gone. Whoever is still there after that
    found a mistake of its own machine.
    """
    if os.environ.get("RANK", "0") == "0":
        return True
    if under_torchrun():
        time.sleep(QUIET_S)
    return under_torchrun()


def message_of_a_lost_rank(error: Exception) -> str:
    """What to say of an error that only means that another rank is gone or late; empty for any other error."""
    import torch.distributed as dist

    text = str(error)
    if not (isinstance(error, dist.DistError) or lost_a_rank(text)):
        return ""
    late = "imed out" in text
    what = "waited for another rank in vain" if late else "lost another rank, which was killed or is gone"
    return f"error: rank {os.environ['RANK']} {what}; {REMEDY}"


def message_of_a_signal(rank: int, number: int) -> str:
    """What to say of a rank that a signal ended. SIGABRT is its own doing: under NCCL no exception tells of too long a wait, but a
    thread of torch's says so in log lines, and aborts."""
    name = signal.Signals(number).name
    if number == signal.SIGABRT:
        what = (f"aborted ({name}): on GPUs most often NCCL's watchdog, which ends a wait after cluster.timeout_s; another rank "
                f"was late or is gone, and the log above says at what this one waited")  # fmt: skip
    else:
        what = f"was killed ({name})"
    return f"error: rank {rank} {what}; {REMEDY}"


def lost_a_rank(text: str) -> bool:
    """Whether an error's text is one of those that torch has for a rank that is gone or late."""
    return any(sign in text for sign in ("gloo/transport", "Timed out waiting", "NCCL"))


def wait_for_all_ranks() -> None:
    """The last collective of ranks that leave in order. One that cannot, as its disk is full at the end, tells why itself."""
    import torch.distributed as dist

    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()


def exit_when_the_job_ends() -> None:
    """Leave when whoever started this rank is gone, or torchrun sends SIGTERM."""
    if "TPPO_PARENT_PIPE" in os.environ:
        threading.Thread(target=_exit_when_the_launcher_is_gone, daemon=True).start()
    if under_torchrun():
        _exit_on_sigterm()
        threading.Thread(target=_exit_when_orphaned, args=(os.getppid(),), daemon=True).start()


def _exit_when_orphaned(agent: int) -> None:
    """torchrun starts its ranks in sessions of their own: a kill -9 of torchrun alone would leave them running."""
    while os.getppid() == agent:
        time.sleep(1)
    os._exit(1)


def _exit_when_the_launcher_is_gone() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _exit_on_sigterm() -> None:
    """At once, and with a word where no rank has said why.

    A thread does it: the rank may stand in a collective operation with a rank that is gone, and Python's handlers wait for its end.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def leave() -> None:
        while os.read(read, 1) != bytes([signal.SIGTERM]):
            pass
        with report_lock:  # not between a rank's word that it will say why, and the line itself
            if claim_the_report():
                print(f"error: torchrun ended the ranks: one was killed or is gone (torchrun's report says which), or the job was "
                      f"stopped; {REMEDY}", file=sys.stderr, flush=True)  # fmt: skip
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
