"""The bridge to vla-eval on stand-ins with its names: a benchmark's observation reaches our server in openpi's keys."""

import importlib
import sys
import types

import numpy as np
import pytest
import simulated_gym


class PredictModelServer:
    def __init__(self, *, chunk_size, **others):
        self.chunk_size, self.others = chunk_size, others


@pytest.fixture
def bridge(monkeypatch):
    names = {
        "base": {"SessionContext": object},
        "predict": {"PredictModelServer": PredictModelServer},
        "serve": {"run_server": None},
    }
    modules = {f"vla_eval.model_servers.{name}": content for name, content in names.items()}
    modules |= {"vla_eval": {}, "vla_eval.model_servers": {}}
    modules |= {"vla_eval.specs": {"IMAGE_RGB": "image", "LANGUAGE": "language", "RAW": "raw"}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "scripts.vla_eval_bridge", raising=False)
    yield importlib.import_module("scripts.vla_eval_bridge").Bridge
    del sys.modules["scripts.vla_eval_bridge"]


@pytest.mark.parametrize("key", ["states", "state"])
def test_observations_reach_the_server_in_openpis_keys(bridge, monkeypatch, key):
    with simulated_gym.serving(0.5) as server:
        made = bridge(server, image_keys="observation/image", state_key="state", max_batch_size=1)
        asked, policy = [], made._policy
        monkeypatch.setattr(made, "_policy", lambda requests: asked.extend(requests) or policy(requests))
        picture = np.full((8, 8, 3), 7, np.uint8)
        seen = {"images": {"front": picture, "wrist": picture}, key: [1.0, 2.0], "task_description": "walk"}
        actions = made.predict(seen, None)["actions"]
        policy.close()
    assert actions.shape == (6, 2) and actions[0, 0] == 0.5
    assert set(asked[0]) == {"observation/image", "state", "prompt"} and asked[0]["state"].tolist() == [1.0, 2.0]
    assert made.get_observation_params() == {"send_wrist_image": False, "send_state": True, "quat_no_antipodal": True}
    assert (made.chunk_size, made.others) == (5, {"max_batch_size": 1})
