"""Which configuration file holds: the places, in the order in which they count.

What: `find_config`. The annotation io.katacontainers.config_path comes before all of these, but only a file
found here can allow it (`shim.config.load`).
Why classes: one containerd may run several kinds of sandboxes. Each runtime io.containerd.kata-CLASS.v2 is a
link to the same program, whose name then says which file to read.
Invariants: a file that somebody names and that is not there is an error, never passed over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from devices.errors import ConfigError

__all__ = ["SEARCH_PATH", "existing", "find_config"]

SEARCH_PATH = (
    "/etc/kata-containers/configuration.toml",
    "/opt/kata-shim/share/defaults/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/configuration.toml",
)


def find_config(
    path: str | None,
    *,
    options_path: str | None = None,
    env: Mapping[str, str] | None = None,
    runtime_class: str = "",
) -> str:
    """The configuration file to use: `path`, else the runtime options' config_path, else the file of the
    runtime's class, else $KATA_CONF_FILE, else the first that exists on SEARCH_PATH. Raises ConfigError.

    `runtime_class` is "fc" for io.containerd.kata-fc.v2. Its file is configuration-fc.toml, beside
    $KATA_CONF_FILE or in the directories of SEARCH_PATH; none of another class serves instead.
    """
    from_env = (env or {}).get("KATA_CONF_FILE")
    named = [("the given file", path), ("Options.config_path", options_path)]
    if not runtime_class:
        named.append(("$KATA_CONF_FILE", from_env))
    for origin, name in named:
        if name:
            return existing(origin, name)
    if not runtime_class:
        for candidate in SEARCH_PATH:
            if os.path.exists(candidate):
                return candidate
        raise ConfigError(
            f"there is no configuration file; looked for {', '.join(SEARCH_PATH)}",
            phase="config",
            hint="`make install` puts one there; or name one by $KATA_CONF_FILE or the option ConfigPath",
        )
    places = [os.path.dirname(each) for each in (*([from_env] if from_env else []), *SEARCH_PATH)]
    looked = [os.path.join(place, f"configuration-{runtime_class}.toml") for place in dict.fromkeys(places)]
    for candidate in looked:
        if os.path.isabs(candidate) and os.path.exists(candidate):
            return candidate
    raise ConfigError(
        f'there is no configuration file for the runtime class "{runtime_class}"; looked for '
        f"{', '.join(looked)}",
        phase="config",
        hint="put one there, or name one by the runtime option ConfigPath",
    )


def existing(origin: str, path: str) -> str:
    """`path`, which is absolute and exists; raises ConfigError that says where it came from."""
    if not os.path.isabs(path):
        raise ConfigError(f"{origin} must be an absolute path, not {path!r}", phase="config")
    if not os.path.exists(path):
        raise ConfigError(f"{origin} does not exist: {path}", phase="config", hint="correct the path")
    return path
