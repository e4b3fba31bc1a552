"""Run this export in lerobot (made for 0.6.1) and compare with the JAX model's recorded actions.

    python check_lerobot.py

lerobot needs no help to load the folder: config.json says how many blocks there are. `load_policy` is
`SmolVLAPolicy.from_pretrained(folder, strict=True)` but for two things. The vision-language model's weights, which
those of the file would replace at once, are not fetched; and its configuration comes from the folder `vlm`, if that is
complete, in place of the hub.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def load_policy(folder=HERE, **settings):
    """The policy in a folder; settings replace fields of its config, e.g. device="cuda"."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = PreTrainedConfig.from_pretrained(folder)
    config.load_vlm_weights = False
    if any((folder / "vlm" / f"{name}_config.json").exists() for name in ("processor", "preprocessor")):
        config.vlm_model_name = str(folder / "vlm")
    for name, value in settings.items():
        setattr(config, name, value)
    return SmolVLAPolicy.from_pretrained(folder, config=config, strict=True).eval()


def largest_difference(folder=HERE):
    """max |lerobot - JAX| over the recorded actions, in float32, through predict_action_chunk."""
    import torch
    from safetensors.torch import load_file

    with np.load(folder / "check.npz") as archive:
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
    policy = load_policy(folder, device="cpu").float()
    policy.load_state_dict(load_file(folder / "model.safetensors"), strict=True)  # lerobot may have rounded some
    batch = {
        "observation.state": arrays["state"],
        "observation.language.tokens": arrays["tokenized_prompt"].long(),
        "observation.language.attention_mask": arrays["tokenized_prompt_mask"],
    }
    for key, array in arrays.items():
        if key.startswith("image/"):
            camera = key.removeprefix("image/")
            batch[camera] = array.permute(0, 3, 1, 2).float() / 255
            batch[f"{camera}_padding_mask"] = arrays[f"image_mask/{camera}"]
    actions = policy.predict_action_chunk(batch, noise=arrays["noise"])
    return float((actions - arrays["actions"][..., : actions.shape[-1]]).abs().max())


def main(words):
    """The program: compare."""
    try:
        difference = largest_difference()
    except OSError as error:  # what transformers raises when neither disk nor hub has a model's configuration
        if words != ["--json"]:
            raise
        reason = str(error).strip().splitlines()[0]
        print(json.dumps({"largest_difference": None, "missing": f"needs the vision-language model's files: {reason}"}))
        return 0
    if words == ["--json"]:
        print(json.dumps({"largest_difference": difference}))
    else:
        print(f"largest difference of the actions from the JAX model: {difference:.1e}")
    return int(not difference <= 1e-3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
