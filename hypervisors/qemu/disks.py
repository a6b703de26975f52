"""What changes of a disk while it is plugged, under QEMU: its size and its limits.

What: `update_disk` makes a plugged disk what is asked for now.
Invariants: a disk never shrinks here: what the guest has at its end would be gone; what cannot be changed is
refused before anything is.
Source: qapi/block-core.json (block_resize, query-named-block-nodes), docs/throttle.txt of QEMU 7.2.
"""

from __future__ import annotations

from dataclasses import replace

from devices.config import BlockConfig, BlockFormat
from devices.disk_size import disk_size
from devices.errors import CallerError, UnsupportedByHypervisor
from devices.threads import look
from hypervisors.qemu.qmp import QmpClient, sensible
from hypervisors.qemu.recipes import limits_name, node_name, throttle

__all__ = ["update_disk"]


async def update_disk(qmp: QmpClient, old: BlockConfig, new: BlockConfig) -> None:
    """Size and limits of a disk that is plugged as `old`. Its guest hears of the size by itself.

    Raises CallerError for a smaller size and for other changes, UnsupportedByHypervisor for limits on a disk
    that came without, HostError, HypervisorError.
    """
    kept = replace(new, options=replace(new.options, limits=old.options.limits), size=old.size)
    if kept != old:
        raise CallerError(f"of the plugged disk {old.id} only size and limits can change", phase="devices")
    limits = new.options.limits
    if limits and not old.options.limits:
        raise UnsupportedByHypervisor("qemu", f"limits on disk {old.id}, which was plugged without")
    present = await _virtual_size(qmp, old.id)
    size = new.size or (await look(disk_size, new.path) if new.format is BlockFormat.RAW else 0)
    if 0 < size < present:
        raise CallerError(
            f"disk {old.id} has {present} bytes and cannot shrink to {size}",
            phase="devices",
            hint="what the guest has at its end would be lost",
        )
    if size % 512:
        raise CallerError(f"a disk of {size} bytes is no number of sectors (512 bytes)", phase="devices")
    if limits != old.options.limits:
        where = {"path": f"/objects/{limits_name(old.id)}", "property": "limits"}
        await qmp.execute("qom-set", {**where, "value": throttle(limits)})
    if size > present:
        await qmp.execute("block_resize", {"node-name": node_name(old.id), "size": size})


async def _virtual_size(qmp: QmpClient, device_id: str) -> int:
    """Bytes of the disk as its guest has it."""
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    with sensible("query-named-block-nodes"):
        return next(int(n["image"]["virtual-size"]) for n in nodes if n["node-name"] == node_name(device_id))
