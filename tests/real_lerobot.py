"""The real lerobot for tests, at the sizes of an architecture; depths stay lerobot's."""

import importlib

import pytest


def import_lerobot() -> None:
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("lerobot", reason="needs lerobot: see constraints/lerobot.txt")


def shrink(sizes: dict, patch) -> None:
    """Gives lerobot's π0 and π0.5 the sizes in ``export.json``, but for the depths.

    Args:
      sizes: its entry "architecture".
      patch: pytest's MonkeyPatch.
    """
    for kind in ("pi0", "pi05"):
        modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
        patch.setattr(modeling, "get_gemma_config", _gemma(sizes, modeling.GemmaConfig))
        for name, build in (
            ("PaliGemmaForConditionalGenerationWithPiGemma", _paligemma),
            ("PiGemmaForCausalLM", _causal),
        ):
            patch.setattr(modeling, name, build(sizes, getattr(modeling, name)))


def _gemma(sizes: dict, config_class):
    def get_gemma_config(variant: str):
        expert = {"gemma_2b": sizes["vlm"], "gemma_300m": sizes["action"]}[variant]
        names = ("width", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
        return config_class(depth=18, **{name: expert[name] for name in names})

    return get_gemma_config


def _paligemma(sizes: dict, original):
    def build(config):
        v = sizes["vision"]
        config.text_config.vocab_size = sizes["vocab_size"]
        new = {"hidden_size": v["width"], "intermediate_size": v["mlp_dim"], "num_attention_heads": v["num_heads"]}
        new |= {"patch_size": v["patch_size"], "projection_dim": sizes["vlm"]["width"]}
        for name, value in new.items():
            setattr(config.vision_config, name, value)
        return original(config=config)

    return build


def _causal(sizes: dict, original):
    def build(config):
        config.vocab_size = sizes["vocab_size"]
        return original(config=config)

    return build
