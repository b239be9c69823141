"""Jobs spread over a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kvferry.errors import InputError, KVFerryError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 4
"""Jobs that wait for each core of the cluster, so that none is idle and stopping early loses little."""


def over_ray(task: Callable[[Job], Result], jobs: Sequence[Job], address: str) -> Iterator[Result]:
    """``task`` of every job, one core each, in the order in which they end.

    Every machine of the cluster needs kvferry, and whatever files the task reads, in the same places. A machine that is
    lost has its jobs done elsewhere (Ray's own retries).

    Parameters
    ----------
    task : callable
        Picklable; called in workers that stay alive between jobs, so that it may keep what it loads.
    address : str
        ``auto`` for the cluster that this machine belongs to, ``local`` for a new one of this machine alone, or a head
        node's ``HOST:PORT``.

    Raises
    ------
    InputError
        Ray is not installed, or there is no cluster at that address.
    KVFerryError
        A worker died more often than Ray tries again.
    """
    if not jobs:
        return
    try:
        import ray
    except ImportError:
        raise InputError("--ray needs Ray: pip install 'kvferry[ray]'") from None
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`") from None

    def work(job: Job) -> Result:
        return task(job)

    try:
        yield from _each(ray, ray.remote(num_cpus=1)(work).remote, jobs)
    except ray.exceptions.WorkerCrashedError:
        raise KVFerryError("a worker died; run the same command again to go on where it stopped") from None
    finally:
        ray.shutdown()


def _each(ray: Any, start: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[Any]:
    """Results as they come, with so many jobs under way that no core waits."""
    most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(jobs)
    running = [start(job) for _, job in zip(range(most), waiting, strict=False)]
    while running:
        done, running = ray.wait(running)
        running += [start(job) for _, job in zip(done, waiting, strict=False)]
        yield from ray.get(done)
