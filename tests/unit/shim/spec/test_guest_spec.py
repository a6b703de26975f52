"""The guest gets the container's spec without the host's paths, hooks, devices and namespaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from devices.errors import CallerError
from shim.spec.documents import checked
from shim.spec.guest_spec import (
    GUEST_SHM,
    guest_rootfs,
    guest_spec,
    own_shm,
    plan_volumes,
    wants_sandbox_pidns,
)
from shim.state.bundle import MEMBER, OWN


def amended(spec: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], list[str]]:
    arguments: dict[str, Any] = {
        "container_id": "c1",
        "bundle": "/b",
        "container_type": "single_container",
        "volumes": plan_volumes(spec, "c1"),
    }
    return guest_spec(spec, **{**arguments, **changes})


def test_root_is_the_share_and_annotations_say_whence() -> None:
    spec = {"root": {"path": "/host/rootfs", "readonly": True}}
    guest, left_out = amended(spec)

    assert guest["root"] == {"path": guest_rootfs("c1"), "readonly": True}
    assert guest["annotations"]["io.katacontainers.pkg.oci.container_type"] == "single_container"
    assert left_out == []
    assert spec["root"]["path"] == "/host/rootfs", "the caller's document is not changed"


def test_namespaces_of_the_host_do_not_reach_the_guest() -> None:
    spaces = [
        {"type": "pid"},
        {"type": "network", "path": "/run/netns/x"},
        {"type": "ipc", "path": "/proc/7/ns/ipc"},
        {"type": "mount"},
        {"type": "time"},
    ]
    guest, left_out = amended({"linux": {"namespaces": spaces}})

    assert guest["linux"]["namespaces"] == [{"type": "ipc"}, {"type": "mount"}, {"type": "cgroup"}]
    assert any(line.startswith("linux.namespaces time") for line in left_out)
    assert not wants_sandbox_pidns({"linux": {"namespaces": spaces}})
    assert wants_sandbox_pidns({"linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}})


def test_only_start_container_hooks_go_along() -> None:
    hooks = {"prestart": [{"path": "/evil"}], "startContainer": [{"path": "/ok"}]}
    guest, _ = amended({"hooks": hooks})

    assert guest["hooks"] == {"startContainer": [{"path": "/ok"}]}
    assert "hooks" not in amended({"hooks": {"prestart": [{"path": "/evil"}]}})[0]


def test_what_names_host_devices_is_left_out_and_listed() -> None:
    spec = {
        "linux": {
            "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm"},
                    {"allow": True, "type": "b", "major": 8, "minor": 0, "access": "r"},
                    {"allow": True, "type": "c", "major": 10, "minor": 60, "access": "r"},
                    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
                    {"allow": True, "type": "b", "access": "m"},
                ],
                "pids": {"limit": 3},
                "cpu": {"cpus": "0-3", "quota": 5},
            },
        },
    }
    guest, left_out = amended(spec, disable_seccomp=True)

    resources = guest["linux"]["resources"]
    assert resources["pids"] == {"limit": 3}
    assert resources["cpu"] == {"quota": 5}
    assert [(r["allow"], r.get("type"), r["major"], r["minor"]) for r in resources["devices"]] == [
        (False, None, -1, -1),
        (True, "c", 136, -1),
        (True, "b", -1, -1),
    ]
    assert guest["linux"]["devices"] == spec["linux"]["devices"]
    assert left_out == [
        "linux.resources.devices[1] (the host's b 8:0)",
        "linux.resources.devices[2] (the host's c 10:60)",
        "linux.resources.cpu.cpus",
        "linux.seccomp",
    ]


def test_bind_mounts_become_shares() -> None:
    spec = {
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "/srv/da ta", "options": ["rbind", "ro"]},
            {
                "destination": "/dev/shm",
                "type": "bind",
                "source": "/run/sandboxes/c1/shm",
                "options": ["rbind"],
            },
            {"destination": "/sys/fs/bpf", "source": "/sys/fs/bpf", "options": ["bind"]},
        ]
    }
    volumes = plan_volumes(spec, "c1")
    guest, _ = amended(spec)

    assert [(v.index, v.source, v.readonly) for v in volumes] == [(1, "/srv/da ta", True)]
    assert guest["mounts"][1]["source"] == volumes[0].guest_path
    assert "/srv" not in str(guest["mounts"])
    assert guest["mounts"][2]["source"] == "/run/kata-containers/sandbox/shm"
    assert guest["mounts"][3]["source"] == "/sys/fs/bpf", "the guest's own sysfs"


@pytest.mark.parametrize(
    ("source", "shared"),
    [
        ("/var/lib/kubelet/pods/7e1c/volumes/kubernetes.io~empty-dir/cache", True),
        ("/srv/shm", True),
        ("/dev/shm/of-somebody", True),
        ("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/the-pod/shm", False),
        (f"/var/lib/docker/containers/{64 * 'a'}/mounts/shm", False),
        ("/var/lib/containers/storage/overlay-containers/c1/userdata/shm", False),
        ("/made/by/hand", False),
        ("/dev/shm", False),
    ],
)
def test_a_volume_at_dev_shm_is_a_volume(source: str, shared: bool) -> None:
    """The engine's own becomes the pod's, in the guest's memory; whatever a user puts there is his."""
    mount = {"destination": "/dev/shm", "type": "bind", "source": source}
    spec = {"mounts": [mount], "annotations": {"io.kubernetes.cri.sandbox-id": "the-pod"}}
    volumes = plan_volumes(spec, "c1", own_shm({"mounts": [{**mount, "source": "/made/by/hand"}]}))
    guest, _ = amended(spec, volumes=volumes)

    assert [volume.source for volume in volumes] == ([source] if shared else [])
    assert guest["mounts"][0]["source"] == (volumes[0].guest_path if shared else GUEST_SHM)


