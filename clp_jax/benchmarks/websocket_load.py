"""Clients that ask a server as fast as it answers, in a process of their own; imports neither JAX nor a model."""

import concurrent.futures
import contextlib
import threading
import time

import websockets.sync.client


def closed_loop(port: int, request: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Latencies of clients that each send their next request when the last is answered.

    Args:
      port: on this machine.
      request: the message, the same every time.
      clients: connections, one thread each.
      seconds: how long to begin new requests.

    Returns:
      Seconds from sending to the answer's last byte, of every request; and answers per second of all clients together.

    Raises:
      RuntimeError: the server answered with an error.
    """
    begin = threading.Barrier(clients + 1)

    def ask() -> list[float]:
        latencies = []
        try:
            with websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as server:
                server.recv()  # metadata
                begin.wait()
                end = time.perf_counter() + seconds
                while (start := time.perf_counter()) < end:
                    server.send(request)
                    answer = server.recv()
                    latencies.append(time.perf_counter() - start)
                    if isinstance(answer, str):
                        raise RuntimeError(f"the server answered: {answer}")
        except BaseException:
            begin.abort()  # nobody waits for who does not come
            raise
        return latencies

    with concurrent.futures.ThreadPoolExecutor(clients) as threads:
        asking = [threads.submit(ask) for _ in range(clients)]
        with contextlib.suppress(threading.BrokenBarrierError):
            begin.wait()
        start = time.perf_counter()
        every = [latency for client in asking for latency in client.result()]
        elapsed = time.perf_counter() - start
    return every, len(every) / elapsed
