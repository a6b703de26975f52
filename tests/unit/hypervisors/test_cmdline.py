"""QEMU's arguments follow from the plan alone, and nothing from outside can add an option to them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from devices.addresses import PciTopology
from devices.config import (
    BalloonConfig,
    BlockConfig,
    ConsoleConfig,
    NetworkConfig,
    PortConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.errors import BugError
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.cmdline import Plan, arguments, kernel_command_line
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.recipes import Placed

SECTION = HypervisorConfig(
    path="/usr/bin/qemu-system-x86_64",
    kernel="/g/vmlinux",
    initrd="/g/initrd.img",
    image="/g/rootfs.img",
    default_memory=256,
)


def at(slot: int) -> dict[str, str]:
    return {"bus": "pcie.0", "addr": f"{slot:#x}"}


def device(argv: list[str], number: int = -1) -> dict[str, object]:
    """The properties of one of the -device arguments that are JSON."""
    found = [word for option, word in itertools.pairwise(argv) if option == "-device" and word[0] == "{"]
    made: dict[str, object] = json.loads(found[number])
    return made


PLAN = Plan(
    sandbox_id="pod1",
    section=SECTION,
    accelerator=Accelerator.TCG,
    vcpus=1,
    qmp_fd=5,
    home_port=1028,
    devices=[
        Placed(device=BlockConfig(id="image", path="/g/rootfs.img", read_only=True), at=at(1)),
        Placed(device=VsockConfig(), at=at(2), fd=6),
        Placed(device=ShareFsConfig(source="/share"), at=at(3), fd=7),
        Placed(device=RngConfig(), at=at(4)),
        Placed(device=BalloonConfig(), at=at(5)),
        Placed(device=ConsoleConfig(), fd=8),
    ],
)


def variant(**section: object) -> Plan:
    return dataclasses.replace(PLAN, section=dataclasses.replace(SECTION, **section))  # type: ignore[arg-type]


def test_the_whole_command_line() -> None:
    node = {
        "driver": "raw",
        "node-name": "node-image",
        "read-only": True,
        "file": {"driver": "file", "filename": "/g/rootfs.img", "read-only": True},
    }
    rng = {"qom-type": "rng-random", "id": "src-rng", "filename": "/dev/urandom"}

    def front(driver: str, name: str, slot: int, **properties: object) -> list[str]:
        return ["-device", json.dumps({"driver": driver, **properties, "id": name, **at(slot)})]

    kernel = (
        "console=ttyS0 reboot=t panic=-1 cryptomgr.notests swiotlb=noforce no_timer_check quiet "
        "root=/dev/vda rootfstype=ext4 ro agent.home_vport=1028"
    )

    assert arguments(PLAN) == [
        *("-name", "sandbox-pod1,debug-threads=on"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        *("-machine", "q35,accel=tcg,memory-backend=mem0", "-cpu", "max", "-smp", "1", "-m", "256M"),
        *("-object", "memory-backend-memfd,id=mem0,size=256M,share=on"),
        *("-kernel", "/g/vmlinux", "-initrd", "/g/initrd.img", "-append", kernel),
        *("-chardev", "socket,id=qmp,fd=5,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-rtc", "base=utc,clock=host"),
        *("-blockdev", json.dumps(node)),
        *front("virtio-blk-pci", "image", 1, drive="node-image"),
        *("-chardev", "socket,id=char-vsock,fd=6"),
        *front("vhost-user-vsock-pci", "vsock", 2, chardev="char-vsock"),
        *("-chardev", "socket,id=char-share-fs,fd=7"),
        *front(
            "vhost-user-fs-pci",
            "share-fs",
            3,
            **{"tag": "kataShared", "queue-size": 1024, "chardev": "char-share-fs"},
        ),
        *("-object", json.dumps(rng)),
        *front("virtio-rng-pci", "rng", 4, rng="src-rng"),
        *front("virtio-balloon-pci", "balloon", 5, **{"free-page-reporting": True}),
        *("-chardev", "socket,id=console,fd=8", "-serial", "chardev:console"),
    ]


def test_kvm_takes_the_hosts_cpu_and_features() -> None:
    plan = dataclasses.replace(variant(cpu_features="pmu=off,"), accelerator=Accelerator.KVM)
    argv = arguments(plan)

    assert argv[argv.index("-cpu") + 1] == "host,pmu=off"
    assert "accel=kvm" in argv[argv.index("-machine") + 1]


def test_the_configurations_kernel_parameters_come_last() -> None:
    words = kernel_command_line(variant(kernel_params="quiet=no agent.log=debug", enable_debug=True)).split()

    assert words[-2:] == ["quiet=no", "agent.log=debug"]
    assert "quiet" not in words


def test_an_initrd_alone_has_no_root_parameter() -> None:
    assert "root=" not in kernel_command_line(variant(image=""))


def test_kernel_vsock_passes_descriptor_and_cid() -> None:
    plan = dataclasses.replace(PLAN, devices=[Placed(device=VsockConfig(), at=at(2), fd=9, cid=4711)])

    wanted = {"driver": "vhost-vsock-pci", "vhostfd": "9", "guest-cid": 4711, "id": "vsock", **at(2)}
    assert device(arguments(plan)) == wanted


def test_a_network_card_has_its_queues() -> None:
    card = NetworkConfig(id="net0", mac="02:00:00:00:00:01", tap_fds=(10, 11), vhost_fds=(12, 13))
    argv = arguments(dataclasses.replace(PLAN, devices=[Placed(device=card, at=at(6))]))

    netdev = {"type": "tap", "id": "net-net0", "vhost": True, "fds": "10:11", "vhostfds": "12:13"}
    assert json.loads(argv[argv.index("-netdev") + 1]) == netdev
    front = device(argv)
    assert (front["mac"], front["mq"], front["vectors"]) == (card.mac, True, 6)
    assert (front["netdev"], front["addr"]) == ("net-net0", "0x6")


def test_ports_for_hot_plug_and_a_sandbox_of_ones_own() -> None:
    section = dataclasses.replace(
        SECTION, pcie_root_port=2, pcie_switch_port=2, default_bridges=1, seccomp_sandbox="off"
    )
    topology = PciTopology()
    for device in PLAN.devices:
        topology.allocate(device.device.id)
    argv = arguments(with_ports(dataclasses.replace(PLAN, section=section), topology))

    room = "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m"
    assert argv[argv.index("chardev:console") + 1 :] == [
        *("-device", "pcie-root-port,id=rp0,bus=pcie.0,addr=0x7,chassis=1,slot=1"),
        *("-device", "pcie-root-port,id=rp1,bus=pcie.0,addr=0x8,chassis=2,slot=2"),
        *("-device", "pcie-root-port,id=swrp0,bus=pcie.0,addr=0x9,chassis=3,slot=3"),
        *("-device", "x3130-upstream,id=swup0,bus=swrp0,addr=0x0"),
        *("-device", "xio3130-downstream,id=swdp0,bus=swup0,addr=0x0,chassis=5,slot=5"),
        *("-device", "xio3130-downstream,id=swdp1,bus=swup0,addr=0x1,chassis=6,slot=6"),
        *("-device", f"pci-bridge,id=pci-bridge-0,bus=pcie.0,addr=0xa,chassis_nr=7,shpc=off,{room}"),
    ]
    assert argv[argv.index("-sandbox") + 1] == "off"
    assert "-sandbox" not in arguments(variant(disable_seccomp=True, seccomp_sandbox="on"))


def test_a_vm_that_may_grow_says_how_far() -> None:
    section = dataclasses.replace(SECTION, default_maxvcpus=4, default_maxmemory=4000)
    plan = first_plan(section, Accelerator.TCG, "pod1")
    argv = arguments(plan)

    assert argv[argv.index("-smp") + 1] == "4"  # TCG: all of them, and the guest keeps the others offline
    assert " maxcpus=1 " in f" {kernel_command_line(plan)} "
    plugged = first_plan(section, Accelerator.KVM, "pod1")
    assert arguments(plugged)[argv.index("-smp") + 1] == "1,maxcpus=4"
    assert "maxcpus" not in kernel_command_line(plugged)
    assert argv[argv.index("-m") + 1] == "256M,slots=10,maxmem=3968M"  # whole memory blocks more
    assert "memhp_default_state=online" in kernel_command_line(plan)


def test_virtio_mem_reserves_nothing_and_needs_no_slots() -> None:
    section = dataclasses.replace(SECTION, default_maxmemory=4096, enable_virtio_mem=True)
    argv = arguments(with_ports(first_plan(section, Accelerator.TCG, "pod1"), PciTopology()))

    assert argv[argv.index("-m") + 1] == "256M,maxmem=4096M"
    assert argv[-3:] == [
        "memory-backend-memfd,id=mem-virtio-mem0,size=3840M,share=on,reserve=off",
        "-device",
        "virtio-mem-pci,id=virtio-mem0,memdev=mem-virtio-mem0,requested-size=0,bus=pcie.0,addr=0x2",
    ]


def test_a_vm_that_may_not_grow_has_nothing_for_it() -> None:
    for section in (
        SECTION,
        dataclasses.replace(SECTION, default_maxmemory=256, default_maxvcpus=1),
        dataclasses.replace(SECTION, default_maxmemory=4096, memory_slots=0),
    ):
        plan = first_plan(section, Accelerator.TCG, "pod1")
        argv = arguments(plan)

        assert (argv[argv.index("-smp") + 1], argv[argv.index("-m") + 1]) == ("1", "256M")
        assert "memhp" not in kernel_command_line(plan)


def test_paths_with_commas_stay_paths() -> None:
    path = '/images/a,readonly=off,b="c".img'
    argv = arguments(
        dataclasses.replace(PLAN, devices=[Placed(device=BlockConfig(id="d", path=path), at=at(1))])
    )

    assert json.loads(argv[argv.index("-blockdev") + 1])["file"]["filename"] == path


@pytest.mark.parametrize("bad", ["", "a,b", "1a", "a b", "x" * 32, "a=b"])
def test_ids_cannot_speak_qemus_syntax(bad: str) -> None:
    with pytest.raises(BugError):
        RngConfig(id=bad)


def test_other_values_cannot_either() -> None:
    with pytest.raises(BugError):
        BlockConfig(id="d", path="/x", serial="s,share-rw=on")
    with pytest.raises(BugError):
        ShareFsConfig(source="/x", tag="t,queue-size=1")
    with pytest.raises(BugError):
        NetworkConfig(id="n", mac="02:00:00:00:00:01,x=y")


def test_a_microvm_has_its_devices_on_virtio_mmio() -> None:
    devices = [
        dataclasses.replace(one, at={"bus": f"virtio-mmio-bus.{number}"})
        for number, one in enumerate(PLAN.devices, 1)
    ]
    argv = arguments(dataclasses.replace(variant(machine_type="microvm"), tsc_khz=2_600_000, devices=devices))
    fronts = [device(argv, number) for number in range(5)]
    assert [(front["driver"], front["bus"]) for front in fronts] == [
        ("virtio-blk-device", "virtio-mmio-bus.1"),
        ("vhost-user-vsock-device", "virtio-mmio-bus.2"),
        ("vhost-user-fs-device", "virtio-mmio-bus.3"),
        ("virtio-rng-device", "virtio-mmio-bus.4"),
        ("virtio-balloon-device", "virtio-mmio-bus.5"),
    ]
    assert argv[argv.index("-machine") + 1] == "microvm,accel=tcg,pic=off,rtc=on,memory-backend=mem0"
    assert argv[argv.index("-global") + 1] == "virtio-mmio.force-legacy=false"
    assert " tsc_early_khz=2600000 tsc=reliable" in argv[argv.index("-append") + 1]
    assert not [word for word in argv if "pci" in word]


def test_a_template_and_a_vm_that_begins_with_it_differ_in_how_they_map_its_memory() -> None:
    """And in nothing else of the machine: the one boots, the other waits for the state."""
    devices = [
        Placed(device=BlockConfig(id="image", path="/g/rootfs.img", read_only=True), at=at(1)),
        Placed(device=PortConfig(), at=at(2), fd=6),
    ]
    made = dataclasses.replace(variant(boot_to_be_template=True), devices=devices, memory=9, home_port=0)
    begun = dataclasses.replace(variant(boot_from_template=True), devices=devices, memory=9, home_port=0)
    one, other = arguments(made), arguments(begun)
    memory = "memory-backend-file,id=mem0,size=256M,share={},mem-path=/proc/self/fd/9"
    assert memory.format("on") in one
    assert memory.format("off") in other
    assert "agent.port=kata.agent" in one[one.index("-append") + 1]
    assert other[other.index("-incoming") + 1] == "defer"
    boots = {"-kernel", "/g/vmlinux", "-initrd", "/g/initrd.img", "-append", one[one.index("-append") + 1]}
    assert set(one) - set(other) == {memory.format("on"), *boots}
    assert set(other) - set(one) == {memory.format("off"), "-incoming", "defer"}
    assert device(one, -2) == {"driver": "virtio-serial-pci", "id": "ports-port", "max_ports": 2, **at(2)}
    assert device(one) == {
        "driver": "virtserialport",
        "bus": "ports-port.0",
        "nr": 1,
        "name": "kata.agent",
        "chardev": "char-port",
        "id": "port",
    }
    assert "socket,id=char-port,fd=6" in one
