"""What a model family is: the names that the rest of the package asks for.

A family is one package below ``clp_jax.models``, listed in ``clp_jax.models.FAMILIES``: a module with the names of
`Family`. Nothing is inherited, and no other part of clp_jax knows a kind or a tower by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from clp_jax.aliases import AnyArray, Array, Leaf, Tree
from clp_jax.models.layers.scan import Rows
from clp_jax.models.layers.torch_rules import Layout
from clp_jax.models.towers import Capture, Gates, Projection, Stack, Tower, TowerStates
from clp_jax.processing.conventions import Configuration
from clp_jax.processing.norm_stats import By, NormStats
from clp_jax.processing.robots import Robot

Remat = Literal["all", "dots", "none"]
"""What the backward pass of a block computes again: all of it, all but its matrix products, or nothing."""

LongPrompts = Literal["cut", "refuse"]
"""What becomes of prompts with more tokens than a model reads: cut as upstream does, with a warning, or an error."""

_SHOWN = 80
"""Characters of a prompt in a message."""


class Lengths(NamedTuple):
    """Sizes of an observation that no parameter tells: actions of a chunk, tokens of a prompt with its padding."""

    horizon: int
    prompt: int


class Times(NamedTuple):
    """Times that training draws: at one end x_t is noise, at the other, which is left out, it is the action.

    Attributes:
      lowest: the least of them.
      highest: the largest of them.
      noise: where x_t is noise.
    """

    lowest: float
    highest: float
    noise: float

    def hold(self, time: Float[np.ndarray, " n"]) -> bool:
        """Whether all of these are such times."""
        above = time > self.lowest if self.noise == self.highest else time >= self.lowest
        below = time <= self.highest if self.noise == self.highest else time < self.highest
        return bool((above & below).all())

    def __str__(self) -> str:
        """As an interval.

        >>> print(Times(0, 1, noise=1))
        (0, 1], where 1 is noise
        """
        left, right = "(]" if self.noise == self.highest else "[)"
        return f"{left}{self.lowest:g}, {self.highest:g}{right}, where {self.noise:g} is noise"


class Loss(NamedTuple):
    """What a model gets wrong.

    Attributes:
      each: loss of every observation, and of each of its draws of noise and time where it has several.
      weight: of every observation in the loss of a batch, ``sum(weight * each) / sum(weight)``.
    """

    each: Float[Array, "b *k"]
    weight: Float[Array, " b"]


@runtime_checkable
class Architecture(Protocol):
    """Sizes of a model, read from its checkpoint: a frozen, hashable dataclass of the family.

    Attributes:
      kind: of the model, for people and files.
      dtype: of activations; parameters keep theirs.
      remat: memory of training against time.
      vocab_size: token ids that a prompt may hold.
      action_dim: dimensions of the model's actions; None where they are tokens.
    """

    kind: str
    dtype: str
    remat: str
    vocab_size: int
    action_dim: int | None

    @property
    def towers(self) -> tuple[Tower, ...]:
        """All towers, in data-flow order."""
        ...

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the towers that keep the same blocks, the most important group first."""
        ...

    @property
    def depths(self) -> dict[str, int]:
        """Blocks per tower, in data-flow order."""
        ...

    @property
    def coupled(self) -> tuple[tuple[str, ...], ...]:
        """The groups of several towers, which must keep the same blocks."""
        ...

    def with_depths(self, depths: Mapping[str, int]) -> "Architecture":
        """The same model at other depths; towers not named keep theirs."""
        ...


