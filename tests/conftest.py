"""Ctrl-C reaches every test. A suite that a script starts in the background has SIGINT ignored, and its children inherit that: those
tests that interrupt something would wait for it in vain."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
