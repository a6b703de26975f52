"""A lazy module is loaded at its first use and then is the module itself; bundled ones come from bundles."""

from __future__ import annotations

import importlib
import marshal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.runtime.quickstart import BundleFinder, LazyFinder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path; what is imported from it is forgotten again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = sys.meta_path.copy()
    yield tmp_path
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith("qs_")]:
        del sys.modules[name]


def lazy(place: Path, text: str, name: str = "qs_lazy") -> Path:
    """A module that is to be lazy."""
    file = place / f"{name}.py"
    file.write_text(text)
    sys.meta_path.insert(0, LazyFinder([name]))
    return file


def test_loaded_at_first_use(place: Path) -> None:
    """Importing runs nothing; the first attribute runs it once."""
    lazy(place, "import sys\nsys.qs_count = getattr(sys, 'qs_count', 0) + 1\nvalue = 7\n")
    module = importlib.import_module("qs_lazy")
    assert not hasattr(sys, "qs_count")

    assert (module.value, module.value) == (7, 7)
    assert sys.qs_count == 1  # type: ignore[attr-defined]
    assert type(module) is type(sys)
    del sys.qs_count  # type: ignore[attr-defined]


def test_from_import_is_a_use(place: Path) -> None:
    """`from x import y` sees y."""
    lazy(place, "value = 7\n")
    namespace: dict[str, object] = {}
    exec("from qs_lazy import value", namespace)

    assert namespace["value"] == 7


def test_errors_surface_at_each_use(place: Path) -> None:
    """A module that cannot be loaded does not become an empty one."""
    lazy(place, "raise RuntimeError('no')\n")
    module = importlib.import_module("qs_lazy")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            _ = module.value


def test_an_attribute_that_is_not_there(place: Path) -> None:
    """An AttributeError, as ever."""
    lazy(place, "")
    module = importlib.import_module("qs_lazy")

    with pytest.raises(AttributeError, match="absent"):
        _ = module.absent


def test_threads_see_it_complete(place: Path) -> None:
    """A second thread waits while the first one loads."""
    text = "import threading\nstarted.set() if (started := threading.qs_started) else 0\n"
    text += "threading.qs_go.wait(10)\nvalue = 7\n"
    lazy(place, text)
    module = importlib.import_module("qs_lazy")
    started, go = threading.Event(), threading.Event()
    threading.qs_started, threading.qs_go = started, go  # type: ignore[attr-defined]
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(module.value)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    go.set()
    for thread in threads:
        thread.join(10)
    del threading.qs_started, threading.qs_go  # type: ignore[attr-defined]

    assert seen == [7, 7, 7]


def test_bundles(place: Path) -> None:
    """Packages and their modules come out of the bundle, what is not in it from the package's directory."""
    folder = place / "somewhere" / "qs_package"
    folder.mkdir(parents=True)
    (folder / "loose.py").write_text("value = 'loose'\n")
    texts = {"qs_package": "from .inner import value\n", "qs_package.inner": "value = 'inner'\n"}
    code = {name: compile(text, name, "exec") for name, text in texts.items()}
    (place / "0").write_bytes(marshal.dumps(code))
    index = {"qs_package": (0, str(folder)), "qs_package.inner": (0, "")}
    sys.meta_path.insert(0, BundleFinder(str(place), index))

    package = importlib.import_module("qs_package")
    assert package.value == "inner"
    assert importlib.import_module("qs_package.loose").value == "loose"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("qs_package.none")


def test_a_lazy_module_from_a_bundle(place: Path) -> None:
    """The two finders work together."""
    (place / "0").write_bytes(marshal.dumps({"qs_lazy": compile("value = 7", "x", "exec")}))
    sys.meta_path.insert(0, BundleFinder(str(place), {"qs_lazy": (0, "")}))
    sys.meta_path.insert(0, LazyFinder(["qs_lazy"]))
    module = importlib.import_module("qs_lazy")

    assert type(module).__name__ == "_Lazy"
    assert module.value == 7
