"""What a saved step holds beside its parameters, so that nothing else is needed to go on from it or to serve it."""

import os
from collections.abc import Callable

from etils import epath

from clp_jax.checkpoint import CheckpointSpec, Spec, copy_files
from clp_jax.checkpoint.orbax.spec import POLICY
from clp_jax.data import TrainingData
from clp_jax.folders import check_inside
from clp_jax.models import Architecture, family_of
from clp_jax.processing import norm_stats
from clp_jax.processing.tokenizer import FILE


def assets_writer(
    spec: Spec,
    architecture: Architecture,
    data: TrainingData,
    *,
    vlm_config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    embodiment: str | None = None,
) -> Callable[[epath.Path], None]:
    """Fills a step's assets: the statistics of the data, or those of a checkpoint whose normalised data it is.

    A tokenizer of the checkpoint's own goes with it, one of actions in any case, and below ``policy`` whatever else a
    loader will ask for. That is read now, for the source may be gone when a step is saved.

    Args:
      spec: the checkpoint that the run began from.
      architecture: of the trained model.
      data: what it is trained on.
      vlm_config: ``config.json`` of the vision-language model, or its folder, if it was given.
      tokenizer: the tokenizer's file or folder, if it was given.
      embodiment: which of the model's robots this is, if it was given.
    """
    if data.asset_id is not None:
        check_inside(data.asset_id, "--asset-id")
    beside = family_of(architecture).side_files(
        spec.folder,
        vlm_config=vlm_config,
        tokenizer=tokenizer,
        norm_stats=data.norm_stats,
        robot=None if data.conventions is None else data.conventions.robot,
        videos=data.videos,
        depths=architecture.depths,
        image_sizes=_image_sizes(data),
        **({} if embodiment is None else {"embodiment": embodiment}),
    )
    files = {f"{POLICY}/{name}": content for name, content in beside.items()} | dict(data.files)

    def write(folder: epath.Path) -> None:
        if data.norm_stats is not None and data.asset_id is not None:
            norm_stats.save(folder / data.asset_id, data.norm_stats)
            if spec.assets is not None and (own := spec.assets / FILE).exists():
                own.copy(folder / FILE)
        elif spec.assets is not None and isinstance(spec, CheckpointSpec):
            copy_files(spec.assets, folder)
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    return write


def _image_sizes(data: TrainingData) -> dict[str, tuple[int, int]]:
    """Height and width per camera, where the images are not what the model itself made of them."""
    row = data.read(data.rows[:1])
    images = {camera: row[f"image/{camera}"] for camera in data.cameras}
    return {camera: tuple(image.shape[1:3]) for camera, image in images.items() if image.dtype == "uint8"}
