"""Put the modules that the agent always imports together into a few files.

What: `make_bundles` runs the guest's own Python here, imports in stages what the agent imports in stages
(up to the call home, up to the first answer, for the first container), and writes each stage's new
modules as one file for `guest.runtime.quickstart`, which says why.
Invariants: the files depend on nothing but the modules. Importing a module of the agent must have no
effect, as it is imported on the building machine.
"""

from __future__ import annotations

import os

from .contents import run_guest_python

__all__ = ["STAGES", "make_bundles"]

# Modules whose import ends a stage; what they import comes along. `agent.*` is all that is left of it.
STAGES = (
    ("agent.main",),
    ("agent.serve", "socket", "ttrpc._server"),
    ("agent.*", "json", "shutil", "concurrent.futures.thread"),
)

# Only modules that are built in may be imported before the first stage: the others belong to it.
# Not bundled: what the interpreter has imported before its first line, extension modules, and modules
# that have stayed lazy. A pyc file has 16 bytes before the code.
_PROGRAM = """\
import marshal, sys
places, target, stages = marshal.loads(sys.stdin.buffer.read())
sys.path[:] = places
known = set(sys.modules)
from quickstart import LAZY, LazyFinder
sys.meta_path.insert(0, LazyFinder(LAZY))
known.add("quickstart")
index = {}
for number, names in enumerate(stages):
    for name in names:
        __import__(name)
    bundle = {}
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)  # typing.io is no real module
        if name in known or type(module).__name__ == "_Lazy" or spec is None:
            continue
        known.add(name)
        if (spec.origin or "").endswith(".pyc"):
            with open(spec.origin, "rb") as stream:
                bundle[name] = marshal.loads(stream.read()[16:])
            (place,) = [there for here, there in places.items() if spec.origin.startswith(here + "/")]
            is_package = spec.submodule_search_locations is not None
            index[name] = (number, f"{place}/{name.replace('.', '/')}" if is_package else "")
    with open(f"{target}/{number}", "wb") as stream:
        stream.write(marshal.dumps(bundle))
with open(f"{target}/index", "wb") as stream:
    stream.write(marshal.dumps(index))
"""


def make_bundles(root: str, places: dict[str, str], target: str) -> None:
    """Write the files `index`, `0`, `1`, ... to the directory `target`.

    `places`: the directories on sys.path here -> the same in the guest; one of them has our modules.
    Raises `HostError` if the agent cannot be imported.
    """
    stages = [[name for pattern in stage for name in _expand(pattern, places)] for stage in STAGES]
    run_guest_python(root, _PROGRAM, (places, target, stages), "bundle the agent's modules")


def _expand(pattern: str, places: dict[str, str]) -> list[str]:
    """`package.*` stands for all modules of the package, those of packages in it included."""
    package, star, _ = pattern.partition(".*")
    if not star:
        return [pattern]
    found: set[str] = set()
    for place in places:
        for folder, _, names in os.walk(os.path.join(place, package)):
            here = os.path.relpath(folder, place).replace("/", ".")
            found |= {f"{here}.{name[:-4]}" for name in names if name.endswith(".pyc")}
    return sorted(name for name in found if not name.endswith(".__init__"))
