"""What is wrong is told: one paragraph through `ctr` with phase, cause and hint, and nothing stays behind."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.containerd import Containerd, Result
from testing.guest import Value, write_configuration

pytestmark = pytest.mark.kata_only

Broken = Callable[..., Result]


@pytest.fixture
def broken(containerd: Containerd, runtime: str, tmp_path: Path) -> Broken:
    """`ctr run --rm` with a configuration in which some keys are wrong; it must fail."""

    def _broken(*, boot_ms: int = 60000, **values: Value | None) -> Result:
        overrides: dict[str, dict[str, Value | None]] = {
            "hypervisor.qemu": values,
            "agent.kata": {"reconnect_timeout_ms": boot_ms},
        }
        file = write_configuration(tmp_path / "configuration.toml", overrides)
        result = containerd.run(
            "local/busybox:1",
            "true",
            runtime=runtime,
            options=("--runtime-config-path", str(file)),
            check=False,
            timeout=100,
        )
        assert result.code
        assert result.out == b""
        return result

    return _broken


def initrd(path: Path, init: str) -> str:
    """An initramfs with a busybox and this script as its init."""
    root = path / "initrd-root"
    for name in ("bin", "dev", "proc"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    if init:
        (root / "init").write_text(f"#!/bin/busybox sh\n{init}\n")
        (root / "init").chmod(0o755)
    names = "\n".join(str(p.relative_to(root)) for p in sorted(root.rglob("*")))
    archive = path / "broken-initrd.img"
    with archive.open("wb") as out:
        subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"],
            input=names.encode(), stdout=out, cwd=root, check=True, timeout=30,
        )  # fmt: skip
    return str(archive)


def assert_explains(result: Result, phase: str, *cause: str) -> None:
    """One paragraph that names the phase, the cause and what to try."""
    text = result.error
    assert len(text.splitlines()) == 1, text
    assert len(text) < 6000, text
    assert phase in text
    for word in cause:
        assert word in text
    assert "try: " in text


@pytest.mark.parametrize("key", ["kernel", "initrd", "image"])
def test_a_guest_file_that_is_not_there(broken: Broken, no_leaks: Callable[[], None], key: str) -> None:
    assert_explains(broken(**{key: "/no/such/guest-file"}), "config", key, "/no/such/guest-file")


def test_no_virtiofsd(broken: Broken, no_leaks: Callable[[], None]) -> None:
    assert_explains(broken(virtio_fs_daemon="/no/such/virtiofsd"), "config", "/no/such/virtiofsd")


def test_no_qemu(broken: Broken, no_leaks: Callable[[], None]) -> None:
    assert_explains(broken(path="/no/such/qemu"), "config", "/no/such/qemu")


def test_an_unknown_key_is_told_with_its_line(broken: Broken, no_leaks: Callable[[], None]) -> None:
    result = broken(default_memroy=512)
    assert_explains(result, "config", "default_memroy", "default_memory", "configuration.toml:")


def test_a_kernel_that_is_no_kernel(broken: Broken, no_leaks: Callable[[], None], tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"no kernel" * 1000)
    assert_explains(broken(kernel=str(kernel)), "boot", "qemu", "kernel")


def test_a_guest_that_does_not_boot(broken: Broken, no_leaks: Callable[[], None], tmp_path: Path) -> None:
    # Without an init the kernel panics, and the VM resets: QEMU ends, and the console says why.
    result = broken(initrd=initrd(tmp_path, ""))
    assert_explains(result, "boot", "panic")


def test_an_image_that_is_no_file_system(
    broken: Broken, no_leaks: Callable[[], None], tmp_path: Path
) -> None:
    image = tmp_path / "rootfs.img"
    image.write_bytes(bytes(16 << 20))
    assert_explains(broken(image=str(image)), "boot", "console")


def test_an_agent_that_never_answers(broken: Broken, no_leaks: Callable[[], None], tmp_path: Path) -> None:
    sleeping = initrd(tmp_path, "echo the guest only sleeps > /dev/console\nexec /bin/busybox sleep 1000000")
    result = broken(initrd=sleeping, boot_ms=10)  # ten seconds are the least that the shim grants
    assert_explains(result, "boot", "the guest only sleeps")
    assert result.seconds < 40


@pytest.fixture
def shim(containerd: Containerd, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run the shim binary as containerd does, in a bundle of ours."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    name = containerd.new_id("bundle")

    def _shim(action: str, config: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        if config is not None:
            (bundle / "config.json").write_bytes(config)
        flags = ["-namespace", containerd.namespace, "-address", containerd.address,
                 "-publish-binary", str(containerd.programs / "containerd"), "-id", name]  # fmt: skip
        if action == "delete":
            flags += ["-bundle", str(bundle)]
        return subprocess.run(
            [str(containerd.root / "bin/containerd-shim-kata-v2"), *flags, action],
            cwd=bundle,
            env=containerd.environment | {"TTRPC_ADDRESS": containerd.address + ".ttrpc"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=30,
        )

    return _shim


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "config.json"),
        (b'{"ociVersion": "1.0.2", "process": {', "config.json"),
        (b"[]", "config.json"),
    ],
    ids=["missing", "cut", "list"],
)
def test_a_bundle_that_is_wrong(
    shim: Callable[..., subprocess.CompletedProcess[bytes]],
    no_leaks: Callable[[], None],
    config: bytes | None,
    named: str,
) -> None:
    done = shim("start", config)
    text = (done.stdout + done.stderr).decode().strip()
    assert done.returncode
    assert len(text.splitlines()) == 1, text
    assert named in text
    assert "try: " in text
    done = shim("delete")
    assert (done.returncode, done.stderr) == (0, b"")
    no_leaks()
