"""Fine-tune a checkpoint: optax under ``jax.jit`` with shardings, on one device or on the hosts of a pod."""

from clp_jax.training.loop import Diverged as Diverged
from clp_jax.training.loop import Report as Report
from clp_jax.training.loop import Run as Run
from clp_jax.training.loop import check_batch_size as check_batch_size
from clp_jax.training.loop import check_rows as check_rows
from clp_jax.training.loop import check_sharding as check_sharding
from clp_jax.training.loop import train as train
from clp_jax.training.optimizer import OptimizerSettings as OptimizerSettings
from clp_jax.training.optimizer import check_schedule as check_schedule
from clp_jax.training.optimizer import make_optimizer as make_optimizer
from clp_jax.training.saving import Steps as Steps
from clp_jax.training.state import TrainState as TrainState
from clp_jax.training.state import make_state as make_state
from clp_jax.training.step import StepSettings as StepSettings
from clp_jax.training.step import train_step as train_step
