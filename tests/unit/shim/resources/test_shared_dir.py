"""The share shows each mount in the exported tree, read-only ones read-only, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Real mounts need a mount namespace of their own, and a namespace needs a process of its own.
PROGRAM = """
import json, os, sys
from devices.undo import MemoryUndo
from devices.errors import KataError
from devices import mounts, syscalls
from shim.spec.guest_spec import Volume
from shim.protocols import RootfsMount
from shim.resources import shared_dir
from shim.resources.shared_dir import SharedDir

mounts.make_private()
os.umask(0o077)  # as the daemon's
base = sys.argv[1]
before = len(mounts.mounts_below(base))
undo = MemoryUndo()
share = SharedDir(base + "/share/s1", undo)
share.set_up()
out = {}
for name in ("lower", "upper", "work", "vol", "rovol"):
    os.makedirs(f"{base}/{name}")
open(f"{base}/lower/file", "w").write("below")
open(f"{base}/rovol/file", "w").write("x")
options = [f"lowerdir={base}/lower", f"upperdir={base}/upper", f"workdir={base}/work"]
overlay = RootfsMount("overlay", "overlay", "", options)
volumes = [
    Volume(0, f"{base}/vol", "/v", False, True, "c1-v"),
    Volume(1, f"{base}/rovol", "/r", True, True, "c1-r"),
    Volume(2, f"{base}/lower/file", "/f", True, False, "c1-f"),
]
share.add_container("c1", [overlay], "", volumes)
seen = share.ro + "/passthrough"
out["modes"] = [oct(os.stat(path).st_mode & 0o777) for path in (share.path, share.ro, seen, seen + "/c1")]
out["content"] = open(seen + "/c1/rootfs/file").read()
open(seen + "/c1/rootfs/new", "w").write("n")
out["upper"] = os.path.exists(f"{base}/upper/new")
open(seen + "/c1-v/new", "w").write("n")

def refused(path):
    try:
        open(path, "w")
    except OSError as error:
        return error.errno
    return 0

out["ro_volume"] = refused(seen + "/c1-r/file")
out["ro_file"] = refused(seen + "/c1-f")
out["beside"] = refused(seen + "/planted")
try:
    share.add_container("c2", [], base + "/missing", [])
except KataError as error:
    out["missing"] = str(error)
out["after_failure"] = sorted(os.listdir(share.rw + "/passthrough"))
out["errors"] = [str(e) for e in share.remove_container("c1")]
out["after_removal"] = sorted(os.listdir(share.rw + "/passthrough"))
def volume(container, readonly=False):
    return share.merge([Volume(0, f"{base}/vol", "/v", readonly, True, f"{container}-v")])

names = []
for container, readonly in (("m1", False), ("m2", False), ("m3", True)):
    merged = volume(container, readonly)
    share.add_container(container, [], base + "/lower", merged)
    names.append(merged[0].share_name)
out["errors"] += [str(e) for e in share.remove_container("m1")]
out["still_there"] = os.path.exists(f"{seen}/m1-v/new")
os.rename(f"{base}/vol", f"{base}/old")
os.mkdir(f"{base}/vol")
merged = volume("m1")
share.add_container("m1", [], base + "/lower", merged)
names.append(merged[0].share_name)
out["names"] = names
out["another"] = os.path.exists(f"{seen}/{names[-1]}/new"), os.path.exists(f"{seen}/m1-v/new")
out["errors"] += [str(e) for name in ("m2", "m3", "m1") for e in share.remove_container(name)]
out["after_merging"] = sorted(os.listdir(share.rw + "/passthrough"))
share.add_container("c3", [], base + "/lower", [])
out["errors"] += [str(e) for e in share.tear_down() + share.tear_down()]
out["left"] = os.path.exists(share.path), len(mounts.mounts_below(base)) - before, len(undo.entries)
apart = SharedDir(base + "/share/s2", undo, roots_apart=True)
apart.set_up()
apart.add_container("r1", [], base + "/lower", [Volume(0, f"{base}/vol", "/v", False, True, "r1-v")])
out["apart"] = (
    sorted(os.listdir(apart.ro + "/passthrough")),
    sorted(os.listdir(apart.path + "/roots/ro")),
    open(apart.path + "/roots/ro/r1/rootfs/file").read(),
    refused(apart.path + "/roots/ro/planted"),
)
tenants = [each for each in mounts.mounts_below(apart.path) if each.target.endswith(("rootfs", "r1-v"))]
share_options = [each.options.split(",") for each in tenants]
out["attributes"] = len(share_options), all({"nodev", "nosuid"} <= set(each) for each in share_options)
out["errors"] += [str(e) for e in apart.tear_down() + apart.tear_down()]
out["left_apart"] = os.path.exists(apart.path), len(mounts.mounts_below(base)) - before, len(undo.entries)

