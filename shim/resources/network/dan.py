"""A directly attachable network: cards that a CNI plugin names in a file, instead of the pod's links.

What: `read` parses `<dan_conf>/<sandbox id>.json`; `DanNetwork` is what `pod.PodNetwork` is for links. Cards
of vhost-user back ends (a DPDK switch) and of taps that are there already, with their addresses in the guest.
Why: such cards have no link that could be found by looking; and what is found there is not meant then.
Invariants: the file is bounded and checked whole before anything is opened. A tap is opened, never made, and
never removed.
Source: Kata's DAN (facts/kata.md 1.6; runtime-rs, network/dan.rs, for names and defaults).
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from devices.config import NetworkConfig, VhostUserNetConfig
from devices.errors import HostError
from devices.kinds import Op
from devices.manager import DeviceManager
from devices.small_file import read_small
from devices.strict_json import parse
from devices.threads import acquire
from hypervisors.base import Hypervisor
from shim.resources.network.netns import Netns
from shim.resources.network.routes import RTAX_MTU, Hop, Route
from shim.resources.network.scan import Address, Link, Neighbor, Scan
from shim.resources.network.settings import NetworkSettings
from shim.resources.network.tap import open_tap, open_vhost
from shim.state.trace import Trace

if TYPE_CHECKING:
    from shim.resources.network.guest import NetworkAgent

__all__ = ["Dan", "DanCard", "DanNetwork", "read"]

_LIMIT = 1 << 20  # bytes of the file
_CARDS, _MANY = 32, 1024
_MTUS = range(68, 65536)
_QUEUES = range(257)
_NUD_PERMANENT = 0x80
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
_WORDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class DanCard:
    """One card. `socket`: of its vhost-user back end, or `tap`: a tap's name. `queues`: 0 for the
    configuration's number."""

    link: Link
    socket: str = ""
    tap: str = ""
    queues: int = 0
    queue_size: int = 256


