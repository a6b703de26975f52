"""Kata's files load: every key that its runtimes know is known here, and what we do not act on is listed.

The keys are written down from the facts (kata.md part 5), not taken from the code; tests/data/kata has the
files that Kata ships, in our words.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from devices.errors import ConfigError
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.plugin import ClhPlugin
from hypervisors.config import HypervisorConfig
from hypervisors.dragonball.config import DragonballConfig
from hypervisors.dragonball.plugin import DragonballPlugin
from hypervisors.qemu.plugin import QemuPlugin
from hypervisors.remote.config import RemoteConfig
from hypervisors.remote.plugin import RemotePlugin
from shim.config import ConfigFileError, load_config
from shim.config.fill import known_keys
from shim.config.schema import (
    AGENT_INACTIVE,
    HYPERVISOR_ALIASES,
    HYPERVISOR_INACTIVE,
    RUNTIME_INACTIVE,
    TOP_LEVEL,
    AgentConfig,
    AnnotationPolicy,
    FactoryConfig,
    RuntimeConfig,
)

FILES = Path(__file__).parents[3] / "data" / "kata"


def words(text: str) -> list[str]:
    return text.split()


HYPERVISOR = words("""
    path valid_hypervisor_paths ctlpath valid_ctlpaths jailer_path valid_jailer_paths disable_nesting_checks
    enable_iothreads indep_iothreads prefetch_list_path disable_guest_selinux disable_selinux
    disable_block_device_use block_device_driver block_device_aio block_device_cache_set
    block_device_cache_direct block_device_cache_noflush block_device_logical_sector_size
    block_device_physical_sector_size disable_image_nvdimm memory_offset enable_vhost_user_store
    vhost_user_store_path valid_vhost_user_store_paths disk_rate_limiter_bw_max_rate
    disk_rate_limiter_bw_one_time_burst disk_rate_limiter_ops_max_rate disk_rate_limiter_ops_one_time_burst
    queue_size num_queues kernel kernel_params kernel_verity_params initrd image rootfs_type firmware
    vm_rootfs_driver guest_extension_images cpu_features default_vcpus overhead_vcpus default_maxvcpus
    disable_nested_virtualization default_memory overhead_memory default_maxmemory memory_slots
    enable_mem_prealloc enable_hugepages hugepage_type enable_virtio_mem enable_guest_swap guest_swap_path
    guest_swap_size_percent guest_swap_create_threshold_secs machine_type machine_accelerators pflashes
    entropy_source valid_entropy_sources default_bridges cold_plug_vfio pcie_root_port pcie_switch_port
    enable_iommu enable_iommu_platform reclaim_guest_freed_memory disable_vhost_net rx_rate_limiter_max_rate
    tx_rate_limiter_max_rate network_queues enable_debug log_level extra_monitor_socket dbg_monitor_socket
    guest_memory_dump_path guest_memory_dump_paging rootless rootless_user disable_seccomp seccomp_sandbox
    confidential_guest sev_snp_guest snp_id_block snp_id_auth snp_guest_policy guest_hook_path initdata
    enable_annotations tdx_quote_generation_service_socket_port selinux_label shared_fs virtio_fs_daemon
    valid_virtio_fs_daemon_paths virtio_fs_extra_args virtio_fs_cache virtio_fs_cache_size
    virtio_fs_queue_size virtio_fs_is_dax hypervisor_socket hypervisor_timeout remote_hypervisor_socket
    remote_hypervisor_timeout default_gpus default_gpu_model boot_to_be_template boot_from_template
    memory_path device_state_path factory
""")
AGENT = words("""
    enable_debug log_level enable_tracing debug_console_enabled visible_cdi_devices server_port log_port
    passfd_listener_port dial_timeout_ms reconnect_timeout_ms cdh_api_timeout_ms create_container_timeout
    health_check_request_timeout_ms kernel_modules container_pipe_size launch_process_timeout policy mem_agent
