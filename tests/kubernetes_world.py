"""A cluster for tests: an API server that keeps JobSets and Jobs, and nodes that run their pods as processes.

What is real: every request of the launcher, over HTTP, and every container's command and variables, which run as
processes of this machine. What stands in: the JobSet controller's status, which is derived from those processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from jackpot.control_plane.launch.kubernetes.settings import DATA_DIR

JOBSETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/jobs/jobsets"
CORE = "/api/v1/namespaces/jobs"
JOBS = "/apis/batch/v1/namespaces/jobs/jobs"
INSTANCE = "jackpot/instance"
TICK_SECONDS = 0.1
Object = dict[str, Any]

CLUSTER: Object = {
    "namespace": "jobs",
    "redis": {"url_secret": {"name": "jackpot-redis", "key": "url"}},
    "run_claim": "jackpot-runs",
    "roles": {
        role: {"image": f"registry.example/jackpot-{role}:0.1.0"}
        for role in ("orchestrator", "rollout", "evaluator", "scorer", "learner")
    },
}


class Pod:
    """A container of a JobSet, or of a Job that belongs to one, as a process."""

    def __init__(self, jobset: Object, role: str, index: int, container: Object, nodes: Nodes) -> None:
        self.jobset, self.role, self.index, self.container = jobset, role, index, container
        self.joined = any(one["name"] == "JACKPOT_ADVERTISE_ADDRESS" for one in container["env"])
        self.name = f"{jobset['metadata']['name']}-{role}-0-{index}-{os.urandom(2).hex()}"
        self.uid = os.urandom(8).hex()
        self.log = nodes.directory / f"{self.name}.log"
        variables: dict[str, str] = {}
        for one in container["env"]:
            variables[one["name"]] = nodes.value(one, self).replace("$(POD_IP)", variables.get("POD_IP", ""))
        told = {name: nodes.localized(text, self) for name, text in variables.items()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *container["command"][1:]],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **told},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=nodes.directory,
            )

    @property
    def phase(self) -> str:
        """As the kubelet would say."""
        code = self.process.poll()
        return "Running" if code is None else "Succeeded" if code == 0 else "Failed"

    def plain(self) -> Object:
        """As the API server shows it."""
        labels = self.jobset["metadata"]["labels"] | {"app.kubernetes.io/component": self.role}
        annotations = {"batch.kubernetes.io/job-completion-index": str(self.index)}
        if self.joined:
            labels, annotations = labels | {INSTANCE: str(self.index)}, {}
        metadata = {"name": self.name, "uid": self.uid, "labels": labels, "annotations": annotations}
        return {"metadata": metadata, "spec": {"containers": [{"name": self.role}]}, "status": {"phase": self.phase}}


class Nodes:
    """Runs the pods of JobSets, replaces those that fail, and tells how the JobSets are doing.

    Args:
        directory: stands for the volumes that pods mount at /var/lib/jackpot, and for logs.
        secrets: values by (name, key).
    """

    def __init__(self, directory: Path, secrets: dict[tuple[str, str], str]) -> None:
        self.directory = directory
        self.pods: list[Pod] = []
        self._secrets = secrets
        self._ports: dict[str, int] = {}
        self._replaced: set[str] = set()

    def value(self, variable: Object, pod: Pod) -> str:
        """A variable's value, from wherever it comes."""
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "secretKeyRef" in source:
            return self._secrets[source["secretKeyRef"]["name"], source["secretKeyRef"]["key"]]
        path = source["fieldRef"]["fieldPath"]
        if path == "status.podIP":
            return self.host(pod)
        assert "job-completion-index" in path
        return str(pod.index)

    def host(self, pod: Pod) -> str:
        """The pod's name in the network of the cluster."""
        jobset = pod.jobset["metadata"]["name"]
        return f"{jobset}-{pod.role}-0-{pod.index}.{jobset}"

    def localized(self, text: str, pod: Pod) -> str:
        """Volumes and network of the cluster, on this machine: a port for each address."""
        parts = text.replace(DATA_DIR, str(self.directory)).replace("0.0.0.0:", f"{self.host(pod)}:").split(",")
        domain = "." + pod.jobset["metadata"]["name"] + ":"
        return ",".join(f"127.0.0.1:{self._port(part)}" if domain in part else part for part in parts)

    def start(self, jobset: Object) -> None:
        """Start every pod of a JobSet."""
        for job in jobset["spec"]["replicatedJobs"]:
            spec = job["template"]["spec"]
            for index in range(spec["completions"]):
                self._start(jobset, job["name"], index, spec["template"]["spec"]["containers"][0])

    def look(self, jobset: Object) -> Object:
        """Replace failed pods; the JobSet's status."""
        jobs = {job["name"]: job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}
        mine = [pod for pod in self.pods if pod.jobset["metadata"]["uid"] == jobset["metadata"]["uid"]]
        for pod in mine:
            if pod.phase != "Failed" or pod.uid in self._replaced:
                continue
            spec = jobs[pod.role]
            final = next(
                rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
            )
            if pod.process.returncode in final:
                return {
                    "conditions": [condition("Failed", "FailJobSetAction", f"{pod.role} broke a pod failure policy")]
                }
            self._replaced.add(pod.uid)
            self._start(jobset, pod.role, pod.index, pod.container)
        latest = [pod for pod in mine if pod.uid not in self._replaced]
        done = {role: all(pod.phase == "Succeeded" for pod in latest if pod.role == role) for role in jobs}
        if all(done[role] for role in jobset["spec"]["successPolicy"]["targetReplicatedJobs"]):
            return {"conditions": [condition("Completed", "AllJobsCompleted", "jobset completed successfully")]}
        return {
            "replicatedJobsStatus": [
                {"name": role, "ready": int(not done[role]), "succeeded": int(done[role])} for role in jobs
            ]
        }

    def start_job(self, jobset: Object, job: Object) -> None:
        """Start the pod of a Job that belongs to a JobSet."""
        instance = int(job["metadata"]["labels"][INSTANCE])
        self._start(jobset, "rollout", instance, job["spec"]["template"]["spec"]["containers"][0])

    def leave(self, jobset: Object, instances: range, joined: bool) -> None:
        """End rollout pods for good."""
        uid = jobset["metadata"]["uid"]
        mine = [pod for pod in self.pods if pod.jobset["metadata"]["uid"] == uid and pod.role == "rollout"]
        for pod in mine:
            if pod.index in instances and pod.joined == joined:
                self._replaced.add(pod.uid)
                self._end([pod])

    def end(self, jobset: Object | None = None) -> None:
        """End the pods of a JobSet, or of all."""
        mine = [
            pod for pod in self.pods if jobset is None or pod.jobset["metadata"]["uid"] == jobset["metadata"]["uid"]
        ]
        self._end(mine)

    def _end(self, pods: list[Pod]) -> None:
        for pod in pods:
            if pod.process.poll() is None:
                pod.process.send_signal(signal.SIGTERM)
        for pod in pods:
            try:
                pod.process.wait(15)
            except subprocess.TimeoutExpired:
                pod.process.kill()
                pod.process.wait()

    def _start(self, jobset: Object, role: str, index: int, container: Object) -> None:
        self.pods.append(Pod(jobset, role, index, container, self))

    def _port(self, address: str) -> int:
        if address not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[address] = probe.getsockname()[1]
        return self._ports[address]


