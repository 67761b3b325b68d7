"""Commands: what they see, what they may, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agentckpt.errors import IncompatibleError
from agentckpt.sandbox import Workspace, commands
from agentckpt.sandbox.commands import Isolation

FOUND = commands.isolation()
PLANS = {
    "found": FOUND,
    "user namespace": Isolation(True, True, True),
    "network only": Isolation(False, True, FOUND.user),
    "none": Isolation(False, False, False),
}


@pytest.fixture(params=list(PLANS))
def workspace(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with each isolation that a kernel may leave us."""
    plan = PLANS[request.param]
    if (plan.pid, plan.net) > (FOUND.pid, FOUND.net) or (plan.user and not _user_namespaces()):
        pytest.skip(f"NOT RUN, this kernel does not allow: {request.param}")
    monkeypatch.setattr("agentckpt.sandbox.workspace.isolation", lambda: plan)
    return Workspace(tmp_path / "w")


def _user_namespaces() -> bool:
    return subprocess.run(["unshare", "--user", "true"], capture_output=True).returncode == 0


def alive(marker: str) -> list[int]:
    """Processes whose command line holds ``marker``."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                if marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes():
                    found.append(int(name))
            except OSError:
                continue
    return found


def gone(marker: str, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while alive(marker) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(marker)


def test_streams_status_and_input(workspace: Workspace) -> None:
    result = workspace.run("cat; echo err >&2; exit 3", input="in\n")
    assert (result.exit_code, result.stdout, result.stderr, result.timed_out) == (3, "in\n", "err\n", False)
    assert workspace.run("cat", input="x" * 900_000).stdout == "x" * 900_000
    assert workspace.run("true", input="x" * 900_000).exit_code == 0, "a command that does not read must not hang us"
    assert workspace.run("cat").stdout == "", "without input stdin is empty"
    assert workspace.run("kill -TERM $$").exit_code == -signal.SIGTERM
    assert workspace.run(["sh", "-c", "kill -ABRT $$"]).exit_code == -signal.SIGABRT
    assert workspace.run("printf '\\377\\376'").stdout == "\ufffd\ufffd"


def test_a_sequence_never_meets_a_shell(workspace: Workspace) -> None:
    assert workspace.run(["printf", "%s|", "a b", "$HOME", ";", "*"]).stdout == "a b|$HOME|;|*|"
    missing = workspace.run(["no-such-program", "x"])
    assert (missing.exit_code, missing.stderr) == (127, "no-such-program: No such file or directory\n")
    workspace.write_file("script", "not executable")
    assert workspace.run(["./script"]).exit_code == 126
    for bad in ([], ["a\0b"]):
        with pytest.raises(IncompatibleError):
            workspace.run(bad)


def test_the_environment_is_clean(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_SECRET", "secret")
    workspace.env = {"EXTRA": "täst", "LANG": "C"}
    lines = set(workspace.run(["env"]).stdout.splitlines())
    assert lines == {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", f"HOME={workspace.path}", f"PWD={workspace.path}",
        "LANG=C", "EXTRA=täst",
    }  # fmt: skip
    assert workspace.run("pwd; umask").stdout == f"{workspace.path}\n0022\n"
    assert workspace.run("ls /proc/self/fd | wc -l").stdout.strip() in ("4", "5"), "0, 1, 2 and what ls and the shell open"


def test_output_is_bounded(workspace: Workspace) -> None:
    workspace.max_output_bytes = 1000
    result = workspace.run("echo first; yes | head -c 3000000; echo last; echo e >&2")
    assert result.stdout.startswith("first\n")
    assert result.stdout.endswith("last\n")
    assert f"[... {3_000_000 + 11 - 1000} bytes left out ...]" in result.stdout
    assert len(result.stdout) < 1100
    assert result.stderr == "e\n"


MARK = "agentckpt-test-{}"


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def test_a_timeout_kills_grandchildren(workspace: Workspace) -> None:
    mark = MARK.format(os.getpid())
    script = f"setsid sh -c 'sleep 97; : {mark}' & (sh -c 'sleep 97; : {mark}' &) ; trap '' TERM INT HUP; sleep 97; : {mark}"
    result = workspace.run(f"echo before; {script}", timeout_s=0.4)
    assert (result.timed_out, result.exit_code, result.stdout) == (True, None, "before\n")
    assert alive(mark) == []


def test_what_a_command_leaves_running_dies_with_it(workspace: Workspace) -> None:
    mark = MARK.format(os.getpid())
    result = workspace.run(f"setsid nohup sh -c 'sleep 97; : {mark}' >out 2>&1 & sh -c 'sleep 97; : {mark}' & echo started", timeout_s=20)
    assert (result.exit_code, result.stdout) == (0, "started\n")
    assert alive(mark) == []


WORKER = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[3])
from agentckpt.sandbox import Workspace, commands, workspace
plan = commands.Isolation(*[part == "True" for part in sys.argv[4:]])
workspace.isolation = lambda: plan
mark = sys.stdin.readline().strip()  # not in argv: a forked child of the worker would carry it


def fork_later():  # a child that inherits the worker's end of the life pipe, and outlives the worker
    while not os.path.exists(sys.argv[1] + "/started"):
        time.sleep(0.01)
    if os.fork() == 0:
        with open(sys.argv[1] + "/forked", "w") as file:
            file.write("forked")
        time.sleep(8)
        os._exit(0)


threading.Thread(target=fork_later, daemon=True).start()
Workspace(sys.argv[1]).run(f"setsid sh -c 'sleep 97; : {mark}' & (sh -c 'sleep 97; : {mark}' &) ; echo go > started; sleep 97; : {mark}")
"""


