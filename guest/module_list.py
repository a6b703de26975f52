"""The kernel modules that people's workloads ask the guest for, beside those that it boots with.

What: `for_workloads` picks them from a kernel's tree.
Why in the image and not in the kernel's memory: each is loaded when something asks for it (the kernel's own
modprobe, the agent for `kernel_modules` and for containers with the rights, agent/privileged.py). All of them
are a third of the image, a file that all VMs of a host share, and cost a guest that wants none nothing.
Not here: file systems and drivers of which the host mounts or plugs what comes of them (ceph, rbd, iscsi),
nor what is large and rare (btrfs, cifs, RAID, KVM). A guest build of one's own adds it here.
Invariants: a kernel that lacks one, or has it built in, builds a guest all the same.
"""

from __future__ import annotations

from .kernel import ModuleTree

__all__ = ["for_workloads"]

# Whole folders below `kernel/`: netfilter with iptables, nftables, ebtables, ipset and ipvs; traffic control.
_FOLDERS = (
    "net/bridge/netfilter/",
    "net/ipv4/netfilter/",
    "net/ipv6/netfilter/",
    "net/netfilter/",
    "net/sched/",
)
_NAMES = (
    # links and tunnels
    *(
        "8021q",
        "bonding",
        "br_netfilter",
        "dummy",
        "geneve",
        "gre",
        "ifb",
        "ip6_gre",
        "ip6_tunnel",
        "ip6_vti",
    ),
    *("ip_gre", "ip_vti", "ipip", "ipvlan", "ipvtap", "macsec", "macvlan", "macvtap", "mpls_iptunnel"),
    *("mpls_router", "nlmon", "openvswitch", "sit", "tap", "team", "vrf", "vxlan", "wireguard"),
    *(
        "l2tp_eth",
        "l2tp_ip",
        "l2tp_ip6",
        "l2tp_netlink",
        "l2tp_ppp",
        "ppp_async",
        "ppp_deflate",
        "ppp_generic",
    ),
    *("ppp_mppe", "pppoe", "pptp"),
    # IPsec, SCTP, TLS, congestion controls; what `ss` asks; the kernel's ciphers for programs
    *("af_key", "ah4", "ah6", "esp4", "esp6", "ipcomp", "ipcomp6", "xfrm_interface", "xfrm_user"),
    *("sctp", "sctp_diag", "tls", "tcp_bbr", "tcp_cdg", "tcp_dctcp", "tcp_htcp", "tcp_vegas", "tcp_westwood"),
    *("af_packet_diag", "inet_diag", "netlink_diag", "raw_diag", "tcp_diag", "udp_diag", "unix_diag"),
    *("vsock_diag", "vsock_loopback"),
    *("algif_aead", "algif_hash", "algif_rng", "algif_skcipher"),
    # file systems and disks
    *("autofs4", "binfmt_misc", "cuse", "dm_crypt", "dm_mod", "exfat", "isofs", "nbd", "udf", "vfat"),
    *("nfs", "nfsd", "nfsv3", "nfsv4", "nfs_layout_flexfiles", "nfs_layout_nfsv41_files"),
    *("nls_ascii", "nls_cp437", "nls_iso8859_1", "nls_utf8"),
)


def for_workloads(tree: ModuleTree) -> list[str]:
    """Their names, sorted."""
    folders = tuple(f"kernel/{folder}" for folder in _FOLDERS)
    found = {name for name in tree.paths if tree.relative(name).startswith(folders)}
    return sorted(found | {name for name in _NAMES if name in tree.paths})
