"""`ctr task exec` in a running container: with and without a terminal, alone and ten at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from testing.api import Api, Stdio, Task
from testing.containerd import Containerd, Result, docker_exit_code


@pytest.fixture
def execute(containerd: Containerd, sleeper: str) -> Callable[..., Result]:
    """`ctr task exec` in the sleeping container."""

    def _execute(
        *command: str, options: tuple[str, ...] = (), check: bool = True, **keywords: object
    ) -> Result:
        exec_id = containerd.new_id("exec")
        return containerd.ctr(
            "task", "exec", "--exec-id", exec_id, *options, sleeper, *command, check=check, **keywords  # type: ignore[arg-type]
        )  # fmt: skip

    return _execute


@pytest.fixture
def in_sleeper(api: Api, containerd: Containerd, sleeper: str) -> Callable[..., Task]:
    """Add (not start) a process to the sleeping container, by the API."""
    host = Task(api, sleeper, "", Stdio.__new__(Stdio))
    return lambda *args, **keywords: host.exec(*args, exec_id=containerd.new_id("x"), **keywords)


@pytest.mark.parametrize("code", [0, 1, 42])
def test_exit_code_and_streams(execute: Callable[..., Result], code: int) -> None:
    result = execute("sh", "-c", f"echo out; echo err >&2; exit {code}", check=False)
    assert (result.code, result.out, result.err) == (code, b"out\n", b"err\n")


def test_standard_input_ends(execute: Callable[..., Result]) -> None:
    assert execute("sh", "-c", "cat; echo end", stdin=b"some\nlines\n").out == b"some\nlines\nend\n"


def test_directory_and_user(execute: Callable[..., Result]) -> None:
    result = execute("sh", "-c", "pwd; id -u; id -g", options=("--cwd", "/tmp", "--user", "1000:1000"))
    assert result.text.splitlines() == ["/tmp", "1000", "1000"]


def test_execs_share_the_containers_processes_and_files(execute: Callable[..., Result]) -> None:
    assert "sleep 100000" in execute("ps", "-o", "args").text
    execute("sh", "-c", "echo shared > /tmp/shared")
    assert execute("cat", "/tmp/shared").text == "shared"


def test_ten_execs_at_once(execute: Callable[..., Result]) -> None:
    # All ten meet at a barrier: each adds its line, and none goes on before there are ten.
    execute("rm", "-f", "/tmp/barrier")
    wait = 'while [ "$(wc -l < /tmp/barrier)" -lt 10 ]; do sleep 0.1; done'
    script = f"echo $0 >> /tmp/barrier; {wait}; echo $0; exit $0"
    with ThreadPoolExecutor(10) as pool:
        results = list(
            pool.map(lambda n: execute("sh", "-c", script, str(n), check=False, timeout=90), range(10))
        )
    assert [(r.code, r.text) for r in results] == [(n, str(n)) for n in range(10)]


def test_a_command_that_does_not_exist_is_named(execute: Callable[..., Result]) -> None:
    result = execute("/no/such/program", check=False)
    assert result.code
    assert "/no/such/program" in result.error
    assert execute("echo", "still alive").text == "still alive"


@pytest.mark.parametrize(
    ("program", "code"), [("/nope", 127), ("nope", 127), ("/etc/passwd", 126), ("/etc", 126)]
)
def test_dockers_client_finds_the_exit_code_in_the_text(
    execute: Callable[..., Result], program: str, code: int
) -> None:
    assert docker_exit_code(execute(program, check=False).error) == code


def test_a_terminal_by_ctr(execute: Callable[..., Result]) -> None:
    # ctr wants its own stdin to be a terminal for -t; the API tests cover the rest of terminals.
    assert execute("tty", check=False).text == "not a tty"


def test_an_exec_with_a_terminal(in_sleeper: Callable[..., Task]) -> None:
    process = in_sleeper("sh", terminal=True)
    process.start()
    process.resize(101, 37)
    process.io.write(b"stty size; tty; exit 5\n")
    assert process.wait() == 5
    out, err = process.io.finish()
    assert b"37 101" in out
    assert b"/dev/pts/" in out
    assert err == b""
    assert process.delete().exit_status == 5


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, 137), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_it_with_128_plus_its_number(
    in_sleeper: Callable[..., Task], number: signal.Signals, code: int
) -> None:
    process = in_sleeper("sleep", "1000", stdin=False)
    process.start()
    process.kill(number)
    assert process.wait() == code
    assert process.delete().exit_status == code


def test_output_is_whole_and_in_order(in_sleeper: Callable[..., Task]) -> None:
    process = in_sleeper("seq", "1", "200000", stdin=False)
    process.start()
    assert process.wait() == 0
    out, _ = process.io.finish()
    assert out == b"".join(b"%d\n" % number for number in range(1, 200001))
    process.delete()


def test_a_client_that_goes_does_not_end_standard_input(in_sleeper: Callable[..., Task]) -> None:
    process = in_sleeper("cat")
    process.start()
    process.io.write(b"one\n")
    process.io.wait_for(b"one\n")
    process.io.detach_stdin()
    process.io.write(b"two\n")
    process.io.wait_for(b"two\n")
    process.io.detach_stdin()
    process.close_stdin()
    assert process.wait() == 0
    process.delete()


def test_deleted_means_gone_and_running_means_not_deletable(in_sleeper: Callable[..., Task]) -> None:
    process = in_sleeper("sleep", "1000", stdin=False)
    process.start()
    with pytest.raises(grpc.RpcError) as error:
        process._call("DeleteProcess")
    assert error.value.code() in {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNKNOWN}
    process.kill(signal.SIGKILL)
    assert process.wait() == 137
    process.delete()
    with pytest.raises(grpc.RpcError) as error:
        process.state()
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
