"""The entry point: on one machine it starts its own workers, under torchrun it is one of them.

    python scale/launch.py [train] --config scale/configs/cpu-tiny.yaml [--section.field VALUE ...]
    torchrun --nnodes N --nproc-per-node G --rdzv-backend c10d --rdzv-endpoint HOST:29500 scale/launch.py --config FILE
    python scale/launch.py --dry-run --config scale/configs/qwen2.5-32b-math.yaml

Commands: train (default), pretrain-value, evaluate, export, report. Exit codes: 0 done, 2 a user's mistake (one line on stderr),
130 Ctrl-C (once: at the step's edge, with a checkpoint), 1 anything else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python puts a script's own folder first on the path: `import config` anywhere would find ours, and ours would shadow others'.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if p and Path(p).resolve() not in (HERE, HERE.parent))]

COMMANDS = ("train", "pretrain-value", "evaluate", "export", "report")
GRACE_S = 20.0  # how long the other ranks may take to leave after one has gone


def main(argv: Sequence[str]) -> int:
    from scale.shutdown import tells_before_the_start
    from tppo_ref.method.errors import UserError
    from tppo_ref.runs.stop import sigterm_stops

    try:
        if "RANK" in os.environ:  # a rank leaves without a word until it trains: who asked it to, says so
            return _run(argv)
        with sigterm_stops():
            return _run(argv)
    except UserError as error:
        if tells_before_the_start():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(argv: Sequence[str]) -> int:
    from scale.config import ScaleConfig, check, check_training
    from tppo_ref.method.errors import UserError, nearest
    from tppo_ref.runs.parsing import fields_given, parse

    arguments = [a for a in argv if a != "--dry-run"]
    command = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    if command not in COMMANDS:
        raise UserError(f"command: got {command!r}; expected one of {', '.join(COMMANDS)}{nearest(command, COMMANDS)}")
    config = parse(ScaleConfig, arguments, prog="python scale/launch.py", description=__doc__ or "")
    config = check(config, fields_given(ScaleConfig, arguments))
    if command == "train":
        check_training(config)
    if "--dry-run" in argv:
        from scale.memory.dryrun import dry_run

        return dry_run(config)
    if command == "report":
        from scale.report import report

        return report(config)
    if "RANK" in os.environ:
        return work(command, config)
    return start_workers(argv, config)


def start_workers(argv: Sequence[str], config: object) -> int:
    """Start cluster.devices_per_node ranks of this machine, wait, and when one goes, see to it that all go.

    The first failure's exit code is the job's. Workers hold the other end of a pipe: should this process be killed, they leave too.
    """
    from scale.network import ranks_here
    from scale.shutdown import message_of_a_signal

    workers = []
    for rank in ranks_here(config.cluster.devices_per_node):  # type: ignore[attr-defined]
        environment = os.environ | rank | {"TPPO_PARENT_PIPE": "1", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that goes would make the others print pages of C++ frames
        environment.setdefault("OMP_NUM_THREADS", str(config.algo.run.threads))  # type: ignore[attr-defined]
        workers.append(subprocess.Popen([sys.executable, str(HERE / "launch.py"), *argv], env=environment, stdin=subprocess.PIPE,
                                        start_new_session=True))  # fmt: skip
    asked = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        for worker in workers:
            if worker.poll() is None:
                # Not SIGINT: until a rank has a way of its own to stop, it would end in a traceback.
                worker.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    while all(worker.poll() in (None, 0) for worker in workers) and any(worker.poll() is None for worker in workers):
        time.sleep(0.1)
    deadline = time.monotonic() + (GRACE_S if not asked else 600.0)
    failed = next(((r, w.returncode) for r, w in enumerate(workers) if w.poll() not in (None, 0)), None)
    if failed and failed[1] < 0 and asked:  # asked before it trained
        print("stopped", file=sys.stderr)
        failed, deadline = (failed[0], 130), time.monotonic() + GRACE_S
    elif failed and failed[1] < 0:  # the others wait for it in vain
        deadline = 0.0
        print(message_of_a_signal(failed[0], -failed[1]), file=sys.stderr)
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.wait()
    if failed is None:
        return 0
    return failed[1] if failed[1] > 0 else 1


def console(argv: Sequence[str]) -> int:
    """`tppo launch ...`: the arguments of `main` behind the command's name."""
    return main(argv[1:])


def work(command: str, config: object) -> int:
    """One rank. The first rank to fail says so, in one line; the exit code is the same everywhere."""
    import logging

    from tqdm import tqdm

    from scale import commands, shutdown
    from scale.build import with_base_model
    from scale.config import ScaleConfig, check_ranks
    from scale.distributed import Collective, start
    from tppo_ref.method.errors import UserError

    assert isinstance(config, ScaleConfig)
    shutdown.exit_when_the_job_ends()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, and these processes leave without giving it back
    code, message = 0, ""
    world = None
    try:
        world = start(
            tensor_parallel=config.engine.tensor_parallel, context_parallel=config.sharding.context_parallel,
            device=config.algo.model.device, timeout_s=config.cluster.timeout_s,
        )  # fmt: skip
        if command in ("train", "pretrain-value"):  # the others take what there is
            check_ranks(config, world.world)
        getattr(commands, command.replace("-", "_"))(with_base_model(config, Collective(world.flat)), world)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt as stop:
        code, message = 130, str(stop) or "stopped"
    except Exception as error:
        code, message = 1, shutdown.message_of_a_lost_rank(error)
        if message and not shutdown.under_torchrun():
            shutdown.keep_quiet()  # the launcher says which one was killed, and ends the rest
        elif not message:
            message = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            traceback.print_exc()
    alone = bool(message) and world is None and shutdown.tells_before_the_start()
    with shutdown.report_lock:
        if message and (alone or (world and shutdown.claim_the_report())):
            print(message, file=sys.stderr, flush=True)
    if code in (0, 130):
        shutdown.wait_for_all_ranks()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no orderly end: vLLM and torch each take the process groups down, and the second one fails


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
