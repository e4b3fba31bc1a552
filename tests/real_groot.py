"""Stock GR00T-N1.5 for tests, from the code of lerobot 0.4, on a CPU."""

import functools
import importlib.util
import runpy
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest

from clp_jax.export.upstream import TEMPLATES

AT_START = Path(__file__).parent / "torch_without_cuda"
"""To be put on PYTHONPATH of a process that runs stock code."""


_at_start = functools.cache(lambda: runpy.run_path(str(AT_START / "sitecustomize.py")))
"""What it declares lasts as long as its variables do."""


def import_groot() -> ModuleType:
    """The program of an export, whose ``load_model`` is upstream's ``from_pretrained``."""
    pytest.importorskip("torch", reason="needs torch")
    if not importlib.util.find_spec("lerobot") or not version("lerobot").startswith("0.4."):
        pytest.skip("needs lerobot 0.4: see constraints/groot.txt")
    _at_start()
    found = importlib.util.spec_from_file_location("check_groot", TEMPLATES / "check_groot.py")
    assert found is not None and found.loader is not None
    program = importlib.util.module_from_spec(found)
    found.loader.exec_module(program)
    return program


def add_adapters(model, rank: int) -> dict:
    """Adds peft's adapters where NVIDIA's script with --lora-full-model does, and returns their tensors by name."""
    import peft
    import torch

    names = ("q_proj", "k_proj", "v_proj", "to_q", "to_k", "to_v")
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if any(part in name for part in names)]
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=targets, lora_dropout=0.1, bias="none")
    peft.inject_adapter_in_model(config, model)
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def loss_of(program: ModuleType, model, arrays: dict[str, np.ndarray]) -> float:
    """Upstream's loss without dropout, at the noise and times of the arrays."""
    import torch

    drawn = program.as_tensors({key: arrays[key] for key in ("noise", "time")})
    inputs = program.inputs_of(arrays) | program.as_tensors(
        {"action": arrays["actions"], "action_mask": arrays["action_mask"].astype(np.float32)}
    )
    with (
        torch.no_grad(),
        mock.patch.object(torch, "randn", return_value=drawn["noise"]),
        mock.patch.object(model.action_head, "sample_time", return_value=drawn["time"]),
    ):
        return float(model(inputs)["loss"])


def actions_of(program: ModuleType, model, arrays: dict[str, np.ndarray], noise: np.ndarray) -> np.ndarray:
    """Upstream's actions from a noise."""
    import torch

    with torch.no_grad(), mock.patch.object(torch, "randn", return_value=torch.from_numpy(noise)):
        return model.get_action(program.inputs_of(arrays))["action_pred"].numpy()
