"""Patches of an installed openpi: depths from checkpoints (always), behaviour of the real openpi (where it is)."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_openpi
import recordings
import toys
from checkpoints import write_example_data

import openpi_patches
from clp_jax import cli, example
from clp_jax.checkpoint import read_params, read_spec, write_params
from clp_jax.models import build
from clp_jax.models.pi0 import Observation, architecture_of, sample_actions
from clp_jax.models.pi0.flow import compute_loss, draw_noise_and_time
from clp_jax.plan import PrunePlan
from clp_jax.prune import prune_checkpoint
from clp_jax.trees import flatten
from openpi_patches.__main__ import main

openpi_warns = pytest.mark.filterwarnings("ignore")
"""openpi, torch and transformers raise warnings of their own."""


def pruned(kind: str, out: Path, **keep) -> Path:
    """A recorded checkpoint with only these blocks of the language stack ("llm") and of SigLIP ("vision")."""
    spec = read_spec(recordings.GOLDEN / "ckpt" / f"{kind}_released")
    architecture = architecture_of(spec.tree)
    towers = {"vlm": keep["llm"], "action": keep["llm"]} | {k: v for k, v in keep.items() if k == "vision"}
    plan = PrunePlan.of(architecture.kind, architecture.depths, towers, coupled=architecture.coupled)
    prune_checkpoint(spec, plan, out)
    return out


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    return {
        "pi0": pruned("pi0", folder / "pi0", llm=[0, 3, 5, 11, 17]),
        "pi05": pruned("pi05", folder / "pi05", llm=[1, 2, 16]),
        "vision": pruned("pi0", folder / "vision", llm=[0, 17], vision=[0, 2]),
    }


def test_depths_come_from_the_shapes(checkpoints):
    assert openpi_patches.depths_of_checkpoint(checkpoints["pi0"]) == openpi_patches.Depths(llm=5, vision=3)
    for path in (checkpoints["vision"], checkpoints["vision"] / "params"):
        assert openpi_patches.depths_of_checkpoint(path) == openpi_patches.Depths(llm=2, vision=2)
    trained = recordings.GOLDEN / "ckpt" / "pi0_trained" / "1"  # written by openpi's training: no clp.json
    assert openpi_patches.depths_of_checkpoint(trained) == openpi_patches.Depths(llm=18, vision=3)


def test_a_record_that_contradicts_the_weights_is_an_error(checkpoints, tmp_path):
    step = pruned("pi0", tmp_path / "step", llm=[0, 1])
    record = json.loads((checkpoints["pi0"] / "clp.json").read_text())
    (step / "clp.json").write_text(json.dumps(record))
    with pytest.raises(
        openpi_patches.PatchError, match="keeps 5 blocks of the tower 'vlm', the weights beside it have 2"
    ):
        openpi_patches.depths_of_checkpoint(step)


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(openpi_patches.PatchError, match="is no checkpoint: give a step folder"):
        openpi_patches.depths_of_checkpoint(tmp_path)
    tree = toys.params(toys.architecture())
    tree["PaliGemma"]["llm"]["layers"]["mlp"]["linear"] = np.zeros((3, 20, 16), np.float32)
    write_params(tmp_path / "uneven", tree)
    with pytest.raises(openpi_patches.PatchError, match=r"disagree about its depth: \[3, 4\]"):
        openpi_patches.depths_of_checkpoint(tmp_path / "uneven")


def test_the_layers_of_a_torch_file_are_counted(tmp_path):
    names = ["paligemma.model.language_model.layers.0.x", "gemma_expert.model.layers.0.x"]
    names += ["paligemma.model.vision_tower.vision_model.encoder.layers.0.x"] * 1
    header = {f"paligemma_with_expert.{name}": {} for name in names}

    def write() -> Path:
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        return tmp_path

    assert openpi_patches.depths_of_checkpoint(write()) == openpi_patches.Depths(llm=1, vision=1)
    header["paligemma_with_expert.gemma_expert.model.layers.1.x"] = {}
    with pytest.raises(openpi_patches.PatchError, match="'llm' are missing, have gaps or differ"):
        openpi_patches.depths_of_checkpoint(write())


def test_importing_needs_neither_openpi_nor_clp_jax():
    heavy = {"openpi", "clp_jax", "jax", "torch"}
    code = f"import sys, openpi_patches; bad = {heavy} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_without_openpi_the_command_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "script.py").write_text("print('ran')")
    monkeypatch.setitem(sys.modules, "openpi", None)
    assert main([str(tmp_path / "script.py")]) == 2
    assert "error: openpi is not installed for this Python" in capsys.readouterr().err
    assert main([str(tmp_path / "none.py")]) == 2
    assert "there is no script" in capsys.readouterr().err


@pytest.fixture
def openpi(monkeypatch):
    """The real openpi at the sizes of the recordings, patches taken off afterwards."""
    real_openpi.import_openpi()
    import openpi.models.tokenizer

    spec = read_spec(recordings.GOLDEN / "ckpt" / "pi0_released")
    real_openpi.shrink(architecture_of(spec.tree), monkeypatch)
    monkeypatch.setattr(openpi.models.tokenizer, "PaligemmaTokenizer", real_openpi.Tokenizer)
    monkeypatch.delenv(openpi_patches.ENVIRONMENT, raising=False)
    yield openpi
    openpi_patches.uninstall()


def train_config(kind: str, **options):
    import openpi.models.pi0_config as pi0_config
    import openpi.training.config as config

    return config.TrainConfig(
        name="test",
        exp_name="test",
        model=pi0_config.Pi0Config(
            dtype="float32", action_horizon=10, pi05=kind == "pi05", max_token_len=48, pytorch_compile_mode=None
        ),
        data=config.LeRobotLiberoDataConfig(repo_id="physical-intelligence/libero"),
        **options,
    )


def depths_built(train_config) -> openpi_patches.Depths:
    import flax.nnx as nnx

    model = nnx.eval_shape(train_config.model.create, jax.random.key(0))
    return openpi_patches.depths.depths_of_params(nnx.state(model).to_pure_dict())


@openpi_warns
@pytest.mark.parametrize("name", ["pi0", "pi05", "vision"])
def test_a_pruned_policy_of_openpi_gives_our_actions(openpi, checkpoints, name):
    from openpi.policies import libero_policy, policy_config

    kind = "pi05" if name == "pi05" else "pi0"
    openpi_patches.install()
    policy = policy_config.create_trained_policy(train_config(kind), checkpoints[name])
    seen = {}
    sample = policy._sample_actions

    def spy(rng, observation, **options):
        seen["observation"], seen["actions"] = observation, sample(rng, observation, **options)
        return seen["actions"]

    policy._sample_actions = spy
    noise = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    result = policy.infer(libero_policy.make_libero_example(), noise=noise)
    assert result["actions"].shape == (10, 7)
    assert np.isfinite(result["actions"]).all()

    # openpi's policies cast the parameters to bfloat16 and compute in the config's dtype.
    params = read_params(read_spec(checkpoints[name]), dtype=jnp.bfloat16)
    architecture = architecture_of(params, dtype="float32")
    o = seen["observation"]
    observation = Observation(
        o.images, o.image_masks, o.state, o.tokenized_prompt.astype(jnp.int32), o.tokenized_prompt_mask
    )
    ours = jax.jit(lambda p, o, n: sample_actions(build(architecture), p, o, noise=n))(params, observation, noise[None])
    assert np.abs(np.asarray(ours) - np.asarray(seen["actions"])).max() < 1e-4


@openpi_warns
def test_each_config_gets_the_depth_of_its_own_weights(openpi, checkpoints):
    from openpi.training import weight_loaders

    def loader(name: str):
        return weight_loaders.CheckpointWeightLoader(str(checkpoints[name] / "params"))

    before = train_config("pi0")
    openpi_patches.install()
    five = train_config("pi0", weight_loader=loader("pi0"))
    two = dataclasses.replace(five, weight_loader=loader("vision"))  # shares its model config with `five`
    assert depths_built(five) == openpi_patches.Depths(llm=5, vision=3)
    assert depths_built(two) == openpi_patches.Depths(llm=2, vision=2)
    assert depths_built(before) == openpi_patches.Depths(llm=18, vision=27)
    assert two.model == five.model == before.model
    gone = dataclasses.replace(five, weight_loader=weight_loaders.CheckpointWeightLoader("/no/such/params"))
    assert depths_built(gone) == openpi_patches.Depths(llm=18, vision=27)

    openpi_patches.install(checkpoints["pi05"])  # what is said explicitly wins over configs
    assert depths_built(before) == depths_built(five) == openpi_patches.Depths(llm=3, vision=3)
    loaded = five.model.load(read_params(read_spec(checkpoints["vision"])))  # and the weights themselves over both
    assert loaded.PaliGemma.img.Transformer["encoderblock"]["LayerNorm_0"]["scale"].value.shape[0] == 2


@openpi_warns
def test_uninstall_puts_everything_back(openpi, checkpoints):
    import openpi.models.gemma as gemma
    import openpi.models.siglip as siglip
    from openpi.training import config

    places = [(gemma, "get_config"), (siglip, "Module"), (config.TrainConfig, "__post_init__")]
    before = [vars(owner)[name] for owner, name in places]
    openpi_patches.install(checkpoints["pi0"])
    openpi_patches.install()
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(places, before, strict=True))
    openpi_patches.uninstall()
    assert all(vars(owner)[name] is old for (owner, name), old in zip(places, before, strict=True))
    assert depths_built(train_config("pi0")) == openpi_patches.Depths(llm=18, vision=27)


@openpi_warns
def test_the_environment_names_the_default(openpi, checkpoints, monkeypatch):
    monkeypatch.setenv(openpi_patches.ENVIRONMENT, str(checkpoints["vision"]))
    openpi_patches.install()
    assert depths_built(train_config("pi0")) == openpi_patches.Depths(llm=2, vision=2)


@pytest.mark.slow
@openpi_warns
@pytest.mark.parametrize("missing", ["get_config", "behaviour"])
def test_an_unknown_openpi_is_refused_and_left_alone(openpi, monkeypatch, missing):
    import openpi.models.gemma as gemma
    import openpi.models.pi0_config as pi0_config

    if missing == "get_config":
        monkeypatch.delattr(gemma, "get_config")
    else:  # a model that no longer asks for the depth where it is patched
        frozen = gemma.get_config
        monkeypatch.setattr(
            sys.modules["openpi.models.pi0"],
            "_gemma",
            type("G", (), dict(vars(gemma), get_config=staticmethod(frozen))),
        )
    create = pi0_config.Pi0Config.create
    with pytest.raises(openpi_patches.PatchError, match="not one that openpi_patches knows"):
        openpi_patches.install()
    assert pi0_config.Pi0Config.create is create


TRAIN = """
import sys, pytest, jax
sys.path[:0] = {paths!r}
import real_openpi, recordings
from clp_jax.checkpoint import read_spec
from clp_jax.models.pi0 import architecture_of
real_openpi.import_openpi()
real_openpi.shrink(architecture_of(read_spec({pruned!r}).tree), pytest.MonkeyPatch())
from openpi_patches.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_openpis_training_script_trains_a_pruned_checkpoint(openpi, checkpoints, tmp_path):
    """Its own process: the script sets a compilation cache and logging for the whole process."""
    import openpi.training.config

    script = Path(openpi.training.config.__file__).parents[3] / "scripts" / "train.py"
    if not script.exists():
        pytest.skip("needs openpi's repository, with scripts/train.py")
    here = Path(__file__).parent
    flags = ["debug_restore", "--batch-size=2", "--num-train-steps=2", "--log-interval=1", "--num-workers=0"]
    flags += ["--model.dtype=float32", "--model.paligemma-variant=gemma_2b", "--model.action-expert-variant=gemma_300m"]
    flags += [f"--checkpoint-base-dir={tmp_path}/runs"]
    flags += [f"--weight-loader.params-path={checkpoints['vision']}/params", "--data.repo-id=fake"]
    code = TRAIN.format(paths=[str(here), str(here.parent)], pruned=str(checkpoints["vision"]))
    environment = os.environ | {"HOME": str(tmp_path), "XLA_FLAGS": ""}
    words = [sys.executable, "-c", code, str(script), *flags]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (step,) = (tmp_path / "runs").glob("*/*/1")
    assert openpi_patches.depths_of_checkpoint(step) == openpi_patches.Depths(llm=2, vision=2)
    before, after = (flatten(read_params(read_spec(p))) for p in (checkpoints["vision"], step))
    assert before.keys() == after.keys()
    # The first steps of the warm-up, averaged with 0.99, move only what has large gradients.
    changed = [path for path in before if not np.array_equal(before[path], after[path])]
    assert "PaliGemma/llm/layers/mlp_1/linear" in changed


