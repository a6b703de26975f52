"""containerd's CRI plugin, driven as kubelet drives it: pods and their containers.

What: `Cri` speaks runtime.v1 (RuntimeService, ImageService) to a containerd whose CRI plugin is
enabled (`Containerd(cri=True)`): it runs pods, and containers in them, whose output is read from the
log files that CRI writes. Debian has no crictl, and a test wants answers, not tables.
Why host-network pods by default: they need no CNI. In the VM they have the guest's network.
Invariants: each call has a deadline; `close()` removes every pod that was made here.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from testing.api import message, method
from testing.containerd import Containerd
from testing.guest import PROJECT

__all__ = ["HANDLER", "NAMESPACE", "Cri", "Pod"]

NAMESPACE = "k8s.io"
"""containerd's namespace of everything that CRI makes."""
HANDLER = "kata"
"""The runtime handler, which a RuntimeClass would name."""

_RUNTIME = "runtime.v1.RuntimeService"
_IMAGES = "runtime.v1.ImageService"


class Cri:
    """A connection to the CRI of `containerd`, which clears up after its pods too."""

    def __init__(self, containerd: Containerd) -> None:
        self.containerd = containerd
        self.pods: list[Pod] = []
        self._numbers = itertools.count(1)
        self._channel = grpc.insecure_channel(f"unix://{containerd.address}")

    def close(self) -> None:
        """Remove all pods, and close the connection."""
        for pod in list(self.pods):
            with contextlib.suppress(grpc.RpcError):
                pod.remove()
        self._channel.close()

    def call(self, name: str, *, service: str = _RUNTIME, deadline: float = 120, **fields: object) -> Any:
        """One call, `deadline` in seconds. Raises grpc.RpcError, whose code() and details() say why."""
        path, request, response = method(service, name)
        stub = self._channel.unary_unary(
            path, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return stub(request(**fields), timeout=deadline, wait_for_ready=True)

    def wait_until_up(self, timeout: float = 60) -> None:
        """Until the plugin serves, after containerd has come back. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                self.call("ListPodSandbox", deadline=5)
                return
            time.sleep(0.05)
        raise TimeoutError("CRI does not serve")

    def wait_for_image(self, name: str, timeout: float = 30) -> None:
        """Until the plugin has heard of an image that `ctr` imported. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while not self.call("ImageStatus", service=_IMAGES, image={"image": name}).image.id:
            if time.monotonic() > deadline:
                raise TimeoutError(f"CRI does not see {name}")
            time.sleep(0.05)

    def run_pod(
        self,
        *,
        hostname: str = "",
        namespaces: Mapping[str, str] | None = None,
        dns: Mapping[str, Sequence[str]] | None = None,
        sysctls: Mapping[str, str] | None = None,
        handler: str = HANDLER,
        deadline: float = 120,
        **more: object,
    ) -> Pod:
        """RunPodSandbox. `namespaces` as {"pid": "POD"}, by CRI's names; private pids are the default,
        as in Kubernetes. `more` are further fields of PodSandboxConfig.linux.
        """
        name = f"{self.containerd.tag}-pod{next(self._numbers)}"
        directory = self.containerd.root / "pods" / name
        directory.mkdir(parents=True)
        options = {"network": "NODE", "pid": "CONTAINER", **(namespaces or {})}
        config = message("runtime.v1.PodSandboxConfig")(
            metadata={"name": name, "uid": name, "namespace": "default"},
            hostname=hostname,
            log_directory=str(directory),
            dns_config=dict(dns or {}),
            linux={
                "security_context": {"namespace_options": options},
                "sysctls": dict(sysctls or {}),
                **more,
            },
        )
        answer = self.call("RunPodSandbox", config=config, runtime_handler=handler, deadline=deadline)
        pod = Pod(self, answer.pod_sandbox_id, config, options, directory)
        self.pods.append(pod)
        self.containerd.ids.append(pod.id)
        return pod


class Pod:
    """One pod sandbox and its containers, which are named by their ids."""

    def __init__(self, cri: Cri, pod_id: str, config: Any, namespaces: Mapping[str, str], logs: Path) -> None:
        self.cri = cri
        self.id = pod_id
        self.config = config
        self.namespaces = namespaces
        self.logs = logs
        self._names = itertools.count(1)
        self._log_paths: dict[str, Path] = {}

    def create(
        self,
        *command: str,
        image: str,
        namespaces: Mapping[str, str] | None = None,
        resources: Mapping[str, object] | None = None,
        **more: object,
    ) -> str:
        """CreateContainer; its id. `more` are further fields of ContainerConfig.

        The namespace options are the pod's, as kubelet sends them, unless given.
        """
        number = next(self._names)
        container = self.cri.call(
            "CreateContainer",
            pod_sandbox_id=self.id,
            sandbox_config=self.config,
            config={
                "metadata": {"name": f"c{number}"},
                "image": {"image": image},
                "command": list(command),
                "log_path": f"{number}.log",
                "linux": {
                    "resources": dict(resources or {}),
                    "security_context": {"namespace_options": {**self.namespaces, **(namespaces or {})}},
                },
                **more,
            },
        ).container_id
        self._log_paths[container] = self.logs / f"{number}.log"
        return str(container)

    def start(self, container: str) -> None:
        """StartContainer."""
        self.cri.call("StartContainer", container_id=container)

    def run(self, *command: str, image: str, **more: Any) -> str:
        """Create and start; the container's id."""
        container = self.create(*command, image=image, **more)
        self.start(container)
        return container

    def exec(self, container: str, *command: str, timeout: int = 60) -> Any:
        """ExecSync: stdout, stderr, exit_code."""
        return self.cri.call("ExecSync", container_id=container, cmd=list(command), timeout=timeout)

    def sh(self, container: str, script: str) -> str:
        """What a shell script in the container writes, stripped. Raises AssertionError if it fails."""
        done = self.exec(container, "sh", "-c", script)
        assert done.exit_code == 0, f"{script}: exit {done.exit_code}: {done.stdout!r} {done.stderr!r}"
        return str(done.stdout.decode().strip())

    def forward(self, port: int, data: bytes, timeout: float = 60) -> tuple[bytes, str]:
        """PortForward, as `kubectl port-forward` does it: what an echo at this port of the pod answers to
        `data`, or the error's text."""
        url = self.cri.call("PortForward", pod_sandbox_id=self.id, port=[port]).url
        done = subprocess.run(
            self.cri.containerd.in_network(sys.executable, "-m", "testing.portforward", url),
            check=False,
            capture_output=True,
            timeout=timeout,
            input=data,
            cwd=PROJECT,
        )
        return done.stdout, done.stderr.decode()

    def status(self, container: str) -> Any:
        """The ContainerStatus."""
        return self.cri.call("ContainerStatus", container_id=container).status

    def wait_exit(self, container: str, timeout: float = 180) -> Any:
        """The ContainerStatus once the container has exited. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (status := self.status(container)).finished_at == 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{container} has not exited: {status}")
            time.sleep(0.05)
        return status

    def output(self, container: str) -> str:
        """What it wrote to stdout and stderr, from CRI's log: `<time> <stream> <F|P> <line>`."""
        text = ""
        for line in self._log_paths[container].read_text().splitlines():
            _, _, tag, rest = line.split(" ", 3)
            text += rest + ("\n" if tag == "F" else "")
        return text

    def wait_output(self, container: str, needle: str, timeout: float = 180) -> str:
        """Its output once it holds `needle`. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while needle not in (text := self.output(container)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {needle!r} in {text[-2000:]!r}")
            time.sleep(0.05)
        return text

    def stop_container(self, container: str, grace: int = 0) -> None:
        """StopContainer: SIGTERM, and SIGKILL after `grace` seconds."""
        self.cri.call("StopContainer", container_id=container, timeout=grace)

    def remove_container(self, container: str) -> None:
        """RemoveContainer."""
        self.cri.call("RemoveContainer", container_id=container)

    def info(self) -> dict[str, str]:
        """What PodSandboxStatus tells when it is asked for everything."""
        return dict(self.cri.call("PodSandboxStatus", pod_sandbox_id=self.id, verbose=True).info)

    def state(self) -> str:
        """SANDBOX_READY or SANDBOX_NOTREADY."""
        state = self.cri.call("PodSandboxStatus", pod_sandbox_id=self.id).status.state
        return "SANDBOX_READY" if state == 0 else "SANDBOX_NOTREADY"

    def stop(self) -> None:
        """StopPodSandbox."""
        self.cri.call("StopPodSandbox", pod_sandbox_id=self.id)

    def remove(self) -> None:
        """Stop and remove, with all containers."""
        self.stop()
        self.cri.call("RemovePodSandbox", pod_sandbox_id=self.id)
        if self in self.cri.pods:
            self.cri.pods.remove(self)
