"""A service's processes under torchrun: started together, ended together, and one exit code for the launcher.

torchrun's own settings (``PET_NNODES``, ``PET_NPROC_PER_NODE``, ``PET_RDZV_ENDPOINT``, …) apply if set, for
ranks on several machines; otherwise all ranks run on this one. A lost rank ends all of them, and the launcher restarts
the service.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import NoReturn

from jackpot.config import JobSpec
from jackpot.config.environment import PREFIX, ServiceEnvironment
from jackpot.errors import ConfigError
from jackpot.process.children import stop_with_parent
from jackpot.process.service_process import STOPPED_EARLY, ServiceMain, run_service
from jackpot.storage.run_directory import load_service_job

_SIGNAL_BASE = 128
# The meaning of --standalone: a rendezvous of this process alone, on a free local port.
_ALONE = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost")


def run_ranked_service(name: str, main: ServiceMain, processes: Callable[[JobSpec], int]) -> NoReturn:
    """Run a service from start to exit: its only process, one of its ranks, or the process that starts the ranks.

    Args:
        name: the service.
        main: the service itself, see :func:`run_service`.
        processes: how many the job sets.
    """
    if not is_rank():
        try:
            count = processes(load_service_job(ServiceEnvironment.from_env()))
        except ConfigError:
            count = 1  # run_service reports it
        if count > 1:
            sys.exit(run_ranks(name, count))
    environ = dict(os.environ)
    if int(environ.get("RANK", "0")) > 0:
        # Only rank 0 serves metrics, calls and health checks.
        environ |= {PREFIX + variable: "" for variable in ("METRICS_ADDRESS", "HEALTH_LISTEN", "LISTEN")}
    run_service(name, main, environ)


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ


def run_ranks(service: str, processes: int, environ: Mapping[str, str] = os.environ) -> int:
    """Run ``python -m jackpot.<service>`` on this many ranks until all have ended.

    Returns:
        0; the exit code of the rank that failed first; or 75 if a signal stopped them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    stop_with_parent()
    settings = [] if "PET_RDZV_ENDPOINT" in environ else [*_ALONE, "--rdzv-id", uuid.uuid4().hex]
    if "PET_NPROC_PER_NODE" not in environ:
        settings += ["--nproc-per-node", str(processes)]
    # No restarts here: the launcher restarts, with its back-off and limit.
    arguments = [*settings, "--max-restarts", "0", "-m", f"jackpot.{service}"]
    config, command, command_arguments = config_from_args(parse_args(arguments))  # type: ignore[no-untyped-call]
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except SignalException:
        return STOPPED_EARLY
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} of the {service} ended first", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else _SIGNAL_BASE - failure.exitcode
    return 0