""")
MEM_AGENT = words("""
    enable mem_agent_enable memcg_disable memcg_swap memcg_swappiness_max memcg_period_secs
    memcg_period_psi_percent_limit memcg_eviction_psi_percent_limit memcg_eviction_run_aging_count_min
    compact_disable compact_period_secs compact_period_psi_percent_limit compact_psi_percent_limit
    compact_sec_max compact_order compact_threshold compact_force_times
""")
RUNTIME = words("""
    name hypervisor_name agent_name enable_debug log_level experimental internetworking_model
    disable_new_netns sandbox_bind_mounts sandbox_cgroup_only enable_vcpus_pinning enable_tracing
    jaeger_endpoint jaeger_user jaeger_password enable_pprof static_sandbox_resource_mgmt
    disable_guest_seccomp emptydir_mode vfio_mode keep_abnormal dan_conf shared_mounts use_passfd_io
    passfd_listener_port pod_resource_api_sock create_container_timeout
""")
GO_ONLY = words("""
    valid_file_mem_backends file_mem_backend msize_9p hot_plug_vfio enable_numa use_legacy_serial
    hypervisor_loglevel seccompsandbox net_rate_limiter_bw_max_rate vhost_user_reconnect_timeout_sec
""")


def names(schema: type[Any]) -> set[str]:
    return {field.name for field in fields(schema)}


def test_every_key_of_kata_is_known() -> None:
    hypervisor = known_keys(HypervisorConfig, HYPERVISOR_INACTIVE).keys() | names(AnnotationPolicy)
    assert {*HYPERVISOR, *GO_ONLY} - hypervisor - HYPERVISOR_ALIASES.keys() == set()
    assert set(AGENT) - known_keys(AgentConfig, AGENT_INACTIVE).keys() == set()
    assert set(MEM_AGENT) - AGENT_INACTIVE["mem_agent"].keys() == set()
    read_in_another_section = {"create_container_timeout"}
    assert set(RUNTIME) - known_keys(RuntimeConfig, RUNTIME_INACTIVE).keys() == read_in_another_section
    assert names(FactoryConfig) == {"enable_template", "template_path"}
    assert TOP_LEVEL["factory"].keys() == {"vm_cache_number", "vm_cache_endpoint"}


def test_a_section_of_any_plugin_knows_them_all() -> None:
    """Where a plugin's schema lacks a key, it is one without effect, not an unknown one."""
    plain = HYPERVISOR_INACTIVE.keys() | names(AnnotationPolicy) | HYPERVISOR_ALIASES.keys()
    assert set(HYPERVISOR) - plain == set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """The schema of a VMM that knows little."""

    path: str = ""
    kernel: str = ""
    disable_seccomp: bool = False


class Plugin:
    """A plugin of any name; without rules."""

    def __init__(self, name: str, section: type[Any]) -> None:
        self.name = name
        self.section = section

    def adjust_config(self, section: Any) -> Any:
        return section

    def validate_config(self, section: Any) -> None:
        pass


@pytest.fixture
def place(tmp_path: Path) -> Callable[[str], str]:
    """Copies one of the files, with real programs where it says /opt/kata."""

    def copy(name: str) -> str:
        text = (FILES / name).read_text()
        for path in set(re.findall(r'"(/opt/kata/[^"]+)"', text)):
            real = tmp_path / path.lstrip("/")
            real.parent.mkdir(parents=True, exist_ok=True)
            real.touch(mode=0o755)
        target = tmp_path / name
        target.write_text(text.replace('"/opt/kata/', f'"{tmp_path}/opt/kata/'))
        return str(target)

    return copy


def test_katas_file_for_qemu_loads_with_our_plugin(place: Callable[[str], str]) -> None:
    config = load_config(place("configuration-qemu.toml"), get_plugin=lambda _: QemuPlugin())
    assert config.hypervisor.default_memory <= 2048
    assert config.hypervisor.virtio_fs_extra_args[0] == "--thread-pool-size=1"
    assert config.policy.enable_annotations[0] == "enable_iommu"
    assert (config.agent.home_call, config.runtime.disable_guest_seccomp) == (False, True)
    # All the rest is listed, and what asks for something else than happens is not called harmless.
    told = {f"{each.section}.{each.key}": each.harmless for each in config.inactive}
    assert told["agent.kata.mem_agent.compact_order"] is True
    if "hypervisor.qemu.overhead_memory" in told:  # until somebody acts on it
        assert told["hypervisor.qemu.overhead_memory"] is False
    sections = (RuntimeConfig, AgentConfig, HypervisorConfig, AnnotationPolicy, FactoryConfig)
    active = set().union(*map(names, sections))
    inactive = {each.key for each in config.inactive}
    for table in _tables(tomllib.loads((FILES / "configuration-qemu.toml").read_text())):
        for key in table:
            assert (key in active) or (key in inactive), key


