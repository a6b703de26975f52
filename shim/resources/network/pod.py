"""The pod's network as the sandbox sees it: one object, from the namespace's path to cards in the guest.

What: `PodNetwork`. `open` gives the namespace that the VMM shall stand in and begins to look at it; `plug`
gives the VM its cards before it starts, `join` connects them while it boots, `configure` tells the guest;
`rescan` does all four for links that came later, and takes away the cards of those that went; `follow`
does that whenever something changes (`watch`); `close` removes everything.
Why at a container's start again: a CNI plugin of CRI sets the network up before the sandbox is made, but
`ctr run --cni`, Docker and nerdctl do it between Create and Start, by the task's pid or by an OCI hook.
Invariants: nothing blocks the event loop. Without a namespace of its own a sandbox has no network but lo, and
nothing here does anything. `close` may be called at any time, any number of times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

import structlog

from devices.errors import HostError, KataError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from devices.manager import DeviceManager
from devices.undo import UndoLog
from hypervisors.base import Capabilities, Hypervisor
from shim.resources.network.netns import Netns, names, refuse_used
from shim.resources.network.settings import NetworkSettings
from shim.state.trace import Trace

if TYPE_CHECKING:
    from shim.resources.network.endpoint import Endpoint
    from shim.resources.network.guest import NetworkAgent
    from shim.resources.network.scan import Link, Scan

__all__ = ["PodNetwork"]

T = TypeVar("T")

_log = structlog.get_logger("network")


class PodNetwork:
    """See the module's docstring."""

    def __init__(
        self,
        settings: NetworkSettings,
        hypervisor: Hypervisor,
        devices: DeviceManager,
        undo: UndoLog,
        trace: Trace,
    ) -> None:
        self._settings = settings
        self._hypervisor = hypervisor
        self._devices = devices
        self._undo = undo
        self._trace = trace
        self._netns: Netns | None = None
        self._scanning: asyncio.Task[Scan] | None = None
        self._scan: Scan | None = None
        self._by_name, self._owner = False, (0, 0)
        self._endpoints: list[Endpoint] = []
        self._parted: list[Endpoint] = []  # those whose card could not be unplugged
        self._untold: list[Endpoint] = []
        self._made = 0
        self._lock = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._followed: list[Endpoint] = []  # those whose links came while containers ran

    async def open(self) -> str | None:
        """The path of the VMM's network namespace, None for the shim's own. Raises HostError."""
        settings = self._settings
        if settings.own:
            self._netns = await Netns.create()
            return self._netns.path
        if settings.path:
            self._netns = Netns.open(settings.path)
            if self._netns is None:
                _log.warning("the pod's network is the host's: the guest gets none", netns=settings.path)
                return None
            refuse_used(settings.path)
            if settings.hosted:
                self._netns.close()
                self._netns = None
                return settings.path
            self._scanning = asyncio.create_task(self._look(), name="scan the network")
            return settings.path
        return None

    async def plug(self) -> None:
        """Cold-plug a card for each link. Raises KataError."""
        if self._scanning is None:
            return
        with self._trace.phase("network"):
            self._scan = await self._scanning
            if self._scan.links:
                capabilities = await self._hypervisor.capabilities()
                self._by_name, self._owner = capabilities.tap_by_name, capabilities.tap_owner
                _require(capabilities, Op.COLD)
            for link in self._scan.links:
                await self._plug(link)

    async def join(self) -> None:
        """Connect the cards; the VM has its descriptors. Raises HostError."""
        if self._endpoints:
            with self._trace.phase("network.join"):
                for endpoint in self._endpoints:
                    endpoint.handed_over()
                    await endpoint.join()

    async def configure(self, agent: NetworkAgent) -> None:
        """Tell the guest. Raises KataError."""
        if self._untold and self._scan is not None:
            await self._tell(agent, self._scan)

    async def rescan(self, agent: NetworkAgent) -> None:
        """Plug what has come since, unplug what has gone. Raises KataError; what came is not there then."""
        if self._netns is None:
            return
        async with self._lock:
            known = {one.link.name for one in self._endpoints}
            if self._netns is None or (await self._inside(names) == known and not self._untold):
                return
            with self._trace.phase("network.rescan"):
                await self._catch_up(await self._look())
            await self.configure(agent)

    def follow(self, agent: Callable[[], NetworkAgent | None]) -> None:
        """From now on links that come and go reach the VM by themselves, and, once one has come so, its
        addresses and all routes. `agent` answers None when the VM is gone. Once."""
        if self._following is None and self._netns is not None:
            work = self._follow(self._netns, agent)
            self._following = asyncio.create_task(work, name="follow the network")

    async def close(self) -> list[Exception]:
        """Remove everything; the VM has gone, or never was. The errors met on the way."""
        errors: list[Exception] = []
        for task in (self._scanning, self._following):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()  # nobody may have waited for it
        async with self._lock:
            for endpoint in reversed(self._endpoints + self._parted):
                try:
                    await endpoint.release()
                except Exception as error:  # noqa: BLE001  (undo goes on past every error)
                    errors.append(error)
            self._endpoints.clear()
            self._parted.clear()
            self._untold.clear()
            self._followed.clear()
            if self._netns is not None:
                self._netns.close()
                self._netns = None
        return errors

    # --- how it is done

    async def _inside(self, function: Callable[[], T]) -> T:
        """Call it in the namespace. Raises HostError."""
        assert self._netns is not None
        try:
            return await self._netns.run(function)
        except OSError as error:
            raise HostError(
                f"the pod's network cannot be looked at: {error.strerror or error}", phase="network"
            ) from error

    async def _look(self) -> Scan:
        with self._trace.phase("network.scan"):
            found = await self._inside(_scan)
        _log.info("the pod's network", links=[link.name for link in found.links], of=sorted(found.names))
        return found

    async def _tell(self, agent: NetworkAgent, scan: Scan) -> None:
        from shim.resources.network.guest import tell

        with self._trace.phase("agent.network"):
            cards = [(one.link, await self._devices.get_pci_path(one.id)) for one in self._untold]
            await tell(agent, cards, scan)
        self._scan = scan
        self._untold.clear()

    async def _catch_up(self, found: Scan) -> list[Endpoint]:
        """Have the cards of what was found, no others; the new ones."""
        for endpoint in [one for one in self._endpoints if one.link.name not in found.names]:
            await self._unplug(endpoint)
        indexes = {one.link.index for one in self._endpoints}
        new = [link for link in found.links if link.index not in indexes]
        if not new:
            return []
        plugged = await self._plug_late(new)
        self._scan = found
        return plugged

    async def _follow(self, netns: Netns, agent: Callable[[], NetworkAgent | None]) -> None:
        from shim.resources.network.watch import LinkWatch  # not on the start path

        try:
            watch = await LinkWatch.open(netns)
        except OSError as error:
            _log.warning("changes of the network will not be seen", error=error.strerror)
            return
        try:
            while (to := agent()) is not None:
                try:
                    await self._follow_once(to)
                except KataError as error:
                    _log.warning("a change of the network does not reach the guest", error=str(error))
                await watch.changed()
        finally:
            watch.close()

    async def _follow_once(self, agent: NetworkAgent) -> None:
        async with self._lock:
            known = {one.link.name for one in self._endpoints}
            if await self._inside(names) == known and not self._followed and not self._untold:
                return
            with self._trace.phase("network.follow"):
                before = self._scan
                found = await self._look()
                self._followed += await self._catch_up(found)
                self._followed = [one for one in self._followed if one in self._endpoints]
                links = {link.index: link for link in found.links}
                for one in self._followed:
                    now = links.get(one.link.index, one.link)
                    if (now.addresses, now.mtu) != (one.link.addresses, one.link.mtu):
                        one.link = now
                        if one not in self._untold:
                            self._untold.append(one)
                if before is not None and (found.routes, found.rules) != (before.routes, before.rules):
                    await self._tell(agent, found)
            await self.configure(agent)

    async def _plug(self, link: Link) -> Endpoint:
        """Make the host's end, and the card. Nothing is left if it fails."""
        from shim.resources.network.endpoint import Endpoint

        assert self._netns is not None
        endpoint = Endpoint(
            self._netns,
            link,
            self._made,
            self._settings,
            self._undo,
            by_name=self._by_name,
            owner=self._owner,
        )
        self._made += 1
        card = await endpoint.make()
        try:
            await self._devices.try_add_device(card, self._hypervisor)
        except BaseException:
            await endpoint.release()
            raise
        self._endpoints.append(endpoint)
        self._untold.append(endpoint)
        return endpoint

    async def _plug_late(self, new: Sequence[Link]) -> list[Endpoint]:
        """All of them, or none."""
        try:
            _require(await self._hypervisor.capabilities(), Op.HOT)
        except UnsupportedByHypervisor as error:
            names_ = ", ".join(link.name for link in new)
            error.cause = f"the network ({names_}) came after the VM had started; {error.cause}"
            raise error.with_context(
                phase="network", hint="set it up before the container is created, as CRI does"
            ) from None
        plugged: list[Endpoint] = []
        try:
            for link in new:
                plugged.append(endpoint := await self._plug(link))
                endpoint.handed_over()
                await endpoint.join()
        except BaseException:
            for endpoint in reversed(plugged):
                await self._unplug(endpoint)
            raise
        return plugged

    async def _unplug(self, endpoint: Endpoint) -> None:
        """Its link has gone, or is not wanted. What cannot be unplugged stays in the VM, cut off."""
        self._endpoints.remove(endpoint)
        if endpoint in self._untold:
            self._untold.remove(endpoint)
        try:
            await self._devices.try_remove_device(endpoint.id, self._hypervisor)
            await endpoint.release()
        except (KataError, OSError) as error:
            self._parted.append(endpoint)
            _log.warning("a card stays in the VM", link=endpoint.link.name, error=str(error))


def _scan() -> Scan:
    """In the namespace's thread, which also imports what is needed only where there is a network."""
    import_module("shim.resources.network.endpoint")
    from shim.resources.network.scan import scan

    return scan()


def _require(capabilities: Capabilities, op: Op) -> None:
    """Raise UnsupportedByHypervisor, with the reason, unless the VM takes cards then."""
    capabilities.require("this hypervisor", Kind.NET, op)
