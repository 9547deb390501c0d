"""The killable verifier process: hanging, raising, exiting and printing verifiers, and the waits around them."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tppo_ref.method.errors import UserError
from tppo_ref.tasks.verifier import STATUSES, Score, Verifier

SOURCE = '''
import os, subprocess, sys, threading, time

def by_name(answer, ids, text):
    """Does what the answer says."""
    if answer == "hang":
        while True:
            pass
    if answer == "sleep":
        time.sleep(3600)
    if answer == "raise":
        raise KeyError("no such thing")
    if answer == "raise-odd":
        class Odd(Exception):
            def __str__(self):
                raise RuntimeError
        raise Odd
    if answer == "sys-exit":
        sys.exit(3)
    if answer == "os-exit":
        os._exit(7)
    if answer == "nan":
        return float("nan")
    if answer == "inf":
        return float("inf")
    if answer == "none":
        return None
    if answer == "true":
        return True
    if answer == "text":
        return "1.0"
    if answer == "beyond-float32":
        return -1e39
    if answer == "beyond-the-bound":
        return 1_000_001
    if answer == "at-the-bound":
        return -1e6
    if answer == "huge":
        return 10 ** 400
    if answer == "print":
        print('[0, "ok", 9.0, ""]')
        print("x" * 200_000)
        sys.stdout.flush()
        os.write(1, b"\\xff\\x00 binary\\n" * 100)
        os.write(2, b"\\xff\\x00 binary\\n" * 100)
        subprocess.run(["echo", '[0, "ok", 9.0, ""]'])
    if answer == "read":
        return 0.5 if sys.stdin.read() == "" else -0.5
    if answer == "close":
        os.closerange(0, 64)
        time.sleep(3600)
    if answer == "garble":
        for fd in range(3, 64):
            try:
                os.write(fd, b"garbage\\n")
            except OSError:
                pass
        time.sleep(3600)
    if answer.startswith("child "):
        child = subprocess.Popen(["sleep", "3600"])
        with open(answer[6:], "w") as file:
            file.write(str(child.pid))
        time.sleep(3600)
    return 1.0

def echo(answer, ids, text):
    return float(len(ids)) if text is None else float(len(text))

def slow(answer, ids, text):
    time.sleep(float(answer))
    return 1.0

not_a_function = 3
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A module `toy_verifier` on the path of this process, and so on that of its workers."""
    (tmp_path / "toy_verifier.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "toy_verifier"


def one(verifier: Verifier, answer: str) -> Score:
    verifier.submit(answer, answer, [1, 2], None)
    return verifier.collect(30.0)[answer]


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def test_scores_belong_to_their_responses_and_are_given_once(toy):
    with Verifier(f"{toy}:echo", 10.0, num_workers=2) as verifier:
        for i in range(500):
            verifier.submit(i, "", range(i % 50), None)
        verifier.submit("text", "", [], 'täxt \ud800 "\n')
        scores = verifier.collect(30.0)
        assert scores.pop("text") == Score(9.0, "ok")
        assert scores == {i: Score(float(i % 50), "ok") for i in range(500)}
        assert verifier.collect(1.0) == {}
        assert verifier.counts == {"ok": 501, "timeout": 0, "error": 0, "bad_score": 0}


@pytest.mark.parametrize(
    ("answer", "status"),
    [("hang", "timeout"), ("sleep", "timeout"), ("raise", "error"), ("raise-odd", "error"), ("sys-exit", "error"),
     ("os-exit", "error"), ("close", "error"), ("garble", "error"), ("nan", "bad_score"), ("inf", "bad_score"),
     ("none", "bad_score"), ("true", "bad_score"), ("text", "bad_score"), ("huge", "bad_score"),
     ("beyond-float32", "bad_score"), ("beyond-the-bound", "bad_score")],
)  # fmt: skip
def test_each_failure_is_scored_and_counted_and_spares_its_neighbours(toy, answer, status):
    timeout_s = 0.4 if status == "timeout" else 20.0
    with Verifier(f"{toy}:by_name", timeout_s, failure_score=-0.25) as verifier:
        begin_s = time.monotonic()
        for i in range(5):
            verifier.submit(i, answer if i == 2 else "right", [1], None)
        scores = verifier.collect(15.0)
        assert time.monotonic() - begin_s < 10.0
        assert {i: (s.value, s.status) for i, s in scores.items()} == {
            i: (-0.25, status) if i == 2 else (1.0, "ok") for i in range(5)
        }
        assert scores[2].detail
        assert verifier.counts == {**dict.fromkeys(STATUSES, 0), "ok": 4, status: 1}
        assert one(verifier, "right") == Score(1.0, "ok")


def test_the_largest_score_is_that_of_a_failure_too(toy):
    with Verifier(f"{toy}:by_name", 20.0, failure_score=1e6) as verifier:
        assert one(verifier, "at-the-bound") == Score(-1e6, "ok")
        assert one(verifier, "beyond-float32").value == 1e6


def test_the_detail_names_the_exception(toy):
    with Verifier(f"{toy}:by_name", 10.0) as verifier:
        assert one(verifier, "raise").detail == "KeyError: 'no such thing'"
        assert "code 7" in one(verifier, "os-exit").detail


def test_what_a_verifier_prints_or_reads_never_meets_the_protocol(toy, capfd):
    with Verifier(f"{toy}:by_name", 10.0) as verifier:
        assert one(verifier, "print") == Score(1.0, "ok")
        assert one(verifier, "read") == Score(0.5, "ok")
        assert verifier.counts["ok"] == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_every_one_of_many_hangs_is_timed_on_its_own(toy):
    with Verifier(f"{toy}:by_name", 0.3, num_workers=2) as verifier:
        for i in range(12):
            verifier.submit(i, "sleep" if i % 3 == 0 else "right", [], None)
        scores = verifier.collect(20.0)
        assert {i for i, s in scores.items() if s.status == "timeout"} == {0, 3, 6, 9}
        assert verifier.counts == {"ok": 8, "timeout": 4, "error": 0, "bad_score": 0}


def test_a_queue_of_slow_verifications_is_not_a_timeout(toy):
    with Verifier(f"{toy}:slow", 2.0) as verifier:
        for i in range(12):
            verifier.submit(i, "0.2", [], None)
        assert {s.status for s in verifier.collect(20.0).values()} == {"ok"}  # 2.4 s in all, 0.2 s each


def test_submit_and_poll_do_not_wait(toy):
    with Verifier(f"{toy}:slow", 10.0) as verifier:
        begin_s = time.monotonic()
        verifier.submit(1, "1.0", [], None)
        assert verifier.poll() == {}
        assert verifier.num_pending == 1
        assert time.monotonic() - begin_s < 0.8
        assert wait_until(lambda: verifier.num_pending == 0, 10.0)
        assert verifier.poll() == {1: Score(1.0, "ok")}


def test_what_nobody_waits_for_is_scored_soon_all_the_same(toy):
    with Verifier(f"{toy}:echo", 10.0) as verifier:
        for num in (1, 31, 32, 33, 1, 200):
            for i in range(num):
                verifier.submit(i, "", [], None)
            assert wait_until(lambda: verifier.num_pending == 0, 3.0)  # less than the thread's longest sleep
            assert len(verifier.poll()) == num


def test_a_wait_that_is_too_short_names_what_it_waits_for_and_loses_nothing(toy):
    with Verifier(f"{toy}:slow", 10.0) as verifier:
        verifier.submit("seventh", "1.0", [], None)
        with pytest.raises(TimeoutError, match=r"toy_verifier:slow: 1 responses not scored within 0.01 s.*'seventh'"):
            verifier.collect(0.01)
        assert verifier.collect(10.0) == {"seventh": Score(1.0, "ok")}


def test_a_response_is_submitted_once(toy):
    with Verifier(f"{toy}:slow", 10.0) as verifier:
        verifier.submit(4, "1.0", [], None)
        with pytest.raises(ValueError, match="response 4 is submitted already"):
            verifier.submit(4, "1.0", [], None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("no_such_module:verify", "No module named 'no_such_module'"), ("toy_verifier:verfiy", "has no 'verfiy'"),
     ("toy_verifier", "not of the form module:function"), ("toy_verifier:not_a_function", "is int, not a function"),
     ("broken_verifier:verify", "ZeroDivisionError"), ("exiting_verifier:verify", "SystemExit")],
)  # fmt: skip
def test_a_function_that_cannot_be_imported_is_refused_at_once(toy, tmp_path, name, reason):
    (tmp_path / "broken_verifier.py").write_text("print('noise')\n1 / 0\n")
    (tmp_path / "exiting_verifier.py").write_text("raise SystemExit\n")
    with pytest.raises(UserError, match=reason) as caught:
        Verifier(name, 1.0)
    assert name in str(caught.value)
    assert "expected" in str(caught.value)


