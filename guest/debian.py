"""Debian packages as build inputs: which version apt offers, the file, its contents. Nothing is installed.

What: `Apt` is one release's packages, by the host's own sources or by an apt configuration of our own:
`candidates` asks it for versions, `depends` for what packages name, `closure` follows that, `download`
fetches exactly what it is told to into a directory; `unpack` extracts that below one root.
Why apt: it checks the archive's signatures and hashes, and every Debian machine has its sources. Why
Depends instead of lists of ours: libraries are renamed (libext2fs2t64), programs change what they are linked
to, Debian 14 has split its kernels, and Python's package is called after its minor version.
Invariants: a file in the download directory is complete (it got its name by a rename); the host's
package database and its lists are only read; what another release is asked stays below its own directory.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping

from devices.errors import HostError

from .tools import PHASE, run_tool

__all__ = ["Apt", "deb_name", "host_suite", "kernel_packages", "unpack"]

_UPDATE = "have Debian's sources in apt, run `apt-get update`, and try again"
_APT_STATE = ("/var/lib/apt/lists", "/var/lib/dpkg/status", "/etc/apt/sources.list", "/etc/apt/preferences")
_APT = ("-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring"
_KEYRINGS = (f"{_KEYRING}.gpg", f"{_KEYRING}.pgp")
_MIRROR, _SECURITY = "http://deb.debian.org/debian/", "http://deb.debian.org/debian-security/"
_UNSTABLE = ("sid", "unstable", "forky", "testing")  # which have no suite of security updates yet
_UNPACK = 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"'
_DIRECTORY = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "build", "apt")
_LISTS_FOR = 86400.0  # seconds that another release's lists are taken for new


class Apt:
    """The packages of one release.

    `suite`: "" for the host's own sources, else a Debian suite such as "trixie", for which lists and
    configuration are kept below `directory`.
    """

    def __init__(self, suite: str = "", directory: str = _DIRECTORY) -> None:
        self.suite = suite
        self.directory = os.path.join(directory, suite) if suite else ""

    def state(self) -> list[tuple[str, int]]:
        """What the answers depend on, as modification times: while it is the same, so are they."""
        watched = [f"{self.directory}/ready"] if self.suite else [*_APT_STATE, *_parts()]
        return [(path, os.stat(path).st_mtime_ns) for path in watched if os.path.exists(path)]

    def refresh(self) -> None:
        """Have the other release's lists, not older than a day. Raises `HostError` where there are none at
        all; without a network the old ones serve."""
        if not self.suite:
            return
        os.makedirs(self.directory, exist_ok=True)
        with open(f"{self.directory}/.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._refresh()

    def _refresh(self) -> None:
        ready = f"{self.directory}/ready"
        old = os.path.exists(ready)
        if old and 0 <= time.time() - os.stat(ready).st_mtime < _LISTS_FOR:
            return
        for part in ("lists/partial", "cache/archives/partial", "parts"):
            os.makedirs(f"{self.directory}/{part}", exist_ok=True)
        with open(f"{self.directory}/sources.list", "w", encoding="utf-8") as stream:
            stream.write(_sources(self.suite))
        try:
            strict = ("-o", "APT::Update::Error-Mode=any")
            run_tool(["apt-get", *_APT, *self._options(), *strict, "update"], hint="is there a network?")
        except HostError:
            if not old:
                raise
            return
        with open(ready, "w", encoding="utf-8"):
            pass

    def candidates(self, names: Iterable[str]) -> dict[str, str]:
        """The version that apt would install now, for each package. Raises `HostError` naming the unknown."""
        wanted = list(names)
        output = run_tool(["apt-cache", *self._options(), "policy", *wanted], hint=_UPDATE)
        found = dict(re.findall(r"^(\S+):\n(?:  .*\n)*?  Candidate: (\S+)", output, re.MULTILINE))
        missing = [name for name in wanted if found.get(name, "(none)") == "(none)"]
        if missing:
            raise self.unknown(missing)
        return {name: found[name] for name in wanted}

    def depends(self, names: Iterable[str]) -> dict[str, list[str]]:
        """What each package depends on (of alternatives the first, no virtual packages). Raises `HostError`
        naming the unknown."""
        wanted = list(dict.fromkeys(names))
        output = run_tool(["apt-cache", *self._options(), "depends", "--important", *wanted], hint=_UPDATE)
        found: dict[str, list[str]] = {}
        current: list[str] = []
        after_or = False
        for line in output.splitlines():
            if not line.startswith(" "):
                current = found.setdefault(line.strip(), [])
                after_or = False
            elif match := re.fullmatch(r"( \|| {2})(?:Pre)?Depends: (\S+)", line):
                if not after_or and not match[2].startswith("<"):
                    current.append(match[2])
                after_or = match[1] == " |"
        missing = [name for name in wanted if name not in found]
        if missing:
            raise self.unknown(missing)
        return found

    def closure(self, names: Iterable[str], wanted: Callable[[str], bool]) -> list[str]:
        """These packages and all that they depend on, directly or not, as far as `wanted` says so; sorted.

        Raises `HostError`."""
        known: set[str] = set()
        pending = set(names)
        while pending:
            known |= pending
            found = self.depends(sorted(pending))
            pending = {name for listed in found.values() for name in listed if wanted(name)} - known
        return sorted(known)

    def download(self, versions: Mapping[str, str], directory: str) -> list[str]:
        """Have each package's file in `directory`; return those that were fetched. Raises `HostError`."""
        os.makedirs(directory, exist_ok=True)
        missing = [
            name
            for name, version in versions.items()
            if not os.path.exists(f"{directory}/{deb_name(name, version)}")
        ]
        if missing:
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                exact = [f"{name}={versions[name]}" for name in missing]
                run_tool(["apt-get", *_APT, *self._options(), "download", *exact], cwd=scratch, hint=_UPDATE)
                for name in missing:
                    final = deb_name(name, versions[name])
                    (fetched,) = glob.glob(f"{glob.escape(scratch)}/{final.removesuffix('.deb')}_*.deb")
                    os.replace(fetched, f"{directory}/{final}")
        return missing

    def _options(self) -> list[str]:
        """Nothing of the host's apt is read for another release but its network settings, and nothing is
        written outside the directory. A mirror that lags behind serves an older list: still signed."""
        if not self.suite:
            return []
        own = self.directory
        options = {
            "Acquire::Check-Valid-Until": "false",
            "Acquire::GzipIndexes": "true",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
            "Acquire::Languages": "none",
            "APT::Default-Release": "",
            "Dir::Etc::SourceList": f"{own}/sources.list",
            "Dir::Etc::SourceParts": f"{own}/parts",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": f"{own}/parts",
            "Dir::State::Lists": f"{own}/lists",
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": f"{own}/cache",
        }
        return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    def unknown(self, names: list[str]) -> HostError:
        """The error for packages that this release does not have."""
        return HostError(
            f"apt does not know the package{'s' if len(names) > 1 else ''} {', '.join(names)}"
            + (f" in {self.suite}" if self.suite else ""),
            phase=PHASE,
            hint="the guest is built from Debian 12 or later: have its sources in apt and run"
            " `apt-get update`, or name a release (--release trixie)",
        )


