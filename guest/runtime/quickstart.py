"""How the agent starts fast under an emulated CPU: modules from few files, and rare ones only when used.

What: `LazyFinder` makes `import x` for chosen names bind a module that is empty until an attribute of it
is asked for; `BundleFinder` takes modules out of a handful of files in which the image's builder has put
them together (guest/bundle.py), instead of searching and opening one file each.
Why: importing what the agent needs takes 1.5 s of a cold boot; a third is for modules that it never
touches (traceback, inspect, protobuf's pure-Python half) and a quarter is the search (docs/guest.md).
`importlib.util.LazyLoader` would do for the former, at the price of importing `importlib.util`.
Invariants: what a program sees is the module itself, only later; an error in it surfaces at its first
use; threads that use it at the same time all see it complete; a lazy module is never a package. A
module that is in no bundle is found as ever.
"""

from __future__ import annotations

import marshal
import sys
from _thread import RLock
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is one of the costly ones
    from collections.abc import Collection, Mapping, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import CodeType
    from typing import Any

__all__ = ["LAZY", "BundleFinder", "LazyFinder", "install"]

# Imported by what the agent imports, and used by none of it unless something goes wrong.
LAZY = (
    "asyncio.sslproto",
    "asyncio.staggered",
    "google.protobuf.descriptor_database",
    "google.protobuf.internal.python_message",
    "google.protobuf.reflection",
    "google.protobuf.text_encoding",
    "inspect",
    "linecache",
    "locale",
    "textwrap",
    "traceback",
    "warnings",
)

# The import system looks for these on each new module and sets those that apply. Asking is not using.
_ASKED_BY_IMPORT = frozenset({"__path__", "__file__", "__cached__"})

_lock = RLock()
_loading: set[str] = set()


class _Lazy(ModuleType):
    """A module before its first use. Attributes that the import system sets are there already."""

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED_BY_IMPORT:
            raise AttributeError(name)
        with _lock:
            own = ModuleType.__getattribute__(self, "__name__")
            if type(self) is _Lazy:
                if own in _loading:  # it imports itself in a circle, as the real one might
                    raise AttributeError(f"partially initialized module {own!r} has no attribute {name!r}")
                _loading.add(own)
                try:
                    self.__loader__.exec_module(self)  # type: ignore[union-attr]
                    self.__class__ = ModuleType  # type: ignore[assignment]
                finally:
                    _loading.discard(own)
        return getattr(self, name)


class _LazyLoader:
    """Gives the import system a `_Lazy` module instead of running the real loader."""

    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Lazy(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.real
        assert module.__spec__ is not None
        module.__spec__.loader = self.real


class LazyFinder:
    """A meta path finder for the names that are to be lazy; the others find the module as ever."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder.find_spec."""
        if name not in self.names:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and spec.submodule_search_locations is None:
                    spec.loader = _LazyLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class BundleFinder:
    """A meta path finder and loader for modules in bundles.

    `directory` has the files `0`, `1`, ...: each a marshalled dict of module name -> code object.
    `index` tells for each module the number of its file, and its directory if it is a package. A file is
    read when the first of its modules is imported, and its code objects are dropped as they are used.
    """

    def __init__(self, directory: str, index: Mapping[str, tuple[int, str]]) -> None:
        self.directory = directory
        self.index = index
        self._code: dict[int, dict[str, CodeType]] = {}

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  (the protocol's)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder.find_spec."""
        entry = self.index.get(name)
        if entry is None:
            return None
        folder = entry[1]
        spec = _ModuleSpec(name, self, is_package=bool(folder))  # type: ignore[arg-type]
        if folder:
            spec.submodule_search_locations = [folder]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The default will do."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code."""
        name = module.__name__
        number = self.index[name][0]
        if number not in self._code:
            with open(f"{self.directory}/{number}", "rb") as stream:
                self._code[number] = marshal.loads(stream.read())  # noqa: S302  (the image is ours)
        exec(self._code[number].pop(name), module.__dict__)  # noqa: S102


assert sys.__spec__ is not None
_ModuleSpec: type[ModuleSpec] = type(sys.__spec__)


def install(directory: str) -> None:
    """Find modules in the bundles of this directory, and load those of `LAZY` lazily, from now on."""
    with open(f"{directory}/index", "rb") as stream:
        bundles = BundleFinder(directory, marshal.loads(stream.read()))  # noqa: S302
    sys.meta_path.insert(0, bundles)
    sys.meta_path.insert(0, LazyFinder(LAZY))