# Between the look that names a volume and its mount the source becomes something else.
share = SharedDir(base + "/share/s3", undo)
share.set_up()
os.makedirs(f"{base}/seen")
os.makedirs(f"{base}/secret")
(seen_then,) = share.merge([Volume(0, f"{base}/seen", "/v", False, True, "s3-v")])
key = shared_dir._key
def swapped(volume):
    found = key(volume)
    os.rename(f"{base}/seen", f"{base}/was")
    os.symlink(f"{base}/secret", f"{base}/seen")
    return found
shared_dir._key = swapped
try:
    share.add_container("s3", [], base + "/lower", [seen_then])
except KataError as error:
    out["swapped"] = str(error), error.code
shared_dir._key = key
out["errors"] += [str(e) for e in share.tear_down()]
os.symlink(base + "/lower", base + "/link")
share = SharedDir(base + "/share/s4", undo)
share.set_up()
try:
    share.add_container("s4", [], base + "/link", [])
except KataError as error:
    out["link"] = str(error), error.code
out["errors"] += [str(e) for e in share.tear_down()]
# Only "rro" makes what is mounted below read-only, too.
import subprocess
os.makedirs(f"{base}/nest/sub")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "nest", f"{base}/nest/sub"], check=True)
share = SharedDir(base + "/share/s5", undo)
share.set_up()
three = share.merge([
    Volume(0, f"{base}/nest", "/v", True, True, "s5-ro"),
    Volume(1, f"{base}/nest", "/w", True, True, "s5-rro", deep=True),
    Volume(2, f"{base}/nest", "/x", True, False, "s5-alone"),
    Volume(3, f"{base}/lower", "/y", True, True, "s5-plain"),
])
out["nested"] = [each.nested for each in three]
share.add_container("s5", [], base + "/lower", three)
seen = share.ro + "/passthrough"
out["deep"] = [
    [refused(f"{seen}/s5-{name}/{place}") for place in ("x", "sub/x")] for name in ("ro", "rro", "alone")
]
out["errors"] += [str(e) for e in share.tear_down()]
subprocess.run(["umount", f"{base}/nest/sub"], check=True)
out["left_last"] = len(mounts.mounts_below(base)) - before, len(undo.entries)
out["sources"] = os.path.exists(f"{base}/rovol/file") and os.path.exists(f"{base}/lower/file")
print(json.dumps(out))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_share_from_set_up_to_tear_down(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)

    assert out["content"] == "below"
    modes = ["0o700", "0o711", "0o711", "0o711"]
    assert out["modes"] == modes, "closed to the host's users, open to users of the guest"
    assert out["upper"], "what is written through the share lands in the snapshot"
    assert (out["ro_volume"], out["ro_file"], out["beside"]) == (30, 30, 30), "EROFS"
    assert "missing" in out["missing"]
    assert out["missing"].startswith("rootfs:")
    assert out["after_failure"] == ["c1", "c1-f", "c1-r", "c1-v"]
    assert out["after_removal"] == []
    assert out["errors"] == []
    assert out["names"] == ["m1-v", "m1-v", "m3-v", "m1-v_"], "one mount for each source and way to use it"
    assert out["still_there"], "a volume stays as long as one container of the pod uses it"
    assert out["another"] == [False, True], "what lies at the source now is not what the others have"
    assert out["after_merging"] == []
    assert out["left"] == [False, 0, 0]
    assert out["apart"] == [["r1-v"], ["r1"], "below", 30], "root file systems in a share of their own"
    assert out["attributes"] == [4, True], "on the host no node works, no program has privileges"
    assert out["left_apart"] == [False, 0, 0]
    assert "changed meanwhile" in out["swapped"][0]
    assert out["swapped"][1] == "UNAVAILABLE"
    assert "link is a symbolic link" in out["link"][0]
    assert out["link"][1] == "INVALID_ARGUMENT"
    assert out["nested"] == [True, False, False, False]
    assert out["deep"] == [[30, 0], [30, 30], [30, 30]], "as runc: ro is the mount's own, rro everything's"
    assert out["left_last"] == [0, 0]
    assert out["sources"], "what was bound is untouched"