def test_katas_file_for_cloud_hypervisor_loads_with_our_plugin(place: Callable[[str], str]) -> None:
    """Its hypervisor_name is "cloud-hypervisor", its section [hypervisor.clh]: both are one VMM's."""
    config = load_config(place("configuration-clh.toml"), get_plugin=lambda _: ClhPlugin())
    section = config.hypervisor
    assert (config.hypervisor_name, type(section)) == ("clh", ClhConfig)
    assert (section.block_device_driver, section.vm_rootfs_driver) == ("virtio-blk-pci", "virtio-blk-pci")
    assert (section.rootless, section.shared_fs, section.overhead_memory) == (False, "virtio-fs", 32)
    sections = (RuntimeConfig, AgentConfig, ClhConfig, AnnotationPolicy, FactoryConfig)
    active = set().union(*map(names, sections))
    inactive = {each.key for each in config.inactive}
    for table in _tables(tomllib.loads((FILES / "configuration-clh.toml").read_text())):
        for key in table:
            assert (key in active) or (key in inactive), key


def test_katas_file_for_dragonball_loads_with_our_plugin(
    place: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `path` is empty, since Kata's shim has the library in itself; here it is found by its name."""
    program = tmp_path / "dragonball-process"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = load_config(place("configuration-dragonball.toml"), get_plugin=lambda _: DragonballPlugin())
    section = config.hypervisor
    assert (config.hypervisor_name, type(section)) == ("dragonball", DragonballConfig)
    assert (section.block_device_driver, section.shared_fs) == ("virtio-blk-mmio", "inline-virtio-fs")
    assert section.path == str(program)
    sections = (RuntimeConfig, AgentConfig, DragonballConfig, AnnotationPolicy, FactoryConfig)
    active = set().union(*map(names, sections))
    inactive = {each.key for each in config.inactive}
    for table in _tables(tomllib.loads((FILES / "configuration-dragonball.toml").read_text())):
        for key in table:
            assert (key in active) or (key in inactive), key


@pytest.mark.parametrize("name", ["clh", "cloud-hypervisor"])
def test_a_section_of_either_age_loads(place: Callable[[str], str], name: str) -> None:
    """Kata 3.20's [hypervisor.cloud-hypervisor] with the keys that are gone since, and 4.1's."""
    path = Path(place("configuration-clh.toml"))
    text = path.read_text().replace("[hypervisor.clh", f"[hypervisor.{name}")
    text = text.replace(
        "enable_hugepages = false", 'enable_hugepages = false\nfile_mem_backend = ""\nmsize_9p = 8192'
    )
    path.write_text(text)
    config = load_config(str(path), get_plugin=lambda _: ClhPlugin())
    assert config.hypervisor.default_memory <= 2048
    assert {"file_mem_backend", "msize_9p"} <= {each.key for each in config.inactive}


@pytest.mark.parametrize(
    ("name", "boot", "told"),
    [
        ("configuration-remote.toml", 30.0, set()),
        ("configuration-remote-go.toml", 30.0, {"disable_guest_empty_dir"}),
    ],
)
@pytest.mark.parametrize("spelling", ["remote_hypervisor", "hypervisor"])
def test_katas_files_for_a_remote_hypervisor_load(
    place: Callable[[str], str], name: str, boot: float, told: set[str], spelling: str
) -> None:
    """As they are, and with the keys as Kata 4 reads them, which its own file does not have."""
    path = Path(place(name))
    path.write_text(path.read_text().replace("remote_hypervisor_", f"{spelling}_"))
    config = load_config(str(path), get_plugin=lambda _: RemotePlugin())
    section = config.hypervisor
    assert (config.hypervisor_name, type(section)) == ("remote", RemoteConfig)
    assert section.remote_hypervisor_socket == "/run/peerpod/hypervisor.sock"
    assert (section.remote_hypervisor_timeout, section.default_memory) == (600, 2048)
    assert (config.agent.home_call, config.runtime.use_passfd_io) == (False, False)
    assert (config.agent.boot_deadline, config.agent.create_container_timeout) == (boot, 60.0)
    inactive = {each.key for each in config.inactive}
    assert told <= inactive
    active = names(RuntimeConfig) | names(AgentConfig) | names(RemoteConfig) | names(AnnotationPolicy)
    for table in _tables(tomllib.loads(path.read_text())):
        for key in {HYPERVISOR_ALIASES.get(key, key) for key in table} - {"dial_timeout"}:
            assert (key in active) or (key in inactive) or key == "create_container_timeout", key


def test_a_pod_of_a_remote_hypervisor_may_ask_for_what_kata_lists(place: Callable[[str], str]) -> None:
    asked = {
        "machine_type": "t3.large",
        "default_vcpus": "64",
        "default_memory": "262144",
        "default_gpus": "2",
    }
    annotations = {f"io.katacontainers.config.hypervisor.{key}": value for key, value in asked.items()}
    path = place("configuration-remote.toml")
    section = load_config(path, get_plugin=lambda _: RemotePlugin(), annotations=annotations).hypervisor
    assert (section.machine_type, section.default_vcpus, section.default_gpus) == ("t3.large", 64, 2)
    assert section.default_memory == 262144


def _tables(table: dict[str, Any]) -> list[dict[str, Any]]:
    inner = [each for value in table.values() if isinstance(value, dict) for each in _tables(value)]
    return [{key: value for key, value in table.items() if not isinstance(value, dict)}, *inner]


@pytest.mark.parametrize(
    ("name", "section", "boot"),
    [("configuration-fc.toml", "firecracker", 45.0), ("configuration-clh.toml", "clh", 10.0)],
)
@pytest.mark.parametrize("schema", [Small, HypervisorConfig])
def test_katas_other_files_load_whatever_the_plugin_makes_of_them(
    place: Callable[[str], str], name: str, section: str, boot: float, schema: type[Any]
) -> None:
    config = load_config(place(name), get_plugin=lambda wanted: Plugin(wanted, schema))  # type: ignore[arg-type, return-value]
    assert config.hypervisor_name == section
    assert config.hypervisor.path.endswith(("firecracker", "cloud-hypervisor"))
    assert config.agent.boot_deadline == boot
    assert config.agent.create_container_timeout == 60.0
    assert ("shared_fs" in {each.key for each in config.inactive}) == (schema is Small and section == "clh")


def test_without_its_plugin_a_file_has_that_one_problem(place: Callable[[str], str]) -> None:
    def nobody(name: str) -> Any:
        raise ConfigError(f"there is no hypervisor {name!r}")

    path = place("configuration-clh.toml")
    with pytest.raises(ConfigFileError) as caught:
        load_config(path, get_plugin=nobody)
    (problem,) = caught.value.problems
    assert re.fullmatch(re.escape(path) + r":\d+: there is no hypervisor 'cloud-hypervisor'", problem)


def test_a_wrong_key_in_a_sub_table_is_told(place: Callable[[str], str]) -> None:
    path = Path(place("configuration-qemu.toml"))
    path.write_text(path.read_text().replace("compact_order = 9", "compact_ordr = 9"))
    with pytest.raises(ConfigFileError) as caught:
        load_config(str(path), get_plugin=lambda _: QemuPlugin())
    (problem,) = caught.value.problems
    assert problem.endswith(
        '[agent.kata.mem_agent] has no key "compact_ordr"; the nearest is "compact_order" (an integer)'
    )
    assert re.match(re.escape(str(path)) + r":\d{3}: ", problem)