def test_how_deep_a_volume_is_read_only() -> None:
    """What is mounted below a read-only volume takes its "ro" over in the guest, so that it is left to the
    host."""
    mounts = [
        {"destination": f"/{name}", "type": "bind", "source": "/srv", "options": ["rbind", name, "nosuid"]}
        for name in ("ro", "rro")
    ]
    volumes = plan_volumes({"mounts": mounts}, "c1")
    assert [(volume.readonly, volume.deep) for volume in volumes] == [(True, False), (True, True)]

    plain, _ = amended({"mounts": mounts}, volumes=volumes)
    nested, _ = amended({"mounts": mounts}, volumes=[replace(each, nested=True) for each in volumes])
    assert [mount["options"] for mount in plain["mounts"]] == [
        ["rbind", "ro", "nosuid"],
        ["rbind", "rro", "nosuid"],
    ]
    assert [mount["options"] for mount in nested["mounts"]] == [
        ["rbind", "nosuid"],
        ["rbind", "rro", "nosuid"],
    ]


def test_what_lies_in_the_hosts_dev_shm_can_be_shared_like_anything_else() -> None:
    spec = {"mounts": [{"destination": "/data", "type": "bind", "source": "/dev/shm/data"}]}

    assert [volume.source for volume in plan_volumes(spec, "c1")] == ["/dev/shm/data"]
    assert own_shm({"mounts": [{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"}]}) == ""


@pytest.mark.parametrize(
    "mounts",
    [
        "x",
        [{"destination": 1}],
        [None],
        [{"type": "tmpfs"}],
        [{"destination": "/a", "type": "bind", "source": "../etc"}],
        [{"destination": "/a", "type": "tmpfs"}] * 2000,
    ],
)
def test_malformed_mounts_are_refused(mounts: Any) -> None:
    with pytest.raises(CallerError) as caught:
        plan_volumes(checked({"mounts": mounts}, "config.json"), "c1")

    assert caught.value.code == "INVALID_ARGUMENT"


def test_share_names_stay_inside_the_share() -> None:
    spec = {"mounts": [{"destination": "/a/..", "type": "bind", "source": "/x"}]}

    assert "/" not in plan_volumes(spec, "c1")[0].share_name
    assert plan_volumes(spec, "c1")[0].share_name.startswith("c1-")


def test_the_container_that_holds_a_pod_gets_nothing_of_the_host() -> None:
    spec = {
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/resolv.conf", "source": "/run/x/resolv.conf", "options": ["rbind", "ro"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/x/shm"},
        ]
    }
    guest, _ = amended(spec, container_type=OWN, volumes=[])

    assert [mount["destination"] for mount in guest["mounts"]] == ["/proc"]


def test_a_member_tells_which_namespaces_it_has_of_its_own() -> None:
    spaces = [{"type": "ipc"}, {"type": "uts", "path": "/proc/7/ns/uts"}, {"type": "mount"}]
    spec = {
        "annotations": {"io.kata-shim.private-namespaces": "mount"},
        "linux": {"namespaces": spaces},
    }
    member, left_out = amended(spec, container_type=MEMBER)
    _, of_the_host = amended(spec, container_type=OWN)

    assert member["annotations"]["io.kata-shim.private-namespaces"] == "ipc"
    assert member["linux"]["namespaces"][:2] == [{"type": "ipc"}, {"type": "uts"}], "no path of the host"
    assert left_out == []
    assert of_the_host == ["linux.namespaces.uts.path"], "there is nobody to share with"