def test_no_process_outlives_a_worker_killed_by_9(workspace: Workspace) -> None:
    plan = sys.modules["agentckpt.sandbox.workspace"].isolation()
    mark, root = MARK.format(f"{os.getpid()}k"), str(Path(__file__).parents[2])
    argv = [sys.executable, "-c", WORKER, workspace.path, "-", root, str(plan.pid), str(plan.net), str(plan.user)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        worker.stdin.write(mark + "\n")
        worker.stdin.flush()
        wait_for(Path(workspace.path) / "started")
        assert len(alive(mark)) >= 3
        launchers = [pid for pid in alive("launcher.py") if f"\0{worker.pid}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert launchers
        wait_for(Path(workspace.path) / "forked")
        worker.kill()
    assert gone(mark, within_s=4), "the child that the worker forked holds the pipe, and must not keep commands alive"
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in launchers) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in launchers), "the launcher itself must go, too"


def test_a_killed_launcher_is_replaced_and_its_commands_die(workspace: Workspace) -> None:
    mark = MARK.format(f"{os.getpid()}l")
    results: list[object] = []

    def run() -> None:
        try:
            results.append(workspace.run(f"echo > started; sleep 97; : {mark}"))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(Path(workspace.path) / "started")
    process = commands._LAUNCHER._process
    assert process is not None
    process.kill()
    if not sys.modules["agentckpt.sandbox.workspace"].isolation().pid:
        for pid in alive(mark):  # without a pid namespace the supervisor goes on without its launcher, until the worker ends
            os.kill(pid, signal.SIGKILL)
    thread.join(20)
    assert results
    assert gone(mark)
    assert workspace.run("echo again").stdout == "again\n"


def test_loopback_works_and_nothing_else(workspace: Workspace) -> None:
    program = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "client = socket.create_connection(server.getsockname())\n"
        "print('loopback')\n"
        "outer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "outer.connect(('192.0.2.1', 9))\n"
        "print('network')\n"
    )
    workspace.env = {"PYTHONDONTWRITEBYTECODE": "1"}
    result = workspace.run([sys.executable, "-I", "-S", "-c", program])
    assert result.stdout.splitlines()[0] == "loopback"
    if workspace.denies_network:
        assert "Network is unreachable" in result.stderr


