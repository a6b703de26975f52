"""Annotations of a pod that change its configuration: io.katacontainers.config.*

What: `PodAnnotations` reads them, `section_name` and `overlay` lay them over what the files say,
before the plugin adjusts and validates. The names are Kata's; `enable_annotations` of the chosen
hypervisor's section says which of them a pod may use (`AnnotationPolicy`).
Why: whoever may create a pod writes them, so they are hostile input. One that is not enabled, not
known or not of its type refuses the pod and says which setting would allow it; Kata's runtime-rs
ignores such ones, and never asks for those of the agent and the runtime.
Invariants:
- No annotation brings a path, an argument or a kernel parameter that the administrator did not list:
  such values must match a pattern of the list that belongs to them, which is empty by default.
- Every other text is one plain word. So whatever a pod says, a value that reaches a command line is
  a number, a boolean, such a word, or listed.
- A pattern of `enable_annotations` matches whole names (Kata: any part, so that "path" allows
  jailer_path as well). A pattern in a path list matches one component by each component of its own.
- Messages show at most 80 characters of a value, and none of one that may be a secret.
Source: kata.md 5.5 and 8.5.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from devices.errors import ConfigError
from devices.plain import plain
from shim.config.fill import KIND_TEXT, Kind, Place, nearest
from shim.config.schema import AnnotationPolicy, Inactive, toml_value

__all__ = ["CONFIG_PATH", "PREFIX", "PodAnnotations", "Rule", "known_names", "listed_path"]

PREFIX = "io.katacontainers.config."
CONFIG_PATH = "io.katacontainers.config_path"
MAX_VALUE = 64 << 10
"""Characters of one value; cc_init_data is the only long one."""

_WORD = re.compile(r"[A-Za-z0-9._-]{0,64}")
_NUMBER = re.compile(r"[0-9]{1,15}")
_FRACTION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")
_SIZE = re.compile(r"([0-9]{1,12})([kKmMgGtT]?)(i?)[bB]?")
_FEATURES = re.compile(r"[+-][A-Za-z0-9._-]+(,[+-][A-Za-z0-9._-]+)*")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
_BOOLS = {"true": True, "1": True, "t": True, "false": False, "0": False, "f": False}


class _ValueError(Exception):
    """The value cannot be taken; the text goes on after "must be "."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What an annotation does: to which key of the section, how its text is read.

    `reads`: "" by the key's type; "size" (MiB, or with a unit), "features" (of a CPU), "base64", "path",
    "words" (listed words that replace those of the same name), "options" (the same, by commas), "append"
    (listed, by commas, appended to an array), "lines" (the same, by semicolons), "csv" (plain words),
    "never".
    `listed_by`: the key whose patterns the value must match. `in_guest`: a path that is not the host's.
    """

    key: str = ""
    reads: str = ""
    listed_by: str = ""
    in_guest: bool = False


_PATH = "valid_guest_paths"  # for what Kata has no list of
HYPERVISOR: Mapping[str, Rule] = {
    "path": Rule(reads="path", listed_by="valid_hypervisor_paths"),
    "jailer_path": Rule(reads="path", listed_by="valid_jailer_paths"),
    "ctlpath": Rule(reads="path", listed_by="valid_ctlpaths"),
    "virtio_fs_daemon": Rule(reads="path", listed_by="valid_virtio_fs_daemon_paths"),
    "entropy_source": Rule(reads="path", listed_by="valid_entropy_sources"),
    "vhost_user_store_path": Rule(reads="path", listed_by="valid_vhost_user_store_paths"),
    "file_mem_backend": Rule(reads="path", listed_by="valid_file_mem_backends"),
    "kernel": Rule(reads="path", listed_by=_PATH),
    "image": Rule(reads="path", listed_by=_PATH),
    "initrd": Rule(reads="path", listed_by=_PATH),
    "firmware": Rule(reads="path", listed_by=_PATH),
    "guest_hook_path": Rule(reads="path", listed_by=_PATH, in_guest=True),
    "prefetch_files.list": Rule("prefetch_list_path", "path", _PATH),
    "kernel_params": Rule(reads="words", listed_by="valid_kernel_params"),
    "kernel_verity_params": Rule(reads="options", listed_by="valid_kernel_params"),
    "virtio_fs_extra_args": Rule(reads="append", listed_by="valid_virtio_fs_extra_args"),
    "machine_accelerators": Rule(reads="options", listed_by="valid_machine_accelerators"),
    "cpu_features": Rule(reads="features"),
    "default_memory": Rule(reads="size"),
    "default_max_vcpus": Rule("default_maxvcpus"),
    "cc_init_data": Rule("initdata", "base64"),
    "blk_logical_sector_size": Rule("block_device_logical_sector_size"),
    "blk_physical_sector_size": Rule("block_device_physical_sector_size"),
    "block_device_num_queues": Rule("num_queues"),
    "block_device_queue_size": Rule("queue_size"),
    **dict.fromkeys(
        (
            "block_device_cache_direct", "block_device_cache_noflush", "block_device_cache_set",
            "block_device_driver", "cold_plug_vfio", "default_bridges", "default_gpu_model", "default_gpus",
            "default_vcpus", "disable_block_device_use", "disable_image_nvdimm", "disable_vhost_net",
            "enable_guest_swap", "enable_hugepages", "enable_iommu", "enable_iommu_platform",
            "enable_iothreads", "enable_mem_prealloc", "enable_vhost_user_store", "enable_virtio_mem",
            "hot_plug_vfio", "hotplug_vfio_on_root_bus", "hugepage_type", "indep_iothreads", "machine_type",
            "memory_offset", "memory_slots", "msize_9p", "network_queues", "pcie_root_port",
            "pcie_switch_port", "rx_rate_limiter_max_rate", "shared_fs",
            "tx_rate_limiter_max_rate", "use_legacy_serial", "virtio_fs_cache", "virtio_fs_cache_size",
        ),
        Rule(),
    ),
    "rootless": Rule(reads="never"),  # whom the VMM runs as is the administrator's matter
    # Hashes of files: nothing here checks any, and to accept one would promise it.
    **dict.fromkeys(
        ("asset_hash_type", "firmware_hash", "image_hash", "initrd_hash", "jailer_hash", "kernel_hash",
         "path_hash"),
        Rule(reads="never"),
    ),
}  # fmt: skip
AGENT: Mapping[str, Rule] = {
    "cdh_api_timeout_ms": Rule(),
    "container_pipe_size": Rule(),
    "enable_tracing": Rule(),
    "kernel_modules": Rule(reads="lines", listed_by="valid_kernel_params"),
}
RUNTIME: Mapping[str, Rule] = {
    "agent_name": Rule(),
    "create_container_timeout": Rule(),
    "disable_guest_seccomp": Rule(),
    "disable_new_netns": Rule(),
    "enable_pprof": Rule(),
    "enable_vcpus_pinning": Rule(),
    "experimental": Rule(reads="csv"),
    "hypervisor_name": Rule(),
    "internetworking_model": Rule(),
    "name": Rule(),
    "sandbox_bind_mounts": Rule(reads="never"),  # host paths; Kata refuses it too
    "sandbox_cgroup_only": Rule(reads="never"),  # likewise, who pays for the VM
    "shared_mounts": Rule(reads="never"),  # mounts between containers: not implemented
    "vfio_mode": Rule(),
}
_GROUPS = {"hypervisor": HYPERVISOR, "agent": AGENT, "runtime": RUNTIME}


def known_names() -> list[str]:
    """The full name of every annotation that is known."""
    return [f"{PREFIX}{group}.{name}" for group, rules in _GROUPS.items() for name in rules]


def listed_path(path: str, patterns: Iterable[str]) -> bool:
    """Whether `path` is absolute, plain (no "..", "//" or trailing "/"), and matches one of the patterns.

    `*`, `?` and `[...]` of a pattern match within one component only.
    """
    if not path.startswith("/") or "\0" in path or os.path.normpath(path) != path or path.startswith("//"):
        return False
    parts = path.split("/")
    return any(
        len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted))
        for wanted in (pattern.split("/") for pattern in patterns)
    )


class PodAnnotations:
    """The io.katacontainers.config.* annotations of one pod, by the part of the name after PREFIX.

    `used` are those that were laid over the configuration, `origin` the full name of one by (section, key)
    that it set. Raises ConfigError for one that nobody knows.
    """

    def __init__(self, annotations: Mapping[str, Any]) -> None:
        self.used: list[str] = []
        self.origin: dict[tuple[str, str], str] = {}
        self._values: dict[str, str] = {}
        for name, value in annotations.items():
            if not name.startswith(PREFIX):
                continue
            short = name[len(PREFIX) :]
            group, _, rest = short.partition(".")
            if rest not in _GROUPS.get(group, {}):
                kinds: dict[str, Kind] = dict.fromkeys(known_names(), "str")
                raise _refuse(
                    short,
                    "is not known; " + nearest(name[:200], kinds).removesuffix(f" ({KIND_TEXT['str']})"),
                    "correct or remove the annotation",
                )
            if not isinstance(value, str) or len(value) > MAX_VALUE:
                raise _refuse(short, f"must be text of at most {MAX_VALUE} characters", "shorten it")
            self._values[short] = value

    def __bool__(self) -> bool:
        return bool(self._values)

    def section_name(
        self, kind: str, default: str, policy: AnnotationPolicy, where: Place, have: Iterable[str]
    ) -> str:
        """The hypervisor or agent (`kind`) that the pod asks for, if it may, else `default`. `have`: the
        sections that the file has."""
        short = f"runtime.{kind}_name"
        name = self._values.get(short, default)
        if short in self._values:
            self._allow(short, policy, where)
            self.used.append(short)
        if name != default and name not in have:
            there = ", ".join(sorted(have)) or "there is none"
            raise _refuse(short, f"names no [{kind}.*] section of the configuration ({there})", "name one")
        return name

    def overlay(
        self,
        group: str,
        values: dict[str, Any],
        known: Mapping[str, Kind],
        policy: AnnotationPolicy,
        where: Place,
        *,
        section: str,
        inactive: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> list[Inactive]:
        """Lay the annotations of `group` over `values`, the arguments of the section's dataclass.

        `known`: each key of the section with its kind. `inactive`: those without effect, and what we behave
        as. `defaults`: the values of keys that `values` lacks. `where`: of enable_annotations. Returns
        the annotations without effect. Raises ConfigError for the first that the pod may not use.
        """
        without_effect = []
        for short, text in self._values.items():
            mine, _, name = short.partition(".")
            if mine != group:
                continue
            rule = _GROUPS[group][name]
            key = rule.key or name
            if short in ("runtime.hypervisor_name", "runtime.agent_name"):
                continue  # `section_name`
            self._allow(short, policy, where)
            if rule.reads == "never":
                raise _refuse(short, "is not supported", "remove the annotation")
            if key not in known:
                raise _refuse(short, f"does not exist for {section}", "remove the annotation")
            old = values[key] if key in values else defaults.get(key)
            try:
                value = _read(text, rule, known[key], old, policy)
            except _ValueError as wrong:
                raise _refuse(short, f"must be {wrong}", _hint(rule, section)) from None
            self.used.append(short)
            if key in inactive:
                locate = partial(_place, short)
                without_effect.append(Inactive(section, key, value, inactive[key], locate))
            else:
                values[key] = value
                self.origin[section, key] = PREFIX + short
        return without_effect

    def _allow(self, short: str, policy: AnnotationPolicy, where: Place) -> None:
        """Hypervisor annotations go by their bare name, as in Kata; the others with their group."""
        name = short.removeprefix("hypervisor.")
        if not any(re.fullmatch(pattern, name) for pattern in policy.enable_annotations):
            place = where("enable_annotations")
            raise _refuse(
                short,
                f'is not enabled: no pattern of enable_annotations ({place}) matches "{name}"',
                f'the administrator can add "{name}" to it; else remove the annotation',
            )


def _place(short: str) -> tuple[str, int]:
    return f"annotation {PREFIX}{short}", 0


def _refuse(short: str, what: str, hint: str) -> ConfigError:
    return ConfigError(f"annotation {PREFIX}{short[:200]} {what}", phase="config", hint=hint)


def _hint(rule: Rule, section: str) -> str:
    if rule.listed_by:
        return f"the administrator can list it in [{section}] {rule.listed_by}; else correct the annotation"
    return "correct the annotation"


def _read(text: str, rule: Rule, kind: Kind, old: Any, policy: AnnotationPolicy) -> Any:
    """The annotation's value as the key's kind. Raises _ValueError."""
    allowed: tuple[str, ...] = getattr(policy, rule.listed_by) if rule.listed_by else ()
    match rule.reads:
        case "path":
            if not listed_path(text, allowed):
                raise _ValueError(f"a path that {rule.listed_by} lists, not {toml_value(text[:80])}")
            if not rule.in_guest and not os.path.exists(text):
                raise _ValueError(f"a path that exists, not {toml_value(text[:80])}")
            return text
        case "words" | "options":
            separator = None if rule.reads == "words" else ","
            return _merge_words(str(old), text, allowed, rule.listed_by, separator)
        case "append" | "lines":
            pieces = text.split("," if rule.reads == "append" else ";")
            return (
                *old,
                *(_listed(piece.strip(), allowed, rule.listed_by) for piece in pieces if piece.strip()),
            )
        case "csv":
            return tuple(_match(_WORD, word, "plain words separated by commas") for word in text.split(","))
        case "features":
            return _match(_FEATURES, text, 'features with their signs, such as "+avx,-pmu"')
        case "base64":
            if not _BASE64.fullmatch(text):
                raise _ValueError("base64")
            return text
        case "size":
            return _mib(text)
    if kind == "bool":
        if text.lower() not in _BOOLS:
            raise _ValueError(f'"true" or "false", not {toml_value(text[:80])}')
        return _BOOLS[text.lower()]
    if kind == "int":
        return int(_match(_NUMBER, text, "a whole number that is not negative"))
    if kind == "float":
        return float(_match(_FRACTION, text, "a number that is not negative"))
    return _match(_WORD, text, "one plain word (letters, digits, '.', '_', '-')")


def _match(pattern: re.Pattern[str], text: str, what: str) -> str:
    if not pattern.fullmatch(text):
        raise _ValueError(f"{what}, not {toml_value(text[:80])}")
    return text


def _mib(text: str) -> int:
    """A size in MiB: a bare number, or one with a unit (Ki, Mi, Gi, Ti of 1024; k, M, G, T of 1000)."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise _ValueError(
            f'a size in MiB, or with a unit such as "512Mi" or "2Gi", not {toml_value(text[:80])}'
        )
    number, unit, binary = int(match[1]), match[2].upper(), match[3]
    if not unit:
        return number
    size: int = number * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1)
    return -(-size >> 20)


def _listed(word: str, allowed: tuple[str, ...], listed_by: str) -> str:
    if plain(word) != word or '"' in word or not any(fnmatchcase(word, pattern) for pattern in allowed):
        raise _ValueError(f"of what {listed_by} lists, not {toml_value(word[:80])}")
    return word


def _merge_words(old: str, text: str, allowed: tuple[str, ...], by: str, separator: str | None) -> str:
    """`old` with the words of `text`: one of the same name (up to "=") is replaced, another appended."""
    words = [word for word in old.split(separator) if word]
    for word in (word for word in text.split(separator) if word):
        _listed(word, allowed, by)
        name = word.partition("=")[0]
        words = [each for each in words if each.partition("=")[0] != name]
        words.append(word)
    return (separator or " ").join(words)
