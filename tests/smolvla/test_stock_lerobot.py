"""lerobot itself loads what is cut, strictly and without a patch (make test-lerobot)."""

import numpy as np
import pytest
import real_lerobot
from safetensors_folders import GOLDEN, SMOLVLA, change_config, tensors_of

from clp_jax.checkpoint.safetensors.folder import read_folder
from clp_jax.checkpoint.safetensors.slicing import slice_folder

VLM = GOLDEN / "smolvla" / "vlm"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keep", [[0, 1, 4, 5, 8, 11], [2, 3, 4, 9, 10]])
def test_stock_lerobot_loads_a_cut_strictly(keep, tmp_path):
    real_lerobot.import_lerobot()
    pytest.importorskip("num2words", reason="needs lerobot's smolvla extra (num2words)")
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    slice_folder(read_folder(SMOLVLA), {"vlm": keep, "action": keep}, tmp_path / "cut")
    change_config(tmp_path / "cut", lambda config: config.update(vlm_model_name=str(VLM)))
    policy = SmolVLAPolicy.from_pretrained(str(tmp_path / "cut"), strict=True)
    inner = policy.model.vlm_with_expert
    assert inner.num_vlm_layers == inner.num_expert_layers == len(keep)
    stored, loaded = tensors_of(tmp_path / "cut"), policy.state_dict()
    assert loaded.keys() == stored.keys()
    for name, (dtype, shape, content) in stored.items():
        assert dtype == "F32"
        np.testing.assert_array_equal(loaded[name].float().numpy(), np.frombuffer(content, np.float32).reshape(shape))
