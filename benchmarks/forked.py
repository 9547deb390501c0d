"""A rank as a fork of its launcher: what scale/launch.py asks of subprocess.Popen, without the imports of a new program.

They take longer than a tiny run. For kill_jobs.py and for tests of scale/; imports nothing of ours.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn


class Forked:
    """A process of its own session that runs `begin`, as `leave_with` does. Its stdin is a pipe that ends with this process."""

    def __init__(self, begin: Callable[[], int | None]):
        read, write = os.pipe()
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(read)
            self.stdin = os.fdopen(write, "wb")  # for as long as the launcher lives
            return
        os.setsid()
        os.dup2(read, 0)
        os.closerange(3, 256)  # else it would itself hold open what tells that its launcher is gone
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        leave_with(begin)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def leave_with(begin: Callable[[], int | None]) -> NoReturn:
    """End this process with what `begin` returns or exits with (None: 0); 1, and a traceback, for any other exception."""
    code = 1
    try:
        code = begin() or 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
