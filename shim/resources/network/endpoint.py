"""One link of the pod, joined to one card of the VM: the devices between them, and their end.

What: `Endpoint.make` makes the tap or macvtap that is the card's host end, `join` connects it with the link,
`release` removes both. `NetworkConfig` for the VMM is `card`.
How, by model: `tcfilter` sends what arrives at the link out of the tap, and what arrives at the tap (from
the guest) out of the link; the namespace's own stack sees nothing of it. `macvtap` puts a macvtap in passthru
mode on the link. With `none` there is a tap, and who configured that joins it to what he likes.
Why passthru, where Kata's macvtap is a bridge's: the macvtap has the link's own address then, so that
neither its address nor its IP addresses need be changed, and put back, whoever dies meanwhile.
Rates: to the guest a tbf on the tap, from the guest one on the link. To a macvtap nothing can be queued:
what arrives at the link goes through an ifb first.
Invariants: everything is in the undo log before it is made, under the kind `tap`, with what `release_facts`
needs to find it: the namespace by path and inode, the link by name and index.
"""

from __future__ import annotations

import contextlib
import os

from devices.config import NetworkConfig
from devices.errors import HostError, KataError
from devices.undo import Entry, UndoLog
from shim.resources.network import links
from shim.resources.network.netns import OURS, Netns, identity, inside, open_netns
from shim.resources.network.rtnl import Rtnl
from shim.resources.network.scan import Link
from shim.resources.network.settings import MACVTAP, TCFILTER, NetworkSettings
from shim.resources.network.tap import open_macvtap, open_tap, open_vhost

__all__ = ["Endpoint", "release_facts"]


