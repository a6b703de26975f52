"""CDI names lead to the nodes of the host's specifications, strictly read; nothing of theirs runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import cdi
from devices.cdi import annotated, find_device, guest_kind
from devices.errors import CallerError, HostError


def spec(kind: str = "vendor.com/nvme", **names: dict[str, Any]) -> dict[str, Any]:
    devices = [{"name": name, "containerEdits": edits} for name, edits in names.items()]
    return {"cdiVersion": "0.6.0", "kind": kind, "devices": devices}


def node(path: str) -> dict[str, Any]:
    return {"deviceNodes": [{"path": path}]}


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))


def find(tmp_path: Path, name: str) -> cdi.CdiDevice:
    return find_device(name, (str(tmp_path / "etc"), str(tmp_path / "run")))


def test_nodes_and_env_of_a_device_and_of_all(tmp_path: Path) -> None:
    document = spec(
        one={"deviceNodes": [{"path": "/dev/vfio/7"}, {"path": "/in", "hostPath": "/dev/x"}], "env": ["A=1"]},
        two=node("/dev/vfio/8"),
    )
    document["containerEdits"] = {"deviceNodes": [{"path": "/dev/vfio/vfio"}], "env": ["ALL=2"]}
    write(tmp_path / "etc/a.json", document)
    found = find(tmp_path, "vendor.com/nvme=one")
    assert found.nodes == ("/dev/vfio/vfio", "/dev/vfio/7", "/dev/x")
    assert (found.env, found.left_out) == (("ALL=2", "A=1"), ())
    assert find(tmp_path, "vendor.com/nvme=two").nodes == ("/dev/vfio/vfio", "/dev/vfio/8")


def test_hooks_and_mounts_are_left_out_and_told(tmp_path: Path) -> None:
    edits = {**node("/dev/vfio/7"), "hooks": [{"hookName": "createRuntime", "path": "/x"}], "mounts": [{}]}
    write(tmp_path / "run/a.json", spec(one=edits))
    found = find(tmp_path, "vendor.com/nvme=one")
    assert found.left_out == ("vendor.com/nvme=one: hooks", "vendor.com/nvme=one: mounts")


def test_the_later_directory_goes_before_and_in_one_a_device_is_defined_once(tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", spec(one=node("/dev/vfio/7")))
    write(tmp_path / "run/b.json", spec(one=node("/dev/vfio/8")))
    assert find(tmp_path, "vendor.com/nvme=one").nodes == ("/dev/vfio/8",)
    write(tmp_path / "run/c.json", spec(one=node("/dev/vfio/9")))
    with pytest.raises(HostError, match=r"defined in .*b\.json and in .*c\.json"):
        find(tmp_path, "vendor.com/nvme=one")


def test_a_device_that_nothing_has_and_one_that_yaml_may_have(tmp_path: Path) -> None:
    write(tmp_path / "etc/a.json", spec(one=node("/dev/vfio/7")))
    for name in ("vendor.com/nvme=two", "vendor.com/gpu=one"):
        with pytest.raises(HostError, match=f"no CDI specification of this host has the device {name}"):
            find(tmp_path, name)
    write(tmp_path / "etc/b.yaml", "kind: vendor.com/nvme\n")
    with pytest.raises(
        HostError, match=r"YAML is not read here: .*/etc/b\.yaml; try: write it as JSON: .*b\.json"
    ):
        find(tmp_path, "vendor.com/nvme=two")
    assert find(tmp_path, "vendor.com/nvme=one").nodes == ("/dev/vfio/7",)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{", "is no CDI specification"),
        ("[" * 100_000, "is no CDI specification"),
        ([], 'has no "kind"'),
        ({**spec(one={}), "cdiVersion": "2"}, "cdiVersion"),
        ({**spec(), "devices": []}, 'no "devices"'),
        ({**spec(), "devices": [{"containerEdits": {}}]}, "has no name"),
        ({**spec(), "devices": [{"name": "one"}]}, '"containerEdits" of one is no object'),
        ({**spec(one={}), "containerEdits": []}, '"containerEdits" of all is no object'),
        (spec(one={"deviceNodes": {}, "env": "A=1"}), '"env" of one is no list'),
        (spec(one={"deviceNodes": ["/dev/vfio/7"]}), "without a plain path"),
        (spec(one=node("/dev/../etc/shadow")), "without a plain path"),
        (spec(one={"env": ["A B"]}), "no NAME=value"),
        (spec(one={"deviceNodes": [{"path": f"/dev/{n}"} for n in range(257)]}), "more than 256"),
        (json.dumps(spec(one={"env": ["A=" + "x" * (1 << 20)]})), "more than 1048576 bytes"),
    ],
)
def test_what_is_no_specification_is_named(tmp_path: Path, document: Any, words: str) -> None:
    write(tmp_path / "etc/a.json", document)
    with pytest.raises(HostError, match=words) as caught:
        find(tmp_path, "vendor.com/nvme=one")
    assert "/etc/a.json" in str(caught.value)
    write(tmp_path / "run/b.json", spec(one=node("/dev/vfio/7")))
    assert find(tmp_path, "vendor.com/nvme=one").nodes == ("/dev/vfio/7",)  # another one has it


def test_a_directory_with_too_many_files(tmp_path: Path) -> None:
    for number in range(cdi.MAX_FILES + 1):
        write(tmp_path / f"etc/{number}.json", spec(one=node("/dev/vfio/7")))
    with pytest.raises(HostError, match="more than 128 files"):
        find(tmp_path, "vendor.com/nvme=one")


def test_names_in_annotations() -> None:
    annotations = {
        "cdi.k8s.io/vfio1": "nvidia.com/gpu=1,nvidia.com/gpu=0",
        "cdi.k8s.io/vfio0": "nvidia.com/gpu=0",
        "other/key": "nvidia.com/gpu=7",
    }
    assert annotated(annotations) == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    assert annotated({}) == []
    wrong: Any
    for wrong in (
        "",
        "gpu=0",
        "nvidia.com/gpu",
        "nvidia.com/../gpu=0",
        "nvidia.com/gpu=0 ",
        7,
        None,
        "x" * 9000,
    ):
        with pytest.raises(CallerError, match="is no device's name"):
            annotated({"cdi.k8s.io/a": wrong})
    with pytest.raises(CallerError, match="more than 32"):
        annotated({"cdi.k8s.io/a": ",".join(f"a.b/c={n}" for n in range(33))})


@given(st.text() | st.from_regex(r"[a-z./]{1,20}=[a-z./]{1,20}", fullmatch=True))
def test_no_text_is_taken_for_a_name_that_is_more_than_one(text: str) -> None:
    try:
        names = annotated({"cdi.k8s.io/x": text})
    except CallerError:
        return
    assert all(name.count("/") == name.count("=") == 1 and name.isascii() for name in names)


def test_kinds_inside_the_guest_are_katas() -> None:
    assert guest_kind(0x10DE, 0x030200) == "nvidia.com/gpu"
    assert guest_kind(0x1002, 0x030000) == "amd.com/gpu"
    assert guest_kind(0x8086, 0x038000) == ""  # 0x038: not in Kata's table
    assert guest_kind(0x15B3, 0x020700) == "nvidia.com/nic"
    assert guest_kind(0x8086, 0x010802) == ""
