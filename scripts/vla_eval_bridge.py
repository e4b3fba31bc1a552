"""``vla-eval``'s benchmarks (SimplerEnv, CALVIN, RoboCasa and others, each in Docker) against a server of clp.

    $ clp serve --checkpoint pruned --openpi-config pi0_libero --port 8000
    $ python scripts/vla_eval_bridge.py --address 127.0.0.1:8001 --args.server=127.0.0.1:8000
    $ vla-eval run --config ...            # of a benchmark, with the server ws://127.0.0.1:8001

vla-eval (0.8.0, an environment of its own) asks with every observation, in a protocol of its own; here the chunks of
our server's answers are replayed.
"""

from typing import Any

import numpy as np
from vla_eval.model_servers.base import SessionContext  # pyright: ignore[reportMissingImports]
from vla_eval.model_servers.predict import PredictModelServer  # pyright: ignore[reportMissingImports]
from vla_eval.model_servers.serve import run_server  # pyright: ignore[reportMissingImports]
from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW  # pyright: ignore[reportMissingImports]

from clp_jax.evaluation.remote import RemotePolicy


class Bridge(PredictModelServer):
    """Asks an openpi-protocol server with what a benchmark of vla-eval shows.

    Args:
      server: HOST:PORT.
      image_keys: what the server calls a benchmark's cameras in their order, with commas between; cameras without a
        key are left out.
      state_key: what it calls the state; none for policies without.
      chunk_size: actions done before the policy is asked again.
      others: of vla-eval.
    """

    def __init__(
        self,
        server: str = "127.0.0.1:8000",
        image_keys: str = "observation/image,observation/wrist_image",
        state_key: str = "observation/state",
        *,
        chunk_size: int = 5,
        **others: Any,
    ):
        super().__init__(chunk_size=chunk_size, **others)
        self._policy, self._images, self._state = RemotePolicy(server, 1), image_keys.split(","), state_key

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, np.ndarray]:
        """A chunk of actions for one observation."""
        del ctx
        request = {key: np.asarray(image) for key, image in zip(self._images, obs["images"].values(), strict=False)}
        if self._state:
            request[self._state] = np.asarray(obs["states"] if "states" in obs else obs["state"], np.float64)
        (actions,) = self._policy([request | {"prompt": obs["task_description"]}])
        return {"actions": actions}

    def get_observation_params(self) -> dict[str, Any]:
        """What a benchmark is asked to send."""
        return {"send_wrist_image": len(self._images) > 1, "send_state": bool(self._state), "quat_no_antipodal": True}

    def get_observation_spec(self) -> dict[str, Any]:
        """What the policy reads."""
        return {"image": IMAGE_RGB, "language": LANGUAGE} | ({"state": RAW} if self._state else {})

    def get_action_spec(self) -> dict[str, Any]:
        """What it answers."""
        return {"actions": RAW}


if __name__ == "__main__":
    run_server(Bridge)
