"""Of the files that a container mounts, and of nothing else, the kernel asks the host again."""

from __future__ import annotations

from pathlib import Path

from agent.storage.fresh import look_again, shared_files


def test_only_files_of_the_share_are_asked_for(tmp_path: Path) -> None:
    share = f"{tmp_path}/share/"
    (tmp_path / "share/directory").mkdir(parents=True)
    for name in ("share/hosts", "share/resolv.conf", "other"):
        (tmp_path / name).touch()
    sources = ["hosts", "resolv.conf", "hosts", "directory", "gone", "zero\0"]
    mounts = [{"type": "bind", "source": share + name} for name in sources]
    mounts += [{"type": "bind", "source": f"{tmp_path}/other"}, {"type": "proc", "source": "proc"}, {}]
    assert shared_files({"mounts": mounts}, share=share) == [share + "hosts", share + "resolv.conf"]
    assert shared_files({}, share=share) == []


def test_one_that_has_gone_harms_nobody(tmp_path: Path) -> None:
    look_again([str(tmp_path / "gone"), str(tmp_path)])
