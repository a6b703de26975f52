"""One request at a time, an answer or an error that says which request; nothing is waited for for ever."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from devices.errors import HypervisorError
from devices.rendezvous import connect_now, listen
from hypervisors.http_api import ANSWER_LIMIT, HttpApi, fault
from tests.unit.turns import LIMIT, turns

Answer = Callable[[bytes], bytes | None]


async def _with_server(answer: Answer, use: Callable[[HttpApi], Awaitable[None]]) -> list[bytes]:
    """Let `use` talk to a server that gives `answer(request)`, None to hang up; the requests it saw."""
    ours, theirs = socket.socketpair()
    seen: list[bytes] = []

    async def serve() -> None:
        reader, writer = await asyncio.open_connection(sock=theirs)
        try:
            while True:
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError:
                    break
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
                seen.append(head.split(b"\r\n")[0] + b" " + body)
                reply = answer(head + body)
                if reply is None:
                    break
                writer.write(reply)
                await writer.drain()
        finally:
            writer.close()
            await writer.wait_closed()

    server = asyncio.create_task(serve())
    api = HttpApi("Firecracker", ours)
    try:
        await use(api)
    finally:
        await api.close()
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)
    return seen


def _reply(status: str, body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_requests_follow_each_other_on_one_connection() -> None:
    async def use(api: HttpApi) -> None:
        results = await asyncio.gather(
            api.put("/machine-config", {"vcpu_count": 1}, timeout=5), api.get("/", timeout=5)
        )
        assert list(results) == [{"state": "Running"}, {"state": "Running"}]

    seen = await _with_server(lambda _: _reply("200 OK", b'{"state": "Running"}'), use)
    assert seen == [b'PUT /machine-config HTTP/1.1 {"vcpu_count": 1}', b"GET / HTTP/1.1 "]


async def test_no_content_is_none() -> None:
    async def use(api: HttpApi) -> None:
        assert await api.patch("/vm", {"state": "Paused"}, timeout=5) is None

    await _with_server(lambda _: b"HTTP/1.1 204 \r\nServer: x\r\n\r\n", use)


async def test_a_refusal_has_firecrackers_words_and_the_connection_goes_on() -> None:
    answers = iter(
        [_reply("400 Bad Request", b'{"fault_message": "no such drive"}'), _reply("204 No Content")]
    )

    async def use(api: HttpApi) -> None:
        with pytest.raises(HypervisorError, match="refused PUT /drives/x: no such drive") as caught:
            await api.put("/drives/x", {}, timeout=5)
        assert caught.value.code == "FAILED_PRECONDITION"
        await api.put("/drives/y", {}, timeout=5)

    await _with_server(lambda _: next(answers), use)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "broke off during GET /x: it closed the connection"),
        (b"garbage\r\n\r\n", "broke off during GET /x"),
        (_reply("200 OK", b"{"), "answer to GET /x is no JSON"),
        (_reply("200 OK", b'{"n": NaN}'), "answer to GET /x is no JSON"),
        (_reply("200 OK", b'{"n": 1e400}'), "answer to GET /x is no JSON"),
        (_reply("200 OK", b'{"n": 1' + b"0" * 5000 + b"}"), "answer to GET /x is no JSON"),
        (_reply("200 OK", b"[" * 100_000), "answer to GET /x is no JSON"),
        (_reply("400 Bad Request", b"[" * 500 + b"]" * 500), r"refused GET /x: \[\["),
        (_reply("400 Bad Request", b"Unsupported\r\nmethod"), "refused GET /x: Unsupported method"),
        (_reply("200 OK", b" " * (ANSWER_LIMIT + 1)), "more than"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, "more than"),
        (_reply("500 Oops", b"[]"), "refused GET /x: status 500"),
    ],
)
async def test_bad_answers(answer: bytes | None, words: str) -> None:
    async def use(api: HttpApi) -> None:
        with pytest.raises(HypervisorError, match=words):
            await api.get("/x", timeout=5)

    await _with_server(lambda _: answer, use)


async def test_a_chain_of_causes_is_one_line() -> None:
    """As Cloud Hypervisor 53 refuses."""
    chain = b'["Error from API", "The VM could not boot", "Failed to validate config"]'

    async def use(api: HttpApi) -> None:
        with pytest.raises(HypervisorError, match="Error from API: The VM could not boot: Failed to"):
            await api.put("/vm.boot", timeout=5)

    seen = await _with_server(lambda _: _reply("500 Internal Server Error", chain), use)
    assert seen == [b"PUT /vm.boot HTTP/1.1 "]  # without a body, and without the length of one
    assert fault([1, "a\x1b[2J", {}]) == "a"
    assert fault(7) == fault({"fault_message": 7}) == ""


async def test_descriptors_go_with_their_request() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    theirs.settimeout(5)

    def serve() -> bytes:
        data, fds, _, _ = socket.recv_fds(theirs, 1 << 16, 4)
        theirs.sendall(_reply("200 OK", b"{}"))
        os.write(fds[0], b"through it")
        for fd in fds:
            os.close(fd)
        return data

    api = HttpApi("a VMM", ours)
    try:
        serving = asyncio.create_task(asyncio.to_thread(serve))
        assert await api.put("/vm.add-net", {"id": "eth0"}, timeout=5, fds=(writer,)) == {}
        assert (await serving).endswith(b'{"id": "eth0"}')
        assert os.read(reader, 100) == b"through it"
    finally:
        await api.close()
        theirs.close()
        os.close(reader)
        os.close(writer)


async def test_silence_ends_and_the_late_answer_is_nobody_elses() -> None:
    async def use(api: HttpApi) -> None:
        with pytest.raises(HypervisorError, match="did not answer GET /x within") as caught:
            await api.get("/x", timeout=0.05)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        with pytest.raises(HypervisorError, match="closed; GET /y was not sent"):
            await api.get("/y", timeout=5)

    await _with_server(lambda _: b"", use)


async def test_an_answer_of_one_byte_pieces_holds_nobody_up() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = head + b"1\r\n \r\n" * 100_000 + b"2\r\n{}\r\n0\r\n\r\n"

    async def use(api: HttpApi) -> None:
        async with turns() as longest:
            assert await api.get("/x", timeout=60) == {}
        assert longest.seconds < LIMIT

    await _with_server(lambda _: body, use)


async def test_after_a_timeout_a_new_connection_is_made_where_there_is_a_path(tmp_path: Path) -> None:
    listener = listen(str(tmp_path / "api"))
    api = HttpApi("a VMM", connect_now(str(tmp_path / "api")), str(tmp_path / "api"))
    first, _ = listener.accept()
    with pytest.raises(HypervisorError, match="did not answer GET /x"):
        await api.get("/x", timeout=0.05)

    def serve() -> None:
        second, _ = listener.accept()
        second.recv(1 << 16)
        second.sendall(_reply("204 No Content"))
        second.close()

    serving = asyncio.create_task(asyncio.to_thread(serve))
    assert await api.put("/y", timeout=5) is None
    await serving
    listener.close()
    await api.close()
    with pytest.raises(HypervisorError, match="closed; GET /z was not sent"):
        await api.get("/z", timeout=5)
    first.close()
