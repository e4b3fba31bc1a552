"""Load this pruned policy in lerobot (made for 0.6.1), whose π0 and π0.5 know one depth.

    from load_lerobot import load_policy                             # the policy, every weight compared with the file
    python load_lerobot.py                                           # compare its actions with the JAX model's
    python load_lerobot.py -m lerobot.scripts.lerobot_eval --policy.path=FOLDER ...   # any lerobot program

The depth is part of the variant's name in config.json, such as gemma_2b_depth9_vision27. lerobot alone refuses such a
name; `install` teaches it to the running process. Nothing is written into lerobot. A policy with such a variant is
returned only if each of its weights is the one in the file: lerobot alone would print a line and go on with random
weights.

`install` also gives both policies JAX's sampling times and time embedding, which are rounded to float32: lerobot's
float64 moves the actions of a pi0.5 by up to 2e-4.
"""

import contextvars
import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent

_VARIANT = re.compile(r"(gemma_2b|gemma_300m)_depth(\d+)_vision(\d+)")
_FIELDS = ("paligemma_variant", "action_expert_variant")
_TIED = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
_HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
_vision_depth = contextvars.ContextVar("vision_depth", default=None)


def install():
    """Let lerobot's π0 and π0.5 be as deep as their variants' names say. Calling it again changes nothing."""
    for kind in ("pi0", "pi05"):
        modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
        if hasattr(modeling.get_gemma_config, "knows_depths"):
            continue
        policy = getattr(modeling, f"{kind.upper()}Policy")
        modeling.get_gemma_config = _with_depths(modeling.get_gemma_config)
        modeling.euler_integrate = _at_jax_times(modeling.euler_integrate)
        modeling.create_sinusoidal_pos_embedding = _time_embedding
        model = modeling.PaliGemmaWithExpertModel
        model.__init__ = _with_vision_depth(model.__init__)
        built = "PaliGemmaForConditionalGenerationWithPiGemma"
        setattr(modeling, built, _with_vision_layers(getattr(modeling, built)))
        policy.config_class.__post_init__ = _without_depths(policy.config_class.__post_init__)
        policy.from_pretrained = classmethod(_compared_with_file(policy.from_pretrained.__func__))


def load_policy(folder=HERE, **settings):
    """The policy in a folder; settings replace fields of its config, e.g. device="cuda", dtype="bfloat16"."""
    from lerobot.configs.policies import PreTrainedConfig

    install()
    config = PreTrainedConfig.from_pretrained(folder)
    for name, value in settings.items():
        setattr(config, name, value)
    kind = config.type
    modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    return getattr(modeling, f"{kind.upper()}Policy").from_pretrained(folder, config=config).eval()


def _with_depths(get_gemma_config):
    def get_pruned_config(variant):
        match = _VARIANT.fullmatch(variant)
        config = get_gemma_config(match[1] if match else variant)
        if match:
            config.depth, config.vision_depth = int(match[2]), int(match[3])
        return config

    get_pruned_config.knows_depths = True
    return get_pruned_config


def _with_vision_depth(init):
    def init_pruned(self, vlm_config, *arguments, **options):
        token = _vision_depth.set(getattr(vlm_config, "vision_depth", None))
        try:
            init(self, vlm_config, *arguments, **options)
        finally:
            _vision_depth.reset(token)

    return init_pruned


def _with_vision_layers(model):
    def build_pruned(config):
        if (depth := _vision_depth.get()) is not None:
            config.vision_config.num_hidden_layers = depth
        return model(config=config)

    return build_pruned


def _without_depths(post_init):
    """lerobot's config accepts two variants: it sees them without the depth."""

    def post_init_pruned(self):
        names = {field: getattr(self, field) for field in _FIELDS}
        for field, name in names.items():
            match = _VARIANT.fullmatch(name)
            setattr(self, field, match[1] if match else name)
        post_init(self)
        for field, name in names.items():
            setattr(self, field, name)

    return post_init_pruned


def _at_jax_times(euler_integrate):
    """JAX adds -1/n to the time, in float32, where lerobot multiplies."""

    def integrate(denoise, noise, num_steps, **options):
        import torch

        steps = np.full(num_steps, -1 / num_steps, np.float32)
        steps[0] = 1
        times = torch.from_numpy(np.add.accumulate(steps)).to(noise.device)

        def denoise_at(x, time):
            return denoise(x, times[torch.round((1 - time) * num_steps).long()])

        return euler_integrate(denoise_at, noise, num_steps, **options)

    return integrate


def _time_embedding(time, dimension, min_period, max_period, device="cpu"):
    """Sines, then cosines, with the roundings of JAX: linspace multiplies by 1 / (n - 1), a power is rounded once."""
    import torch

    count = dimension // 2
    fraction = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count - 1))
    fraction[-1] = 1
    power = np.float64(np.float32(max_period / min_period)) ** fraction.astype(np.float64)
    period = np.float32(min_period) * power.astype(np.float32)
    angle = time[:, None] * torch.from_numpy(1 / period * 2 * np.float32(np.pi)).to(device)
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)


def _compared_with_file(from_pretrained):
    def from_pretrained_pruned(cls, pretrained_name_or_path, **options):
        policy = from_pretrained(cls, pretrained_name_or_path, **options)
        if _VARIANT.fullmatch(policy.config.paligemma_variant):
            _compare(policy, pretrained_name_or_path)
        return policy

    return from_pretrained_pruned


def _compare(policy, path):
    """Raises unless the policy has exactly the weights of the file."""
    import torch
    from safetensors import safe_open
    from transformers.utils import cached_file

    state, wrong = policy.state_dict(), []
    with safe_open(cached_file(str(path), "model.safetensors"), "pt") as file:
        names = set(file.keys())
        for name in sorted(names & set(state)):
            stored, loaded = file.get_tensor(name), state[name]
            if stored.shape != loaded.shape or not torch.equal(stored.to(loaded.dtype), loaded.cpu()):
                wrong.append(name)
    if not torch.equal(state[_TIED], state[_HEAD]):
        wrong.append(_TIED)
    wrong += sorted(names ^ (set(state) - {_TIED}))
    if wrong:
        raise RuntimeError(
            f"{path}: {len(wrong)} weights are not those of the file, for example {wrong[0]}; the file, config.json "
            "or lerobot's version does not fit (made for lerobot 0.6.1)"
        )


def largest_difference(folder=HERE):
    """max |lerobot - JAX| over the recorded actions, through predict_action_chunk."""
    import torch

    with np.load(folder / "check.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    policy = load_policy(folder, device="cpu", dtype="float32")
    batch = {
        "observation.state": arrays["state"],
        "observation.language.tokens": arrays["tokenized_prompt"].long(),
        "observation.language.attention_mask": arrays["tokenized_prompt_mask"],
    }
    for key, array in arrays.items():
        if key.startswith("image/") and arrays[key.replace("image/", "image_mask/")].all():
            camera = key.removeprefix("image/")
            batch[f"observation.images.{camera}"] = array.permute(0, 3, 1, 2).float() / 255  # absent ones are left out
    actions = policy.predict_action_chunk(batch, noise=arrays["noise"])
    return float((actions - arrays["actions"][..., : actions.shape[-1]]).abs().max())


def main(words):
    """The program: compare, or run another module with the depths known."""
    if words[:1] == ["-m"]:
        install()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return 0
    difference = largest_difference()
    if words == ["--json"]:
        print(json.dumps({"largest_difference": difference}))
    else:
        print(f"largest difference of the actions from the JAX model: {difference:.1e}")
    return int(not difference <= 1e-3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
