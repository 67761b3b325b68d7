"""The witness counts before it answers, honours keys only where told, and outlives whoever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentckpt.testing.witness import Arrival, Counter, Witness, post


@pytest.fixture
def witness() -> Iterator[Witness]:
    with Witness.start(honoured=["keyed"]) as started:
        yield started


def test_a_key_is_honoured_only_for_the_tools_that_do(witness: Witness) -> None:
    for tool in ("keyed", "plain"):
        answers = [post(f"{witness.url}/deploy", {"tool": tool}, key="k1") for _ in range(2)]
        assert [a["applied"] for a in answers] == [True, tool == "plain"]
    assert witness.seen() == [Arrival("keyed", "k1", 2, 1), Arrival("plain", "k1", 2, 2)]
    assert witness.seen(tool="plain", key="k1") == [Arrival("plain", "k1", 2, 2)]
    assert witness.seen(key="other") == []


def test_a_request_without_a_key_is_never_merged() -> None:
    counter = Counter(["keyed"])
    assert [counter.arrive("keyed", "")[0] for _ in range(2)] == [True, True]


def test_a_request_is_counted_before_the_answer_and_survives_the_asker(witness: Witness) -> None:
    witness.delay("plain", 30.0)
    code = f"from agentckpt.testing.witness import post; post({witness.url + '/deploy'!r}, {{'tool': 'plain'}}, key='k')"
    asker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 20
    while not witness.num_requests("plain") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert witness.num_requests("plain") == 1
    assert asker.poll() is None, "it still waits for its answer"
    os.killpg(asker.pid, signal.SIGKILL)
    asker.wait()
    assert witness.seen() == [Arrival("plain", "k", 1, 1)]


def test_many_at_once_are_all_counted(witness: Witness) -> None:
    threads = [threading.Thread(target=post, args=(witness.url, {"tool": "plain"}), kwargs={"key": "k"}) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert witness.seen() == [Arrival("plain", "k", 16, 16)]


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("/deploy", b"not json"),
        ("/deploy", b"[]"),
        ("/deploy", b'{"tool": 3}'),
        ("/deploy", b"{}"),
        ("/control", b'{"delay_s": {"plain": 1e9}}'),
        ("/control", b'{"delay_s": {"plain": NaN}}'),
        ("/control", b'{"delay_s": 3}'),
    ],
)
def test_garbage_is_refused_and_not_counted(witness: Witness, path: str, data: bytes) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(witness.url + path, data=data), timeout=10)
    assert error.value.code == 400
    error.value.close()
    assert witness.seen() == []


def test_it_ends_with_its_starter() -> None:
    code = (
        "import os, signal\n"
        "from agentckpt.testing.witness import Witness\n"
        "w = Witness.start(); print(w.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    starter = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(starter.stdout)
    deadline = time.monotonic() + 20
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
