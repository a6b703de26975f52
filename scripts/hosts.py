"""`make test-hosts`: a fresh machine of each other release, with README's commands and the tests run there.

What: a minimal Debian (mmdebstrap: the essential packages and make, git, ca-certificates) unpacked below
build/hosts, a fresh clone of HEAD in it, and the suites run there in namespaces of its own
(`scripts.host_root`). What came out is written to build/hosts/results.json, and from there into the table of
docs/hosts.md.
Why not containers of an image: a host's set-up is a part of what is tried, and mounts, cgroups and processes
have to be those of a host.
Two releases at once: one command for each, in network namespaces of their own.
Invariants: a release's root is new with each run (but with --keep); a user's machine gets nothing of this
project from outside the clone. What this machine needs to reach a mirror and a package index (certificates,
apt's and pip's settings) is laid into the root by `lend_network`, and is no part of the project.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.releases import RELEASES, host_release
from testing.guest import PROJECT

OUT = PROJECT / "build/hosts"
PAGE = PROJECT / "docs/hosts.md"
CLONE = "/srv/kata-shim"
SUITES = {"debian-12": "bookworm", "debian-13": "trixie", "debian-14": "sid"}
"""What can be made here, and how its release is called in Debian's archive."""

_PYTEST = ".venv/bin/python -m pytest -q -p no:cacheprovider"
_TEN = (
    "test_run.py::test_the_container_sees_the_guests_kernel",
    "test_run.py::test_environment_directory_and_streams",
    "test_run.py::test_a_read_only_root_refuses_writes",
    "test_run.py::test_fifty_megabytes_of_standard_input_arrive",
    "test_exec.py::test_ten_execs_at_once",
    "test_exec.py::test_a_terminal_by_ctr",
    "test_lifecycle.py::test_events_come_in_order_and_once",
    "test_pods.py::test_what_is_shared_and_what_is_not",
    "test_sizing.py::test_an_update_grows_the_vm",
    "test_network.py::test_ctr_run_with_cni",
)
JOBS: dict[str, str] = {
    "demo": "make demo",
    "check": "make install && kata-ctl check && make uninstall",
    "ten": f"{_PYTEST} " + " ".join(f"tests/e2e/{name}" for name in _TEN),
    "unit": f'{_PYTEST} -m "not e2e"',
    "conformance": f"{_PYTEST} -vv tests/conformance",
    "e2e": f'{_PYTEST} -vv tests/e2e -m "e2e and not benchhost"',
    "fault": f'{_PYTEST} -vv tests/fault -m "e2e and not benchhost"',
}
"""Each suite is one shell command in the clone; those before `unit` are the short form."""

SHORT = ("demo", "check", "ten")
LONG = ("demo", "check", "unit", "conformance", "e2e", "fault")
# Settings of ours that a root needs to reach mirrors and indexes, and no others.
_ENVIRONMENT = re.compile(r"(?i)(pip_.*|(http|https|ftp|no|all)_proxy|ssl_cert_(file|dir)|\w+_ca_bundle)")
_VERSIONS = {
    "QEMU": "qemu-system-x86_64 --version",
    "virtiofsd": "/usr/libexec/virtiofsd --version || /usr/lib/qemu/virtiofsd --version",
    "crun": "crun --version",
    "containerd": "containerd --version",
    "Python": "python3 --version",
    "guest kernel": "grep '\"kernel\"' build/guest/manifest.json",
}


def say(text: str) -> None:
    """One line, at once."""
    print(f"[hosts] {text}", flush=True)


# --- a root


def make_root(release: str) -> Path:
    """The release's root, unpacked anew from the archive that is kept."""
    archive = OUT / f"{release}.tar"
    root = OUT / release
    if not archive.exists():
        say(f"{release}: bootstrap (two minutes)")
        # Debian's mirror as apt here knows it may lag behind: an old list is signed all the same.
        subprocess.run(
            [
                *(
                    "mmdebstrap",
                    "--quiet",
                    "--format=tar",
                    "--variant=minbase",
                    "--include=make,git,ca-certificates",
                ),
                *("--aptopt=Acquire::Check-Valid-Until false", SUITES[release], f"{archive}.new"),
                "http://deb.debian.org/debian",
            ],
            check=True,
            stdin=subprocess.DEVNULL,
        )
        os.rename(f"{archive}.new", archive)
    remove_root(root)
    root.mkdir(parents=True)
    subprocess.run(["tar", "-C", root, "-xf", archive], check=True)
    return root