@runtime_checkable
class Processing(Protocol):
    """Everything between one robot and one model, in upstream's order.

    Attributes:
      robot: the robot.
      norm_stats: of ``state`` and ``actions``.
      action_horizon: actions of a chunk.
      max_token_len: tokens of a prompt, padding included.
    """

    robot: Robot
    norm_stats: Mapping[str, NormStats]
    action_horizon: int
    max_token_len: int

    @property
    def state_in_prompt(self) -> bool:
        """Whether the prompt spells the state."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """The model's cameras of which `inputs` has an image, in the model's order, by the robot's names."""
        ...

    @property
    def action_dim(self) -> int:
        """Dimensions of the robot's actions."""
        ...

    @property
    def normalised_by(self) -> By:
        """What normalises states and actions."""
        ...

    def check_dims(self, state: int, actions: int) -> None:
        """Raise an `InputError` if the model cannot hold so many dimensions."""
        ...

    def prompt_tokens(self, prompt: str, state_dims: int) -> int:
        """Tokens of a prompt, with a state of so many dimensions if it is spelled, before it is cut."""
        ...

    def inputs(
        self,
        *,
        state: Float[np.ndarray, " d"],
        images: Mapping[str, np.ndarray],
        prompt: str,
        actions: Float[np.ndarray, "h adim"] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model reads of one observation, without a batch axis."""
        ...

    def outputs(self, actions: np.ndarray, *, state: Float[np.ndarray, " d"]) -> Float[np.ndarray, "h rdim"]:
        """The robot's actions from what the model samples: actions [h, adim], or tokens [t]."""
        ...

    def note(self, actions: np.ndarray) -> str | None:
        """What a client must know of an answer made of this sample; None where it is as it should be."""
        ...

    def for_augmentation(self) -> "Processing":
        """The same with whole images, where it takes a part of them that augmentation will choose in its place."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """Files without which a checkpoint trained with this means nothing, by their names in its assets."""
        ...


def over_long(processing: Processing, prompt: str, state_dims: int) -> str | None:
    """What to say about a prompt of which the model would not read the end; None if all of it fits."""
    tokens, most = processing.prompt_tokens(prompt, state_dims), processing.max_token_len
    return f"the prompt {prompt[:_SHOWN]!r} has {tokens} tokens, more than {most}" if tokens > most else None


@runtime_checkable
class Family(Protocol):
    """The module of a family.

    Arrays that a model reads are a flat mapping, the keys of a ``.npz`` of observations: ``image/<camera>``,
    ``image_mask/<camera>``, ``state``, ``tokenized_prompt``, ``tokenized_prompt_mask``, ``actions``, ``noise``,
    ``time`` and what a family adds.

    Attributes:
      KINDS: values of ``Architecture.kind``.
      RELEASED: sizes as published, by the name that people give.
      STACKS: the stacked leaves; the first match wins.
      WRITES: what blocks add to the streams through, by which a cut is healed; towers that are not here are not.
      OF_LOSSES: keys that losses read and sampling does not.
      TIMES: which times training draws; of no matter where none are drawn.
      MAX_SAMPLES: tokens of a group of observations that are compared if nobody says how many: what keeps an analysis
        at full size below a twentieth of the time that a TPU's matrix unit needs for the forward pass.
      ROBOTS: robots that upstream knows, by name.
      UNRECORDED_ROBOTS: what these names meant to runs that recorded no conventions.
      CONFIGURATIONS: conventions that upstream names, by name.
      UNRECORDED_CONFIGURATIONS: names of upstream's that are not among them, and why.
      LORA: the module of its adapters, None without: ``RANKS``, ``with_adapters``, ``without_adapters``,
        ``has_adapters``, ``adapter_paths``, ``merge_lora``, ``merge_weight``, ``lora_scale``; `layers.lora` knows an
        adapter by its name.
      TARGETS: of ``clp export``, those that have such a model; with "lerobot" there is ``LEROBOT``, the module of its
        policy folders: ``LOADER``, ``INSTALL``, ``LOAD``, ``PREFIX``, ``ONE_DTYPE``, ``why_not``, ``unlike``,
        ``unused_tensors``, ``policy_files``; with "groot" ``NVIDIA``, that of NVIDIA's folders: ``LOADER``,
        ``INSTALL``, ``LOAD``, ``TIED``, ``why_not``, ``unlike``, ``folder_files``; with "openpi-pytorch"
        ``why_no_torch``, ``zero_tensors`` and ``torch_config``.
      TITLES: names of the kinds for people.
      LICENCES: under which terms the weights are, for whoever passes them on.
    """

    KINDS: tuple[str, ...]
    RELEASED: Mapping[str, Any]
    STACKS: tuple[Stack, ...]
    WRITES: tuple[Projection, ...]
    OF_LOSSES: frozenset[str]
    TIMES: Times
    MAX_SAMPLES: int
    ROBOTS: Mapping[str, Robot]
    UNRECORDED_ROBOTS: Mapping[str, Robot]
    CONFIGURATIONS: Mapping[str, Configuration]
    UNRECORDED_CONFIGURATIONS: Mapping[str, str]
    LORA: Any
    TARGETS: tuple[str, ...]
    TITLES: Mapping[str, str]
    LICENCES: str

    def recognises(self, tree: Tree) -> bool:
        """Whether a parameter tree is of this family, by names alone."""
        ...

    def architecture_of(self, tree: Tree, folder: epath.Path | None, *, dtype: str, **settings: Any) -> Any:
        """The architecture, from the shapes in a tree and from the files beside the weights.

        Args:
          tree: parameters or their shapes.
          folder: where the checkpoint's own files are (``config.json``...), if it has any.
          dtype: of activations.
          settings: what neither tells.

        Raises:
          InputError: the tree is no such model, or a file says what this family does not know.
        """
        ...

    def architecture_of_tensors(
        self, tensors: Mapping[str, Any], folder: epath.Path | None, *, dtype: str, **settings: Any
    ) -> Any:
        """`architecture_of` from the tensors of a folder of safetensors files, by name, in place of a tree."""
        ...

    def stored_layout(self, leaves: Mapping[str, Any], names: Iterable[str]) -> Layout:
        """The tensors of upstream's files for every leaf; families without such files need it only to export."""
        ...

    def build(self, architecture: Any, rows: Rows = None) -> nn.Module:
        """The model without parameters; ``rows`` is how a batch is split over devices."""
        ...

    def init_params(self, architecture: Any, rng: jax.Array) -> dict:
        """Fresh parameters, float32; under ``jax.eval_shape`` it is the parameter tree."""
        ...

    def lengths(self, architecture: Any, cameras: int | None = None) -> Lengths:
        """Chunk and prompt where nobody says otherwise: the checkpoint's, else upstream's.

        Args:
          architecture: of the model.
          cameras: how many there are, where prompts hold the images; the model's default if None.
        """
        ...

    def inputs(
        self, architecture: Any, lengths: Lengths, cameras: Sequence[str] | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model reads of one observation, without a batch axis; the one description of it.

        Args:
          architecture: of the model.
          lengths: chunk and prompt.
          cameras: those that are there; all of the model's if None.
        """
        ...

    def as_example(self, architecture: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Random arrays with the prompts that this model reads, where not any tokens will do."""
        ...

    def camera_names(self, architecture: Any) -> tuple[str, ...] | None:
        """The model's cameras, in the order in which it reads them; None where it reads any, sorted by name."""
        ...

    def robot_cameras(self, architecture: Any) -> tuple[str, ...] | None:
        """The names that a robot may give the model's cameras; None where any will do."""
        ...

    def any_size(self, architecture: Any) -> frozenset[str]:
        """Keys whose arrays may have any size, because the model does not read them."""
        ...

    def complete(self, architecture: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a ``.npz``, with what upstream would add to them where it is missing."""
        ...

    def without_unseen(self, architecture: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays without the cameras that no observation has, where that changes nothing but time."""
        ...

    def own_robot(self, architecture: Any) -> Robot | None:
        """The robot that the checkpoint itself describes, if it does."""
        ...

    def load_tokenizer(
        self, architecture: Any, path: str | None, assets: epath.Path | None, **settings: str | None
    ) -> Any:
        """The tokenizer of prompts: the file given, else the checkpoint's own, else upstream's.

        Args:
          architecture: of the model.
          path: of the tokenizer, if it was given.
          assets: the checkpoint's ``assets`` folder, if it has one.
          settings: where actions are tokens, ``fast_tokenizer``, the folder of theirs, if it was given.
        """
        ...

    def processing(
        self,
        architecture: Any,
        robot: Robot,
        norm_stats: Mapping[str, NormStats],
        tokenizer: Any,
        lengths: Lengths,
        *,
        state_in_prompt: bool | None = None,
    ) -> "Processing":
        """What stands between a robot and the model."""
        ...

    def draw(
        self, architecture: Any, rng: jax.Array, batch: Mapping[str, Leaf], samples: int = 1
    ) -> tuple[dict[str, Leaf], jax.Array]:
        """A training batch with noise and times as upstream draws them, and the key of its augmentation."""
        ...

    def fixed_draw(self, architecture: Any, batch: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Noise and times that are the same in every run and cover all noise levels; empty where none are drawn."""
        ...

    def frozen_rules(self, architecture: Any) -> tuple[tuple[str, bool], ...]:
        """What upstream does not train: (regular expression over a whole name, whether it is frozen), in order."""
        ...

    def frozen_rows(self, architecture: Any, leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Rows on axis 0 that upstream does not train of leaves that it trains otherwise; empty for most models.

        Args:
          architecture: of the model.
          leaves: parameters, or what has their shapes, by path.
        """
        ...

    def training_defaults(self, architecture: Any, steps: int) -> Mapping[str, Any]:
        """Upstream's settings of a run of so many steps, by the names of the flags of ``clp finetune``."""
        ...

    def norm_stats_of(
        self, folder: epath.Path, architecture: Any = None, robot: Robot | None = None
    ) -> dict[str, NormStats] | None:
        """The statistics in the checkpoint's own form, from the folder of its files; None if it has none.

        Args:
          folder: of the files.
          architecture: says which robot it is, where a checkpoint knows several.
          robot: says which parts of its vectors there are, where their statistics have names.
        """
        ...

    def known_robot(self, architecture: Any, robot: Robot, folder: epath.Path | None) -> Robot:
        """The robot with what the checkpoint's files say of the parts that it names."""
        ...

    def own_statistics(self, folder: epath.Path) -> Mapping[str, dict[str, NormStats]]:
        """Statistics in a file of upstream's that is no processor of lerobot's, by the robots that it names."""
        ...

    def side_files(self, folder: epath.Path | None, **changes: Any) -> dict[str, bytes]:
        """Contents of what a checkpoint needs beside its weights, by name; empty where weights are enough.

        Args:
          folder: where the files are now.
          changes: ``vlm_config``, ``tokenizer`` and ``embodiment`` as given on the command line; ``norm_stats``,
            ``depths`` and ``image_sizes`` in place of those in the files; ``robot``, whose statistics these are, and
            ``videos``, per camera height, width and rate of its pictures.
        """
        ...

    def augment(self, architecture: Any, key: jax.Array, inputs: Mapping[str, Leaf]) -> dict[str, Leaf]:
        """The inputs with images changed as upstream changes them in training."""
        ...

    def forward(
        self, model: Any, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates, capture: Capture = False
    ) -> tuple[Array, dict[str, TowerStates]]:
        """The output that the loss compares (velocity or logits), and the towers' states if captured."""
        ...

    def losses(self, model: Any, params: Tree, inputs: Mapping[str, Leaf], *, gates: Gates) -> Loss:
        """The family's own training loss, observation by observation."""
        ...

    def loss_of(self, architecture: Any, output: Array, inputs: Mapping[str, Leaf]) -> Loss:
        """The same of an output of `forward`."""
        ...

    def distance(self, architecture: Any, output: Array, other: AnyArray, inputs: Mapping[str, Leaf]) -> Loss:
        """How far an output is from another model's for the same inputs: `loss_of` with the other as target.

        Of logits it is the divergence from the other's probabilities. It is 0 where the two agree.
        """
        ...

    def error_weights(self, architecture: Any, inputs: Mapping[str, Leaf]) -> Float[Array, "b horizon adim"] | None:
        """w of a loss that is ``sum(w * (output - target)**2)`` for each observation; None for another loss."""
        ...

    def sample(
        self, model: Any, params: Tree, inputs: Mapping[str, Leaf], *, noise: Leaf | None, num_steps: int, gates: Gates
    ) -> Float[Array, "b horizon adim"] | Int[Array, "b steps"]:
        """Actions, normalised and padded; tokens where the architecture's actions are tokens, which need no noise."""
        ...

    def num_steps(self, architecture: Any) -> int:
        """Steps of sampling where nobody says otherwise: integrations from noise to actions, or tokens at most."""
        ...

    def why_no_actions(self, architecture: Any) -> str | None:
        """Why `sample` gives no actions; None where it does."""
        ...
