"""The real openpi for tests, at the sizes of a recorded checkpoint; skips where it is not installed.

openpi needs lerobot and wandb to be imported, neither of which its models use: where they are missing, empty modules
stand in. Sizes are openpi's own constants, replaced for one test at a time.
"""

import importlib.util
import sys
import types

import numpy as np
import pytest

from clp_jax.models import Architecture


class _Stand(types.ModuleType):
    """A module that has everything and does nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Stand(name)

    def __call__(self, *_, **__):
        return self


def import_openpi() -> None:
    """Makes ``import openpi...`` work, or skips."""
    if importlib.util.find_spec("openpi") is None:
        pytest.skip("needs openpi: put src/ and packages/openpi-client/src of its repository on PYTHONPATH")
    names = ["wandb", "lerobot", "lerobot.common", "lerobot.common.datasets", "lerobot.common.datasets.lerobot_dataset"]
    for name in names:
        if name not in sys.modules and (name != names[0] or importlib.util.find_spec(name) is None):
            sys.modules[name] = _Stand(name)


def shrink(architecture: Architecture, patch: pytest.MonkeyPatch) -> None:
    """Gives openpi's JAX models the sizes of an architecture, but for the depths of openpi: 18 and 27."""
    import openpi.models.gemma as gemma
    import openpi.models.siglip as siglip

    def get_config(variant: str) -> gemma.Config:
        e = architecture.action if "300m" in variant else architecture.vlm
        assert e is not None
        depth = 18
        return gemma.Config(e.width, depth, e.mlp_dim, e.num_heads, e.num_kv_heads, e.head_dim)

    def module(num_classes=None, *, variant=None, **given):
        v = architecture.vision
        sizes = {"width": v.width, "depth": 27, "mlp_dim": v.mlp_dim, "num_heads": v.num_heads, "patch_size": (14, 14)}
        return siglip._Module(num_classes, **(sizes | given))

    patch.setattr(gemma, "get_config", get_config)
    patch.setattr(gemma, "PALIGEMMA_VOCAB_SIZE", architecture.vocab_size)
    patch.setattr(siglip, "Module", module)


class Tokenizer:
    """Stands in for PaliGemma's, whose vocabulary is not in openpi's repository."""

    def __init__(self, max_len: int = 48):
        self.max_len = max_len

    def tokenize(self, prompt, state=None):
        del prompt, state
        index = np.arange(self.max_len)
        return (index * 7) % 500, index < 9


def shrink_torch(architecture: Architecture, patch: pytest.MonkeyPatch) -> None:
    """The same for openpi's PyTorch model, whose vocabulary and SigLIP are literals; skips without its transformers."""
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs openpi's transformers")
    try:
        from transformers.models.siglip import check
    except ImportError:
        pytest.skip("needs openpi's transformers_replace, copied over transformers 4.53.2")
    assert check.check_whether_transformers_replace_is_installed_correctly()
    import openpi.models_pytorch.gemma_pytorch as gemma_pytorch

    v, vlm = architecture.vision, architecture.vlm
    paligemma, causal = gemma_pytorch.PaliGemmaForConditionalGeneration, gemma_pytorch.GemmaForCausalLM

    def small_paligemma(config):
        config.text_config.vocab_size = architecture.vocab_size
        sizes = {"hidden_size": v.width, "intermediate_size": v.mlp_dim, "num_attention_heads": v.num_heads}
        sizes |= {"patch_size": v.patch_size, "image_size": v.image_size, "projection_dim": vlm.width}
        for name, value in sizes.items():
            setattr(config.vision_config, name, value)
        return paligemma(config=config)

    def small_causal(config):
        config.vocab_size = architecture.vocab_size
        return causal(config=config)

    patch.setattr(gemma_pytorch, "PaliGemmaForConditionalGeneration", small_paligemma)
    patch.setattr(gemma_pytorch, "GemmaForCausalLM", small_causal)