def test_an_import_that_never_ends_is_refused_in_time(toy, tmp_path):
    (tmp_path / "endless_verifier.py").write_text("while True: pass\n")
    with pytest.raises(UserError, match=r"not imported within 0.5 s.*task.verifier_timeout_s"):
        Verifier("endless_verifier:verify", 1.0, startup_timeout_s=0.5)


@pytest.mark.parametrize("holding", ["while True: pass", "import time; time.sleep(3600)"])
def test_a_worker_that_hangs_at_import_ends_itself_when_its_parent_is_dead(tmp_path, holding):
    """Nobody is left to watch its clock: the kernel does."""
    (tmp_path / "endless_verifier.py").write_text(holding + "\n")
    path = os.pathsep.join([str(tmp_path), *(os.path.abspath(entry) for entry in sys.path)])
    code = (
        "from tppo_ref.tasks import verifier_worker as w; import sys; w.GRACE_S = 0.1; "
        "sys.argv = ['w', 'endless_verifier:verify', '1', '0.1']; w.main()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    try:
        assert worker.wait(timeout=30) == -14  # SIGALRM
    finally:
        worker.kill()


def test_an_import_has_a_minute_or_as_long_as_a_verification(toy):
    for timeout_s, startup_s in ((5.0, 60.0), (300.0, 300.0)):
        with Verifier(f"{toy}:echo", timeout_s) as verifier:
            assert verifier.startup_timeout_s == startup_s


def test_a_wait_for_an_import_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tppo_ref.tasks.verifier.TOLD_AFTER_S", 0.0)
    (tmp_path / "late_verifier.py").write_text("import time\ntime.sleep(1.5)\ndef verify(*a):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level("INFO"), Verifier("late_verifier:verify", 20.0):
        assert [r.getMessage() for r in caplog.records] == [
            "waiting for verifier late_verifier:verify to be imported (60 s at most)"
        ]


def test_a_slow_import_within_its_limit_is_no_failure(tmp_path, monkeypatch):
    """Its alarm must not go off later."""
    (tmp_path / "late_verifier.py").write_text(
        "import time\ntime.sleep(0.5)\ndef verify(*a):\n    time.sleep(1.5)\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Verifier("late_verifier:verify", 20.0, startup_timeout_s=20.0) as verifier:
        assert one(verifier, "a") == Score(1.0, "ok")


def test_a_process_that_dies_while_importing_is_refused_with_its_last_words(toy, tmp_path):
    (tmp_path / "dying_verifier.py").write_text("import os\nos.write(2, b'last words\\n')\nos._exit(9)\n")
    with pytest.raises(UserError, match=r"did not start.*code 9.*last words"):
        Verifier("dying_verifier:verify", 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"num_workers": 0},
        {"failure_score": float("nan")},
        {"failure_score": 1e39},
    ],
)
def test_senseless_options_are_refused_by_name(toy, options):
    with pytest.raises(UserError, match=next(iter(options))):
        Verifier(f"{toy}:echo", **{"timeout_s": 1.0, **options})


def test_close_ends_the_workers_and_their_hung_calls(toy):
    verifier = Verifier(f"{toy}:by_name", 60.0, num_workers=2)
    pids = [worker.process.pid for worker in verifier._workers]
    assert all(map(alive, pids))
    verifier.submit(1, "hang", [], None)
    verifier.close()
    assert not any(map(alive, pids))
    with pytest.raises(RuntimeError, match="closed"):
        verifier.submit(2, "", [], None)
    verifier.close()


def test_an_interrupt_typed_at_the_terminal_does_not_reach_the_workers(toy):
    with Verifier(f"{toy}:echo", 10.0) as verifier:
        pid = verifier._workers[0].process.pid
        assert os.getsid(pid) == pid != os.getsid(0)


def test_a_killed_verifier_takes_its_children_along(toy, tmp_path):
    file = tmp_path / "pid"
    with Verifier(f"{toy}:by_name", 0.5) as verifier:
        assert one(verifier, f"child {file}").status == "timeout"
        pid = int(file.read_text())
        assert wait_until(lambda: not alive(pid), 5.0)


def test_workers_die_with_their_parent_also_when_it_is_killed(toy, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal
        from tppo_ref.tasks.verifier import Verifier
        verifier = Verifier("toy_verifier:by_name", 60.0)
        print(verifier._workers[0].process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=30,
                         env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    pid = int(run.stdout)
    assert wait_until(lambda: not alive(pid), 10.0)


def test_a_hung_worker_ends_itself_when_its_parent_is_dead(toy):
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    code = (
        "from tppo_ref.tasks import verifier_worker as w; import sys; w.GRACE_S = 0.1; "
        "sys.argv = ['w', 'toy_verifier:by_name', '0.1', '60']; w.main()"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": path})  # fmt: skip
    assert worker.stdin is not None
    worker.stdin.write(b'[0, "hang", [], null]\n')
    worker.stdin.close()
    try:
        assert worker.wait(timeout=20) == -14  # SIGALRM
    finally:
        worker.kill()


def test_the_worker_imports_neither_torch_nor_transformers():
    code = (
        "import sys, tppo_ref.tasks.verifier_worker, tppo_ref.tasks.chain, tppo_ref.tasks.fork, tppo_ref.tasks.length, "
        "tppo_ref.tasks.jsonl, tppo_ref.tasks.verifier; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert run.stdout.strip() == "[]", run.stderr
