"""Any amount goes both ways, whatever guest's kernel and vsock daemon make of large packets."""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.api import Task
from testing.guest import PROJECT, write_configuration

_DAEMON = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
_SIZE = 64 << 20
# Without what grants less than the daemon's own 64 KiB: daemons of others have no such argument.
_CANNOT_BE_TOLD = """\
#!/bin/bash
words=("$@")
for ((i = 0; i < ${#words[@]}; i++)); do
    [[ ${words[i]} == --tx-buffer-size ]] && unset 'words[i]' 'words[i+1]'
done
exec "${0%/*}/daemon" "${words[@]}"
"""


@pytest.mark.kata_only
@pytest.mark.slow
@pytest.mark.skipif(not _DAEMON.exists(), reason=f"{_DAEMON} is not there: the kernel's vsock serves here")
@pytest.mark.parametrize("told", [True, False], ids=["our daemon", "one that cannot be told"])
def test_64_megabytes_each_way(create: Callable[..., Task], tmp_path: Path, told: bool) -> None:
    """With Linux 6.12.y and later in the guest it stopped after less than one, without an error."""
    place = tmp_path / "opt"
    place.mkdir(mode=0o755)
    wrapper = place / "vhost-device-vsock"
    wrapper.write_text(_CANNOT_BE_TOLD)
    wrapper.chmod(0o755)
    shutil.copy(_DAEMON, place / "daemon")  # what is beside a program is in its sight
    daemon = str(_DAEMON if told else wrapper)
    settings = write_configuration(tmp_path / "c.toml", {"hypervisor.qemu": {"vsock_daemon": daemon}})
    task = create("cat", options=("--runtime-config-path", str(settings)))
    task.start()
    data = random.Random(3).randbytes(_SIZE)

    def feed() -> None:
        task.io.write(data, timeout=200)
        task.io.detach_stdin()
        task.close_stdin()

    writer = threading.Thread(target=feed)
    writer.start()
    assert task.wait(timeout=240) == 0
    writer.join(10)
    out, err = task.io.finish()
    assert (len(out), hashlib.sha256(out).digest(), err) == (_SIZE, hashlib.sha256(data).digest(), b"")
    task.delete()