def remove_root(root: Path) -> None:
    """Nothing is mounted in it: what was, was in a namespace that is gone."""
    if root.exists():
        subprocess.run(["rm", "-rf", "--one-file-system", root], check=True)


def lend_network(root: Path) -> None:
    """This machine's way to the network: resolver, certificates, apt's and pip's settings."""
    for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf"):
        if os.path.exists(name):
            target = root / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copyfile(name, target)
    for path in Path("/etc/apt/apt.conf.d").glob("*"):
        lines = re.sub(r"(?m)^\s*(#|//).*$", "", path.read_text()).strip().splitlines()
        if lines and all(re.match(r"(?i)\s*Acquire::(Check|https?|Retries)\b", line) for line in lines):
            shutil.copyfile(path, root / "etc/apt/apt.conf.d" / path.name)


def environment() -> dict[str, str]:
    """A login's, and what leads to the network."""
    lent = {name: value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name)}
    return {
        **lent,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM": "dumb",
    }


def clone(root: Path) -> str:
    """A fresh clone of HEAD; answers its commit."""
    target = root / CLONE.lstrip("/")
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", f"file://{PROJECT}", target], check=True)
    head = _output(["git", "-C", str(PROJECT), "rev-parse", "HEAD"])
    subprocess.run(["git", "-C", target, "checkout", "--quiet", "--detach", head], check=True)
    return head


# --- running in it


@contextlib.contextmanager
def cgroups(name: str) -> Iterator[list[Path]]:
    """A cgroup for this machine in each v1 hierarchy and in v2's: the root of its cgroup namespace."""
    made = []
    for folder in sorted(Path("/sys/fs/cgroup").iterdir()):
        if (folder / "cgroup.procs").exists() and not folder.is_symlink():
            group = folder / f"kata-host-{name}"
            group.mkdir(exist_ok=True)
            made.append(group)
            if (group / "cpuset.cpus").exists():
                for file in ("cpuset.cpus", "cpuset.mems"):
                    if not (group / file).read_text().strip():
                        (group / file).write_text((folder / file).read_text())
                with contextlib.suppress(OSError):
                    (group / "cgroup.clone_children").write_text("1")
    try:
        yield made
    finally:
        for group in made:
            for path, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)


