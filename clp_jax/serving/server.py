"""openpi's websocket protocol: metadata first, then for every request an answer; what waits is batched together.

An error is a text message, which openpi-client raises as RuntimeError (answers are binary). After a request that makes
no sense the connection is closed; other clients notice nothing. Facts: openpi serving/websocket_policy_server.py and
openpi_client/websocket_client_policy.py, commit 15a9616.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import http
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from clp_jax.errors import InputError
from clp_jax.serving import wire
from clp_jax.serving.policy import Policy, Prepared

logger = logging.getLogger(__name__)
_LONGEST_ERROR = 1000
_PREPARING_THREADS = 4


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How to listen.

    Attributes:
      host: address; the loopback by default, for there is no authentication.
      port: 0 takes a free one.
      queue: requests that may wait for the model; one more is answered "busy".
      max_message_bytes: of a request; a larger one closes its connection.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 64
    max_message_bytes: int = 16 * 2**20

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise InputError(f"--port {self.port} is no port; give 0 to 65535, where 0 is any free one.")
        if self.queue < 1 or self.max_message_bytes < 1:
            raise InputError("a server needs a --queue of at least 1 and messages of at least a byte.")


def check_free(settings: ServerSettings) -> None:
    """Raises if the address cannot be listened on, before minutes are spent on what would then not be served.

    Raises:
      InputError: it is taken, or not this machine's.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
                trial.bind(address)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise InputError(f"{where} cannot be listened on: {error.strerror}; give another --port or --host.") from error


class Busy(Exception):
    """The queue is full."""


@dataclasses.dataclass(frozen=True)
class _Waiting:
    prepared: Prepared
    answer: "asyncio.Future[dict[str, Any]]"


class Batcher:
    """Requests are prepared in a few threads, wait while the model is busy, and go on together, as many as fit.

    Args:
      policy: runs the batches, in one thread.
      limit: requests that may wait.
    """

    def __init__(self, policy: Policy, limit: int):
        self.policy = policy
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue(limit)
        self._threads = concurrent.futures.ThreadPoolExecutor(_PREPARING_THREADS, "prepare")

    async def answer(self, message: str | bytes) -> dict[str, Any]:
        """The answer to a message; ``server_timing`` has ``infer_ms`` from its arrival on, the queue included.

        Raises:
          InputError: the message is no request that the policy can answer.
          Busy: too many wait already.
        """
        start, loop = time.monotonic(), asyncio.get_running_loop()
        if isinstance(message, str):
            raise InputError("a request is a binary message of msgpack, this is text.")
        prepared = await loop.run_in_executor(self._threads, lambda: self.policy.prepare(wire.unpack(message)))
        entry = _Waiting(prepared, loop.create_future())
        try:
            self._waiting.put_nowait(entry)
        except asyncio.QueueFull:
            raise Busy from None
        return await entry.answer | {"server_timing": {"infer_ms": 1e3 * (time.monotonic() - start)}}

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        with self._threads, concurrent.futures.ThreadPoolExecutor(1, "policy") as device:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < self.policy.buckets[-1] and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                outcomes = await loop.run_in_executor(device, self._outcomes, [entry.prepared for entry in batch])
                for entry, outcome in zip(batch, outcomes, strict=True):
                    if entry.answer.cancelled():
                        continue
                    if isinstance(outcome, Exception):
                        entry.answer.set_exception(outcome)
                    else:
                        entry.answer.set_result(outcome)

    def _outcomes(self, prepared: list[Prepared]) -> list[dict[str, Any] | Exception]:
        """The answers of a batch; where it fails as a whole, each request is tried alone."""
        try:
            return self.policy.outcomes(prepared)
        except Exception as error:
            logger.exception("a batch of %d failed", len(prepared))
            if len(prepared) == 1:
                return [error]
        return [self._outcomes([one])[0] for one in prepared]


async def run_server(
    policy: Policy, settings: ServerSettings, stop: asyncio.Event, on_ready: Callable[[int], None]
) -> None:
    """Serve until ``stop`` is set; then close every connection and return.

    Args:
      policy: compiled already, or the first clients wait for it.
      settings: how to listen.
      stop: ends the server.
      on_ready: called with the port when it is open.

    Raises:
      OSError: the address is taken or not this machine's.
    """
    batcher = Batcher(policy, settings.queue)
    working = asyncio.create_task(batcher.run())
    try:
        async with serve(
            functools.partial(_converse, batcher),
            settings.host,
            settings.port,
            compression=None,  # as openpi: images do not shrink
            max_size=settings.max_message_bytes,
            max_queue=1,  # of one connection: its next request waits in the network, not in memory
            process_request=_health,
            origins=[None],  # robots send no Origin; a web page that finds this port does
        ) as server:
            on_ready(next(iter(server.sockets)).getsockname()[1])
            await stop.wait()
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


@contextlib.contextmanager
def serving(policy: Policy, settings: ServerSettings) -> Iterator[int]:
    """A server in a thread of its own while the block runs, for tests and benchmarks; yields its port."""
    loop, ports = asyncio.new_event_loop(), concurrent.futures.Future[int]()
    stop = asyncio.Event()

    def work() -> None:
        try:
            loop.run_until_complete(run_server(policy, settings, stop, ports.set_result))
        except BaseException as error:
            if ports.done():
                raise
            ports.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=work, name="server")
    thread.start()
    try:
        yield ports.result()
    finally:
        with contextlib.suppress(RuntimeError):  # closed already: it never began
            loop.call_soon_threadsafe(stop.set)
        thread.join()


def _health(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(http.HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None


async def _converse(batcher: Batcher, connection: ServerConnection) -> None:
    """One client, from the metadata until either side closes."""
    previous: float | None = None
    with contextlib.suppress(ConnectionClosed):
        await connection.send(wire.pack(batcher.policy.metadata))
        async for message in connection:
            start = time.monotonic()
            try:
                answer = await batcher.answer(message)
            except Busy:
                await connection.send("busy: too many requests are waiting; try again later.")
                continue
            except InputError as error:
                await _refuse(connection, str(error), CloseCode.INVALID_DATA, "invalid request")
                return
            except Exception:
                logger.exception("a request of %s failed", connection.remote_address)
                text = "the server failed on this request; its log says why."
                await _refuse(connection, text, CloseCode.INTERNAL_ERROR, "internal error")
                return
            if previous is not None:
                answer["server_timing"]["prev_total_ms"] = 1e3 * previous
            await connection.send(wire.pack(answer))
            previous = time.monotonic() - start


async def _refuse(connection: ServerConnection, text: str, code: CloseCode, reason: str) -> None:
    await connection.send(text[:_LONGEST_ERROR])
    await connection.close(code, reason)