def as_nested(arrays):
    """Flat arrays as openpi has them."""
    pictures = {part: {} for part in ("image", "image_mask")}
    for name, array in arrays.items():
        part, _, camera = name.partition("/")
        if camera:
            pictures[part][camera] = jnp.asarray(array)
    names = ("state", "tokenized_prompt", "tokenized_prompt_mask")
    return pictures | {name: jnp.asarray(arrays[name]) for name in names}


@pytest.mark.slow
@openpi_warns
def test_a_healed_cut_has_the_same_loss_in_openpi(tmp_path, monkeypatch):
    real_openpi.import_openpi()
    import openpi.models.model
    import openpi.models.pi0
    import openpi.models.pi0_config

    data = write_example_data(tmp_path / "data.npz", 24)
    flags = ["--keep", "0,1,2,3,4,5,6,7,8,9,10,11,16,17", "--heal", "--data", str(tmp_path / "data.npz")]
    assert cli.main(["prune", "--checkpoint", example.CHECKPOINT, *flags, "--out", str(tmp_path / "healed")]) == 0
    params = read_params(read_spec(tmp_path / "healed"))
    architecture = architecture_of(params, dtype="float32")
    key, some = jax.random.key(0), data.take(range(6)).arrays
    actions = some["actions"]
    noise, time = draw_noise_and_time(key, actions.shape)
    ours = compute_loss(build(architecture), params, Observation.of(some), actions, noise=noise, time=time)

    real_openpi.shrink(architecture, monkeypatch)
    # Its models resize pictures to 224 pixels and want three cameras; the example has one of 84.
    monkeypatch.setattr(openpi.models.model, "IMAGE_RESOLUTION", (example.IMAGE_SIZE,) * 2)
    monkeypatch.setattr(openpi.models.model, "preprocess_observation", lambda _, observation, **__: observation)
    openpi_patches.install(tmp_path / "healed")
    try:
        config = openpi.models.pi0_config.Pi0Config(
            dtype="float32", action_dim=actions.shape[-1], action_horizon=actions.shape[1], max_token_len=12
        )
        model = config.load(params)
    finally:
        openpi_patches.uninstall()
    theirs = model.compute_loss(key, openpi.models.model.Observation.from_dict(as_nested(some)), actions)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6)