def test_the_network_is_really_denied(workspace: Workspace) -> None:
    """A server of ours on this host, reachable from here, is not reachable from a command, whatever the command tries."""
    import socket

    if not workspace.denies_network:
        pytest.skip("NOT RUN: this plan has no network namespace")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0agentckpt-test-abstract")
        abstract.listen()
        server.settimeout(0.2)
        program = (
            "import socket, sys\n"
            "for make in (lambda: socket.create_connection(('127.0.0.1', int(sys.argv[1])), 2),\n"
            "             lambda: socket.socket(socket.AF_UNIX).connect('\\0agentckpt-test-abstract')):\n"
            "    try:\n        make()\n        print('reached')\n    except OSError as error:\n        print('denied')\n"
        )
        result = workspace.run([sys.executable, "-I", "-S", "-c", program, str(server.getsockname()[1])])
        assert result.stdout.split() == ["denied", "denied"], result.stderr
        escapes = (
            "nsenter --net=/proc/1/ns/net echo reached; nsenter -t 1 -n echo reached; nsenter -t $PPID -n echo reached;"
            f" nsenter -t {os.getpid()} -n echo reached; unshare -U -r nsenter --net=/proc/{os.getpid()}/ns/net echo reached"
        )
        assert "reached" not in workspace.run(escapes).stdout
        with pytest.raises(TimeoutError):
            server.accept()


def test_processes_outside_cannot_be_seen(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    if not FOUND.pid:
        pytest.skip("NOT RUN: no pid namespaces here")
    assert workspace.run(f"kill -0 {os.getpid()}").exit_code != 0
    assert int(workspace.run("ls /proc | grep -c '^[0-9]'").stdout) < 6
    assert workspace.run("mount -t tmpfs x .").exit_code != 0, "a mount in the workspace would break the next restore"


@pytest.mark.parametrize(
    ("network", "net", "effect", "claim"),
    [
        ("deny", True, "sandbox", "denied"), ("deny", False, "irreversible", "allowed"), ("allow", True, "irreversible", "allowed"),
        ("declared-harmless", True, "sandbox", "declared, not enforced"), ("declared-harmless", False, "sandbox", "declared, not enforced"),
    ],
)  # fmt: skip
def test_the_effect_class_says_what_is_enforced(
    network: str, net: bool, effect: str, claim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentckpt.sandbox.workspace.isolation", lambda: Isolation(True, net, False))
    workspace = Workspace(tmp_path / "w", network=network)  # type: ignore[arg-type]
    assert (workspace.effect_class, workspace.network_claim) == (effect, claim)
    assert workspace.denies_network == (claim == "denied")


def test_many_commands_at_once(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    results: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: results.__setitem__(n, workspace.run(f"sleep 0.2; echo {n}").stdout)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"{n}\n" for n in range(20)}
    assert len(alive("launcher.py")) >= 1
    assert os.listdir("/proc/self/fd") is not None


def test_no_descriptors_leak(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "w")
    workspace.run("true")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        workspace.run("true")
        workspace.run("sleep 9", timeout_s=0.05)
    assert len(os.listdir("/proc/self/fd")) == before


FORKED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from agentckpt.sandbox import Workspace
workspace = Workspace(sys.argv[1])
print(workspace.run("echo parent").stdout, end="", flush=True)
if os.fork() == 0:
    print(workspace.run("echo child").stdout, end="", flush=True)
    sys.exit(0)
os.wait()
print(workspace.run("echo parent").stdout, end="", flush=True)
"""


def test_a_forked_worker_gets_a_launcher_of_its_own(tmp_path: Path) -> None:
    argv = [sys.executable, "-W", "error", "-c", FORKED, str(tmp_path / "w"), str(Path(__file__).parents[2])]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("parent\nchild\nparent\n", "")
