"""A server in this process and the real openpi-client: answers, batches, refusals, and the end."""

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import random
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import jax
import msgpack
import numpy as np
import pytest
import toys
import websockets.sync.client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import GOLDEN
from served import broken, frames, loaded, params, rows
from websockets.exceptions import ConnectionClosed, InvalidStatus

from clp_jax.checkpoint import write_params
from clp_jax.cli import main
from clp_jax.commands import serve as serve_command
from clp_jax.errors import InputError
from clp_jax.models import Lengths, build
from clp_jax.models.pi0 import Observation, Pi0, sample_actions
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.provenance import trained_with
from clp_jax.serving import wire
from clp_jax.serving.policy import Policy, noise_of
from clp_jax.serving.requests import ModelRequests
from clp_jax.serving.server import Batcher, ServerSettings, serving

STEPS = 3
# The same observation in batches of 1, 2 and 4: other shapes sum in another order.
BATCH_TOLERANCE = 1e-5
RECORD = {"plan": {"kind": "pi0", "towers": {}}}


@pytest.fixture(scope="module")
def policy() -> Policy:
    """On two devices: one observation on both, more are split over them."""
    arch = toys.architecture()
    requests = ModelRequests(arch, Lengths(toys.HORIZON, toys.PROMPT))
    model = loaded(arch, params(arch), devices=2, record=RECORD)
    made = Policy(model, requests, action_horizon=toys.HORIZON, max_batch=4, num_steps=STEPS)
    assert made.buckets == (1, 2, 4)
    made.buckets = (1, 4)  # less to compile, and more that has to be filled up
    made.compile()
    return made


@pytest.fixture(scope="module")
def port(policy):
    with serving(policy, ServerSettings(port=0, queue=8, max_message_bytes=2**16)) as port:
        yield port


@pytest.fixture
def connect(port):
    """openpi's own client."""
    module = pytest.importorskip("openpi_client.websocket_client_policy", reason="needs openpi_client")
    with contextlib.ExitStack() as stack:

        def make(port=port):
            client = module.WebsocketClientPolicy("127.0.0.1", port)
            stack.callback(client._ws.close)
            return client

        yield make


def raw(port, **options):
    return websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, **options)


@functools.cache
def noise(seed):
    return np.random.default_rng(seed).standard_normal((toys.HORIZON, 6), np.float32)


def direct(policy, requests, noises):
    """The model itself, without the policy's batches and programs."""
    arch = toys.architecture()
    module = build(arch)
    assert isinstance(module, Pi0)
    stacked = {key: np.stack([request[key] for request in requests]) for key in requests[0]}
    observation = Observation.of(stacked)
    sample = jax.jit(lambda params, noise: sample_actions(module, params, observation, noise=noise, num_steps=STEPS))
    return np.asarray(sample(params(arch), np.stack(noises)))


@pytest.mark.slow
def test_handshake_tells_what_is_served(connect):
    told = connect().get_server_metadata()
    assert told["model"] == "pi0"
    assert told["depth"] == {"vision": 2, "vlm": 4, "action": 4}
    assert told["plan"] == RECORD["plan"]
    assert (told["action_horizon"], told["action_dim"], told["max_batch"]) == (toys.HORIZON, 6, 4)
    assert "tokenized_prompt" in told["keys"]


