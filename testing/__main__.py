"""`python -m testing [CTR ARGUMENT...]`: a containerd with our shim and the test images, for debugging.

Without arguments it prints how to use it and stays until Ctrl-C; with arguments it runs `ctr` with them
once, shows what the daemon and the shim logged, and goes. RUNTIME stands for io.containerd.kata.v2, ID for
a fresh name. KATA_E2E_CONTAINERD chooses the containerd: 1.6, 1.7 or 2; the host's own is the default.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from testing.containerd import KATA, Containerd, chosen_version
from testing.images import busybox_image


def main() -> int:
    """Run; answers the exit code."""
    with Containerd(debug=True, version=chosen_version()) as containerd:
        archive = containerd.root / "busybox.tar"
        busybox_image(archive, "local/busybox:1")
        containerd.ctr("image", "import", str(archive))
        if len(sys.argv) > 1:
            boring = containerd.log.stat().st_size
            words = {"RUNTIME": KATA, "ID": containerd.new_id()}
            argv = containerd.ctr_argv(*(words.get(word, word) for word in sys.argv[1:]))
            code = subprocess.run(argv, check=False, env=containerd.environment).returncode
            sys.stderr.write(f"\n--- containerd and shim log ---\n{containerd.log.read_text()[boring:]}\n")
            return code
        print(
            f"log:           {containerd.log}\n"
            f"configuration: {containerd.configuration}\n"
            f"shim:          {containerd.root}/bin/containerd-shim-kata-v2\n"
            f"export PATH={containerd.root}/bin:$PATH CONTAINERD_ADDRESS={containerd.address}\n"
            f"ctr run --rm --runtime {KATA} local/busybox:1 x1 uname -r\n"
            "(docs/pods.md has the commands for a pod)\n"
            f"Ctrl-C (or kill {os.getpid()}) ends it and removes everything."
        )
        sys.stdout.flush()
        done = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_args: done.set())
        done.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
