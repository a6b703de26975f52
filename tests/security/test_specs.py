"""Whatever stands in a config.json, Create works or says which key is wrong: never a Python error.

Each value of the specs that containerd writes, and of one with every field of OCI, is replaced by one of each
other type, left out, written in other letters, and doubled. Everything that a Create does before it asks the
guest is the shim's own: reading, checks, sizes, network, devices, hooks, the spec for the guest; only nothing
is mounted, plugged or run.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import KataError
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from hypervisors.base import Capabilities
from shim import runtime
from shim.api import task_service
from shim.config import load_config
from shim.hooks import hook_process, hooks
from shim.protocols import DaemonContext, GuestContainer, RootfsMount
from shim.resources import vfio_settings
from shim.resources.sizing import Sizing
from shim.sandbox import container_resources, host_files
from shim.sandbox.container_resources import ContainerResources
from shim.sandbox.settings import SandboxSettings
from shim.spec import documents, guest_devices, oci_fields
from shim.spec.oci_types import MOST
from shim.spec.shape import copied
from shim.state import logs
from shim.state.trace import Trace
from shim.stdio.stdio import StdioSpec
from shim.tasks.container_manager import ContainerManager
from tests.unit.shim.fakes import VMM_PID, FakeSandbox, Recorder, TaskClient
from tests.unit.shim.spec.oci_documents import example

DATA = Path(__file__).resolve().parents[1] / "data" / "specs"
#: One of each type, and what its own type does not take.
VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 2**32 - 1, 10**30, 1.5, "", "x", "/x\u202e\u2028",
    [], ["x"], [None], [[]], {}, {"x": [1]}, [{}],
)  # fmt: skip
#: What no caller may be answered: containerd would call it unknown.
CODES = {"INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION"}
#: Words of Python's own errors.
PYTHON = ("Traceback", "Error:", "object has no", "NoneType", "unhashable", "not iterable", "<class", "codec")


class Files:
    """A container's files, of which nothing is made."""

    live = True

    async def name(self, volumes: Any) -> Any:
        return volumes

    def rootfs(self, _: str) -> str:
        return "/run/rootfs"

    async def add(self, *_: Any, image: Any = None) -> list[Any]:
        return []

    async def remove(self, _: str, *, alive: bool = True) -> list[Exception]:
        return []


class Vmm:
    """One that grows in nothing, and its guest."""

    async def capabilities(self) -> Capabilities:
        return Capabilities()

    async def get_vmm_master_tid(self) -> int:
        return VMM_PID

    async def online_cpu_mem(self, _: int) -> None:
        pass


class Prepared(FakeSandbox):
    """A sandbox without a VM, whose containers are prepared as in every other."""

    def __init__(self, settings: SandboxSettings) -> None:
        super().__init__(settings.sandbox_id)
        vmm, undo = cast("Any", Vmm()), MemoryUndo()
        self._containers = ContainerResources(
            settings,
            vmm,
            DeviceManager(settings.disks.driver),
            files=cast("Any", Files()),
            sizing=Sizing(settings.bounds, vmm, lambda: vmm, lambda work: work.close()),
            undo=undo,
            trace=Trace("c"),
            agent=lambda: cast("Any", self.agent),
            rescan=lambda: asyncio.sleep(0),
            spawn=lambda work: work.close(),
        )

    async def prepare_container(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], rootfs: Sequence[RootfsMount]
    ) -> GuestContainer:
        return await self._containers.prepare(container_id, bundle, spec, rootfs)

    async def release_container(self, container_id: str) -> None:
        await self._containers.release(container_id, alive=True)


class Handler(runtime.VirtContainer):
    """The real one, up to the VM."""

    def new_instance(self, *arguments: Any, **more: Any) -> Any:
        return Prepared(super().new_instance(*arguments, **more).settings)