@pytest.mark.slow
def test_given_noise_gives_the_actions_of_the_model_itself(connect, policy):
    client, requests, noises = connect(), rows(3), [noise(i) for i in range(3)]
    expected = direct(policy, requests, noises)
    for i, request in enumerate(requests):
        answer = client.infer(request | {"noise": noises[i]})
        np.testing.assert_allclose(answer["actions"], expected[i], atol=BATCH_TOLERANCE)
        assert answer["state"] == request["state"].tolist()
        assert answer["server_timing"]["infer_ms"] >= answer["policy_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in answer["server_timing"]) == (i > 0)


def test_own_noise_is_that_of_the_requests_number(policy):
    (request,) = rows(1)
    prepared = policy.prepare(request)
    (answer,) = policy.infer_batch([prepared])
    drawn = np.asarray(noise_of(0, np.uint32([prepared.number]), (toys.HORIZON, 6)))
    np.testing.assert_array_equal(answer["actions"], policy.infer(request, noise=drawn[0])["actions"])
    assert not np.array_equal(policy.infer(request)["actions"], policy.infer(request)["actions"])


def test_batches_of_any_size_equal_one_by_one(policy):
    requests = [request | {"noise": noise(i)} for i, request in enumerate(rows(4))]
    alone = [policy.infer(request)["actions"] for request in requests]
    for count in (2, 3, 4):
        together = policy.infer_batch([policy.prepare(request) for request in requests[:count]])
        for one, other in zip(alone, together, strict=False):
            np.testing.assert_allclose(other["actions"], one, atol=BATCH_TOLERANCE)


def test_many_clients_at_once_each_get_their_own_answer(connect, policy):
    requests = [request | {"noise": noise(i)} for i, request in enumerate(rows(6))]
    expected = [policy.infer(request)["actions"] for request in requests]

    def ask(i, client):
        return [client.infer(requests[i])["actions"] for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        clients = [connect() for _ in requests]
        for i, answers in enumerate(threads.map(ask, range(6), clients)):
            for answer in answers:
                np.testing.assert_allclose(answer, expected[i], atol=BATCH_TOLERANCE)


def test_client_reconnects_after_leaving(connect):
    first = connect()
    first.infer(rows(1)[0])
    first._ws.close()
    assert connect().infer(rows(1)[0])["actions"].shape == (toys.HORIZON, 6)


def test_action_chunk_broker_walks_through_a_chunk(connect):
    broker = pytest.importorskip("openpi_client.action_chunk_broker", reason="needs openpi_client")
    client = connect()
    request = rows(1)[0] | {"noise": noise(0)}
    chunk = client.infer(request)["actions"]
    walking = broker.ActionChunkBroker(client, toys.HORIZON)
    np.testing.assert_array_equal([walking.infer(request)["actions"] for _ in range(toys.HORIZON)], chunk)


BAD = {
    "lacks state": {"state": None},
    "noise has shape (3, 6), expected (4, 6)": {"noise": np.zeros((3, 6), np.float32)},
    "noise holds NaN": {"noise": np.full((4, 6), np.nan, np.float32)},
    "noise is str": {"noise": "loud"},
    "state is float64": {"state": np.zeros(6)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_request_raises_at_its_client_and_nowhere_else(connect, message):
    good, bad = connect(), connect()
    request = {key: value for key, value in (rows(1)[0] | BAD[message]).items() if value is not None}
    with pytest.raises(RuntimeError, match="Error in inference server") as caught:
        bad.infer(request)
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ConnectionClosed):
        bad._ws.recv()
    good.infer(rows(1)[0])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=20)
    | st.binary(max_size=60)
    | st.dictionaries(
        st.text(max_size=9) | st.sampled_from(["state", "noise", "image", "prompt"]),
        st.none() | st.integers(0, 9) | st.text(max_size=9) | st.lists(st.floats(), max_size=3),
        max_size=4,
    ).map(msgpack.packb)
)
def test_any_message_gets_one_line_and_the_end_of_its_connection(port, message):
    with raw(port) as connection:
        wire.unpack(connection.recv())
        connection.send(message)
        complaint = connection.recv()
        assert isinstance(complaint, str)
        assert complaint
        assert "Traceback" not in complaint
        with pytest.raises(ConnectionClosed):
            connection.recv()


def test_a_client_gets_right_answers_while_others_send_hundreds_of_broken_messages(port):
    rng, request = random.Random(0), wire.pack(rows(1)[0] | {"noise": noise(0)})
    with raw(port) as good:
        good.recv()
        good.send(request)
        expected = wire.unpack(good.recv())["actions"]
        for number in range(300):
            message = broken(rng)
            with raw(port) as bad:
                bad.recv()
                bad.send(message)
                complaint = bad.recv(timeout=60)
                assert isinstance(complaint, str), message[:80]
                assert "the server failed" not in complaint, message[:80]
                with pytest.raises(ConnectionClosed):
                    bad.recv(timeout=60)
            if number % 20 == 0:
                good.send(request)
                np.testing.assert_allclose(
                    wire.unpack(good.recv(timeout=60))["actions"], expected, atol=BATCH_TOLERANCE
                )


@pytest.mark.parametrize("name", frames(random.Random(0)))
def test_frames_against_the_protocol_end_their_connection_and_no_other(port, name):
    upgrade = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    upgrade += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as bad, raw(port) as good:
        bad.sendall(upgrade.encode() + frames(random.Random(0))[name])
        with contextlib.suppress(ConnectionResetError):
            while bad.recv(65536):  # a server that keeps it open runs into the timeout
                pass
        good.recv()
        good.send(wire.pack(rows(1)[0]))
        assert wire.unpack(good.recv(timeout=60))["actions"].shape == (toys.HORIZON, 6)


def test_message_over_the_limit_closes_its_connection_only(port, connect):
    good = connect()
    with raw(port) as connection:
        connection.recv()
        connection.send(wire.pack({"state": np.zeros(2**16, np.uint8)}))
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv()
        assert caught.value.rcvd.code == 1009
    good.infer(rows(1)[0])


def test_health_answers_and_web_pages_do_not_get_in(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as response:
        assert (response.status, response.read()) == (200, b"OK\n")
    with pytest.raises(InvalidStatus):
        raw(port, origin="https://a.page")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)


def test_what_waits_goes_together_and_one_too_many_is_busy(policy, connect, monkeypatch):
    go, began, sizes, infer_batch = threading.Event(), threading.Event(), [], policy.outcomes

    def stalled(prepared):
        sizes.append(len(prepared))
        began.set()
        assert go.wait(60)
        return infer_batch(prepared)

    monkeypatch.setattr(policy, "outcomes", stalled)
    with serving(policy, ServerSettings(port=0, queue=3)) as port, concurrent.futures.ThreadPoolExecutor(8) as threads:
        clients, request = [connect(port) for _ in range(8)], rows(1)[0]
        answers = [threads.submit(clients[0].infer, request)]
        assert began.wait(60)  # the first is in the model; of the other seven, three may wait
        answers += [threads.submit(client.infer, request) for client in clients[1:]]
        for _, refused in zip(range(4), concurrent.futures.as_completed(answers, 60), strict=False):
            assert "busy" in str(refused.exception())
        go.set()
        served = [answer.exception(60) is None for answer in answers]
        assert served.count(True) == 4
        assert sizes == [1, 3]
        refused = clients[served.index(False)]
        assert refused.infer(request)["actions"].shape == (toys.HORIZON, 6)  # its connection is still open


def test_who_stops_waiting_holds_up_nobody(policy, monkeypatch):
    async def scenario():
        loop, infer_batch, message = asyncio.get_running_loop(), policy.outcomes, wire.pack(rows(1)[0])
        batcher = Batcher(policy, 8)
        working = asyncio.create_task(batcher.run())
        leaving = asyncio.create_task(batcher.answer(message))

        def leave_meanwhile(prepared):
            loop.call_soon_threadsafe(leaving.cancel)
            return infer_batch(prepared)

        monkeypatch.setattr(policy, "outcomes", leave_meanwhile)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        monkeypatch.undo()
        assert (await asyncio.wait_for(batcher.answer(message), 60))["actions"].shape == (toys.HORIZON, 6)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    asyncio.run(scenario())


def test_model_that_fails_or_answers_nan_is_no_answer(policy, connect, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(policy, "_sampled", lambda *_: np.full((1, 4, 6), np.nan))
        with pytest.raises(RuntimeError, match="the server failed on this request") as caught:
            connect().infer(rows(1)[0])
    assert "NaN" not in str(caught.value)
    assert "the model's actions hold NaN" in caplog.text
    connect().infer(rows(1)[0])


def test_nothing_compiles_after_the_start(policy):
    assert sorted(bucket for _, bucket in policy._programs) == [1, 4]


def test_taken_port_is_an_error(policy, port):
    with pytest.raises(OSError, match="address already in use"), serving(policy, ServerSettings(port=port)):
        pass
    with pytest.raises(InputError, match="--port 70000"):
        ServerSettings(port=70000)


def test_a_taken_port_is_said_before_the_model_is_read(saved, port, capsys, monkeypatch):
    monkeypatch.setattr(serve_command, "make_policy", lambda *_: pytest.fail("the model was read"))
    assert serve(saved, "--port", str(port)) == 2
    said = capsys.readouterr().err
    assert f"error: 127.0.0.1:{port} cannot be listened on: Address already in use; give another --port" in said


def test_statistics_without_spread_are_refused_before_the_model_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve_command, "load_model", lambda *_: pytest.fail("the model was read"))
    norm_stats.save(tmp_path, {name: NormStats(np.zeros(d), np.zeros(d)) for name, d in (("state", 8), ("actions", 7))})
    flags = ("--robot", "libero", "--tokenizer", str(GOLDEN / "tokenizer/tiny_spm.model"), "--port", "0")
    assert serve(GOLDEN / "ckpt/pi0_trained/1", *flags, "--norm-stats", str(tmp_path)) == 2
    assert "have no spread in dimensions that the robot uses: state 0" in capsys.readouterr().err


def test_lengths_of_the_last_fine_tuning_are_taken():
    steps = [
        {"command": "finetune", "config": {"action_horizon": 3}},
        {"command": "finetune", "config": {"action_horizon": 10, "max_token_len": None, "state_in_prompt": False}},
        {"command": "prune", "config": {"action_horizon": 99}},
    ]
    assert trained_with({"steps": steps}) == {"action_horizon": 10, "state_in_prompt": False}
    assert trained_with({"steps": steps[2:]}) == trained_with(None) == {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "full"
    write_params(folder, params(toys.architecture()))
    return folder


def serve(saved, *flags):
    return main(["serve", "--checkpoint", str(saved), "--max-token-len", "5", "--max-batch", "1", *flags])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_answers_until_a_signal_and_exits_with_0(saved, number, policy, connect, capsys, monkeypatch):
    if number == signal.SIGINT:  # the model was read and compiled once, for SIGTERM
        monkeypatch.setattr(serve_command, "make_policy", lambda *_: policy)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def visit():
        while True:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10)
                break
            time.sleep(0.05)
        client = connect(port)
        answer = client.infer(rows(1)[0])
        os.kill(os.getpid(), number)
        with pytest.raises(ConnectionClosed) as caught:
            client._ws.recv(timeout=60)
        return answer, caught.value.rcvd.code

    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        visitor = threads.submit(visit)
        flags = ("--port", str(port), "--action-horizon", "2", "--num-steps", "1", "--params-dtype", "bfloat16")
        assert serve(saved, *flags) == 0
        answer, code = visitor.result(60)
    assert answer["actions"].shape == (4 if number == signal.SIGINT else 2, 6)
    assert code == 1001  # going away
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    out = capsys.readouterr().out
    assert f"ready: ws://127.0.0.1:{port}" in out
    assert out.endswith("stopped\n")


REFUSED = {
    "has no norm stats; give a norm_stats.json": ("--robot", "libero"),
    "has no norm stats named x": ("--robot", "libero", "--asset-id", "x"),
    "--prompt: nothing in model-ready requests depends on it; say which robot": ("--prompt", "go"),
    "--asset-id: --norm-stats already says": ("--robot", "libero", "--norm-stats", "nowhere.json", "--asset-id", "x"),
    "there is no robot 'r2d2'": ("--robot", "r2d2"),
    "--port is 99999; give at least 0 and below 65536": ("--port", "99999"),
    "--max-batch is 0": ("--max-batch", "0"),
    "--action-horizon is 0": ("--action-horizon", "0"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_flags_that_cannot_be_are_refused_before_the_model_is_read(saved, message, capsys, monkeypatch):
    flags = ("--tokenizer", str(GOLDEN / "tokenizer/tiny_spm.model")) if "--robot" in REFUSED[message] else ()
    monkeypatch.setattr(serve_command, "load_model", lambda *_: pytest.fail("the model was read"))
    assert serve(saved, *flags, *REFUSED[message]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_fault_of_one_request_spoils_no_other_of_its_batch(policy):
    """Finite noise of 3e38 makes infinite actions: for whoever sent it."""
    good, bad = rows(1)[0], rows(1)[0] | {"noise": np.full((toys.HORIZON, 6), 3e38, np.float32)}
    prepared = [policy.prepare(request) for request in (good, bad, good)]
    first, second, third = policy.outcomes(prepared)
    assert isinstance(second, InputError) and "the noise of the request" in str(second)
    assert first["actions"].shape == third["actions"].shape == (toys.HORIZON, 6)
    with pytest.raises(InputError, match="send normal noise"):
        policy.infer_batch(prepared)
    with pytest.raises(InputError, match="noise holds NaN or infinite values"):  # in float32, which the model reads
        policy.prepare(good | {"noise": np.full((toys.HORIZON, 6), 1e300)})
