"""Make the embedded example: a small openpi-format π0 with planted twin layers, and calibration observations for it.

It was never near a robot. It starts random, with the output projections of half of its blocks scaled down so far that
the block hardly changes the residual stream: planted twins, so that what an analysis finds can be compared with the
truth. Then it is trained for a few hundred steps on a made-up task (move to the coloured spot in the picture) with the
twins' projections frozen, so that its loss means something.

``python scripts/make_example.py`` writes ``clp_jax/example`` again in some minutes on two cores.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clp_jax.checkpoint import write_params
from clp_jax.data import observation_of
from clp_jax.models import Architecture, GemmaSizes, SiglipSizes, build, init_params
from clp_jax.models.pi0 import compute_loss, draw_noise_and_time
from clp_jax.trees import flatten, unflatten

FOLDER = Path(__file__).resolve().parent.parent / "clp_jax" / "example"
DEPTH = 18
TWINS = (2, 3, 5, 8, 9, 10, 12, 14, 15)
ARCHITECTURE = Architecture(
    kind="pi0",
    vision=SiglipSizes(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=14, num_tokens=36),
    vlm=GemmaSizes(width=64, depth=DEPTH, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    action=GemmaSizes(width=48, depth=DEPTH, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16),
    vocab_size=256,
    action_dim=32,
    dtype="float32",
)
TWIN_SCALE = 0.03
EPISODES, STEPS, HORIZON, PROMPT = 12, 3, 8, 12
TRAINING_STEPS, BATCH_SIZE, LEARNING_RATE = 400, 12, 2e-3


def main() -> None:
    """Write checkpoint, calibration data and the truth about the planted twins."""
    rng = np.random.default_rng(0)
    data = make_observations(rng)
    params = train(plant_twins(random_params()), data)
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    write_params(FOLDER / "checkpoint", jax.tree.map(np.asarray, params))
    norm_stats = FOLDER / "checkpoint" / "assets" / "clp" / "example" / "norm_stats.json"
    norm_stats.parent.mkdir(parents=True)
    identity = {"mean": [0.0] * 32, "std": [1.0] * 32, "q01": [-1.0] * 32, "q99": [1.0] * 32}
    norm_stats.write_text(json.dumps({"norm_stats": {"state": identity, "actions": identity}}, indent=2) + "\n")
    np.savez_compressed(FOLDER / "calibration.npz", **data)
    truth = {"planted_twins": TWINS, "made_by": "scripts/make_example.py"}
    (FOLDER / "truth.json").write_text(json.dumps(truth) + "\n")


def random_params() -> dict:
    """Random parameters in which no leaf is left at zero (SigLIP's head starts there)."""
    params = flatten(init_params(ARCHITECTURE, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(params))
    for key, (path, leaf) in zip(keys, sorted(params.items()), strict=True):
        if not np.asarray(leaf).any():
            scale = leaf.shape[0] ** -0.5 if path.endswith("kernel") else 0.1
            params[path] = scale * jax.random.normal(key, leaf.shape)
    # A table with entries of 1 would drown the images: tokens are scaled by sqrt(width) when embedded.
    params["PaliGemma/llm/embedder/input_embedding"] *= ARCHITECTURE.vlm.width**-0.5
    return unflatten(params)


def output_projections() -> list[str]:
    """The stacked leaves through which a block writes to the residual streams."""
    names = [f"{name}" for expert in ("", "_1") for name in (f"attn/attn_vec_einsum{expert}/w", f"mlp{expert}/linear")]
    return [f"PaliGemma/llm/layers/{name}" for name in names]


def per_block(values: np.ndarray, leaf: jax.Array) -> jax.Array:
    """One value per block, shaped to multiply a stacked leaf."""
    return jnp.asarray(values, jnp.float32).reshape(-1, *[1] * (leaf.ndim - 1))


def plant_twins(params: dict) -> dict:
    """Scale the output projections of the twins nearly to zero."""
    flat = flatten(params)
    scale = np.array([TWIN_SCALE if block in TWINS else 1.0 for block in range(DEPTH)])
    for path in output_projections():
        flat[path] = flat[path] * per_block(scale, flat[path])
    return unflatten(flat)


def make_observations(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Episodes in which a gripper is to move to a coloured spot: the action chunk is the straight way to it."""
    rows = []
    size = ARCHITECTURE.vision.image_size
    for episode in range(EPISODES):
        target, start = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2)
        colour = rng.uniform(0.3, 1.0, 3)
        prompt = np.zeros(PROMPT, np.int32)
        words = rng.integers(4, PROMPT)
        prompt[:words] = rng.integers(3, ARCHITECTURE.vocab_size, words)
        for step in range(STEPS):
            position = start + (target - start) * step / STEPS
            way = (target - position)[None] * np.linspace(0.2, 1.0, HORIZON)[:, None]
            actions, state = np.zeros((HORIZON, 32), np.float32), np.zeros(32, np.float32)
            actions[:, :2], actions[:, 6], state[:2] = way, np.sign(target[0]), position
            rows.append(
                {
                    "image/base_0_rgb": picture(size, target, colour, position),
                    "image/left_wrist_0_rgb": picture(size, target - position, colour, np.zeros(2)),
                    "image/right_wrist_0_rgb": np.zeros((size, size, 3), np.uint8),
                    "image_mask/base_0_rgb": True,
                    "image_mask/left_wrist_0_rgb": True,
                    "image_mask/right_wrist_0_rgb": False,
                    "state": state,
                    "tokenized_prompt": prompt,
                    "tokenized_prompt_mask": np.arange(PROMPT) < words,
                    "actions": actions,
                    "episode_index": np.int32(episode),
                }
            )
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def picture(size: int, spot: np.ndarray, colour: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """A soft spot of one colour on a gradient, and a dark gripper; coordinates in [-1, 1]."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image = np.stack([0.3 + 0.2 * x, 0.3 + 0.2 * y, 0.3 - 0.2 * x], axis=-1)
    near = np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / 0.05)[..., None]
    image = image * (1 - near) + colour * near
    image *= 1 - 0.8 * np.exp(-((x - gripper[0]) ** 2 + (y - gripper[1]) ** 2) / 0.02)[..., None]
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def train(params: dict, data: dict[str, np.ndarray]) -> dict:
    """Adam on the flow-matching loss; the twins' output projections stay as planted."""
    model, inputs = build(ARCHITECTURE), {key: jnp.asarray(value) for key, value in data.items()}
    trained = np.array([block not in TWINS for block in range(DEPTH)])
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, TRAINING_STEPS))

    @jax.jit
    def step(params: dict, state: optax.OptState, rng: jax.Array) -> tuple[dict, optax.OptState, jax.Array]:
        rows = jax.random.choice(rng, len(inputs["state"]), (BATCH_SIZE,), replace=False)
        batch = {key: value[rows] for key, value in inputs.items()}
        observation, actions = observation_of(batch), batch["actions"]
        noise, time = draw_noise_and_time(rng, actions.shape)
        loss, gradient = jax.value_and_grad(
            lambda p: compute_loss(model, p, observation, actions, noise=noise, time=time).mean()
        )(params)
        updates, state = optimizer.update(gradient, state)
        flat = flatten(updates)
        for path in output_projections():
            flat[path] = flat[path] * per_block(trained, flat[path])
        return optax.apply_updates(params, unflatten(flat)), state, loss

    state, rng = optimizer.init(params), jax.random.key(2)
    losses = []
    for i in range(TRAINING_STEPS):
        params, state, loss = step(params, state, jax.random.fold_in(rng, i))
        losses.append(float(loss))
        if (i + 1) % 50 == 0:
            print(f"step {i + 1}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return params


if __name__ == "__main__":
    main()
