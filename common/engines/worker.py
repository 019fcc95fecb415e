"""The process of an engine in a fleet: builds the engine, draws what it is told to, and replies."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue

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
    Sleep,
)
from common.engines.protocol import RolloutEngine
from common.errors import EngineFailed, UserError, cause
from common.rollout import SampleRequest


def serve(
    build: Callable[[], RolloutEngine], orders: "SimpleQueue[Order]", reply: Callable[[Reply], None]
) -> None:
    """Carry out orders until the engine fails; the caller ends the process.

    A failure while the engine is built would come again, one while it samples need not: a new process may draw it.
    """
    try:
        engine = build()
    except UserError as error:
        return reply(Failed(str(error), is_final=True))
    reply(Ready())
    try:
        while True:
            match orders.get():
                case Begin(stream=stream, sampling=sampling):
                    for completion in engine.generate(_requests(orders), sampling):
                        reply(Drawn(stream, (completion,)))
                case LoadWeights(weights=weights):
                    engine.load_weights(weights)
                    reply(Done())
                case Sleep():
                    engine.sleep()
                    reply(Done())
                case Draw() | End():
                    raise AssertionError("requests belong to a call that has begun")
    except EngineFailed as error:
        reply(Failed(f"failed ({error})", is_final=False))
    except UserError as error:
        reply(Failed(str(error), is_final=True))
    except Exception as error:
        reply(Failed(f"failed ({cause(error)})", is_final=False))
        raise


def _requests(orders: "SimpleQueue[Order]") -> Iterator[SampleRequest]:
    """The requests of a call; waits for more until its end."""
    while not isinstance(order := orders.get(), End):
        assert isinstance(order, Draw), "a call ends before the next order"
        yield from order.requests
