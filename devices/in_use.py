"""Who uses a disk on this host already: what must not be given to a VM, and the mark of what has been.

What: `claim` refuses an image file or a block device that is mounted, is swap, lies below another device, or
is another VM's, and names who has it; what it returns keeps the others away until it is closed.
Why the kernel is asked, not only its lists: an exclusive open (O_EXCL) fails for a block device that anybody
has claimed, in whatever mount namespace, and for the partitions of such a disk and the disk of such a
partition. The lists (mountinfo, swaps, holders) give the error its words. Images have no such claim: for
them the loop devices are looked through, and locks tell the VMMs of this host from each other.
Invariants: looking changes nothing. Who writes is alone: while a VM may write to a disk, no other VM has it
and the host cannot mount it. The mark goes with the process that holds it, whatever ends it.
Source: open(2) O_EXCL on block devices, fcntl(2) open file description locks, QEMU's block/file-posix.c (the
bytes that it locks), Cloud Hypervisor's docs/disk_locking.md (all bytes of the disk), loop(4),
Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from devices.errors import CallerError, HostError
from devices.threads import acquire

__all__ = ["claim", "device_node", "hold", "probe", "users"]

CLASS = "/sys/class/block"
_PHASE = "devices"
_LOOP_GET_STATUS64 = 0x4C05
_MARK = 1 << 62  # the byte that we lock, shared by those who read; behind every disk's end
_INSIDE = 1000  # a byte that VMMs have locked which lock the whole disk; earlier versions of us had it too
_QEMU_WRITES, _QEMU_ALONE = 101, 201  # the bytes that QEMU locks: it writes; nobody else may write
_FLOCK = "hhlliL"  # struct flock: type, whence, start, length, pid


def claim(path: str, *, read_only: bool) -> int:
    """A descriptor that keeps the image or block device `path` for one VM until it is closed. Blocks.

    Raises CallerError when it is in use, with the user's name; HostError when it cannot be opened at all.
    """
    try:
        info = os.stat(path)
    except OSError as error:
        raise _unusable(path, error) from error
    if stat.S_ISBLK(info.st_mode):
        path = device_node(info.st_rdev) or path
        backing = _backing_file(path)
        others = _loop_users(*backing, but=info.st_rdev) if backing else []
        fd = _open_exclusive(path, info.st_rdev, keep=not read_only)
    elif stat.S_ISREG(info.st_mode):
        others = [*_loop_users(info.st_dev, info.st_ino), *_swap_users(info)]
        fd = _open(path, os.O_RDONLY if read_only else os.O_RDWR)
    else:
        raise HostError(f"{path} is neither a block device nor an image", phase=_PHASE)
    try:
        if others:
            raise _taken(path, others)
        if stat.S_ISBLK(info.st_mode) and os.lseek(fd, 0, os.SEEK_END) == 0:
            raise HostError(f"{path} is empty: there is no disk, or nothing behind it", phase=_PHASE)
        _mark(fd, path, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise
    return fd


def probe(path: str, *, read_only: bool) -> None:
    """Raise what `claim` would. Blocks."""
    os.close(claim(path, read_only=read_only))


async def hold(path: str, *, read_only: bool) -> int:
    """`claim` beside the event loop."""
    return await acquire(claim, path, read_only=read_only, lost=os.close)


def device_node(number: int) -> str:
    """The kernel's own node of a block device, /dev/loop0; "" if there is none."""
    try:
        with open(f"{_sysfs(number)}/uevent", encoding="ascii") as file:
            name = next(line[8:].strip() for line in file if line.startswith("DEVNAME="))
        return f"/dev/{name}" if os.stat(f"/dev/{name}").st_rdev == number else ""
    except (OSError, StopIteration):
        return ""


def users(number: int) -> list[str]:
    """Who uses the block device with this number, a part of it, or a device on it: "mounted at /srv"."""
    found = _own_users(number)
    directory = os.path.realpath(_sysfs(number))
    for name in _list(directory):  # its partitions
        if os.path.exists(f"{directory}/{name}/partition"):
            found += [f"{each} ({name})" for each in _own_users(_number(f"{directory}/{name}"))]
    if os.path.exists(f"{directory}/partition"):
        disk = os.path.dirname(directory)
        found += [f"{each} ({os.path.basename(disk)})" for each in _own_users(_number(disk))]
    return found


def _own_users(number: int) -> list[str]:
    found = [f"mounted at {place}" for place in _mounts(number)]
    for path in _swaps():
        try:
            if os.stat(path).st_rdev == number:
                found.append(f"swap as {path}")
        except OSError:
            continue
    for name in _list(f"{_sysfs(number)}/holders"):
        above = users(_number(f"{CLASS}/{name}"))
        found += [f"{each} (as {name})" for each in above] or [f"a part of {name}"]
    return found