def host_suite(os_release: str = "/etc/os-release") -> str:
    """The suite of a Debian host, such as "trixie"; "" for what is no Debian. "forky" is sid's name too."""
    try:
        with open(os_release, encoding="utf-8") as stream:
            facts = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', stream.read(), re.MULTILINE))
    except OSError:
        return ""
    return facts.get("VERSION_CODENAME", "") if facts.get("ID") == "debian" else ""


def _parts() -> list[str]:
    return sorted(glob.glob("/etc/apt/*.d/*"))


def _sources(suite: str) -> str:
    """sources.list for the suite, from the host's own mirror if that has Debian."""
    listed = run_tool(
        ["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI)", "Identifier: Packages"]
    ).split()
    keyring = next((path for path in _KEYRINGS if os.path.exists(path)), "")
    if not keyring:
        raise HostError(
            f"the keys of Debian's archive are not there ({_KEYRINGS[0]})",
            phase=PHASE,
            hint="apt-get install debian-archive-keyring",
        )
    mirror = next((uri for uri in listed if uri.endswith("/debian/")), _MIRROR)
    suites = [(mirror, suite)]
    if suite not in _UNSTABLE:
        security = next((uri for uri in listed if uri.endswith("/debian-security/")), _SECURITY)
        suites += [(mirror, f"{suite}-updates"), (security, f"{suite}-security")]
    return "".join(f"deb [signed-by={keyring}] {uri} {name} main\n" for uri, name in suites)


def kernel_packages(apt: Apt, meta: str) -> tuple[str, list[str]]:
    """(kernel release, the packages that its files are in) of the newest kernel that the meta package
    depends on. Raises `HostError`.

    Until Debian 13 that is one package; since Debian 14 it is empty, and depends on base, binary and modules.
    """
    image = next((name for name in apt.depends([meta])[meta] if re.match(r"linux-image-\d", name)), None)
    if image is None:
        raise apt.unknown([meta])
    release = image.removeprefix("linux-image-")
    parts = [name for name in apt.depends([image])[image] if name.endswith(f"-{release}")]
    return release, [image, *parts]


def deb_name(package: str, version: str) -> str:
    """Our name for the file: unlike apt's it does not depend on the architecture field."""
    return f"{package}_{version.replace(':', '%3a')}.deb"


def unpack(versions: Mapping[str, str], directory: str, root: str) -> None:
    """Extract the packages into `root`, which must not exist. Raises `HostError`.

    /lib and its like are links into /usr, as on every Debian machine: older packages have their files there,
    newer ones below /usr.
    """
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(root)
    for name in ("bin", "sbin", "lib", "lib64"):
        os.makedirs(f"{root}/usr/{name}")
        os.symlink(f"usr/{name}", f"{root}/{name}")
    for name, version in versions.items():
        # `dpkg-deb -x` would put a directory in place of the link.
        run_tool(
            ["sh", "-c", _UNPACK, "sh", f"{directory}/{deb_name(name, version)}", root],
            hint=f"remove {directory} and build again",
        )
