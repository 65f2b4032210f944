"""The actors of a batch on the nodes of a Ray cluster: started, given cases, replaced, ended.

It does not know what becomes of a case: it tells how each attempt ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from totalfast.batch.cluster.actor import MOST_CASES, CaseActor, Ready, Result
from totalfast.batch.cluster.connection import Node, alive_nodes
from totalfast.errors import ClusterError
from totalfast.run.many import StageClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from totalfast.batch.cluster.actor import Job
    from totalfast.batch.cluster.waiting import Try, WaitingCases
    from totalfast.batch.finding.cases import Case
    from totalfast.run.many import Running

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Time between two looks at the nodes of the cluster."""

NO_NODE_S = 60.0
"""How long to wait for a node if none is left."""

FRUITLESS = 3
"""Number of actors of a node that end before they are ready, after which it gets no others."""

END_S = 60.0
"""How long actors may take to remove what they have begun to write, after they were told to end."""

PERHAPS = "perhaps the node's memory was full, or the node was taken away"

OTHER_CALLS = 2
"""Calls of an actor at a time beside its cases: ``fractions`` and ``end``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt has ended: with a result, or because its process ended."""

    attempt: Try
    result: Result | None
    reason: str = ""
    """Why there is no result."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Actor:
    """A process on a node, as the command sees it."""

    handle: Any
    node: Node
    watched: Any
    """Reference to ``prepare``, then to ``fractions``; shows at once that the process has ended."""
    at_a_time: int = 0
    """0 until it is ready."""
    in_work: dict[Any, Try] = field(default_factory=dict)
    """Reference to ``segment`` to its attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many actors a node gets, and what each of them reserves."""

    actors: int
    cores: int
    gpus: float

    @classmethod
    def of(cls, node: Node, per_node: int | None, *, on_gpus: bool) -> Share:
        """Share a node: one actor for each GPU, or one with all cores, unless a number is given."""
        wanted = per_node or (node.gpus if on_gpus else 1)
        actors = min(wanted, node.cores) if node.gpus or not on_gpus else 0
        if actors == 0:
            return cls(actors=0, cores=0, gpus=0.0)
        gpus = 1.0 / -(-actors // node.gpus) if on_gpus else 0.0
        return cls(actors=actors, cores=node.cores // actors, gpus=gpus)


class ActorPool:
    """The actors of a batch.

    Parameters
    ----------
    job
        What is the same for all cases.
    per_node
        Number of actors of a node; None for one per GPU, or one where there is none.
    running
        Filled with the cases in work, for a progress bar.
    """

    def __init__(self, job: Job, per_node: int | None, running: Running[Case]) -> None:
        self._job, self._per_node, self._running = job, per_node, running
        self._actors: list[_Actor] = []
        self._refused: dict[str, str] = {}
        """Node to the reason why it gets no actors."""
        self._fruitless: Counter[str] = Counter()
        self._looked_at = self._had_actors_at = time.monotonic()
        self._start_missing()

    @property
    def in_work(self) -> int:
        """Number of cases in work."""
        return sum(len(actor.in_work) for actor in self._actors)

    def give(self, waiting: WaitingCases) -> None:
        """Give cases to the actors that have room, those with the fewest cases first."""
        ready = [actor for actor in self._actors if actor.at_a_time]
        while waiting:
            for actor in sorted(ready, key=lambda actor: len(actor.in_work)):
                if len(actor.in_work) >= actor.at_a_time:
                    continue
                attempt = waiting.take(actor.in_work.values())
                if attempt is not None:
                    self._submit(actor, attempt)
                    break
            else:
                return

    def _submit(self, actor: _Actor, attempt: Try) -> None:
        reference = actor.handle.segment.remote(attempt.case, attempt.attempt)
        actor.in_work[reference] = attempt
        clock = self._running.clocks[attempt.case] = StageClock(threading.Event())
        clock.expect(1.0)

    def wait(self) -> Iterator[Ended]:
        """Wait a moment for attempts to end; replace actors that ended; use new nodes.

        Raises
        ------
        ClusterError
            If no node can be used.
        """
        import ray

        if time.monotonic() - self._looked_at > LOOK_S:
            self._start_missing()
            self._looked_at = time.monotonic()
        of_actor = {actor.watched: actor for actor in self._actors}
        of_actor |= {reference: actor for actor in self._actors for reference in actor.in_work}
        if not of_actor:
            time.sleep(LOOK_S / 4)
            return
        done, _ = ray.wait(list(of_actor), timeout=LOOK_S)
        for reference in done:
            yield from self._take(of_actor[reference], reference)

    def _take(self, actor: _Actor, reference: Any) -> Iterator[Ended]:  # noqa: ANN401 - Ray's
        """Take the answer to a call."""
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # the process still runs
            answer = error.cause
        except ray.exceptions.RayError as error:
            logger.debug("An actor on %s has ended: %s", actor.node.host, error)
            yield from self._end_of(actor, _last_line(error))
            return
        if reference == actor.watched:
            self._watch(actor, answer)
            return
        attempt = self._forget(actor, reference)
        if isinstance(answer, Result):
            yield Ended(attempt=attempt, result=answer)
        else:
            reason = f"it ended on {actor.node.host} with {type(answer).__name__}"
            yield Ended(attempt=attempt, result=None, reason=reason)

    def _watch(self, actor: _Actor, answer: Ready | dict[str, float] | Exception) -> None:
        """Begin to use an actor, note its progress, or give it up."""
        if isinstance(answer, dict):
            for attempt in actor.in_work.values():
                clock = self._running.clocks[attempt.case]
                clock.advance(answer.get(attempt.case.name, 0.0) - clock.fraction)
        elif isinstance(answer, Ready) and answer.problem is None:
            logger.debug("An actor on %s is ready", actor.node.host)
            actor.at_a_time = answer.at_a_time
            self._fruitless.pop(actor.node.identity, None)
        else:
            problem = answer.problem if isinstance(answer, Ready) else _named(answer)
            self._actors.remove(actor)
            _kill(actor)
            self._refuse(actor.node, problem or "")
            return
        actor.watched = actor.handle.fractions.remote()

    def _forget(self, actor: _Actor, reference: Any) -> Try:  # noqa: ANN401 - Ray's
        attempt = actor.in_work.pop(reference)
        self._running.clocks.pop(attempt.case, None)
        return attempt

    def _end_of(self, actor: _Actor, reason: str) -> Iterator[Ended]:
        """Give up an actor that has ended, with its cases; another one will take its place."""
        self._actors.remove(actor)
        _kill(actor)  # it may be alive, but out of reach
        node, references = actor.node, list(actor.in_work)
        if not actor.at_a_time:
            self._fruitless[node.identity] += 1
            if self._fruitless[node.identity] >= FRUITLESS:
                self._refuse(node, f"{FRUITLESS} processes ended when they were started: {reason}")
        results = _results_of(references, within_s=0)
        for reference in references:
            yield Ended(
                attempt=self._forget(actor, reference),
                result=results.get(reference),
                reason=f"its process on {node.host} ended without a result; {PERHAPS}",
            )

    def _refuse(self, node: Node, reason: str) -> None:
        if node.identity not in self._refused:
            self._refused[node.identity] = f"node {node.host} can't be used: {reason}"
            logger.warning("WARNING: %s.", self._refused[node.identity])

    def _start_missing(self) -> None:
        """Start the actors that nodes lack, also those of nodes that have just come."""
        nodes = alive_nodes()
        on_gpus = self._job.keywords["device"] == "gpu" and any(node.gpus for node in nodes)
        there = Counter(actor.node.identity for actor in self._actors)
        usable = [node for node in nodes if node.identity not in self._refused]
        for node in usable:
            share = Share.of(node, self._per_node, on_gpus=on_gpus)
            for _ in range(share.actors - there[node.identity]):
                self._actors.append(self._start(node, share))
        if self._actors:
            self._had_actors_at = time.monotonic()
        elif self._refused and not usable:
            raise ClusterError(f"no node can be used: {'; '.join(self._refused.values())}.")
        elif time.monotonic() - self._had_actors_at > NO_NODE_S:
            raise ClusterError(
                f"the Ray cluster has had no node with a free core for {NO_NODE_S:.0f} s. Run the "
                "same command again to go on."
            )

    def _start(self, node: Node, share: Share) -> _Actor:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        job = self._job
        if job.keywords["device"] == "gpu" and not share.gpus:
            job = dataclasses.replace(job, keywords={**job.keywords, "device": "cpu"})
        handle = (
            ray.remote(CaseActor)
            .options(
                num_cpus=share.cores,
                num_gpus=share.gpus,
                max_concurrency=(job.at_a_time or MOST_CASES) + OTHER_CALLS,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.identity, soft=False),
            )
            .remote(job)
        )
        return _Actor(handle=handle, node=node, watched=handle.prepare.remote())

    def end(self) -> list[Result]:
        """End all actors; return the results of the attempts that ended meanwhile."""
        import ray

        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError):
                actor.handle.end.remote()
        references = [reference for actor in self._actors for reference in actor.in_work]
        results = _results_of(references, within_s=END_S)
        for actor in self._actors:
            _kill(actor)
        return list(results.values())


def _results_of(references: list[Any], *, within_s: float) -> dict[Any, Result]:
    """Wait for attempts; return the results of those that end with one."""
    import ray

    results = {}
    if references:
        done, _ = ray.wait(references, num_returns=len(references), timeout=within_s)
        for reference in done:
            with contextlib.suppress(ray.exceptions.RayError):
                result = ray.get(reference)
                if result is not None:  # the case was told to end
                    results[reference] = result
    return results


def _kill(actor: _Actor) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor.handle)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