def _mounts(number: int) -> list[str]:
    """Where it is mounted: for us, or for the host's first process, whose mounts we may not see."""
    places = []
    wanted = f"{os.major(number)}:{os.minor(number)}"
    for table in ("/proc/self/mountinfo", "/proc/1/mountinfo"):
        try:
            with open(table, encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    fields = line.split()
                    # btrfs has numbers of its own, and tells the device as its source only.
                    source = fields[fields.index("-") + 2] if "-" in fields else ""
                    if fields[2] == wanted or (
                        fields[2].startswith("0:") and source.startswith("/dev/") and _rdev(source) == number
                    ):
                        places.append(fields[4].replace("\\040", " "))
        except OSError:
            continue
    return list(dict.fromkeys(places))


def _swaps() -> list[str]:
    try:
        with open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as lines:
            return [line.split()[0].replace("\\040", " ") for line in lines][1:]
    except (OSError, IndexError):
        return []


def _swap_users(info: os.stat_result) -> list[str]:
    found = []
    for path in _swaps():
        try:
            if os.path.samestat(os.stat(path), info):
                found.append("swap")
        except OSError:
            continue
    return found


def _loop_users(device: int, inode: int, but: int = -1) -> list[str]:
    """Who uses the loop devices of the file with this inode, apart from the one with the number `but`."""
    found = []
    for name in _list("/sys/block"):
        # The file's name may be one of another mount namespace: its inode is asked for.
        if not name.startswith("loop") or not os.path.exists(f"/sys/block/{name}/loop/backing_file"):
            continue
        number = _number(f"/sys/block/{name}")
        if number != but and _backing_file(f"/dev/{name}") == (device, inode):
            found += [f"{each} (as {name})" for each in users(number)]
    return found


def _backing_file(path: str) -> tuple[int, int] | None:
    """(device, inode) of the file behind a loop device; None for what is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if os.major(os.fstat(fd).st_rdev) != 7:
            return None
        status = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(232))
        encoded, inode = struct.unpack_from("=QQ", status)
    except OSError:
        return None
    finally:
        os.close(fd)
    return encoded, inode


def _open_exclusive(path: str, number: int, *, keep: bool) -> int:
    """Open a block device that nobody has claimed. `keep`: claim it; else others may read it too."""
    if found := users(number):
        raise _taken(path, found)
    try:
        fd = os.open(path, (os.O_RDWR if keep else os.O_RDONLY) | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _taken(path, users(number)) from None  # somebody whom we cannot see, or who came just now
        raise _unusable(path, error) from error
    if not keep:
        os.close(fd)
        return _open(path, os.O_RDONLY)
    return fd


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ETXTBSY:
            raise _taken(path, ["swap, or a running program"]) from None
        raise _unusable(path, error) from error


def _mark(fd: int, path: str, *, read_only: bool) -> None:
    """Lock our byte, after a look at those of others: not every VM of this host is one of ours, and a VMM's
    own lock must not meet ours."""
    mode = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    taken = _locked(fd, _INSIDE, mode) >= 0
    for byte in (_QEMU_WRITES,) if read_only else (_QEMU_WRITES, _QEMU_ALONE):
        # One that begins with the disk is another reader's, of a VMM that locks all of it; QEMU's never does.
        taken |= _locked(fd, byte, fcntl.F_WRLCK) > 0
    if taken:
        raise _taken(path, ["another VM's"])
    lock = struct.pack(_FLOCK, mode, 0, _MARK, 1, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _taken(path, ["another VM's"]) from None
        raise _unusable(path, error) from error


def _locked(fd: int, byte: int, mode: int) -> int:
    """Where a lock begins that keeps this one away; -1 if there is none."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, mode, 0, byte, 1, 0, 0))
    kind, _, start, *_ = struct.unpack(_FLOCK, found)
    return -1 if kind == fcntl.F_UNLCK else int(start)


def _taken(path: str, by: list[str]) -> CallerError:
    who = ", ".join(by[:4]) or "claimed by somebody whom the kernel does not name (another VM, perhaps)"
    return CallerError(
        f"{path} is in use on this host: {who}; two kernels must not use one file system",
        phase=_PHASE,
        hint="give the VM a disk that nobody else uses: unmount it (umount), or end its other user",
    )


def _unusable(path: str, error: OSError) -> HostError:
    return HostError(f"{path} cannot be used: {error.strerror}", phase=_PHASE)


def _sysfs(number: int) -> str:
    return f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"


def _number(directory: str) -> int:
    """The number of the device with this directory of sysfs; -1 if it has gone."""
    try:
        with open(f"{directory}/dev", encoding="ascii") as file:
            major, minor = file.read().split(":")
        return os.makedev(int(major), int(minor))
    except (OSError, ValueError):
        return -1


def _rdev(path: str) -> int:
    try:
        return os.stat(path).st_rdev
    except OSError:
        return -1


def _list(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
