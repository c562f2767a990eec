"""A benchmark whose GPU hangs or is lost starts itself again. (That it then goes on: test_bench_run.py.)"""

import subprocess
import sys
import threading

from bench.restart import Watch

HANGS = """
import time
from bench.restart import Watch, start_again
print("hangs")
Watch(lambda: start_again("platform", ["--terse"])).expect(0.1)
time.sleep(100)
"""


def test_a_watch_calls_when_nobody_is_alive():
    called = threading.Event()
    Watch(called.set).expect(0.05)
    assert called.wait(5)


def test_a_watch_that_is_done_calls_nobody():
    called = threading.Event()
    watch = Watch(called.set)
    watch.expect(0.05)
    watch.expect(0.05)
    watch.done()
    assert not called.wait(0.2)


def test_a_process_that_hangs_is_replaced_by_another():
    done = subprocess.run([sys.executable, "-u", "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    hangs, platform = done.stdout.splitlines()
    assert (hangs, "-".join(platform.split("-")[:1])) == ("hangs", "Linux")
    assert 'File "<string>", line 6 in <module>' in done.stderr, "where it hung"