def enter(root: Path, command: str, *, log: Path, own_network: bool, timeout: float) -> int:
    """Run a shell command in the clone of the machine; its exit code, 124 after its time."""
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", "--cgroup"]
    argv += ["--propagation", "private", *(["--net"] if own_network else [])]
    argv += [sys.executable, "-m", "scripts.host_root", str(root), "sh", "-c", f"cd {CLONE} && {command}"]
    with cgroups(root.name) as groups, log.open("wb") as stream:
        inside = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        process = subprocess.Popen(
            ["sh", "-c", f'{inside}exec "$@"', "sh", *argv],
            cwd=PROJECT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            process.kill()  # and the kernel all of the machine, with its first process
            process.wait()


def counts(text: str) -> dict[str, int]:
    """pytest's last line: how many passed, failed, were skipped. Before that: what has ended."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error).* in \d", line)]
    if lines:
        return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", lines[-1])}
    ended = re.findall(
        r"^tests/.* (PASSED|FAILED|SKIPPED|ERROR)(?: \(.*\))? +\[ *\d+%\]$", text, re.MULTILINE
    )
    return {word.lower(): number for word, number in Counter(ended).items()}


def run_suite(root: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run it; what came out."""
    log = OUT / f"{root.name}-{name if name in JOBS else 'command'}.log"
    command = JOBS.get(name, name)
    begin = time.monotonic()
    network = options.own_network and name not in {"demo", "check"}
    code = enter(root, command, log=log, own_network=network, timeout=options.timeout)
    text = log.read_text(errors="replace")
    result: dict[str, Any] = {"ok": code == 0, "seconds": round(time.monotonic() - begin), **counts(text)}
    if code == 124:
        result["unfinished"] = True
    names = re.findall(
        r"^(?:(?:FAILED|ERROR) (tests/\S+)|(tests/\S+::.*?) (?:FAILED|ERROR) )", text, re.MULTILINE
    )
    if names:
        result["names"] = sorted({one or other for one, other in names})
    words = "green" if code == 0 else f"exit {code}"
    say(f"{root.name}: {name}: {words}, {cell(result)} in {result['seconds']} s; {log}")
    return result


def versions(root: Path) -> dict[str, str]:
    """Of what the machine has, as each program says it."""
    log = OUT / f"{root.name}-versions.log"
    found = {}
    for name, command in _VERSIONS.items():
        enter(root, command, log=log, own_network=False, timeout=180)
        words = log.read_text(errors="replace")
        pattern = r'"kernel": "([^"]+)"' if "manifest" in command else r"\b[v]?(\d+\.\d[\w.+~]*)"
        match = re.search(pattern, words)
        found[name] = match[1] if match else "-"
    return found


# --- the table


def cell(result: Mapping[str, Any]) -> str:
    """One suite of one release in a few words."""
    if not result:
        return "-"
    words = ("passed", "failed", "skipped", "error", "errors")
    parts = [f"{result[word]} {word}" for word in words if word in result]
    parts += ["then its time was over"] * ("unfinished" in result)
    return ", ".join(parts) or ("green" if result["ok"] else "fails")


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a column a release, a row a version or a suite."""
    names = [name for name in RELEASES if name in results]
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for what in _VERSIONS:
        rows += [[what, *(results[name].get("versions", {}).get(what, "-") for name in names)]]
    for suite in JOBS:
        rows += [[f"`{suite}`", *(_dated(results[name]["suites"].get(suite, {})) for name in names)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _dated(result: Mapping[str, Any]) -> str:
    return f"{cell(result)} ({result['commit'][:7]})" if result else "-"


def record(release: str, suites: Mapping[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """Add to what is known of a release ("": nothing); all that is known. Another run may do so at once."""
    file = OUT / "results.json"
    with (OUT / "results.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if release:
            known = results.get(release, {"suites": {}})
            results[release] = {
                "suites": {**known["suites"], **suites},
                "versions": {**known.get("versions", {}), **said},
            }
            file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def write_page(results: Mapping[str, Any]) -> None:
    """Put the table into docs/hosts.md."""
    begin, end = "<!-- make test-hosts -->\n", "<!-- end -->"
    text = PAGE.read_text()
    head, _, rest = text.partition(begin)
    PAGE.write_text(f"{head}{begin}{table(results)}\n{end}{rest.partition(end)[2]}")


def main() -> int:
    """The command line; 0 if everything that ran was green."""
    own = host_release(Path("/etc/os-release").read_text())
    parser = argparse.ArgumentParser(prog="python -m scripts.hosts", description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--release", action="append", choices=SUITES, help="default: all but this host's own")
    parser.add_argument("--suite", action="append", help=f"one of {', '.join(JOBS)}, or a shell command")
    parser.add_argument("--keep", action="store_true", help="use the root that is there, and its clone")
    parser.add_argument("--own-network", action="store_true", help="tests in an empty network of their own")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for a suite (%(default)g)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        say("run it as root")
        return 1
    wanted = options.suite or (SHORT if options.short else LONG)
    OUT.mkdir(parents=True, exist_ok=True)
    bad = 0
    for release in options.release or [name for name in SUITES if name != own]:
        root = OUT / release
        if not (options.keep and (root / CLONE.lstrip("/")).exists()):
            root = make_root(release)
            clone(root)
        lend_network(root)
        head = _output(["git", "-C", str(root / CLONE.lstrip("/")), "rev-parse", "HEAD"])
        for name in wanted:
            result = run_suite(root, name, options)
            bad += not result["ok"]
            if name in JOBS:
                record(release, {name: {**result, "commit": head}}, {})
        record(release, {}, {name: said for name, said in versions(root).items() if said != "-"})
        if not options.keep and bad == 0:
            remove_root(root)
    results = record("", {}, {})
    write_page(results)
    print(table(results))
    return 1 if bad else 0


def _output(argv: Sequence[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
