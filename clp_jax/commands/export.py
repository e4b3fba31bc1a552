"""``clp export``: carry a checkpoint to where it runs."""

import dataclasses
from typing import Literal

from rich.console import Console
from rich.markup import escape

from clp_jax.checkpoint import Spec, read_spec
from clp_jax.commands.conventions import Told, choose_conventions
from clp_jax.commands.data_flags import named_stats
from clp_jax.commands.model_flags import ModelFlags
from clp_jax.commands.unused import refuse_unused
from clp_jax.export import Options, Target, Weights, export_checkpoint, unlike_target
from clp_jax.export.weights import Dtype
from clp_jax.loading import has_adapters, read_architecture, stored_tree
from clp_jax.models import Architecture, Lengths, family_of
from clp_jax.processing.conventions import Conventions
from clp_jax.provenance import conventions_of, trained_with
from clp_jax.trees import flatten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(ModelFlags):
    """Write a checkpoint for openpi, its PyTorch, lerobot, Isaac-GR00T or as StableHLO; read it back and compare."""

    checkpoint: str
    """Checkpoint, pruned or not: step folder of openpi or of a run (local or gs://), or a policy folder."""
    to: Target
    """Program for which the checkpoint is written."""
    out: str
    """Folder to create."""
    raw: bool = False
    """Export the weights that were being trained (train_state), not their moving average (EMA)."""
    dtype: Dtype | None = None
    """Dtype of the stored parameters. Default: each as it is for openpi and for a lerobot policy that may have several;
    else as they are if all agree, float32 if not."""
    activations: Dtype = "bfloat16"
    """StableHLO: dtype in which the program computes."""
    merge_lora: bool = False
    """openpi: multiply LoRA adapters into their weights (all other targets always do)."""
    openpi_config: str | None = None
    """Name of openpi's training configuration whose conventions the checkpoint has. Default: those that the run was
    trained with, else the released ones of this kind of model."""
    asset_id: str | None = None
    """lerobot: which norm stats, if the checkpoint of a π0 or π0.5 has several."""
    action_horizon: int | None = None
    """Actions of a chunk. Default: those that the run was trained with, else upstream's for this kind of model."""
    prompt_length: int | None = None
    """Prompt tokens, padding included. Default: as for --action-horizon."""
    num_steps: int | None = None
    """Integration steps of sampling. Default: the model's own number, 10 in openpi."""
    batch_size: int | None = None
    """StableHLO: fix the batch. Default: any."""
    platforms: str = "cpu,cuda,tpu"
    """StableHLO: where the program can run."""
    check: Literal["actions", "bits"] = "actions"
    """Compare what the models answer, or only the stored weights (a machine too small for the model)."""
    overwrite: bool = False
    """Replace --out if it exists."""


def run(config: Export) -> None:
    """Run the command."""
    _refuse_flags_of_other_targets(config)
    console = Console()
    spec = read_spec(config.checkpoint, live=config.raw)
    if spec.folder is not None:
        refuse_unused(config, ("asset_id",), "the checkpoint's own files hold its statistics, without a name")
    architecture = read_architecture(spec, dtype=config.activations, **config.model_settings())
    if not has_adapters(architecture):
        refuse_unused(config, ("merge_lora",), f"{config.checkpoint} has no LoRA adapters")
    told = Told(
        openpi_config=config.openpi_config,
        action_horizon=config.action_horizon,
        max_token_len=config.prompt_length,
        asset_id=config.asset_id,
    )
    conventions = choose_conventions(told, architecture, spec.plan_record).conventions
    if not _reads_statistics(config, spec):
        conventions = _with_statistics_of(spec, conventions)
    weights = Weights(spec, architecture, *_form(config, spec, architecture))
    options = Options(
        lengths=Lengths(conventions.action_horizon, conventions.max_token_len),
        num_steps=family_of(architecture).num_steps(architecture) if config.num_steps is None else config.num_steps,
        asset_id=conventions.asset_id,
        batch_size=config.batch_size,
        platforms=tuple(name.strip() for name in config.platforms.split(",")),
        run=config.check == "actions",
        conventions=conventions,
        assumed=_assumed_lengths(config, spec, conventions),
    )
    check = export_checkpoint(weights, config.to, config.out, options, overwrite=config.overwrite)
    _report(console, architecture, config)
    if conventions.robot is not None:
        console.print(f"Conventions: {conventions}", highlight=False, markup=False, soft_wrap=True)
    if options.assumed is not None:
        console.print(f"[yellow]assumed:[/] {escape(options.assumed)}", soft_wrap=True)
    for sentence in unlike_target(weights, config.to, conventions):
        console.print(f"[yellow]warning:[/] {escape(sentence)}", soft_wrap=True)
    console.print(str(check), highlight=False)
    if check.largest_difference is not None:
        console.print(f"Largest difference of the {escape(check.what)}: [bold]{check.largest_difference:.1e}[/]")
    else:
        console.print(f"[bold]Not compared:[/] {escape(f'{check.what}: {check.missing}')}")
    console.print(f"Export: [bold]{escape(config.out)}[/]")


