"""The schema of configuration.toml: the [runtime] and [agent.NAME] sections, and the keys of Kata
that nothing here acts on yet.

What: two frozen dataclasses whose fields are the keys that we act on, with Kata's names and (except
where said) Kata's defaults; and for each section a table of the further keys that Kata knows. The
section of a hypervisor is a dataclass of its plugin (`HypervisorPlugin.section`).
Why: an existing file must load (design D5), and a key without effect must be visible, not swallowed.
Invariants: a key is a field or in the table, never both; to act on a key is to move it from the
table to the dataclass. The table's value is the one that we behave as, whatever the file says: a file
that says the same has lost nothing.
Source: kata.md part 5, and the keys of the files that Kata 4.1 ships for both of its runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AGENT_INACTIVE",
    "HYPERVISOR_ALIASES",
    "HYPERVISOR_INACTIVE",
    "MIN_BOOT_MS",
    "RUNTIME_INACTIVE",
    "TOP_LEVEL",
    "AgentConfig",
    "AnnotationPolicy",
    "FactoryConfig",
    "Inactive",
    "RuntimeConfig",
    "is_secret",
    "toml_value",
]

MIN_BOOT_MS = 10_000
"""Kata waits at least this long for an agent, whatever reconnect_timeout_ms says (kata.md 4.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """[runtime]. Keys marked "resolved" get their final value from `load_config`."""

    name: str = "virt_container"
    hypervisor_name: str = ""  # resolved: "" is the only [hypervisor.*] section, else qemu
    agent_name: str = ""  # resolved: "" is the only [agent.*] section, else kata
    enable_debug: bool = False
    log_level: str = "info"  # trace | debug | info | warn | error
    disable_guest_seccomp: bool = False
    dan_conf: str = ""  # the directory of files that name a sandbox's cards: <sandbox id>.json
    internetworking_model: str = "tcfilter"  # tcfilter | macvtap | none; "" is tcfilter
    disable_new_netns: bool = False  # the VMM stays in the host's network, and the pod has none
    sandbox_cgroup_only: bool = False  # all of a pod in its cgroup on the host; false: its vCPUs, or its VMM
    static_sandbox_resource_mgmt: bool = False  # the VM has its size from the start and never another
    vfio_mode: str = (
        "guest-kernel"  # who has a device of VFIO in the guest: its kernel, or "vfio": the container
    )
    vfio_bind: bool = False  # ours: take PCI functions from the host's drivers, and give them back
    valid_cdi_devices: tuple[str, ...] = ()  # ours: CDI devices that annotations cdi.k8s.io/* may name
    valid_config_paths: tuple[str, ...] = ()  # ours: what the annotation config_path may name
    on_shim_death: str = "end"  # ours: what becomes of a VM whose shim is killed: end | keep (for `recover`)
    use_passfd_io: bool = True  # resolved: never with a stock guest; else absent is true (Kata: false)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """[agent.NAME]. Times have their unit in the name, except create_container_timeout: seconds."""

    name: str = "kata"  # resolved: the section's name
    enable_debug: bool = False
    server_port: int = 1024
    dial_timeout_ms: int = 10
    reconnect_timeout_ms: int = 3000
    create_container_timeout: float = 30.0
    kill_timeout: float = 10.0  # ours: seconds from SIGKILL to the exit, whatever the guest does
    health_check_interval: float = 30.0  # ours: seconds, 0 for never; Kata's is fixed
    health_check_request_timeout_ms: int = 10_000  # Kata: 90000, for a single question
    health_check_action: str = "none"  # ours: none | end; Kata ends its shim
    kernel_modules: tuple[str, ...] = ()  # each a module of the guest and its parameters, by blanks
    home_call: bool = True  # ours. resolved: absent is true for our guest, false for a stock one

    @property
    def boot_deadline(self) -> float:
        """Seconds in which a started VM's agent must answer."""
        return max(self.reconnect_timeout_ms, MIN_BOOT_MS) / 1000

    @property
    def request_deadline(self) -> float:
        """Seconds for each call to the agent that does not wait for the guest by nature."""
        return self.create_container_timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoryConfig:
    """[hypervisor.NAME.factory], or [factory], as Kata's Go runtime has it; see docs/templates.md."""

    enable_template: bool = False  # VMs begin with one that has booted before
    template_path: str = "/run/vc/vm/template"  # a directory in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotationPolicy:
    """The keys of a [hypervisor.NAME] section, whoever's plugin NAME is, that say what pods may ask for.

    `enable_annotations` are regular expressions, the others lists of patterns with `*`, `?` and `[...]`; see
    `shim.config.annotations`. Keys marked "ours" do not exist in Kata.
    """

    enable_annotations: tuple[str, ...] = ()
    valid_hypervisor_paths: tuple[str, ...] = ()
    valid_jailer_paths: tuple[str, ...] = ()
    valid_ctlpaths: tuple[str, ...] = ()
    valid_virtio_fs_daemon_paths: tuple[str, ...] = ()
    valid_entropy_sources: tuple[str, ...] = ()
    valid_vhost_user_store_paths: tuple[str, ...] = ()
    valid_file_mem_backends: tuple[str, ...] = ()
    valid_guest_paths: tuple[str, ...] = ()  # ours: kernel, image, initrd, firmware, ...
    valid_kernel_params: tuple[str, ...] = ()  # ours: words of kernel_params, lines of kernel_modules
    valid_virtio_fs_extra_args: tuple[str, ...] = ()  # ours
    valid_machine_accelerators: tuple[str, ...] = ()  # ours


@dataclass(frozen=True, slots=True)
class Inactive:
    """A key in the file that Kata knows and nothing here acts on yet.

    `behaviour` is the value that we behave as. `locate` gives (file, line); it scans the text, so it
    is for messages only.
    """

    section: str
    key: str
    value: Any
    behaviour: Any
    locate: Callable[[], tuple[str, int]] = field(repr=False, compare=False)

    @property
    def harmless(self) -> bool:
        """The file asks for what happens anyway, leaves the choice to us, or switches nothing on."""
        if isinstance(self.value, bool):
            return bool(self.value == self.behaviour)
        if isinstance(self.value, dict):
            return not any(each is True for each in self.value.values())
        return self.value == self.behaviour or not self.value

    def __str__(self) -> str:
        file, line = self.locate()
        where = f"{file}:{line}" if line else file
        value = "..." if is_secret(self.key) else toml_value(self.value)
        return (
            f"{where}: [{self.section}] {self.key} = {value} has no effect yet: "
            f"kata-shim behaves as with {toml_value(self.behaviour)}"
        )


def is_secret(key: str) -> bool:
    """Whether the value of this key must not appear in logs and messages."""
    return key in {"initdata", "policy", "snp_id_auth"} or key.endswith(("password", "secret", "token"))


def toml_value(value: Any) -> str:
    """A value as one would write it in the file, tables in short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(each) for each in value)}]"
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    return str(value)


# --- Keys without effect: key -> the value that we behave as. Its type is the key's type: () is an array
# of strings, [] an array of tables, {} any table, a filled one a table of these keys, a float takes integers.

TOP_LEVEL: Mapping[str, Mapping[str, Any]] = {
    "factory": {  # Kata's Go runtime only; what it has of `FactoryConfig` counts
        "vm_cache_number": 0,
        "vm_cache_endpoint": "/var/run/kata-containers/cache.sock",
    },
}

RUNTIME_INACTIVE: Mapping[str, Any] = {
    "disable_guest_empty_dir": False,
    "emptydir_mode": "shared-fs",
    "enable_pprof": False,
    "enable_tracing": False,
    "enable_vcpus_pinning": False,
    "experimental": (),
    "experimental_force_guest_pull": False,
    "guest_selinux_label": "",
    "jaeger_endpoint": "",
    "jaeger_password": "",
    "jaeger_user": "",
    "keep_abnormal": False,
    "kubelet_root_dir": "/var/lib/kubelet",
    "passfd_listener_port": 1027,
    "pod_resource_api_sock": "",
    "sandbox_bind_mounts": (),
    "shared_mounts": [],
}

AGENT_INACTIVE: Mapping[str, Any] = {
    "cdh_api_timeout": 50,
    "cdh_api_timeout_ms": 50_000,
    "container_pipe_size": 0,
    "debug_console_enabled": False,
    "enable_tracing": False,
    "launch_process_timeout": 0,
    "log_level": "info",
    "log_port": 1025,
    "passfd_listener_port": 1027,
    "mem_agent": {
        "compact_disable": False,
        "compact_force_times": 0,
        "compact_order": 9,
        "compact_period_psi_percent_limit": 1,
        "compact_period_secs": 600,
        "compact_psi_percent_limit": 5,
        "compact_sec_max": 300,
        "compact_threshold": 1024,
        "enable": False,
        "mem_agent_enable": False,
        "memcg_disable": False,
        "memcg_eviction_psi_percent_limit": 1,
        "memcg_eviction_run_aging_count_min": 3,
        "memcg_period_psi_percent_limit": 1,
        "memcg_period_secs": 600,
        "memcg_swap": False,
        "memcg_swappiness_max": 50,
    },
    "policy": "",
    "visible_cdi_devices": False,
}

HYPERVISOR_ALIASES: Mapping[str, str] = {
    "dbg_monitor_socket": "extra_monitor_socket",
    "hypervisor_socket": "remote_hypervisor_socket",  # as Kata 4 reads it; its own file has the other
    "hypervisor_timeout": "remote_hypervisor_timeout",
    "seccompsandbox": "seccomp_sandbox",  # as Kata's Go runtime spells it
}

HYPERVISOR_INACTIVE: Mapping[str, Any] = {
    # programs
    "ctlpath": "",
    "path": "",
    "virtio_fs_daemon": "",
    "jailer_path": "",
    # boot
    "boot_from_template": False,
    "boot_to_be_template": False,
    "device_state_path": "",
    "factory": {},  # read as `FactoryConfig`
    "firmware": "",
    "firmware_volume": "",
    "guest_extension_images": [],
    "image": "",
    "initrd": "",
    "kernel": "",
    "kernel_params": "",
    "kernel_verity_params": "",
    "memory_path": "",
    "pflashes": (),
    "rootfs_type": "ext4",
    "vm_rootfs_driver": "virtio-blk-pci",
    # machine, CPU, memory
    "cpu_features": "",
    "default_memory": 0,
    "default_vcpus": 1.0,
    "machine_type": "",
    "default_bridges": 1,
    "default_maxmemory": 0,
    "default_maxvcpus": 0,
    "disable_nested_virtualization": False,
    "disable_nesting_checks": False,
    "enable_guest_swap": False,
    "enable_hugepages": False,
    "enable_mem_prealloc": False,
    "enable_numa": False,
    "enable_virtio_mem": False,
    "file_mem_backend": "",
    "guest_swap_create_threshold_secs": 60,
    "guest_swap_path": "/run/kata-containers/swap",
    "guest_swap_size_percent": 100,
    "hugepage_type": "hugetlbfs",
    "machine_accelerators": "",
    "memory_offset": 0,
    "memory_slots": 10,
    "numa_mapping": (),
    "overhead_memory": 0,
    "overhead_vcpus": 0.0,
    "reclaim_guest_freed_memory": False,
    "use_legacy_serial": True,
    # block devices
    "block_device_aio": "io_uring",
    "block_device_cache_direct": False,
    "block_device_cache_noflush": False,
    "block_device_cache_set": False,
    "block_device_driver": "virtio-blk-pci",
    "block_device_logical_sector_size": 0,
    "block_device_physical_sector_size": 0,
    "disable_block_device_use": False,
    "disable_image_nvdimm": True,
    "disk_rate_limiter_bw_max_rate": 0,
    "disk_rate_limiter_bw_one_time_burst": 0,
    "disk_rate_limiter_ops_max_rate": 0,
    "disk_rate_limiter_ops_one_time_burst": 0,
    "enable_iothreads": False,
    "indep_iothreads": 0,
    "num_queues": 1,
    "queue_size": 128,
    "vhost_user_reconnect_timeout_sec": 0,
    # other devices
    "cold_plug_vfio": "no-port",
    "default_gpu_model": "",
    "default_gpus": 0,
    "enable_iommu": False,
    "enable_iommu_platform": False,
    "entropy_source": "/dev/urandom",
    "hot_plug_vfio": "no-port",
    "hotplug_vfio_on_root_bus": False,
    "measurement_algo": "",  # Kata 3 only
    "pcie_root_port": 0,
    "pcie_switch_port": 0,
    # network
    "disable_vhost_net": False,
    "net_rate_limiter_bw_max_rate": 0,
    "net_rate_limiter_bw_one_time_burst": 0,
    "net_rate_limiter_ops_max_rate": 0,
    "net_rate_limiter_ops_one_time_burst": 0,
    "network_queues": 1,
    "rx_rate_limiter_max_rate": 0,
    "tx_rate_limiter_max_rate": 0,
    # shared file system
    "msize_9p": 8192,
    "prefetch_list_path": "",
    "shared_fs": "none",
    "virtio_fs_cache": "never",
    "virtio_fs_extra_args": (),
    "virtio_fs_queue_size": 0,
    "virtio_fs_is_dax": False,
    "virtio_fs_cache_size": 0,
    "enable_vhost_user_store": False,
    "vhost_user_store_path": "/var/run/kata-containers/vhost-user",
    # debugging
    "enable_debug": False,
    "extra_monitor_socket": "",
    "guest_memory_dump_paging": False,
    "guest_memory_dump_path": "",
    "hypervisor_loglevel": 1,
    "log_level": "info",
    # security
    "confidential_guest": False,
    "disable_guest_selinux": True,
    "disable_seccomp": False,
    "disable_selinux": False,
    "guest_hook_path": "",
    "initdata": "",
    "rootless": False,
    "rootless_user": {},
    "seccomp_sandbox": "",
    "selinux_label": "",
    "sev_snp_guest": False,
    "snp_guest_policy": 0x30000,
    "snp_id_auth": "",
    "snp_id_block": "",
    "tdx_quote_generation_service_socket_port": 0,
    # a remote hypervisor
    "remote_hypervisor_socket": "/run/peerpod/hypervisor.sock",
    "remote_hypervisor_timeout": 600,
}
"""For any hypervisor. Where a plugin's section has a field of the same name, the field counts."""