def condition(kind: str, reason: str, message: str) -> Object:
    """A condition that is true."""
    return {"type": kind, "status": "True", "reason": reason, "message": message}


class Cluster:
    """The API server, in a thread of its own. ``nodes`` is None where nothing runs the pods."""

    def __init__(self, directory: Path, nodes: Nodes | None) -> None:
        self.nodes = nodes
        self.jobsets: dict[str, Object] = {}
        self.jobs: dict[str, Object] = {}
        self.requests: list[str] = []
        self.forget_history = 0  # answer so many watches with 410
        self.unreachable = False
        self.jobs_linger = False  # what is deleted stays until its pods are gone: here, until let_go()
        self._version = 0
        self._changes: list[tuple[int, str, Object]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._up = threading.Event()
        self._thread.start()
        assert self._up.wait(20)
        self.kubeconfig = directory / "kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(_kubeconfig(self.port)), encoding="utf-8")

    def close(self) -> None:
        """Stop it, and every pod."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)
        if self.nodes is not None:
            self.nodes.end()

    def set_status(self, name: str, status: Object) -> None:
        """What the controllers say of a JobSet."""
        self.jobsets[name]["status"] = status
        self._changed("MODIFIED", self.jobsets[name])

    def let_go(self) -> None:
        """Have Jobs that are being deleted be gone."""
        self.jobs = {n: job for n, job in self.jobs.items() if "deletionTimestamp" not in job["metadata"]}

    def _changed(self, kind: str, jobset: Object) -> None:
        self._version += 1
        jobset["metadata"]["resourceVersion"] = str(self._version)
        self._changes.append((self._version, kind, json.loads(json.dumps(jobset))))

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        self._ended = asyncio.Event()
        app = web.Application(middlewares=[self._noted])
        app.router.add_get(JOBSETS, self._list)
        app.router.add_post(JOBSETS, self._create)
        app.router.add_get(JOBSETS + "/{name}", self._get)
        app.router.add_delete(JOBSETS + "/{name}", self._delete)
        app.router.add_get(JOBS, self._list_jobs)
        app.router.add_post(JOBS, self._create_job)
        app.router.add_patch(JOBS + "/{name}", self._patch_job)
        app.router.add_delete(JOBS + "/{name}", self._delete_job)
        app.router.add_get(CORE + "/pods", self._pods)
        app.router.add_get(CORE + "/pods/{name}/log", self._log)
        app.router.add_get(CORE + "/events", self._events)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._up.set()
        while not self._ended.is_set():
            self._control()
            await asyncio.sleep(TICK_SECONDS)
        await runner.cleanup()

    def _control(self) -> None:
        if self.nodes is None:
            return
        for name, jobset in list(self.jobsets.items()):
            status = self.nodes.look(jobset)
            if status != jobset.get("status"):
                self.set_status(name, status)

    @web.middleware
    async def _noted(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}{'?watch' if 'watch' in request.query else ''}")
        if self.unreachable:
            return web.Response(status=503)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _list(self, request: web.Request) -> web.StreamResponse:
        wanted = dict(part.split("=") for part in request.query.get("labelSelector", "").split(",") if part)

        def matches(jobset: Object) -> bool:
            return wanted.items() <= jobset["metadata"]["labels"].items()

        if "watch" not in request.query:
            items = [jobset for jobset in self.jobsets.values() if matches(jobset)]
            return web.json_response({"metadata": {"resourceVersion": str(self._version)}, "items": items})
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if self.forget_history > 0:
            self.forget_history -= 1
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            return response
        seen = int(request.query.get("resourceVersion") or 0)
        while not self._ended.is_set():
            for version, kind, jobset in [change for change in self._changes if change[0] > seen]:
                seen = version
                if matches(jobset):
                    await response.write(json.dumps({"type": kind, "object": jobset}).encode() + b"\n")
            await asyncio.sleep(TICK_SECONDS)
        return response

    async def _create(self, request: web.Request) -> web.Response:
        jobset = await request.json()
        name = jobset["metadata"]["name"]
        if name in self.jobsets:
            return web.json_response({"reason": "AlreadyExists"}, status=409)
        jobset["metadata"]["uid"] = os.urandom(8).hex()
        self.jobsets[name] = jobset
        self._changed("ADDED", jobset)
        if self.nodes is not None:
            self.nodes.start(jobset)
        return web.json_response(jobset, status=201)

    async def _get(self, request: web.Request) -> web.Response:
        jobset = self.jobsets.get(request.match_info["name"])
        return web.json_response(jobset or {"reason": "NotFound"}, status=200 if jobset else 404)

    async def _delete(self, request: web.Request) -> web.Response:
        jobset = self.jobsets.get(request.match_info["name"])
        if jobset is None:
            return web.json_response({"reason": "NotFound"}, status=404)
        assert (await request.json())["propagationPolicy"] == "Foreground"
        if self.nodes is not None:
            await asyncio.to_thread(self.nodes.end, jobset)
        del self.jobsets[request.match_info["name"]]
        uid = jobset["metadata"]["uid"]  # what it owns goes with it
        self.jobs = {n: job for n, job in self.jobs.items() if job["metadata"]["ownerReferences"][0]["uid"] != uid}
        self._changed("DELETED", jobset)
        return web.json_response({"kind": "Status", "status": "Success"})

    def _owner(self, job: Object) -> Object:
        uid = job["metadata"]["ownerReferences"][0]["uid"]
        return next(jobset for jobset in self.jobsets.values() if jobset["metadata"]["uid"] == uid)

    async def _list_jobs(self, request: web.Request) -> web.Response:
        job_label, instance = request.query["labelSelector"].split(",")
        assert instance == INSTANCE
        key, value = job_label.split("=")
        items = [job for job in self.jobs.values() if job["metadata"]["labels"][key] == value]
        return web.json_response({"kind": "JobList", "apiVersion": "batch/v1", "metadata": {}, "items": items})

    async def _create_job(self, request: web.Request) -> web.Response:
        job = await request.json()
        if job["metadata"]["name"] in self.jobs:
            return web.json_response({"reason": "AlreadyExists"}, status=409)
        self.jobs[job["metadata"]["name"]] = job
        if self.nodes is not None:
            self.nodes.start_job(self._owner(job), job)
        return web.json_response(job, status=201)

    async def _patch_job(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        assert name.endswith("-rollout-0") and request.content_type == "application/strategic-merge-patch+json"
        jobset = self.jobsets[name.removesuffix("-rollout-0")]
        spec = next(one for one in jobset["spec"]["replicatedJobs"] if one["name"] == "rollout")["template"]["spec"]
        patch = (await request.json())["spec"]
        assert patch["completions"] == patch["parallelism"] > 0
        before = jobset.setdefault("resized", spec["completions"])
        if self.nodes is not None:
            await asyncio.to_thread(self.nodes.leave, jobset, range(patch["completions"], before), False)
            for index in range(before, patch["completions"]):
                self.nodes._start(jobset, "rollout", index, spec["template"]["spec"]["containers"][0])
        jobset["resized"] = patch["completions"]
        return web.json_response({"kind": "Job", "apiVersion": "batch/v1", "metadata": {"name": name}})

    async def _delete_job(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.jobs:
            return web.json_response({"reason": "NotFound"}, status=404)
        if self.jobs_linger:
            self.jobs[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            return web.json_response({"kind": "Job", "apiVersion": "batch/v1", "metadata": {"name": name}})
        job = self.jobs.pop(name)
        if self.nodes is not None:
            instance = int(job["metadata"]["labels"][INSTANCE])
            await asyncio.to_thread(self.nodes.leave, self._owner(job), range(instance, instance + 1), True)
        return web.json_response({"kind": "Status", "status": "Success"})

    async def _pods(self, request: web.Request) -> web.Response:
        pods = [pod.plain() for pod in (self.nodes.pods if self.nodes else [])]
        return web.json_response({"kind": "PodList", "items": pods})

    async def _log(self, request: web.Request) -> web.StreamResponse:
        assert self.nodes is not None
        pod = next(pod for pod in self.nodes.pods if pod.name == request.match_info["name"])
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        with pod.log.open("rb") as file:
            while True:
                over = pod.phase != "Running" or self._ended.is_set()
                if data := file.read():
                    await response.write(data)
                if over:
                    return response
                await asyncio.sleep(TICK_SECONDS)

    async def _events(self, request: web.Request) -> web.Response:
        events = [
            {
                "metadata": {"name": "one"}, "involvedObject": {"kind": "Pod", "name": f"{name}-learner-0-0-abcde"},
                "type": "Warning", "reason": "FailedScheduling", "message": "0/3 nodes are available",
            }
            for name in self.jobsets
        ]  # fmt: skip
        return web.json_response({"kind": "EventList", "items": events})


@contextmanager
def running_cluster(directory: Path, secrets: dict[tuple[str, str], str] | None = None) -> Iterator[Cluster]:
    """A cluster; with ``secrets`` its pods run, on volumes in ``directory``."""
    cluster = Cluster(directory, None if secrets is None else Nodes(directory, secrets))
    try:
        yield cluster
    finally:
        cluster.close()


def _kubeconfig(port: int) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "test", "user": {"token": "a-token"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "jobs"}}],
    }
