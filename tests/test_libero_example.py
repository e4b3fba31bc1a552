"""The requests of openpi's LIBERO example (examples/libero/main.py) by its own client, and what comes back.

What openpi does around the model is written down here once more, from its transforms: nothing of ours but the sampled
numbers is in the expected actions.
"""

import collections
import dataclasses
import shutil

import jax
import numpy as np
import pytest
import toys
from recordings import GOLDEN, recording

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.commands.serve import Serve, make_policy
from clp_jax.models import build
from clp_jax.models.pi0 import Observation, sample_actions
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.tokenizer import load_tokenizer
from clp_jax.serving.policy import noise_of
from clp_jax.serving.server import ServerSettings, serving

SPM = GOLDEN / "tokenizer/tiny_spm.model"
TASK = "pick up the black bowl and place it on the plate"
CHUNKS, REPLAN, SIZE, STEPS = 3, 5, 224, 2
TOLERANCE = 1e-5
"""Float32 of a program for one observation beside that of another, in normalised units."""
HORIZONS = {"pi0_libero": 50, "pi05_libero": 10}


def observations(count: int):
    """What the simulator shows, at 256 x 256 pixels; as the example sends it."""
    image_tools = pytest.importorskip("openpi_client.image_tools", reason="needs openpi_client")
    rng = np.random.default_rng(0)
    for _ in range(count):
        seen = rng.integers(0, 256, (2, 256, 256, 3)).astype(np.uint8)[:, ::-1, ::-1]
        shown = [image_tools.convert_to_uint8(image_tools.resize_with_pad(image, SIZE, SIZE)) for image in seen]
        axis_angle = rng.uniform(-1, 1, 3)
        state = np.concatenate((rng.uniform(-1, 1, 3), axis_angle, rng.uniform(0, 0.04, 2)))
        images = dict(zip(("observation/image", "observation/wrist_image"), shown, strict=True))
        yield images | {"observation/state": state, "prompt": TASK}


def checkpoint(folder, kind: str):
    """A toy with the vocabulary and the statistics of the recordings."""
    vision = dataclasses.replace(toys.VISION, patch_size=SIZE // 2)
    architecture = dataclasses.replace(toys.architecture(kind), vision=vision, action_dim=32, vocab_size=512)
    g = recording("openpi_configs")
    stats = {
        key: NormStats(*(g[f"libero/norm_stats/{key}/{part}"] for part in ("mean", "std", "q01", "q99")))
        for key in ("state", "actions")
    }
    norm_stats.save(folder / "assets/physical-intelligence/libero", stats)
    shutil.copy(SPM, folder / "assets/paligemma_tokenizer.model")
    write_params(folder / "checkpoint", toys.params(architecture), assets=folder / "assets")
    return architecture, stats


def as_openpi_reads(request: dict, stats: dict[str, NormStats], kind: str, tokens: int) -> dict[str, np.ndarray]:
    """LiberoInputs, Normalize, ResizeImages (nothing to do at 224 pixels), TokenizePrompt, PadStatesAndActions."""
    state, entry = request["observation/state"], stats["state"]
    by_quantiles = 2 * (state - entry.q01) / (entry.q99 - entry.q01 + 1e-6) - 1
    state = by_quantiles if kind == "pi05" else (state - entry.mean) / (entry.std + 1e-6)
    words = load_tokenizer(SPM).encode(TASK)
    return {
        "image/base_0_rgb": request["observation/image"],
        "image/left_wrist_0_rgb": request["observation/wrist_image"],
        "image_mask/base_0_rgb": np.array(True),
        "image_mask/left_wrist_0_rgb": np.array(True),
        "state": np.pad(state, (0, 24)).astype(np.float32),
        "tokenized_prompt": np.pad(np.int32(words), (0, tokens - len(words))),
        "tokenized_prompt_mask": np.arange(tokens) < len(words),
    }


def as_openpi_answers(sampled: np.ndarray, state: np.ndarray, stats: dict[str, NormStats], kind: str) -> np.ndarray:
    """Unnormalize, AbsoluteActions where the configuration has the extra delta, LiberoOutputs."""
    entry, actions = stats["actions"], sampled[:, :7].astype(np.float64)
    if kind == "pi05":
        return (actions + 1) / 2 * (entry.q99 - entry.q01 + 1e-6) + entry.q01
    return actions * (entry.std + 1e-6) + entry.mean + np.append(state[:6], 0)


@pytest.mark.parametrize("name", HORIZONS)
def test_the_example_acts_as_with_openpis_server(name, tmp_path):
    client_module = pytest.importorskip("openpi_client.websocket_client_policy", reason="needs openpi_client")
    kind, tokens = name.removesuffix("_libero"), {"pi0": 48, "pi05": 200}[name.removesuffix("_libero")]
    architecture, stats = checkpoint(tmp_path, kind)
    where = str(tmp_path / "checkpoint")
    policy = make_policy(
        Serve(checkpoint=where, openpi_config=name, num_steps=STEPS, max_batch=1, dtype="float32"), read_spec(where)
    )
    module, params = build(architecture), toys.params(architecture)
    sample = jax.jit(
        lambda observation, noise: sample_actions(module, params, observation, noise=noise, num_steps=STEPS)
    )
    executed = []
    with serving(policy, ServerSettings(port=0)) as port:
        client = client_module.WebsocketClientPolicy("127.0.0.1", port)
        for number, request in enumerate(observations(CHUNKS)):
            plan = collections.deque(client.infer(request)["actions"][:REPLAN])
            executed += [action.tolist() for action in plan]
            inputs = as_openpi_reads(request, stats, kind, tokens)
            noise = noise_of(0, np.uint32([number]), (HORIZONS[name], 32))
            observation = Observation.of({key: value[None] for key, value in inputs.items()})
            sampled = np.asarray(sample(observation, noise))[0]
            expected = as_openpi_answers(sampled, request["observation/state"], stats, kind)
            scale = (stats["actions"].q99 - stats["actions"].q01) / 2 if kind == "pi05" else stats["actions"].std
            answer = np.array(executed[-REPLAN:])
            assert expected.shape == (HORIZONS[name], 7)
            assert np.max(np.abs(answer - expected[:REPLAN]) / scale) < TOLERANCE
        client._ws.close()
    assert np.shape(executed) == (CHUNKS * REPLAN, 7)
