"""A template is whole or not there, whoever makes, uses or removes it at the same time or is killed over
it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from devices.errors import HostError
from shim.factory.store import DEVICE_STATE, MEMORY, RETRY, BusyError, Store

CLASS, OTHER = "a" * 24, "b" * 24
KIND = {"config": "/etc/c.toml", "hypervisor": "qemu"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"{tmp_path}/a/store")


def make(store: Store, digest: str = CLASS) -> str:
    building = store.begin(digest)
    for name in (MEMORY, DEVICE_STATE):
        Path(building.path, name).write_text(name)
    path = store.finish(building, **KIND)
    store.end(building)
    return path


def test_what_is_made_is_found_and_cannot_be_written(store: Store) -> None:
    assert store.find(CLASS) == ""
    path = make(store)
    assert store.find(CLASS) == path == f"{store.directory}/{CLASS}"
    assert store.find(OTHER) == ""
    assert [os.stat(f"{path}/{name}").st_mode & 0o777 for name in (MEMORY, DEVICE_STATE)] == [0o444, 0o444]
    assert os.stat(store.directory).st_mode & 0o777 == 0o700
    (one,) = store.listed()
    assert (one.digest, one.config, one.hypervisor) == (CLASS, "/etc/c.toml", "qemu")


def test_nobody_finds_one_that_is_being_made_and_nobody_waits(store: Store) -> None:
    building = store.begin(CLASS)
    Path(building.path, MEMORY).touch()
    assert store.find(CLASS) == ""
    assert store.listed() == []
    for busy in (lambda: store.begin(CLASS), lambda: store.begin(OTHER), store.destroy):
        with pytest.raises(BusyError, match="another process makes or removes"):
            busy()
    store.end(building)
    store.end(building)
    assert os.listdir(store.directory) == ["lock"]
    make(store)


def test_what_a_killed_one_left_is_removed_by_the_next(store: Store) -> None:
    building = store.begin(CLASS)
    Path(building.path, "vm").mkdir()
    os.close(building.lock)  # as its death does
    make(store, OTHER)
    assert sorted(os.listdir(store.directory)) == [OTHER, "lock"]


def test_a_failure_is_remembered_for_a_while_and_takes_the_template_along(store: Store) -> None:
    make(store)
    store.fail(CLASS, "no room")
    assert (store.find(CLASS), store.failed(CLASS)) == ("", "no room")
    assert store.failed(OTHER) == ""
    file = f"{store.directory}/{CLASS}.failed"
    then = time.time() - RETRY - 1
    os.utime(file, (then, then))
    assert store.failed(CLASS) == ""
    store.fail(CLASS, "x" * 5000)
    assert len(store.failed(CLASS)) == 1000
    make(store)
    assert store.failed(CLASS) == ""


def test_the_earlier_classes_of_a_configuration_go(store: Store) -> None:
    make(store, OTHER)
    make(store)
    store.forget_others(CLASS, "/etc/other.toml")
    assert len(store.listed()) == 2
    store.forget_others(CLASS, "/etc/c.toml")
    assert [one.digest for one in store.listed()] == [CLASS]


def test_destroy_removes_all_and_files_that_are_open_stay_whole(store: Store) -> None:
    assert store.destroy() == 0
    path = make(store)
    store.fail(OTHER, "no")
    with open(f"{path}/{MEMORY}") as memory:
        assert store.destroy() == 1
        assert memory.read() == MEMORY
    assert os.listdir(store.directory) == ["lock"]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_store_that_others_can_write_is_refused(store: Store, mode: int) -> None:
    make(store)
    os.chmod(store.directory, mode)
    for use in (lambda: store.find(CLASS), lambda: store.begin(OTHER), store.destroy):
        with pytest.raises(HostError, match=r"is not a directory that only user .* can write"):
            use()


def test_a_link_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "store").symlink_to("real")
    with pytest.raises(HostError, match="is not a directory"):
        Store(f"{tmp_path}/store").begin(CLASS)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"digest": OTHER}), "\0"])
def test_what_is_no_template_is_not_listed(store: Store, text: str) -> None:
    make(store)
    Path(store.directory, CLASS, "template.json").write_text(text)
    assert store.listed() == []
