"""The 18-block base: demonstrations by scripted experts, a tokenizer for instructions, pre-training from nothing."""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from clp_jax.checkpoint import write_params
from clp_jax.commands.finetune import Finetune
from clp_jax.commands.finetune import run as finetune
from clp_jax.evaluation.metaworld import INSTRUCTIONS
from clp_jax.example import CHECKPOINT
from clp_jax.models import init_params
from clp_jax.models.pi0 import Architecture
from clp_jax.processing.tokenizer import FILE as TOKENIZER_FILE
from clp_jax.trees import flatten, unflatten
from studies.metaworld import protocol

_MAKE_DATASET = Path(__file__).resolve().parents[2] / "scripts" / "make_metaworld_dataset.py"


def make_base(work: Path) -> Path:
    """The pre-trained checkpoint's step folder, made if it is not there."""
    record_demonstrations(work / "data" / "base", protocol.BASE_TASKS, protocol.BASE_EPISODES)
    start = work / "start"
    if not start.exists():
        write_start(start, protocol.architecture(), seed=0)
    steps = protocol.BASE_STEPS
    settings = Finetune(
        checkpoint=str(start),
        data=(str(work / "data" / "base"),),
        out=str(work / "base"),
        steps=steps,
        robot="metaworld",
        asset_id="metaworld",
        action_horizon=protocol.HORIZON,
        max_token_len=protocol.PROMPT_TOKENS,
        batch_size=protocol.BATCH,
        action_samples=protocol.DRAWS,
        peak_lr=protocol.BASE_LR,
        warmup_steps=200,
        decay_steps=steps,
        decay_lr=1e-5,
        augment=False,
        holdout_ratio=0.02,
        log_every=50,
        evaluate_every=500,
        save_every=500,
        keep_period=None,
        workers=2,
        seed=0,
        resume=True,
    )
    finetune(settings)
    return finished(work)


def finished(work: Path) -> Path:
    """The pre-trained checkpoint's step folder."""
    return work / "base" / str(protocol.BASE_STEPS - 1)


def finished_or_committed(work: Path) -> Path:
    """The base of this folder, in float32, or if it has none the committed one, which is the same in bfloat16."""
    return finished(work) if finished(work).exists() else Path(CHECKPOINT)


def statistics(checkpoint: Path) -> str:
    """The file of a base's statistics: its weights know these numbers, and a model from nothing gets the same."""
    return str(checkpoint / "assets" / "metaworld" / "norm_stats.json")


def record_demonstrations(folder: Path, tasks: tuple[str, ...], episodes: int, *, seed: int = 0) -> None:
    """A LeRobot data set of scripted experts; an interrupted recording goes on."""
    if folder.exists():
        return
    command = [sys.executable, str(_MAKE_DATASET), "--out", str(folder), "--tasks", *tasks]
    command += ["--episodes", str(episodes), "--image-size", str(protocol.IMAGE_SIZE), "--seed", str(seed)]
    subprocess.run(command, check=True)


def write_start(folder: Path, architecture: Architecture, *, seed: int) -> None:
    """A random checkpoint with the study's tokenizer in its assets.

    Blocks write to the residual streams at full scale: with the customary shrinking by depth, short training leaves all
    late blocks nearly idle, and whoever drops the deepest wins by construction.
    """
    params = flatten(jax.jit(lambda key: init_params(architecture, key))(jax.random.key(seed)))
    # Entries of 1 would drown the images: tokens are multiplied by sqrt(width) when embedded.
    params["PaliGemma/llm/embedder/input_embedding"] *= architecture.vlm.width**-0.5
    # SigLIP's head is initialised to zero, and the first RMS norm multiplies the gradient of tokens near zero by 1,000.
    head = params["PaliGemma/img/head/kernel"]
    params["PaliGemma/img/head/kernel"] = jax.nn.initializers.lecun_normal()(jax.random.key(seed + 1), head.shape)
    with tempfile.TemporaryDirectory() as assets:
        (Path(assets) / TOKENIZER_FILE).write_bytes(train_tokenizer())
        write_params(folder, jax.tree.map(np.asarray, unflatten(params)), assets=assets)


def train_tokenizer() -> bytes:
    """A SentencePiece model of the instructions: PaliGemma's own would be a table of 257,152 rows, mostly unused."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(INSTRUCTIONS.values())),
        model_writer=model,
        vocab_size=protocol.VOCABULARY,
        model_type="bpe",
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return model.getvalue()