@dataclass(frozen=True, slots=True)
class Dan:
    """The file. `netns`: where the VM and the taps are, "" for wherever the pod is."""

    netns: str = ""
    cards: tuple[DanCard, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbors: tuple[Neighbor, ...] = field(default=())


def read(path: str) -> Dan | None:
    """None if there is no such file. Raises HostError, which names the place in the file. Blocks."""
    try:
        text = read_small(path, _LIMIT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}", phase="network") from error
    try:
        return _dan(_Part("", parse(text)))
    except ValueError as error:
        raise HostError(
            f"{path} is no description of a network: {error}",
            phase="network",
            hint="see Kata's directly attachable network; or remove the file",
        ) from error


class _Part:
    """An object of the file, whose members are asked for by name and kind."""

    def __init__(self, place: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{place or 'it'} must be an object")
        self.place = place
        self._value: dict[str, Any] = value

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def text(self, key: str, default: str | None = None, pattern: re.Pattern[str] | None = None) -> str:
        found: str = self._get(key, default, str)
        if found != default and pattern is not None and not pattern.fullmatch(found):
            raise ValueError(f"{self.at(key)} cannot be {found[:80]!r}")
        return found

    def number(self, key: str, default: int, allowed: range) -> int:
        found: int = self._get(key, default, int)
        if found not in allowed:
            raise ValueError(f"{self.at(key)} must be from {allowed.start} to {allowed.stop - 1}")
        return found

    def part(self, key: str) -> _Part:
        return _Part(self.at(key), self._get(key, None, dict))

    def many(self, key: str, most: int, *, needed: bool = False) -> list[Any]:
        found: list[Any] = self._get(key, None if needed else [], list)
        if len(found) > most:
            raise ValueError(f"{self.at(key)} has more than {most} entries")
        return found

    def parts(self, key: str, most: int, *, needed: bool = False) -> list[_Part]:
        found = self.many(key, most, needed=needed)
        return [_Part(f"{self.at(key)}[{index}]", value) for index, value in enumerate(found)]

    def _get(self, key: str, default: Any, kind: type) -> Any:
        found = self._value.get(key, default)
        if found is None:
            raise ValueError(f"{self.at(key)} is missing")
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ValueError(f"{self.at(key)} must be {_WORDS[kind]}")
        return found


def _dan(top: _Part) -> Dan:
    cards: list[DanCard] = []
    routes: list[Route] = []
    neighbors: list[Neighbor] = []
    for index, device in enumerate(top.parts("devices", _CARDS, needed=True)):
        card = _card(device, index)
        if card.link.name in (other.link.name for other in cards):
            raise ValueError(f"{device.at('name')}: two cards are called {card.link.name}")
        cards.append(card)
        info = device.part("network_info")
        routes += [_route(part, card.link.name) for part in info.parts("routes", _MANY)]
        neighbors += [_neighbor(part, card.link.name) for part in info.parts("neighbors", _MANY)]
    netns = top.text("netns", "")
    return Dan(netns, tuple(cards), tuple(routes), tuple(neighbors))


def _card(device: _Part, index: int) -> DanCard:
    what = device.part("device")
    info = device.part("network_info").part("interface")
    addresses = []
    for number, text in enumerate(info.many("ip_addresses", _MANY, needed=True)):
        one = _parsed(ipaddress.ip_interface, text, f"{info.at('ip_addresses')}[{number}]")
        addresses.append(Address(_family(one), str(one.ip), one.network.prefixlen))
    link = Link(
        index=-1 - index,
        name=device.text("name", pattern=_NAME),
        kind=what.text("type"),
        mac=device.text("guest_mac", "", _MAC) or _random_mac(),
        mtu=info.number("mtu", 1500, _MTUS),
        flags=info.number("flags", 0, range(1 << 32)),
        addresses=tuple(addresses),
    )
    size = what.number("queue_size", 0, range(1025)) or 256
    if size < 256 or size & (size - 1):
        raise ValueError(f"{what.at('queue_size')} must be a power of two from 256 to 1024")
    queues = what.number("queue_num", 0, _QUEUES)
    match link.kind:
        case "vhost-user":
            path = what.text("path")
            if not path.startswith("/") or "\0" in path:
                raise ValueError(f"{what.at('path')} must be an absolute path")
            return DanCard(link, socket=path, queues=queues, queue_size=size)
        case "host-tap":
            return DanCard(link, tap=what.text("tap_name", pattern=_NAME), queues=queues)
        case other:
            raise ValueError(f"{what.at('type')} {other[:40]!r} is not supported: vhost-user or host-tap")


def _route(part: _Part, link: str) -> Route:
    texts = {key: part.text(key, "") for key in ("dest", "gateway", "source")}
    families = set()
    for key, text in texts.items():
        if text:
            parse = ipaddress.ip_network if key == "dest" else ipaddress.ip_address
            families.add(_family(_parsed(parse, text, part.at(key))))
    if len(families) != 1:
        raise ValueError(f"{part.place} needs addresses of one family")
    default = texts["dest"] in ("0.0.0.0/0", "::/0")
    mtu = part.number("mtu", 0, range(65536))
    return Route(
        family=families.pop(),
        destination="" if default else texts["dest"],
        hops=(Hop(texts["gateway"], link, part.number("flags", 0, range(1 << 32))),),
        source=texts["source"],
        scope=part.number("scope", 0, range(256)),
        metrics=((RTAX_MTU, mtu),) if mtu else (),
    )


def _neighbor(part: _Part, link: str) -> Neighbor:
    one = _parsed(ipaddress.ip_interface, part.text("ip_address"), part.at("ip_address"))
    if part.number("state", 0, range(256)) not in (0, _NUD_PERMANENT):
        raise ValueError(f"{part.at('state')} must be 0 or {_NUD_PERMANENT}: permanent")
    return Neighbor(_family(one), str(one.ip), part.text("hardware_addr", pattern=_MAC), link)


def _parsed(parse: Callable[[str], Any], text: object, place: str) -> Any:
    if not isinstance(text, str):
        raise ValueError(f"{place} must be a text")
    try:
        return parse(text)
    except ValueError:
        raise ValueError(f"{place} cannot be {text[:80]!r}") from None


def _family(address: Any) -> int:
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)


def _random_mac() -> str:
    """Of nobody: locally administered."""
    return (b"\x02" + secrets.token_bytes(5)).hex(":")


class DanNetwork:
    """See the module's docstring; the methods are those of `pod.PodNetwork`."""

    def __init__(
        self,
        dan: Dan,
        settings: NetworkSettings,
        hypervisor: Hypervisor,
        devices: DeviceManager,
        trace: Trace,
    ) -> None:
        self._dan = dan
        self._settings = settings
        self._hypervisor = hypervisor
        self._devices = devices
        self._trace = trace
        self._netns: Netns | None = None
        self._fds: list[int] = []
        self._cards: list[tuple[str, Link]] = []

    async def open(self) -> str | None:
        """The path of the VMM's network namespace, None for the shim's own. Raises HostError."""
        path = self._dan.netns or self._settings.path
        if not path and self._settings.own:
            self._netns = await Netns.create()
        elif path:
            self._netns = Netns.open(path)
        return self._netns.path if self._netns is not None else None

    async def plug(self) -> None:
        """Cold-plug the cards. Raises KataError."""
        able = await self._hypervisor.capabilities()
        with self._trace.phase("network"):
            for number, card in enumerate(self._dan.cards):
                name, queues = f"net{number}", card.queues or self._settings.queues or 1
                config: NetworkConfig | VhostUserNetConfig
                if card.socket:
                    config = VhostUserNetConfig(
                        id=name,
                        path=card.socket,
                        mac=card.link.mac,
                        queues=queues,
                        queue_size=card.queue_size,
                    )
                    able.require("this hypervisor", config.kind, Op.COLD)
                else:
                    able.require("this hypervisor", NetworkConfig.kind, Op.COLD)
                    config = await self._tap(name, card, queues, by_name=able.tap_by_name)
                await self._devices.try_add_device(config, self._hypervisor)
                self._cards.append((name, card.link))

    async def _tap(self, name: str, card: DanCard, queues: int, *, by_name: bool) -> NetworkConfig:
        if by_name:
            return NetworkConfig(id=name, mac=card.link.mac, tap=card.tap)

        def there() -> list[int]:
            self._fds += (taps := open_tap(card.tap, queues=queues, existing=True))  # ours, whoever gives up
            return taps

        taps = await (self._netns.run(there) if self._netns is not None else acquire(there))
        vhosts = open_vhost(queues) if self._settings.vhost else []
        self._fds += vhosts
        return NetworkConfig(
            id=name, mac=card.link.mac, tap=card.tap, tap_fds=tuple(taps), vhost_fds=tuple(vhosts)
        )

    async def join(self) -> None:
        """The VM has its descriptors: ours go. What they are joined to is the file's author's matter."""
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())

    async def configure(self, agent: NetworkAgent) -> None:
        """Tell the guest. Raises KataError."""
        from shim.resources.network.guest import tell

        with self._trace.phase("agent.network"):
            cards = [(link, await self._devices.get_pci_path(name)) for name, link in self._cards]
            await tell(agent, cards, Scan((), self._dan.routes, self._dan.neighbors))

    async def rescan(self, agent: NetworkAgent) -> None:
        """The file is read once."""

    def follow(self, agent: Callable[[], NetworkAgent | None]) -> None:
        """Likewise."""

    async def close(self) -> list[Exception]:
        """Let go of everything; the VM has gone, or never was. Idempotent."""
        await self.join()
        if self._netns is not None:
            self._netns.close()
            self._netns = None
        return []
