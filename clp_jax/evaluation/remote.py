"""A policy behind openpi's websocket protocol: `clp serve`, or openpi's own server."""

import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import websockets.exceptions
import websockets.sync.client

from clp_jax.errors import InputError, blamed_on
from clp_jax.serving import wire

_SECONDS_TO_CONNECT = 10.0
_SECONDS_OF_SILENCE = 600.0
"""After which a server is gone: openpi's says nothing while it compiles, at the first request."""


class RemotePolicy:
    """Asks a server, over so many connections at a time.

    Args:
      address: ``HOST:PORT``, perhaps with ``ws://`` in front.
      connections: requests at a time.

    Raises:
      InputError: nobody answers there, or not with openpi's protocol.
    """

    def __init__(self, address: str, connections: int):
        self.address = address if "://" in address else f"ws://{address}"
        self.latencies: list[float] = []
        """Seconds of each request, from sending to the answer's last byte."""
        self._connections = [self._connect() for _ in range(connections)]
        self._threads = concurrent.futures.ThreadPoolExecutor(connections)
        self.metadata = self._connections[0][1]
        if self.metadata.get("robot") == "model-ready":
            raise InputError(f"the server at {address} expects model-ready requests; start it with --robot.")

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """The actions [horizon, d] of each request; at most as many requests as connections.

        Raises:
          InputError: the server refuses a request, or is gone.
        """
        sockets = [socket for socket, _ in self._connections]
        answers = list(self._threads.map(self._ask, sockets[: len(requests)], requests))
        self.latencies += [seconds for _, seconds in answers]
        return [actions for actions, _ in answers]

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        for socket, _ in self._connections:
            socket.close()

    def _connect(self) -> tuple[Any, Mapping[str, Any]]:
        try:
            socket = websockets.sync.client.connect(
                self.address,
                compression=None,
                max_size=None,
                open_timeout=_SECONDS_TO_CONNECT,
                ping_timeout=_SECONDS_OF_SILENCE,
            )
            metadata = wire.unpack(_binary(socket.recv(timeout=_SECONDS_TO_CONNECT)))
        except (OSError, TimeoutError, ValueError, websockets.exceptions.WebSocketException) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(f"no policy answers at {self.address} ({reason}); start one with clp serve.") from error
        return socket, metadata if isinstance(metadata, Mapping) else {}

    def _ask(self, socket: Any, request: Mapping[str, Any]) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        with blamed_on("an observation", "let it hold numbers, arrays of them, and text", verb="cannot be sent"):
            message = wire.pack(dict(request))
        try:
            socket.send(message)
            answer = wire.unpack(_binary(socket.recv()))
        except (OSError, websockets.exceptions.WebSocketException) as error:
            raise InputError(f"the server at {self.address} is gone: {error}.") from error
        if not isinstance(answer, Mapping) or not isinstance(answer.get("actions"), np.ndarray):
            raise InputError(f"the server at {self.address} answers without actions.")
        return answer["actions"], time.perf_counter() - start


def _binary(message: str | bytes) -> bytes:
    """An answer; text is an error of the server's."""
    if isinstance(message, str):
        raise InputError(f"the server refuses: {message.strip().splitlines()[-1] if message.strip() else 'no reason'}")
    return message
