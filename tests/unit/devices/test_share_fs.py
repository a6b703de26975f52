"""Both virtiofsd programs are told apart and started sandboxed, each in its own words."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from devices.config import CacheMode, ShareFsConfig
from devices.errors import BugError, HostError
from devices.rendezvous import connect_now
from devices.share_fs import (
    Flavour,
    Virtiofsd,
    find_virtiofsd,
    flavour_of,
    virtiofsd_arguments,
    virtiofsd_confinement,
)
from devices.undo import MemoryUndo

SHARE = ShareFsConfig(source="/share", extra_args=("--thread-pool-size=1",))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_arguments_of_the_c_program() -> None:
    assert virtiofsd_arguments(SHARE, Flavour.C, 7) == [
        "--fd=7",
        "-f",
        *("-o", "source=/share", "-o", "cache=auto", "-o", "sandbox=chroot"),
        *("-o", "log_level=warn", "-o", "announce_submounts", "-o", "xattr"),
        *("-o", "modcaps=-mknod"),
        "--thread-pool-size=1",
    ]


def test_the_arguments_of_the_rust_program() -> None:
    assert virtiofsd_arguments(SHARE, Flavour.RUST, 7) == [
        *("--fd=7", "--shared-dir=/share", "--cache=auto", "--sandbox=chroot"),
        *("--seccomp=kill", "--announce-submounts", "--log-level=warn", "--xattr", "--modcaps=-mknod"),
        "--thread-pool-size=1",
    ]


@pytest.mark.parametrize(("version", "said"), [((1, 10, 0), False), ((1, 13, 2), True), ((1, 14, 0), True)])
def test_inodes_are_no_file_handles(version: tuple[int, ...], said: bool) -> None:
    """1.14 prefers handles unless it is told; not every older one has the option."""
    argv = virtiofsd_arguments(SHARE, Flavour.RUST, 7, version)

    assert ("--inode-file-handles=never" in argv) is said
    assert not {"-o", "-f"} & set(argv), "the old forms are warned of"


@pytest.mark.parametrize(
    ("flavour", "given", "becomes"),
    [
        (Flavour.C, ["-o", "modcaps=+sys_admin:-chown"], ["-o", "modcaps=-mknod:+sys_admin:-chown"]),
        (Flavour.C, ["-omodcaps=+sys_admin"], ["-omodcaps=-mknod:+sys_admin"]),
        (Flavour.C, ["-o", "flock,modcaps=+sys_admin"], ["-o", "flock,modcaps=-mknod:+sys_admin"]),
        (Flavour.C, ["-o", "xattrmap=:map::user.modcaps=.:"], None),
        (Flavour.RUST, ["--modcaps=+sys_admin"], ["--modcaps=-mknod:+sys_admin"]),
        (Flavour.RUST, ["--modcaps", "+sys_admin"], ["--modcaps", "-mknod:+sys_admin"]),
        (Flavour.RUST, ["-o", "modcaps=+mknod"], ["-o", "modcaps=-mknod:+mknod"]),
    ],
)
def test_capabilities_that_the_administrator_changes_stay_without_mknod(
    flavour: Flavour, given: list[str], becomes: list[str] | None
) -> None:
    """Each program takes the last list only, so there is one; who wants it back has to name it."""
    own = ["-o", "modcaps=-mknod"] if flavour is Flavour.C else ["--modcaps=-mknod"]
    argv = virtiofsd_arguments(ShareFsConfig(source="/s", extra_args=tuple(given)), flavour, 3)
    assert argv[-len(given) :] == (becomes or given)
    assert (argv[-len(given) - len(own) : -len(given)] == own) == (becomes is None)
    able = virtiofsd_arguments(ShareFsConfig(source="/s", extra_args=tuple(given), mknod=True), flavour, 3)
    assert able[-len(given) :] == given
    assert not any("-mknod" in word for word in able)


@pytest.mark.parametrize(
    ("given", "mknod", "more"),
    [
        ([], False, set()),
        ([], True, {"mknod"}),
        (["-o", "modcaps=+sys_admin:-chown"], False, {"sys_admin"}),
        (["--modcaps", "+SYS_ADMIN:+mknod"], False, {"sys_admin", "mknod"}),
        (["--modcaps=+mknod"], True, {"mknod"}),
        (["--modcaps=+of_the_moon"], False, set()),  # it says so itself
        (["-o", "xattrmap=:map:+sys_admin:user.modcaps=.:"], False, set()),
    ],
)
def test_it_may_have_the_capabilities_that_are_named_for_it(
    given: list[str], mknod: bool, more: set[str]
) -> None:
    none = virtiofsd_confinement(ShareFsConfig(source="/s"))
    some = virtiofsd_confinement(ShareFsConfig(source="/s", extra_args=tuple(given), mknod=mknod))
    assert "mknod" not in none.capabilities
    assert set(some.capabilities) == {*none.capabilities, *more}
    assert len(some.capabilities) == len(set(some.capabilities))


@pytest.mark.parametrize(
    ("flavour", "cache", "word"),
    [
        (Flavour.C, CacheMode.NEVER, "cache=none"),
        (Flavour.C, CacheMode.ALWAYS, "cache=always"),
        (Flavour.RUST, CacheMode.NEVER, "--cache=never"),
        (Flavour.RUST, CacheMode.ALWAYS, "--cache=always"),
    ],
)
def test_each_names_its_cache_modes(flavour: Flavour, cache: CacheMode, word: str) -> None:
    argv = virtiofsd_arguments(ShareFsConfig(source="/s", cache=cache, xattr=False), flavour, 3)

    assert word in argv
    assert "xattr" not in argv
    assert "--xattr" not in argv


@pytest.mark.parametrize("source", ["/a,sandbox=none", "/a\\,b"])
def test_a_path_that_could_say_more_is_refused(source: str) -> None:
    with pytest.raises(BugError, match="cannot take"):
        virtiofsd_arguments(ShareFsConfig(source=source), Flavour.C, 3)


def test_a_program_that_is_not_there_is_told_with_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=f"looked at {tmp_path}/virtiofsd") as caught:
        find_virtiofsd(f"{tmp_path}/virtiofsd")

    assert "virtio_fs_daemon" in caught.value.hint
    program = script(tmp_path / "virtiofsd", "exit 0")
    assert find_virtiofsd(program) == program


def test_the_rust_program_is_taken_where_a_host_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """It carries supplemental groups, and can be moved with its VM."""
    there = {"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"}
    monkeypatch.setattr(os, "access", lambda path, _: path in there)

    assert find_virtiofsd() == "/usr/libexec/virtiofsd"
    there.remove("/usr/libexec/virtiofsd")
    assert find_virtiofsd() == "/usr/lib/qemu/virtiofsd"


@pytest.mark.parametrize(
    ("says", "flavour"),
    [
        ("echo virtiofsd version 7.2.0; echo using FUSE kernel interface version 7.36", Flavour.C),
        ("echo virtiofsd 1.10.0", Flavour.RUST),
    ],
)
async def test_they_are_told_apart_by_their_version(tmp_path: Path, says: str, flavour: Flavour) -> None:
    undo = MemoryUndo()

    assert (await flavour_of(script(tmp_path / "virtiofsd", says), undo))[0] is flavour
    assert undo.entries == []


async def test_one_that_says_no_version_is_named(tmp_path: Path) -> None:
    """Which arguments it takes cannot be told then."""
    with pytest.raises(HostError, match="virtiofsd --version says no version: 'me'"):
        await flavour_of(script(tmp_path / "virtiofsd", "echo me"), MemoryUndo())


async def test_a_daemon_has_its_listener_and_leaves_nothing(tmp_path: Path) -> None:
    undo = MemoryUndo()
    before = sorted(os.listdir("/proc/self/fd"))
    program = script(
        tmp_path / "virtiofsd",
        'test "$1" = --version && exec echo virtiofsd 1.10.0\n'
        'echo "listening: $(readlink /proc/self/fd/${1#--fd=})"\n'
        "exec sleep 100",
    )
    (tmp_path / "state").mkdir()
    daemon = await Virtiofsd.start(
        ShareFsConfig(source=str(tmp_path), daemon=program), str(tmp_path / "state"), undo
    )
    assert [entry.kind for entry in undo.entries] == ["process"]
    while not daemon.stderr_tail():  # noqa: ASYNC110  (it has no event)
        await asyncio.sleep(0.005)
    await daemon.stop()
    await daemon.stop()

    assert daemon.stderr_tail().startswith("listening: socket:")
    assert undo.entries == []
    assert os.listdir(tmp_path / "state") == []
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_a_vmm_can_meet_it_at_its_path(tmp_path: Path) -> None:
    """It listens there until it is stopped; nobody has connected before."""
    program = script(
        tmp_path / "virtiofsd", 'test "$1" = --version && exec echo virtiofsd 1.10.0\nexec sleep 100'
    )
    (tmp_path / "state").mkdir()
    daemon = await Virtiofsd.start(
        ShareFsConfig(source=str(tmp_path), daemon=program),
        str(tmp_path / "state"),
        MemoryUndo(),
        at_path=True,
    )
    connect_now(daemon.path).close()
    daemon.handed_over()
    await daemon.stop()
    await daemon.stop()
    assert os.listdir(tmp_path / "state") == []


async def test_what_it_says_at_every_end_is_no_evidence(tmp_path: Path) -> None:
    program = script(
        tmp_path / "virtiofsd",
        'test "$1" = --version && exec echo virtiofsd 1.10.0\n'
        "echo real trouble; echo virtio_loop: Unexpected poll revents 11",
    )
    daemon = await Virtiofsd.start(
        ShareFsConfig(source=str(tmp_path), daemon=program), str(tmp_path), MemoryUndo()
    )
    await daemon.child.wait(10)

    assert daemon.stderr_tail() == "real trouble"
    await daemon.stop()


async def test_a_directory_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    undo = MemoryUndo()
    program = script(tmp_path / "virtiofsd", "exit 0")
    with pytest.raises(BugError, match="does not exist"):
        await Virtiofsd.start(ShareFsConfig(source="/nope", daemon=program), str(tmp_path), undo)

    assert undo.entries == []
