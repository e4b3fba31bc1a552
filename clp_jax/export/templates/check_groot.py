"""Run this export in lerobot (made for 0.4.4) and compare with the JAX model's recorded actions.

    python check_groot.py

On a GPU upstream's code needs no help to load the folder. `load_model` is `GR00TN15.from_pretrained(folder)` on any
machine, but for two things. The configuration of the vision-language model comes from the folder `eagle`, if that is
here, and tokenizer and processors are not fetched. And attention is PyTorch's own, where upstream's code asks for
flash-attn, which no CPU has.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

HERE = Path(__file__).resolve().parent
EAGLE = "lerobot/eagle2hg-processor-groot-n1p5"


def load_model(folder=HERE):
    """The model in a folder, every weight of which is that of the files."""
    import torch

    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(os.environ, {"HF_MODULES_CACHE": scratch}):
        from lerobot.policies.groot import groot_n1

        prepared = Path(scratch) / "lerobot"
        with (
            mock.patch.object(groot_n1, "HF_LEROBOT_HOME", prepared),
            mock.patch.object(
                groot_n1, "ensure_eagle_cache_ready", lambda code, place, _: prepare(folder, code, place)
            ),
        ):
            model = groot_n1.GR00TN15.from_pretrained(str(folder)).eval()
    # Upstream only warns of weights that are missing, and goes on with random ones.
    stored, loaded = weights(folder), model.state_dict()
    tied = {key for key in loaded if key.endswith("lm_head.weight")}  # a file may leave it out
    differing = sorted((stored.keys() ^ loaded.keys()) - tied)
    differing += [key for key in stored if key in loaded and not torch.equal(loaded[key].float(), stored[key].float())]
    if differing:
        raise ValueError(
            f"{len(differing)} weights of the model are not those of the files: {', '.join(differing[:3])}"
        )
    return model


def prepare(folder, code, place):
    """Eagle's code and configuration, where upstream looks for them."""
    shutil.copytree(code, place)
    source = folder / "eagle" / "config.json"
    if not source.exists():
        from huggingface_hub import hf_hub_download

        source = Path(hf_hub_download(EAGLE, "config.json"))
    config = json.loads(source.read_text()) | {"_attn_implementation": "sdpa"}
    (place / "config.json").write_text(json.dumps(config))
    module = place / "modeling_eagle2_5_vl.py"
    forced = '_attn_implementation = "flash_attention_2"'
    module.write_text(module.read_text().replace(forced, '_attn_implementation = "sdpa"'))


def weights(folder=HERE):
    """All tensors of the files by name."""
    from safetensors.torch import load_file

    return {
        name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()
    }


def inputs_of(arrays):
    """Upstream's inputs from those of the JAX model, as torch tensors."""
    images = [arrays[key] for key in sorted(arrays) if key.startswith("image/")]
    pixels = np.stack(images, axis=1).reshape(-1, *images[0].shape[1:]).transpose(0, 3, 1, 2)
    made = {
        "eagle_pixel_values": (pixels.astype(np.float32) / 255 - 0.5) / 0.5,
        "eagle_input_ids": arrays["tokenized_prompt"].astype(np.int64),
        "eagle_attention_mask": arrays["tokenized_prompt_mask"].astype(np.int64),
        "eagle_image_sizes": np.full((len(pixels), 2), pixels.shape[-1]),
        "state": arrays["state"][:, None],
        "embodiment_id": arrays["embodiment_id"].astype(np.int64),
    }
    return as_tensors(made)


def as_tensors(arrays):
    """NumPy arrays as torch tensors."""
    import torch

    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}


def largest_difference(folder=HERE):
    """max |upstream - JAX| over the recorded actions, in float32."""
    import torch

    with np.load(folder / "check.npz") as archive:
        arrays = dict(archive)
    noise = as_tensors({"noise": arrays["noise"]})["noise"]
    model = load_model(folder).float()
    with torch.no_grad(), mock.patch.object(torch, "randn", return_value=noise):
        actions = model.get_action(inputs_of(arrays))["action_pred"]
    return float(np.abs(actions.numpy() - arrays["actions"]).max())


def main(words):
    """The program: compare."""
    try:
        difference = largest_difference()
    except (ImportError, OSError) as error:  # another lerobot, or neither disk nor hub has the configuration
        if words != ["--json"]:
            raise
        reason = str(error).strip().splitlines()[0]
        print(json.dumps({"largest_difference": None, "missing": f"needs lerobot 0.4 and Eagle's files: {reason}"}))
        return 0
    if words == ["--json"]:
        print(json.dumps({"largest_difference": difference}))
    else:
        print(f"largest difference of the actions from the JAX model: {difference:.1e}")
    return int(not difference <= 1e-3)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