class Endpoint:
    """See the module's docstring. `number` counts the sandbox's cards from 0.

    `by_name`: the VMM opens the tap itself.
    """

    def __init__(
        self,
        netns: Netns,
        link: Link,
        number: int,
        settings: NetworkSettings,
        undo: UndoLog,
        *,
        by_name: bool,
        owner: tuple[int, int] = (0, 0),
    ) -> None:
        self.link = link
        self.id = f"net{number}"
        self.card: NetworkConfig | None = None
        self._netns = netns
        self._settings = settings
        self._undo = undo
        self._by_name = by_name
        self._owner = owner
        self._macvtap = settings.model == MACVTAP
        self._tap = f"{'macvtap' if self._macvtap else 'tap'}{number}{OURS}"
        self._ifb = f"ifb{number}{OURS}" if self._macvtap and settings.receive else ""
        self._fds: list[int] = []
        self._entry: Entry | None = None
        self._joined = ""  # the qdiscs on the link that are ours

    async def make(self) -> NetworkConfig:
        """The tap, and what the VMM is told of it. Raises HostError; nothing is left then."""
        if self._macvtap and self._by_name:
            raise HostError(
                "this hypervisor opens a tap device by its name, which a macvtap has not",
                phase="network",
                hint=f'internetworking_model = "{TCFILTER}"',
            )
        try:
            await self._netns.run(self._check)
        except OSError as error:
            raise _said(error, self.link.name) from error
        self._entry = self._undo.record(
            "tap",
            self._remove,
            netns=self._netns.path,
            namespace=self._netns.identity,
            link=self.link.name,
            index=self.link.index,
            devices=f"{self._tap} {self._ifb}".strip(),
            qdiscs="",
        )
        try:
            queues = self._settings.queues
            taps = await self._netns.run(self._make)
            vhosts = open_vhost(queues) if self._settings.vhost and taps else []
            self._fds += vhosts
            self.card = NetworkConfig(
                id=self.id,
                mac=self.link.mac,
                tap=self._tap,
                tap_fds=tuple(taps),
                vhost_fds=tuple(vhosts),
            )
        except OSError as error:
            await self.release()
            raise _said(error, self.link.name) from error
        except BaseException:
            await self.release()
            raise
        return self.card

    async def join(self) -> None:
        """Connect tap and link. Raises HostError."""
        qdiscs = self._qdiscs()
        if qdiscs:
            assert self._entry is not None
            try:
                if "ingress" in qdiscs:
                    await self._netns.run(self._check_ingress)
                self._undo.update(self._entry, qdiscs=qdiscs)
                self._joined = qdiscs
                await self._netns.run(self._join)
            except OSError as error:
                raise _said(error, self.link.name) from error

    def handed_over(self) -> None:
        """The VMM has its own descriptors: close ours. Idempotent."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())

    async def release(self) -> None:
        """Remove everything. Idempotent. Raises KataError, OSError; the undo log remembers it then."""
        self.handed_over()
        entry, self._entry = self._entry, None
        if entry is not None:
            await self._undo.release(entry)

    async def _remove(self) -> None:
        assert self._netns.fd >= 0
        await self._netns.run(
            links.remove,
            self.link.name,
            self.link.index,
            qdiscs=self._joined,
            devices=f"{self._tap} {self._ifb}",
        )

    def _qdiscs(self) -> str:
        kinds = []
        if self._settings.model == TCFILTER or self._ifb:
            kinds.append("ingress")
        if self._settings.send:
            kinds.append("root")
        return " ".join(kinds)

    # --- in the namespace's thread

    def _check(self) -> None:
        """Nothing of what is to be made is there: what is found would be taken for ours, and removed."""
        for name in (self._tap, self._ifb):
            if name and links.index_of(name):
                raise HostError(
                    f"there is a device {name} in the pod's network namespace already: the network is another"
                    " VM's, and two cannot share it",
                    phase="network",
                    hint="give each VM a network namespace of its own; if no VM is in this one"
                    " (kata-ctl list), the device is of one that did not end well: remove it",
                )

    def _check_ingress(self) -> None:
        """Likewise. Not in `_check`: the messages of tc take 13 ms to import, which a booting VM hides."""
        with Rtnl() as rtnl:
            links.check_ingress(rtnl, self.link.index, self.link.name)

    def _make(self) -> list[int]:
        settings, link = self._settings, self.link
        with Rtnl() as rtnl:
            if self._macvtap:
                links.macvtap(rtnl, self._tap, link.index)
                links.raise_link(rtnl, links.index_of(self._tap), link.mtu)
                self._fds += (taps := open_macvtap(self._tap, settings.queues))
                return taps
            self._fds += (
                taps := open_tap(
                    self._tap, queues=settings.queues, persistent=self._by_name, owner=self._owner
                )
            )
            links.raise_link(rtnl, links.index_of(self._tap), link.mtu)
            return taps

    def _join(self) -> None:
        settings, link = self._settings, self.link.index
        with Rtnl() as rtnl:
            tap = links.index_of(self._tap)
            if settings.model == TCFILTER:
                for index in (link, tap):
                    links.ingress(rtnl, index)
                links.redirect(rtnl, link, tap)
                links.redirect(rtnl, tap, link)
            if settings.receive and not self._macvtap:
                links.limit(rtnl, tap, settings.receive)
            elif self._ifb:
                links.ifb(rtnl, self._ifb)
                between = links.index_of(self._ifb)
                links.raise_link(rtnl, between, self.link.mtu)
                links.limit(rtnl, between, settings.receive)
                links.ingress(rtnl, link)
                links.redirect(rtnl, link, between)
            if settings.send:
                links.limit(rtnl, link, settings.send)


def _said(error: OSError, link: str) -> KataError:
    return HostError(
        f"the pod's link {link} cannot be joined to the VM: {error.strerror or error}", phase="network"
    )


def release_facts(facts: dict[str, str | int]) -> None:
    """What `Endpoint.release` does, from the undo log's facts alone; blocks. A namespace that is gone took
    everything with it. Raises OSError."""
    try:
        fd = open_netns(str(facts["netns"]))
    except OSError:
        return
    try:
        if identity(fd) != facts["namespace"]:
            return
        inside(
            fd,
            links.remove,
            str(facts["link"]),
            int(facts["index"]),
            qdiscs=str(facts["qdiscs"]),
            devices=str(facts["devices"]),
        )
    finally:
        os.close(fd)
