"""Network devices and what is attached to them: raised, made, joined, limited, and all of it away again.

What: one function per step, on an open `Rtnl`; `remove` undoes all of them for one of the pod's links.
Why u32: a filter that matches everything is `matchall` by name, but not every kernel has that; u32 with a
mask of nothing is the same, and all have it.
Why tbf: it holds its rate whatever the clients do, and cuts packets of 64 KiB, which virtio and veth hand on
whole, into pieces that fit its bucket.
Invariants: for threads in the pod's namespace. `remove` goes on where an earlier one ended, takes what is not
there for removed, and touches nothing that was not made here.
Source: tc(8), tc-u32(8), tc-mirred(8), tc-tbf(8), linux/pkt_{cls,sched}.h.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Any

from devices.errors import HostError
from shim.resources.network.rtnl import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    RTM_DELLINK,
    RTM_DELQDISC,
    RTM_GETQDISC,
    RTM_NEWLINK,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    Rtnl,
    message,
)

__all__ = [
    "check_ingress",
    "ifb",
    "index_of",
    "ingress",
    "limit",
    "macvtap",
    "raise_link",
    "redirect",
    "remove",
]

_IFF_UP = 0x1
_INGRESS = 0xFFFF0000  # the handle of the ingress qdisc, and the parent of its filters
_INGRESS_PARENT = 0xFFFFFFF1
_ROOT = 0xFFFFFFFF
_ETH_P_ALL = 0x0003
_TC_ACT_STOLEN = 4
_TCA_EGRESS_REDIR, _TCA_INGRESS_REDIR = 1, 3
_MODE_PASSTHRU = "passthru"
_GONE = frozenset({errno.ENODEV, errno.ENOENT, errno.EINVAL, errno.ENXIO})

_BURST = 0.02  # seconds of the rate that may come at once
_MIN_BURST = 64 << 10  # bytes: a packet before it is cut
_LATENCY = 0.1  # seconds that a packet may wait for its turn


def index_of(name: str) -> int:
    """The link's index in the calling thread's namespace; 0 if there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def raise_link(rtnl: Rtnl, index: int, mtu: int) -> None:
    """Set it up, with this MTU; without IPv6 of its own, which would talk into the guest."""
    link = message("ifinfmsg")()
    link["index"] = index
    no_address = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]}
    link["attrs"] = [("IFLA_MTU", mtu), ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", no_address)]})]
    rtnl.ask(link, RTM_NEWLINK)
    link = message("ifinfmsg")()  # the kernel raises before it does the rest
    link["index"], link["flags"], link["change"] = index, _IFF_UP, _IFF_UP
    rtnl.ask(link, RTM_NEWLINK)


def macvtap(rtnl: Rtnl, name: str, below: int) -> None:
    """A macvtap link that takes over all traffic of the link `below`, and its MAC address."""
    _new_link(rtnl, name, "macvtap", ("IFLA_MACVTAP_MODE", _MODE_PASSTHRU), ("IFLA_LINK", below))


def ifb(rtnl: Rtnl, name: str) -> None:
    """A device that traffic can be sent through on its way in."""
    _new_link(rtnl, name, "ifb")


def _new_link(rtnl: Rtnl, name: str, kind: str, data: tuple[str, Any] | None = None, *attrs: Any) -> None:
    link = message("ifinfmsg")()
    info: list[tuple[str, Any]] = [("IFLA_INFO_KIND", kind)]
    if data is not None:
        info.append(("IFLA_INFO_DATA", {"attrs": [data]}))
    link["attrs"] = [("IFLA_IFNAME", name), *attrs, ("IFLA_LINKINFO", {"attrs": info})]
    try:
        rtnl.ask(link, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL)
    except OSError as error:
        raise HostError(
            f"no {kind} device {name} can be made: {error.strerror}",
            phase="network",
            hint=f"modprobe {kind}",
        ) from error


def check_ingress(rtnl: Rtnl, index: int, name: str) -> None:
    """Raise HostError if somebody else handles what arrives at this link: there is one place for it only."""
    for qdisc in rtnl.dump("tcmsg", RTM_GETQDISC):
        if qdisc["index"] == index and qdisc["handle"] == _INGRESS:
            raise HostError(
                f"the pod's link {name} has a qdisc {qdisc.get_attr('TCA_KIND')} already,"
                " and what arrives is to go to the VM",
                phase="network",
                hint='set internetworking_model = "macvtap", or limit the other end of the link instead',
            )


def ingress(rtnl: Rtnl, index: int) -> None:
    """A place for filters on what arrives at this link."""
    _qdisc(rtnl, index, _INGRESS, _INGRESS_PARENT, "ingress")


def redirect(rtnl: Rtnl, source: int, target: int) -> None:
    """Everything that arrives at `source` leaves by `target`."""
    mirred = {
        "attrs": [
            (
                "TCA_MIRRED_PARMS",
                {"action": _TC_ACT_STOLEN, "eaction": _TCA_EGRESS_REDIR, "ifindex": target},
            )
        ]
    }
    action = {"attrs": [("TCA_ACT_KIND", "mirred"), ("TCA_ACT_OPTIONS", mirred)]}
    rule = message("tcmsg")()
    rule["index"], rule["parent"] = source, _INGRESS
    rule["info"] = socket.htons(_ETH_P_ALL) | 1 << 16
    rule["attrs"] = [
        ("TCA_KIND", "u32"),
        (
            "TCA_OPTIONS",
            {
                "attrs": [
                    ("TCA_U32_SEL", {"keys": ["0x0/0x0+0"]}),
                    ("TCA_U32_ACT", {"attrs": [("TCA_ACT_PRIO_1", action)]}),
                ]
            },
        ),
    ]
    rtnl.ask(rule, RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL)


def limit(rtnl: Rtnl, index: int, bits: int) -> None:
    """Let at most so many bits a second leave by this link."""
    from pyroute2.netlink.rtnl.tcmsg import sched_tbf

    rate = bits // 8
    burst = max(_MIN_BURST, int(rate * _BURST))
    options = sched_tbf.get_parameters({"rate": rate, "burst": burst, "limit": burst + int(rate * _LATENCY)})
    _qdisc(rtnl, index, 0, _ROOT, "tbf", options)


def _qdisc(rtnl: Rtnl, index: int, handle: int, parent: int, kind: str, options: Any = None) -> None:
    qdisc = message("tcmsg")()
    qdisc["index"], qdisc["handle"], qdisc["parent"] = index, handle, parent
    qdisc["attrs"] = [("TCA_KIND", kind)]
    if options is not None:
        qdisc["attrs"].append(("TCA_OPTIONS", options))
    try:
        rtnl.ask(qdisc, RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL)
    except OSError as error:
        raise HostError(
            f"the kernel takes no qdisc {kind}: {error.strerror}",
            phase="network",
            hint=f"modprobe sch_{kind}",
        ) from error


def remove(link: str, index: int, *, qdiscs: str, devices: str) -> None:
    """Take away what was made for the pod's link `link`, if it has that index still.

    `qdiscs`: those on it, of "ingress root"; `devices`: names of our own, by blanks. Raises OSError.
    """
    with Rtnl() as rtnl:
        for name in devices.split():
            if number := index_of(name):
                gone = message("ifinfmsg")()
                gone["index"] = number
                with _fine_if_gone():
                    rtnl.ask(gone, RTM_DELLINK)
        if index_of(link) != index:
            return
        for kind in qdiscs.split():
            gone = message("tcmsg")()
            gone["index"] = index
            gone["handle"] = _INGRESS if kind == "ingress" else 0
            gone["parent"] = _INGRESS_PARENT if kind == "ingress" else _ROOT
            with _fine_if_gone():
                rtnl.ask(gone, RTM_DELQDISC)


@contextlib.contextmanager
def _fine_if_gone() -> Any:
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
