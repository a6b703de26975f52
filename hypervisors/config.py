"""The [hypervisor.NAME] section: Kata's keys, Kata's defaults, and the few keys of our own.

What: `SandboxSection`, the keys that the sandbox reads itself, whatever VMM runs it: a plugin's schema
extends it, or `VhostUserSection`, where the VMM has these devices, and mixes in `GrowingSection`,
`DiskSection` and `HostedSection` where what they are about is so. `HypervisorConfig` is QEMU's.
Why: an existing configuration.toml must mean the same here (design D5).
`enable_annotations` and the valid_* lists are the loader's (`shim.config.schema.AnnotationPolicy`): they hold
for every plugin, whatever its schema.
Invariants: the defaults are what an absent key means before `adjust_config`: 0 and "" mean
"choose for me". Sizes are MiB.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DiskSection",
    "GrowingSection",
    "HostedSection",
    "HypervisorConfig",
    "SandboxSection",
    "VhostUserSection",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSection:
    """What every VMM's section has. Keys marked "ours" do not exist in Kata."""

    # --- boot
    kernel: str = ""
    kernel_params: str = ""
    initrd: str = ""  # with `image` too: an initrd that mounts the image (Kata: one of them only)
    image: str = ""

    # --- size
    default_vcpus: float = 1.0
    default_memory: int = 2048

    # --- shared file system
    shared_fs: str = "none"

    # --- security
    disable_guest_selinux: bool = True

    # --- debugging
    enable_debug: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VhostUserSection(SandboxSection):
    """For a VMM that shares files by virtio-fs and may need a daemon for vsock."""

    # --- shared file system
    shared_fs: str = "virtio-fs"  # or "none"
    virtio_fs_daemon: str = ""
    virtio_fs_extra_args: tuple[str, ...] = ()
    virtio_fs_cache: str = "auto"  # never | auto | always
    virtio_fs_queue_size: int = 1024
    virtio_fs_cache_size: int = 0  # MiB of a DAX window; only 0 is possible

    # --- devices
    vsock_daemon: str = ""  # ours: vhost-device-vsock, used where there is no /dev/vhost-vsock
    entropy_source: str = "/dev/urandom"

    # --- network: of the cards, whose taps such a VMM takes as descriptors
    disable_vhost_net: bool = False
    network_queues: int = 1  # of each card; 0 is 1
    rx_rate_limiter_max_rate: int = 0  # bits/s to the guest; 0: no limit
    tx_rate_limiter_max_rate: int = 0  # bits/s from the guest


@dataclass(frozen=True, kw_only=True)
class GrowingSection:
    """Mixed into the section of a VMM whose VMs can grow: what the sandbox plans with. No slots: there is
    another base that has them."""

    default_maxvcpus: int = 0  # that the VM may grow to; 0 is the host's
    overhead_vcpus: float = 0.0  # what the VM needs besides its containers, when its size is static
    default_maxmemory: int = 0  # MiB that the VM may grow to; 0 is the host's
    overhead_memory: int = 0  # as overhead_vcpus; 0 is default_memory
    hotplug_timeout: float = 30.0  # ours: seconds in which the guest must take or give back what is plugged


@dataclass(frozen=True, kw_only=True)
class DiskSection:
    """Mixed into the section of a VMM that plugs containers' disks as it is told to."""

    block_device_driver: str = ""  # virtio-blk-pci | virtio-blk-mmio | virtio-scsi | virtio-pmem
    block_device_cache_set: bool = False  # whether the next counts
    block_device_cache_direct: bool = False
    num_queues: int = 1
    queue_size: int = 128
    disk_rate_limiter_bw_max_rate: int = 0  # bits/s of each disk, both ways together; 0: no limit
    disk_rate_limiter_bw_one_time_burst: int = 0  # bits
    disk_rate_limiter_ops_max_rate: int = 0
    disk_rate_limiter_ops_one_time_burst: int = 0
    enable_vhost_user_store: bool = False  # block devices 241:N of containers are vhost-user disks
    vhost_user_store_path: str = "/var/run/kata-containers/vhost-user"


@dataclass(frozen=True, kw_only=True)
class HostedSection:
    """Mixed into the section of a VMM whose VMs somebody else makes, on another machine. Nothing of this host
    can be part of such a VM: whoever makes it is told the pod's network namespace and takes the network from
    there, the guest pulls its images itself, and this host's size is no bound. Its hypervisor is a
    `hypervisors.base.Hosted`. No slots: as `GrowingSection`."""

    remote_hypervisor_timeout: int = 600  # seconds that a VM may take to be made and started


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorConfig(VhostUserSection, GrowingSection, DiskSection):
    """QEMU's section."""

    # --- programs
    path: str = ""

    # --- shared file system
    virtio_fs_rootfs_mknod: bool = False  # ours: device nodes in root file systems, by a daemon of their own

    # --- boot
    rootfs_type: str = "ext4"
    boot_to_be_template: bool = False  # its memory is the file memory_path, and it can be saved
    boot_from_template: bool = False  # it goes on where the one went that was saved
    memory_path: str = ""  # of either
    device_state_path: str = ""  # what the latter begins with

    # --- machine and CPU
    machine_type: str = "q35"
    machine_accelerators: str = ""
    accelerator: str = "auto"  # ours: "auto" | "kvm" | "tcg"
    cpu_features: str = ""

    # --- memory
    memory_slots: int = 10  # DIMMs that can be plugged; 0 is none
    enable_virtio_mem: bool = False  # grow and shrink by virtio-mem instead of by DIMMs

    # --- disks of containers
    block_device_aio: str = "threads"  # threads | native | io_uring
    block_device_cache_noflush: bool = False  # with block_device_cache_set
    block_device_logical_sector_size: int = 0  # bytes; 0 is 512
    block_device_physical_sector_size: int = 0
    enable_iothreads: bool = False
    enable_guest_swap: bool = False
    guest_swap_path: str = "/run/kata-containers/swap"  # a directory
    guest_swap_size_percent: int = 100  # of the memory that the VM starts with
    vm_rootfs_driver: str = ""  # of the image; virtio-blk-pci, or virtio-blk-mmio

    # --- devices
    reclaim_guest_freed_memory: bool = False
    pcie_root_port: int = 0  # PCI Express ports for hot-plug, one device each
    pcie_switch_port: int = 0  # the same below one switch
    default_bridges: int = 1  # PCI bridges for hot-plug, 31 devices each
    cold_plug_vfio: str = "no-port"  # what VFIO devices sit behind: no-port (none) | root-port | switch-port
    hot_plug_vfio: str = "no-port"  # the same while it runs, or bridge-port; one of the two only
    enable_iommu: bool = False  # an IOMMU in the VM: what vfio_mode = "vfio" needs

    # --- security
    rootless: bool = True  # Kata: false. QEMU and its vsock daemon run as a user of the sandbox's own
    rootless_users: str = "2000000000-2000065535"  # ours: the numbers that such users are taken from
    disable_seccomp: bool = False
    seccomp_sandbox: str = ""
    firmware: str = ""  # what a confidential guest boots with; "" is QEMU's own
    confidential_guest: bool = False  # its memory is kept from the host: SEV, SEV-SNP, TDX or SE
    sev_snp_guest: bool = False  # on AMD: SEV-SNP, or no guest at all
    snp_guest_policy: int = 0x30000
    tdx_quote_generation_service_socket_port: int = (
        0  # vsock port for quotes; 0 is the unix socket, if it is there
    )