def answer(error: Exception) -> str:
    """What stands in the reply, marked if no caller may be answered so."""
    if isinstance(error, KataError) and error.code in CODES:
        return str(error)
    return f"Error: {getattr(error, 'code', 'UNKNOWN')}: {type(error).__name__}: {error}"


class World:
    """A bundle, and a configuration; `create` makes a container of a text, and takes it away again."""

    def __init__(self, directory: Path, bundle: Path) -> None:
        self.bundle = bundle
        self.base = directory / "configuration.toml"
        for name in ("qemu", "kernel", "initrd", "image", "virtiofsd"):
            (directory / name).write_bytes(b"x")
            (directory / name).chmod(0o755)
        names = {"path": "qemu", "kernel": "kernel", "initrd": "initrd", "image": "image"}
        lines = [f'{key} = "{directory / file}"' for key, file in names.items()]
        self.base.write_text(
            "\n".join(["[hypervisor.qemu]", *lines, f'virtio_fs_daemon = "{directory}/virtiofsd"', ""])
        )
        self.guest: Any = None

    async def create(self, text: str | bytes) -> str:
        """ "" if it works, else the error. Raises whatever is no KataError."""
        (self.bundle / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
        context = DaemonContext(
            namespace="default",
            id="c",
            sandbox_id="c",
            containerd="/c.sock",
            key="0" * 32,
            alias="c",
            bundle=str(self.bundle),
            address="unix:///s",
            publish_binary="",
            config_path=str(self.base),
            state_dir=str(self.bundle),
            share_dir=str(self.bundle / "share"),
            debug=False,
            events=Recorder(),
            undo=MemoryUndo(),
            shutdown=lambda: None,
        )
        async with asyncio.TaskGroup() as tasks:
            handler = Handler(context, tasks)
            manager = handler.manager = ContainerManager(
                handler, Recorder(), namespace="default", undo=context.undo
            )
            try:
                await manager.create("c", str(self.bundle), [], StdioSpec("", "", "", False), AnyMessage())
                self.guest = cast("Any", manager.get("c").sandbox).agent.containers["c"]
                return ""
            except Exception as error:  # noqa: BLE001  (that there is no other is what is tested)
                return answer(error)
            finally:
                await manager.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Without threads and hooks that run, and with one configuration for all: it is what takes the time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # thousands of files are written
        yield from _world(tmp_path, Path(memory), monkeypatch)


def _world(directory: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(directory, bundle)
    config = load_config(str(made.base))

    def cached(**arguments: Any) -> Any:
        annotated = any("katacontainers" in key for key in arguments["annotations"])
        return load_config(**arguments) if annotated else config

    async def look(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    for module in (runtime, container_resources, vfio_settings):
        monkeypatch.setattr(module, "look", look)
    monkeypatch.setattr(runtime, "load_config", cached)
    monkeypatch.setattr(logs, "set_level", lambda *_, **__: None)
    monkeypatch.setattr(hooks, "run", lambda *_, **__: None)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield made
    structlog.reset_defaults()


def short(name: str) -> dict[str, Any]:
    """A spec that containerd wrote; of long lists of names, three."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(member) for key, member in value.items()}
        if isinstance(value, list):
            words = all(isinstance(member, str) for member in value)
            return [cut(member) for member in (value[:3] if words or len(value) > 12 else value)]
        return value

    found: dict[str, Any] = cut(json.loads((DATA / f"{name}.json").read_text()))
    return found


def whole() -> dict[str, Any]:
    """One with every field that can be had."""
    found: dict[str, Any] = example()
    for place in oci_fields.REFUSED:
        for parent in _parents(found, place):
            parent.pop(place.rpartition(".")[2], None)
    found["annotations"] = {"a": "b"}
    return found


def _parents(document: Any, place: str) -> list[Any]:
    found = [document]
    for step in place.split(".")[:-1]:
        name = step.removesuffix("[]")
        found = [each.get(name) for each in found if isinstance(each, dict) and name in each]
        if step != name:
            found = [entry for each in found for entry in each]
    return found


DOCUMENTS = {
    "ctr": lambda: short("ctr-2"),
    "cri": lambda: short("cri-container"),
    "sandbox": lambda: short("cri-sandbox"),
    "privileged": lambda: short("cri-privileged"),
    "whole": whole,
}
Step = str | int


def places(value: Any, above: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Where everything in it is."""
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for step, member in members:
        yield (*above, step)
        yield from places(member, (*above, step))


def changed(document: Any, where: tuple[Step, ...], change: Callable[[Any, Step], None]) -> Any:
    found = parent = copied(document)
    for step in where[:-1]:
        parent = parent[step]
    change(parent, where[-1])
    return found


def told(where: tuple[Step, ...], error: str) -> bool:
    """The error names the place, or one that it is in: of what a limit is about, the whole is named."""
    names = [str(step) for step in where if isinstance(step, str)]
    return any(name.lower() in error.lower() for name in names)


def clean(error: str) -> bool:
    return error.isprintable() and not any(word in error for word in PYTHON)


Create = Callable[[str], Coroutine[Any, Any, str]]


async def try_each_value(document: Any, create: Create) -> None:
    """Each value replaced by each of VALUES: it works, or the answer names the place."""
    wrong, refused, number = [], 0, 0
    for where in places(document):
        for value in VALUES:
            number += 1

            def put(parent: Any, step: Step, value: Any = value) -> None:
                parent[step] = value

            error = await create(json.dumps(changed(document, where, put)))
            refused += bool(error)
            if error and not (clean(error) and told(where, error)):
                wrong.append(f"{where} = {value!r}: {error}")
    assert wrong == []
    assert number / 2 < refused < number, "most are refused, and some mean something"


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_one_value_of_another_type(world: World, name: str) -> None:
    document = DOCUMENTS[name]()
    assert await world.create(json.dumps(document)) == ""
    await try_each_value(document, world.create)


@pytest.mark.parametrize("rpc", ["Exec", "Update"])
async def test_one_value_of_another_type_of_an_exec_and_an_update(tmp_path: Path, rpc: str) -> None:
    """Through the service, with a container that is there."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    client = TaskClient(tmp_path)
    await client.create()
    numbers = itertools.count()

    async def call(text: str) -> str:
        payload = AnyMessage(value=text.encode())
        fields: dict[str, Any] = {"resources": payload}
        if rpc == "Exec":
            fields = {"spec": payload, "exec_id": f"e{next(numbers)}"}
        try:
            await client.call(rpc, id="c", **fields)
        except Exception as error:  # noqa: BLE001  (that there is no other is what is tested)
            return answer(error)
        return ""

    document = whole()
    part = document["process"] if rpc == "Exec" else document["linux"]["resources"]
    assert await call(json.dumps(part)) == ""
    await try_each_value(part, call)
    await client.close()
    structlog.reset_defaults()


def delete(parent: Any, step: Step) -> None:
    del parent[step]


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_one_value_left_out(world: World, name: str) -> None:
    document = DOCUMENTS[name]()
    wrong = []
    for where in places(document):
        error = await world.create(json.dumps(changed(document, where, delete)))
        if error and not clean(error):
            wrong.append(f"{where}: {error}")
    assert wrong == []


def free(where: tuple[Step, ...]) -> bool:
    """Keys of maps are the document's own, in which letters are told apart."""
    maps = ("annotations", "sysctl", "unified", "solaris", "windows", "zos", "freebsd", "vm")
    return any(step in maps for step in where[:-1])


@pytest.mark.parametrize(
    "spelled", [str.upper, str.capitalize, str.swapcase], ids=["upper", "capital", "swapped"]
)
@pytest.mark.parametrize("name", DOCUMENTS)
async def test_keys_in_other_letters_are_the_same_keys(
    world: World, name: str, spelled: Callable[[str], str]
) -> None:
    """runc's decoder takes them: no check may be got round so. What the guest is sent does not change."""
    document = DOCUMENTS[name]()
    await world.create(json.dumps(document))
    expected = world.guest

    def respell(value: Any, where: tuple[Step, ...] = ()) -> Any:
        if isinstance(value, dict):
            return {
                key if free((*where, key)) else spelled(key): respell(member, (*where, key))
                for key, member in value.items()
            }
        return [respell(member, (*where, 0)) for member in value] if isinstance(value, list) else value

    world.guest = None
    assert await world.create(json.dumps(respell(document))) == ""
    assert world.guest == expected


@pytest.mark.parametrize("name", ["cri", "whole"])
async def test_a_key_that_is_there_twice_is_refused(world: World, name: str) -> None:
    """In the same letters or in others: which of the two another program takes, nobody knows."""
    document = DOCUMENTS[name]()
    wrong = []
    for where in places(document):
        key = where[-1]
        if not isinstance(key, str):
            continue
        others = ["\x01"] if free(where) else ["\x01", key.upper(), key.replace("s", "\u017f")]
        for other in others:

            def double(parent: Any, step: Step, other: str = other) -> None:
                if other not in parent:
                    parent[other] = copied(parent[step])

            text = json.dumps(changed(document, where, double)).replace('"\\u0001"', json.dumps(key))
            error = await world.create(text)
            if other != key and not (" is there twice" in error and key.lower() in error.lower()):
                wrong.append(f"{where} as {other!r}: {error}")
    assert wrong == []


async def test_what_used_to_pass_every_check(world: World) -> None:
    """Letters that Go does not tell apart from those that our checks looked for."""
    hooks_ = {"Prestart": [{"Path": "relative"}]}
    assert "Hooks.Prestart[0].path" in (error := await world.create(json.dumps({"Hooks": hooks_}))) or error
    assert "mounts[0]" in await world.create(json.dumps({"Mounts": [{"Type": "bind", "Source": "x"}]}))
    devices = {"LINUX": {"Devices": [{"Path": "/dev/x", "TYPE": "c", "Major": 241}]}}
    assert "linux.devices[0]: /dev/x is a character device of the host (241:0)" in await world.create(
        json.dumps(devices)
    )
    assert hook_process.STAGES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "config.json cannot be read as an OCI document"),
        (b"[]", "config.json: it must be an object, not a list"),
        (b'"x"', "config.json: it must be an object"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8"),
        (b'{"process": {"user": {"uid": Infinity}}}', "Infinity is no number of JSON"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
        (b'{"a": ' * 900 + b"1" + b"}" * 900, ""),
        (b'{"windows": ' + b'{"a": ' * 900 + b"1" + b"}" * 901, "windows is nested deeper than 64"),
        (b'{"process": {"user": {"uid": ' + b"9" * 5000 + b"}}}", "process.user.uid must be an integer"),
        (
            b'{"process": {"user": {"uid": 4294967295}}}',
            "process.user.uid must be an integer from 0 to 42949",
        ),
        (b'{"process": {"args": ["a\\u0000b"]}}', "process.args[0] has a NUL"),
        (b'{"hostname": "\\ud800"}', "hostname has half of a surrogate pair"),
        (b'{"hostname": "%s"}' % (b"h" * 65), "hostname has more than 64 bytes"),
        (b'{"mounts": [{"destination": "/%s"}]}' % (b"h" * 5000), "mounts[0].destination has more than 4095"),
        (b'{"linux": {"devices": [{"path": "/dev/x", "type": "b", "major": -1}]}}', "linux.devices[0].major"),
        (b" " * (4 << 20) + b"{}", "it has more than 4194304 bytes"),
    ],
)
async def test_what_is_no_such_document(world: World, text: bytes, words: str) -> None:
    error = await world.create(text)

    assert words in error
    assert bool(words) == bool(error)
    assert clean(error)


async def test_one_more_than_each_list_may_have(world: World) -> None:
    """Of hostile size: refused by its place and the number, in the time that it takes to read."""
    for place, (most, _) in MOST.items():
        *steps, last = place.split(".")
        table = last in ("annotations", "sysctl", "unified", "rdma", "netDevices", "timeOffsets")
        value: Any = {str(number): None for number in range(most + 1)} if table else [None] * (most + 1)
        document: Any = {last: value}
        for step in reversed(steps):
            lists = step in ("mounts", "syscalls", *hook_process.STAGES, "startContainer")
            document = {step: [document] if lists else document}
        error = await world.create(json.dumps(document))
        assert f"has {most + 1} entries, and may have {most}" in error, place
        assert place in error.replace("[0]", "")


async def test_a_resolv_conf_that_is_a_fifo_holds_nobody_up(world: World, tmp_path: Path) -> None:
    """Nor does any other thing that is no file; the container has it all the same."""
    os.mkfifo(tmp_path / "fifo")
    for source in (str(tmp_path / "fifo"), "/dev/zero", str(tmp_path), "/nope", "relative"):
        mount = {"destination": "/etc/resolv.conf", "type": "x", "source": source}
        assert await asyncio.wait_for(world.create(json.dumps({"mounts": [mount]})), 30) == ""


@pytest.mark.parametrize("rpc", ["Exec", "Update"])
async def test_a_large_exec_or_update_is_read_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rpc: str
) -> None:
    """Four megabytes of it are read for a while: others' calls must not wait."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    client = TaskClient(tmp_path)
    await client.create()
    name = "_process" if rpc == "Exec" else "_resources"
    read, threads = getattr(task_service, name), list[int]()

    def noting(data: bytes) -> Any:
        threads.append(threading.get_ident())
        return read(data)

    monkeypatch.setattr(task_service, name, noting)
    part = whole()["process"] if rpc == "Exec" else whole()["linux"]["resources"]
    payload = AnyMessage(value=json.dumps(part).encode())
    fields: dict[str, Any] = {"spec": payload, "exec_id": "e"} if rpc == "Exec" else {"resources": payload}
    await client.call(rpc, id="c", **fields)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
    await client.close()
    structlog.reset_defaults()


async def test_what_may_hold_somebody_up_runs_beside_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path in a spec may lie on a file server that does not answer: others must not wait for it."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "resolv.conf").write_text("nameserver 10.0.0.1\n")
    world = World(tmp_path, tmp_path / "bundle")
    loop, on_the_loop = threading.get_ident(), dict[str, set[bool]]()

    def note(module: Any, name: str) -> None:
        call = getattr(module, name)

        def noting(*arguments: Any) -> Any:
            key = f"{module.__name__}.{name}"
            on_the_loop.setdefault(key, set()).add(threading.get_ident() == loop)
            return call(*arguments)

        monkeypatch.setattr(module, name, noting)

    note(documents, "read_small")
    note(host_files, "read_small")
    note(host_files, "_shm_size")
    note(guest_devices, "_is_elsewhere")
    note(guest_devices, "_vfio_node")
    document = short("cri-privileged")
    document["mounts"] = [
        {"destination": "/etc/resolv.conf", "type": "bind", "source": str(tmp_path / "resolv.conf")},
        {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm"},
    ]
    document["linux"]["devices"] = [
        {"path": "/dev/gone", "type": "b", "major": 4000, "minor": 0},
        {"path": "/dev/mine", "type": "c", "major": 241, "minor": 0},
    ]
    document["linux"]["resources"]["devices"] = [{"allow": True, "access": "rwm"}]
    del document["annotations"]["io.kubernetes.cri.container-type"]

    assert await world.create(json.dumps(document)) == ""
    assert len(on_the_loop) == 5
    assert {name for name, where in on_the_loop.items() if True in where} == set()
