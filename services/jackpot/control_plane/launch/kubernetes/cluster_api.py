"""The few calls that a launcher makes to the Kubernetes API, with our own errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
from kubernetes_asyncio import client, config, watch
from kubernetes_asyncio.client.exceptions import ApiException
from kubernetes_asyncio.config.config_exception import ConfigException

from jackpot.control_plane.launch.kubernetes.naming import INSTANCE_LABEL, JOB_LABEL
from jackpot.errors import ConfigError, JackpotError

LOG = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
WATCH_SECONDS = 240  # the server ends a watch after this long; the next begins with a list
TROUBLE_SECONDS = 2.0
TIMEOUT_SECONDS = 20.0
TROUBLES = (ApiException, aiohttp.ClientError, TimeoutError, OSError)

Object = dict[str, Any]


class ClusterApi:
    """JobSets, pods and events of one namespace. Close it after use.

    Args:
        namespace: of all objects.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._client: client.ApiClient | None = None

    async def connect(self) -> None:
        """Find the API server: the pod's own cluster, or the one that a kubeconfig names.

        Raises:
            ConfigError: there is neither.
        """
        if self._client is not None:
            return
        settings = client.Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
            else:
                await config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=settings)
        except (ConfigException, OSError) as error:
            remedy = "Run in a pod with a service account's token, or set KUBECONFIG."
            raise ConfigError("KUBECONFIG", os.environ.get("KUBECONFIG"), f"no cluster ({error})", remedy) from None
        self._client = client.ApiClient(settings)

    async def close(self) -> None:
        """Close the connections."""
        api, self._client = self._client, None
        if api is not None:
            await api.close()

    async def create(self, manifest: Mapping[str, Any]) -> bool:
        """Create a JobSet; False if one of this name exists.

        Raises:
            JackpotError: the API server refuses it, or cannot be reached.
        """
        made = False
        with _told("the JobSet was refused", unless=409):
            await self._jobsets.create_namespaced_custom_object(
                GROUP, VERSION, self._namespace, PLURAL, manifest, _request_timeout=TIMEOUT_SECONDS
            )
            made = True
        return made

    async def get(self, name: str) -> Object | None:
        """A JobSet; None if there is none.

        Raises:
            JackpotError: the API server cannot be asked.
        """
        jobset: Object | None = None
        with _told(f"the JobSet {name} cannot be read", unless=404):
            jobset = await self._jobsets.get_namespaced_custom_object(
                GROUP, VERSION, self._namespace, PLURAL, name, _request_timeout=TIMEOUT_SECONDS
            )
        return jobset

    async def delete(self, name: str) -> None:
        """Start deleting a JobSet; it is gone once all its pods are. Does nothing if it is gone already.

        Raises:
            JackpotError: the API server refuses, or cannot be reached.
        """
        options = client.V1DeleteOptions(propagation_policy="Foreground")
        with _told(f"the JobSet {name} cannot be deleted", unless=404):
            await self._jobsets.delete_namespaced_custom_object(
                GROUP, VERSION, self._namespace, PLURAL, name, body=options, _request_timeout=TIMEOUT_SECONDS
            )

    async def joined(self, job_id: str, owner_uid: str) -> dict[int, str]:
        """Names of the Jobs of the rollout replicas that joined a job, by instance. Jobs that are being deleted do not
        count, nor do those of an earlier JobSet, which will be deleted soon.

        Raises:
            JackpotError: the API server cannot be asked.
        """
        selector = f"{JOB_LABEL}={job_id},{INSTANCE_LABEL}"
        with _told("Jobs cannot be listed"):
            listing = await self._batch.list_namespaced_job(
                self._namespace, label_selector=selector, _request_timeout=TIMEOUT_SECONDS
            )
        return {
            int(job.metadata.labels[INSTANCE_LABEL]): job.metadata.name
            for job in listing.items
            if job.metadata.deletion_timestamp is None
            and any(owner.uid == owner_uid for owner in job.metadata.owner_references or [])
        }

    async def create_job(self, manifest: Any) -> None:
        """Create a Job.

        Raises:
            JackpotError: the API server refuses it, for example while one of its name is being deleted, or cannot be
                reached.
        """
        with _told(f"the Job {manifest['metadata']['name']} was refused"):
            await self._batch.create_namespaced_job(self._namespace, manifest, _request_timeout=TIMEOUT_SECONDS)

    async def delete_job(self, name: str) -> None:
        """Start deleting a Job with its pods. Does nothing if it is gone already.

        Raises:
            JackpotError: the API server refuses, or cannot be reached.
        """
        options = client.V1DeleteOptions(propagation_policy="Foreground")
        with _told(f"the Job {name} cannot be deleted", unless=404):
            await self._batch.delete_namespaced_job(
                name, self._namespace, body=options, _request_timeout=TIMEOUT_SECONDS
            )

    async def resize_job(self, name: str, pods: int) -> None:
        """Scale an Indexed Job to its first pods, this many of them.

        Raises:
            JackpotError: the API server refuses, or cannot be reached.
        """
        patch = {"spec": {"completions": pods, "parallelism": pods}}
        with _told(f"the Job {name} cannot be resized"):
            await self._batch.patch_namespaced_job(name, self._namespace, patch, _request_timeout=TIMEOUT_SECONDS)

    async def follow(self, job_id: str) -> AsyncIterator[Object | None]:
        """A job's JobSet now and after each change; None while there is none. Never ends: an error (also 410, an
        expired resource version) is logged, and the watch restarts with a list."""
        selector = f"{JOB_LABEL}={job_id}"
        arguments = (GROUP, VERSION, self._namespace, PLURAL)
        while True:
            try:
                listing: Object = await self._jobsets.list_namespaced_custom_object(
                    *arguments, label_selector=selector, _request_timeout=TIMEOUT_SECONDS
                )
                items = listing.get("items") or []
                yield items[0] if items else None
                version = (listing.get("metadata") or {}).get("resourceVersion")
                async with watch.Watch() as stream:
                    async for event in stream.stream(
                        self._jobsets.list_namespaced_custom_object,
                        *arguments,
                        label_selector=selector,
                        resource_version=version,
                        timeout_seconds=WATCH_SECONDS,
                    ):
                        yield None if event["type"] == "DELETED" else event["object"]
            except TROUBLES as error:
                if not (isinstance(error, ApiException) and error.status == 410):
                    LOG.warning("the JobSet of %s cannot be watched: %s", job_id, error)
                await asyncio.sleep(TROUBLE_SECONDS)

    async def pods(self, job_id: str) -> list[Object]:
        """A job's pods, as plain objects; none while the API server does not answer."""
        try:
            listing = await self._core.list_namespaced_pod(
                self._namespace, label_selector=f"{JOB_LABEL}={job_id}", _request_timeout=TIMEOUT_SECONDS
            )
        except TROUBLES as error:
            LOG.warning("the pods of %s cannot be listed: %s", job_id, error)
            return []
        plain: list[Object] = self._api.sanitize_for_serialization(listing.items)
        return plain

    async def events(self, name: str) -> list[Object]:
        """Events about objects whose names begin with ``name``; none while the API server does not answer."""
        try:
            listing = await self._core.list_namespaced_event(
                self._namespace, field_selector="type=Warning", _request_timeout=TIMEOUT_SECONDS
            )
        except TROUBLES as error:
            LOG.warning("events cannot be listed: %s", error)
            return []
        plain: list[Object] = self._api.sanitize_for_serialization(listing.items)
        return [event for event in plain if str(event["involvedObject"].get("name", "")).startswith(name)]

    async def log(self, pod: str, container: str, since_seconds: int | None) -> AsyncIterator[bytes]:
        """Lines of a container's log, as they are written, until it ends or the connection does."""
        extra: dict[str, Any] = {} if since_seconds is None else {"since_seconds": max(1, since_seconds)}
        with contextlib.suppress(*TROUBLES):
            response: Any = await self._core.read_namespaced_pod_log(
                pod, self._namespace, container=container, follow=True, _preload_content=False, **extra
            )
            async for line in response.content:
                yield line

    @property
    def _api(self) -> client.ApiClient:
        assert self._client is not None, "connect first"
        return self._client

    @property
    def _jobsets(self) -> client.CustomObjectsApi:
        return client.CustomObjectsApi(self._api)

    @property
    def _batch(self) -> client.BatchV1Api:
        return client.BatchV1Api(self._api)

    @property
    def _core(self) -> client.CoreV1Api:
        return client.CoreV1Api(self._api)


@contextmanager
def _told(what: str, unless: int | None = None) -> Iterator[None]:
    """Translates the API's errors into ours; an answer with the status ``unless`` is no error.

    Raises:
        JackpotError: ``what`` happened, and why.
    """
    try:
        yield
    except ApiException as error:
        if error.status != unless:
            raise JackpotError(f"{what}: {_reason(error)}") from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise JackpotError(f"the Kubernetes API cannot be reached: {error}") from error


def _reason(error: ApiException) -> str:
    return f"{error.status} {error.reason}: {str(error.body or '')[:500]}".rstrip(": ")
