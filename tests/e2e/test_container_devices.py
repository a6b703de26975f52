"""A block device of the host in `linux.devices` is the container's, as its rules say, and comes back."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.api import Api
from testing.containerd import Containerd
from testing.guest import Value, write_configuration
from tests.e2e.test_oci_spec import Change, Pod

pytestmark = [
    pytest.mark.kata_only,
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="no loop devices"),
]

BUSYBOX = "local/busybox:1"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device and its file, which begins with a line of text."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"from the host\n")
    os.truncate(path, 4 << 20)
    done = subprocess.run(["losetup", "--find", "--show", path], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    yield device, path
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture(scope="module")
def pod(containerd: Containerd, api: Api, runtime: str) -> Iterator[Pod]:
    """One VM for the containers that need nothing else."""
    made = Pod(containerd, api, runtime)
    yield made
    made.close()


def test_ctr_run_with_a_device(
    containerd: Containerd, loop: tuple[str, Path], no_leaks: Callable[[], None]
) -> None:
    device, path = loop
    write = f"echo 'from the guest' | dd of={device} bs=512 seek=1 conv=fsync"
    script = f"head -n 1 {device}; {write}; stat -c %F {device}"
    done = containerd.run(BUSYBOX, "sh", "-c", script, options=("--device", device), timeout=120)

    assert done.text.splitlines() == ["from the host", "block special file"]
    assert path.read_bytes()[512:527] == b"from the guest\n"
    subprocess.run(["mke2fs", "-q", "-F", device], check=True)  # it is the host's again


def with_device(path: str, device: str, access: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        number = os.stat(device).st_rdev
        node = {"type": "b", "major": os.major(number), "minor": os.minor(number)}
        spec["linux"].setdefault("devices", []).append({"path": path, **node})
        spec["linux"]["resources"]["devices"].append({"allow": True, "access": access, **node})

    return change


def test_a_container_that_may_not_write_has_a_disk_that_cannot_be_written(
    pod: Pod, loop: tuple[str, Path]
) -> None:
    device, path = loop
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    script = "cat /sys/block/vdb/ro; head -n 1 /dev/data; echo no | dd of=/dev/data || echo refused"
    done = pod.run(with_device("/dev/data", device, "rm"), "sh", "-c", script)

    assert done.lines == ["1", "from the host", "refused"], done.err
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_containers_of_a_pod_share_a_disk_and_the_last_one_gives_it_back(
    pod: Pod, loop: tuple[str, Path]
) -> None:
    device, _ = loop
    script = "echo changed | dd of=/dev/mine conv=fsync 2>/dev/null; exec sleep 1000"
    first = pod.create(with_device("/dev/mine", device, "rwm"), "sh", "-c", script)
    first.start()
    wait = "until head -n 1 /dev/yours | grep -q changed; do :; done; ls /sys/block | grep -c vdb"
    second = pod.run(with_device("/dev/yours", device, "rwm"), "sh", "-c", wait)
    assert second.lines == ["1"], second.err
    assert subprocess.run(["mke2fs", "-q", "-F", device], capture_output=True, check=False).returncode != 0
    first.kill(9)
    first.wait()
    first.delete()

    subprocess.run(["mke2fs", "-q", "-F", device], check=True)
    assert pod.run(lambda _: None, "ls", "/sys/block").lines == ["vda"]


def test_limits_of_the_spec_are_the_disks(pod: Pod, loop: tuple[str, Path]) -> None:
    """A megabyte at a quarter of it a second: more than three seconds, by the guest's clock."""
    device, _ = loop
    number = os.stat(device).st_rdev

    def change(spec: dict[str, Any]) -> None:
        with_device("/dev/slow", device, "rwm")(spec)
        limit = {"major": os.major(number), "minor": os.minor(number), "rate": 1 << 18}
        spec["linux"]["resources"]["blockIO"] = {"throttleReadBpsDevice": [limit]}

    read = "dd if=/dev/slow of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null"
    done = pod.run(change, "sh", "-c", f"cat /proc/uptime; {read}; cat /proc/uptime")
    before, after = (float(line.split()[0]) for line in done.lines)
    assert after - before > 3


def test_a_microvm_has_its_first_containers_devices_from_the_start(
    containerd: Containerd, loop: tuple[str, Path], tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    device, path = loop
    overrides: dict[str, dict[str, Value | None]] = {"hypervisor.qemu": {"machine_type": "microvm"}}
    configuration = write_configuration(tmp_path / "configuration.toml", overrides)
    second = tmp_path / "second.img"
    second.write_bytes(b"the second\n".ljust(1 << 20, b"\0"))
    other = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", second], check=True, capture_output=True, text=True
    ).stdout.strip()
    script = f"head -n 1 {device} {other}; echo 'from the guest' | dd of={device} bs=512 seek=1 conv=fsync"
    options = ("--runtime-config-path", str(configuration), "--device", device, "--device", other)
    try:
        done = containerd.run(BUSYBOX, "sh", "-c", script, options=options, timeout=120)
    finally:
        subprocess.run(["losetup", "--detach", other], check=True)

    assert [line for line in done.text.splitlines() if line and "==>" not in line] == [
        "from the host",
        "the second",
    ]
    assert path.read_bytes()[512:527] == b"from the guest\n"


def test_a_device_that_the_host_has_mounted_is_refused_before_anything_is_done(
    containerd: Containerd, loop: tuple[str, Path], tmp_path: Path
) -> None:
    device, _ = loop
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mke2fs", "-q", "-F", device], check=True)
    subprocess.run(["mount", device, place], check=True)
    try:
        done = containerd.run(BUSYBOX, "true", options=("--device", device), timeout=120, check=False)
    finally:
        subprocess.run(["umount", place], check=True)

    assert done.code != 0
    assert f"devices: {device} is in use on this host: mounted at {place};" in done.error
    if not containerd.version.startswith("2"):  # whose ctr leaves the code out of the text
        assert "failed precondition" in done.error
