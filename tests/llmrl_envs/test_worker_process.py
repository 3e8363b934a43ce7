"""Worker processes: answers, errors, interruptions, and the end of either side."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from llmrl_envs.errors import UserError
from llmrl_envs.worker_process import WorkerProcess, ask_all


@pytest.fixture(scope="module")
def workers():
    found = [WorkerProcess(list, ()), WorkerProcess(list, (4, 5))]
    for worker in found:
        worker.answer()
    yield found
    for worker in found:
        worker.close()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def ends(pid, seconds=10.0):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_workers_hold_their_own_objects(workers):
    assert ask_all(workers, "append", [1, 2]) == [None, None]
    assert ask_all(workers, "copy") == [[1], [4, 5, 2]]


def test_a_worker_keeps_freed_memory_unless_the_caller_wants_otherwise(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    worker = WorkerProcess(subprocess.getoutput, "env")
    worker.answer()
    worker.ask("splitlines")
    found = dict(line.split("=", 1) for line in worker.answer() if "=" in line)
    assert (found["MALLOC_MMAP_THRESHOLD_"], found["MALLOC_TRIM_THRESHOLD_"]) == (str(2**25), "123")
    assert found["OMP_NUM_THREADS"] == "1"
    worker.close()


def test_an_error_is_raised_here_when_all_have_answered(workers):
    with pytest.raises(IndexError) as caught:
        ask_all(workers, "__getitem__", [100, 0])
    assert "In a worker process" in "".join(caught.value.__notes__)
    assert ask_all(workers, "index", [1, 4]) == [0, 0]


def test_answers_that_an_interruption_left_behind_are_dropped(workers):
    for worker in workers:
        worker.ask("copy")
    assert ask_all(workers, "count", [77, 77]) == [0, 0]


def test_a_worker_that_is_killed_is_told_about_and_the_caller_goes_on():
    worker = WorkerProcess(list, ())
    worker.answer()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="exit code -9"):
        ask_all([worker], "copy")


def test_closing_ends_the_process():
    worker = WorkerProcess(list, ())
    worker.answer()
    worker.close()
    assert ends(worker.pid)


def test_a_program_without_a_main_guard_runs_once_and_its_workers_end_with_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, signal
            from llmrl_envs.worker_process import WorkerProcess
            worker = WorkerProcess(list, (1, 2))
            worker.answer()
            worker.ask("copy")
            print("begun", worker.pid, worker.answer(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    word, pid, *rest = ended.stdout.split()
    assert (word, " ".join(rest)) == ("begun", "[1, 2]")
    assert ends(int(pid))
