"""Several engines, each in a process of its own, behind the interface of one.

The fleet deals out requests, a few at a time, to whichever engine has least to do, and yields completions as they come.
An engine that dies is started again, and its unfinished requests are drawn by any engine: requests carry their seeds,
so the completions are the same. Where processes run, and how messages reach them, is the business of a `Worker`.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Protocol

from common.config import EngineConfig, SamplingParams
from common.engines.orders import (
    Begin,
    Done,
    Draw,
    Drawn,
    End,
    Failed,
    LoadWeights,
    Order,
    Ready,
    Reply,
    SharedWeights,
    Sleep,
)
from common.errors import EngineFailed, UserError
from common.rollout import Completion, SampleRequest

if TYPE_CHECKING:
    import torch

WATCH_SECONDS = 10.0
MOST_DEATHS = 3
"""Deaths that end the job: of each engine without a completion between them, or in a row with the same request
unfinished."""


class Worker(Protocol):
    """A process with an engine: takes orders and replies to them in their order."""

    begins_at_once: bool
    """Whether it begins to build its engine now, and does not wait for a machine first."""

    def send(self, order: Order) -> None:
        """Send an order; one that is sent to a dead process is lost."""
        ...

    def receive(self) -> list[Reply]:
        """Wait for replies. Raises EOFError once the process is gone and all of its replies have been received."""
        ...

    def cause_of_death(self) -> str:
        """Why a process is gone that has not said so itself."""
        ...

    def close(self) -> None:
        """End the process, whatever it does, and wait until its memory is free."""
        ...


Launch = Callable[[int], Worker]
"""Starts the process of a place, from 0 on, without waiting for it."""


@dataclass(slots=True)
class Place:
    """A place in the fleet: the process that fills it now, and what that has still to do."""

    number: int
    worker: Worker
    life: int = 0
    """How often it was started again."""
    is_starting: bool = True
    """Whether its process has not said anything yet."""
    is_ready: bool = False
    is_drawing: bool = False
    """Whether it expects more requests."""
    unfinished: dict[Hashable, SampleRequest] = field(default_factory=dict)
    unanswered: int = 0
    """Orders besides those to draw, and the one to start, that it has not replied to."""
    heard: float = field(default_factory=time.monotonic)
    """When it last replied, or began to have something to do."""

    @property
    def is_busy(self) -> bool:
        """Whether a reply is due."""
        if not self.is_ready:
            return self.is_starting and self.worker.begins_at_once
        return bool(self.unfinished or self.unanswered)


@dataclass(frozen=True, slots=True)
class Event:
    """A reply, or the end of a process, and which process of the place it is from."""

    place: Place
    life: int
    reply: Reply


class EngineFleet:
    """A RolloutEngine over several workers."""

    def __init__(
        self,
        launch: Launch,
        count: int,
        *,
        engine: EngineConfig,
        share: "Callable[[Iterable[tuple[str, torch.Tensor]]], SharedWeights]",
        hopeless: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Start the workers and wait for the first. Raises UserError if its engine cannot be built.

        `share` puts weights where all workers can read them; `hopeless` is asked now and then why waiting for workers
        makes no sense.
        """
        self._launch = launch
        self._share = share
        self._hopeless = hopeless
        self._events: SimpleQueue[Event] = SimpleQueue()
        # An engine takes twice its batch before it waits for more.
        self._in_flight = 3 * engine.max_num_seqs
        self._at_a_time = max(1, engine.max_num_seqs // 8)
        self._hang_seconds = 60 * engine.hang_minutes
        self._weights: SharedWeights | None = None
        self._stream = 0
        self._looked = time.monotonic()
        self._fruitless = 0
        self._deaths: dict[Hashable, int] = {}
        """Of the requests that the last engine to die has left unfinished: how many in a row have died with them."""
        self._places: list[Place] = []
        try:
            for number in range(count):
                self._places.append(Place(number, launch(number)))
                self._listen(self._places[-1])
            while not any(place.is_ready for place in self._places):
                self._handle(self._next_event())
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Iterable[SampleRequest], sampling: SamplingParams) -> Iterator[Completion]:
        """Sample one completion per request, at least once; yields the first of each as it comes.

        Raises UserError if engines die again and again.
        """
        source = iter(requests)
        waiting: deque[SampleRequest] = deque()
        self._stream += 1
        self._deaths.clear()
        try:
            while True:
                is_exhausted = self._deal_out(source, waiting, sampling)
                if is_exhausted and not waiting and not any(place.unfinished for place in self._places):
                    return
                event = self._next_event()
                if isinstance(event.reply, Drawn) and event.reply.stream == self._stream:
                    for completion in event.reply.completions:
                        if event.place.unfinished.pop(completion.key, None) is not None:
                            self._fruitless = 0
                            yield completion
                else:
                    waiting.extendleft(reversed(self._handle(event)))
        finally:  # a caller that stops reading leaves requests behind: their completions will be ignored
            for place in self._places:
                place.unfinished.clear()
                self._end(place)

    def _deal_out(
        self, source: Iterator[SampleRequest], waiting: deque[SampleRequest], sampling: SamplingParams
    ) -> bool:
        """Give requests to the engines that have room for them; returns whether the source is exhausted."""
        is_exhausted = False
        while True:
            ready = [place for place in self._places if place.is_ready]
            place = min(ready, key=lambda place: len(place.unfinished), default=None)
            if place is None or len(place.unfinished) > self._in_flight - self._at_a_time:
                return is_exhausted
            some = [waiting.popleft() for _ in range(min(len(waiting), self._at_a_time))]
            some += islice(source, self._at_a_time - len(some))
            if not some:
                # Told so, an engine does not wait for more while it has some to finish.
                for each in self._places:
                    self._end(each)
                return True
            is_exhausted = len(some) < self._at_a_time
            if not place.is_drawing:
                place.worker.send(Begin(self._stream, sampling))
                place.is_drawing = True
            place.worker.send(Draw(tuple(some)))
            if not place.is_busy:
                place.heard = time.monotonic()
            place.unfinished |= {request.key: request for request in some}

    def _end(self, place: Place) -> None:
        if place.is_drawing:
            place.worker.send(End())
            place.is_drawing = False

    def load_weights(self, named_tensors: "Iterable[tuple[str, torch.Tensor]]") -> None:
        """Replace the weights of all engines. An engine that is started again later gets them too."""
        self._wait_for_answers()  # of those that are still reading the old ones
        if self._weights is not None:  # there may be no room for both
            self._weights.discard()
            self._weights = None
        self._weights = self._share(named_tensors)
        self._order_all(LoadWeights(self._weights))

    def sleep(self) -> None:
        """Free the engines' memory until the next `load_weights`."""
        self._order_all(Sleep())

    def _order_all(self, order: LoadWeights | Sleep) -> None:
        """Have each engine carry out an order. One that is still starting reads the newest weights when it is ready."""
        for place in self._places:
            if place.is_ready:
                place.worker.send(order)
                place.heard = time.monotonic()
                place.unanswered += 1
        self._wait_for_answers()

    def _wait_for_answers(self) -> None:
        while any(place.unanswered for place in self._places):
            self._handle(self._next_event())

    def close(self) -> None:
        """End all processes."""
        for place in self._places:
            place.life = -1  # what it still says is ignored
            place.worker.close()
        if self._weights is not None:
            self._weights.discard()

    def _next_event(self) -> Event:
        """Wait for an event. Raises EngineFailed if there will be none."""
        while True:
            if time.monotonic() - self._looked > WATCH_SECONDS and (event := self._look()) is not None:
                return event
            with suppress(Empty):
                return self._events.get(timeout=WATCH_SECONDS)

    def _look(self) -> Event | None:
        """The failure of an engine that hangs, if there is one. Raises EngineFailed if there is nothing to wait for."""
        now = self._looked = time.monotonic()
        if (reason := self._hopeless()) is not None:
            raise EngineFailed(f"{reason}; start the job again: it goes on from what is kept")
        for place in self._places:
            if place.is_busy and now - place.heard > self._hang_seconds:
                message = f"has been silent for {self._hang_seconds / 60:g} minutes (engine.hang_minutes)"
                return Event(place, place.life, Failed(message, is_final=False))
        return None

    def _handle(self, event: Event) -> list[SampleRequest]:
        """Take note of an event; returns the requests that have to be drawn again, since their engine has died."""
        place = event.place
        if event.life != place.life:
            return []
        match event.reply:
            case Ready():
                place.is_ready = True
                if self._weights is not None:
                    place.worker.send(LoadWeights(self._weights))
                    place.unanswered += 1
            case Done():
                place.unanswered -= 1
            case Failed(message=message, is_final=True):
                raise UserError(message)
            case Failed(message=message):
                return self._replace(place, message)
            case Drawn():
                pass  # of an earlier stream
        return []

    def _replace(self, place: Place, reason: str) -> list[SampleRequest]:
        """Start an engine again; returns its unfinished requests. Raises EngineFailed after too many deaths."""
        lost = list(place.unfinished.values())
        self._fruitless += 1
        self._deaths = {request.key: self._deaths.get(request.key, 0) + 1 for request in lost}
        worst = max(self._deaths, key=self._deaths.__getitem__, default=None)
        is_requests_fault = worst is not None and self._deaths[worst] >= MOST_DEATHS
        if is_requests_fault or self._fruitless >= MOST_DEATHS * len(self._places):
            how_often = (
                f"{MOST_DEATHS} times, each time with the request {worst} unfinished"
                if is_requests_fault
                else f"{self._fruitless} times without a completion"
            )
            raise EngineFailed(
                f"engines have died {how_often}; the last one {reason}; start the job again: it "
                "goes on from what is kept; if it fails again, lower engine.max_num_seqs or engine.engines for more "
                'memory, or set engine.backend = "transformers"'
            )
        print(
            f"warning: engine {place.number + 1} of {len(self._places)} {reason}; it is started again, and "
            f"{len(lost):,} unfinished requests are drawn anew",
            file=sys.stderr,
        )
        place.worker.close()
        place.life += 1
        place.is_ready = place.is_drawing = False
        place.unanswered = 0
        place.unfinished.clear()
        place.worker = self._launch(place.number)
        place.heard, place.is_starting = time.monotonic(), True
        self._listen(place)
        return lost

    def _listen(self, place: Place) -> None:
        """Put what a process says into the queue of events, in a thread that ends with the process."""
        Thread(target=self._hear, args=(place, place.life, place.worker), daemon=True).start()

    def _hear(self, place: Place, life: int, worker: Worker) -> None:
        try:
            while True:
                for reply in worker.receive():
                    place.heard = time.monotonic()
                    place.is_starting = False
                    self._events.put(Event(place, life, reply))
        except EOFError:
            self._events.put(Event(place, life, Failed(worker.cause_of_death(), is_final=False)))