def _assumed_lengths(config: Export, spec: Spec, conventions: Conventions) -> str | None:
    """Which lengths that go into the export neither the user nor the checkpoint said, in a sentence."""
    said = config.openpi_config is not None or spec.folder is not None
    if said or config.to == "openpi" or conventions_of(spec.plan_record) is not None:
        return None
    trained = trained_with(spec.plan_record)
    lengths = {
        "action_horizon": (config.action_horizon, f"chunks of {conventions.action_horizon} actions"),
        "max_token_len": (config.prompt_length, f"prompts of {conventions.max_token_len} tokens"),
    }
    unsaid = [text for name, (given, text) in lengths.items() if given is None and name not in trained]
    if not unsaid:
        return None
    return (
        f"{' and '.join(unsaid)}, upstream's default, for the checkpoint does not say how it was trained; "
        "--action-horizon and --prompt-length say otherwise."
    )


_OF_PROGRAMS = ("batch_size", "platforms", "activations")


def _refuse_flags_of_other_targets(config: Export) -> None:
    """Raise on flags that the target does not read, whatever the checkpoint is."""
    if config.to != "stablehlo":
        refuse_unused(config, _OF_PROGRAMS, f"--to {config.to} writes no program")
    if config.to != "lerobot":
        refuse_unused(config, ("asset_id",), f"--to {config.to} chooses no norm stats")
    if config.to != "openpi":
        refuse_unused(config, ("merge_lora",), f"--to {config.to} merges adapters anyway")


def _reads_statistics(config: Export, spec: Spec) -> bool:
    """Whether the export is made from statistics of a name, and refused where there are none."""
    return config.to == "lerobot" and spec.folder is None


def _with_statistics_of(spec: Spec, conventions: Conventions) -> Conventions:
    """The conventions; they name no statistics that the checkpoint does not have.

    What its own files hold has no name: it is called as it was in training.
    """
    found = {} if spec.assets is None else named_stats(spec.assets)
    if conventions.asset_id in found or (spec.folder is not None and not found):
        return conventions
    return dataclasses.replace(conventions, asset_id=None)


def _form(config: Export, spec: Spec, architecture: Architecture) -> tuple[bool, Dtype | None]:
    """Whether adapters are merged, and the one dtype of the parameters (None keeps each as it is)."""
    if config.to == "openpi":
        return config.merge_lora, config.dtype
    family = family_of(architecture)
    if config.to == "lerobot" and "lerobot" in family.TARGETS and not family.LEROBOT.ONE_DTYPE:
        return True, config.dtype
    stored = {leaf.dtype.name for leaf in flatten(stored_tree(spec, architecture)).values()}
    return True, config.dtype or ("bfloat16" if stored == {"bfloat16"} else "float32")


def _report(console: Console, architecture: Architecture, config: Export) -> None:
    blocks = ", ".join(f"{name} {depth}" for name, depth in architecture.depths.items())
    weights = "live weights" if config.raw else "weights"
    console.print(f"{architecture.kind} with blocks {blocks}; {weights} for {config.to}.")
