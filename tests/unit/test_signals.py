"""Signals before, during and after the trainer's own answer to them, in processes of their own."""

import signal
import subprocess
import sys
import textwrap

from conftest import REPO


def run(script: str) -> subprocess.CompletedProcess:
    begin = "import os, signal, time\nfrom piflow_dist.launch.signals import StopRequest, hold\nme = os.getpid()\n"
    return subprocess.run(
        [sys.executable, "-c", begin + textwrap.dedent(script)], cwd=REPO, capture_output=True, text=True, timeout=120
    )


def test_a_signal_that_comes_too_soon_is_answered_later() -> None:
    done = run("""
        hold()
        os.kill(me, signal.SIGUSR2)
        request = StopRequest()
        print(request.wait(60), request.made, request.name)
    """)
    assert done.stdout.split() == ["False", "True", "SIGUSR2"], done


def test_without_holding_it_would_have_ended_the_process() -> None:
    assert run("os.kill(me, signal.SIGUSR2); StopRequest()").returncode == -signal.SIGUSR2


def test_signals_together_are_one_request_and_a_later_one_is_another() -> None:
    done = run("""
        request = StopRequest()
        os.kill(me, signal.SIGUSR1)
        os.kill(me, signal.SIGTERM)
        first = request.wait(60)
        request.first_at -= 60
        os.kill(me, signal.SIGTERM)
        print(first, request.name, request.wait(60))
    """)
    assert done.stdout.split() == ["False", "SIGUSR1", "True"], done


def test_other_signals_are_no_request() -> None:
    done = run("""
        signal.signal(signal.SIGWINCH, lambda *arguments: None)
        request = StopRequest()
        os.kill(me, signal.SIGWINCH)
        print(request.wait(60), request.made)
    """)
    assert done.stdout.split() == ["False", "False"], done


def test_a_forked_worker_neither_dies_of_a_signal_nor_passes_it_on() -> None:
    done = run("""
        request = StopRequest()
        child = os.fork()
        if child == 0:
            time.sleep(3)
            os._exit(0)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        request.wait(0)
        print(status, request.made)
    """)
    assert done.stdout.split() == ["0", "False"], done
