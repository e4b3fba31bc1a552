"""Flags that say of a model what neither its weights nor the files beside them tell."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What a checkpoint does not tell."""

    lora_scale: float | None = None
    """alpha / rank of LoRA adapters on attention, those of --lora or of the checkpoint. If absent, that of the run that
    trained them; else 1, as in openpi's variants, and 16 / rank for GR00T, as in NVIDIA's script."""
    vlm_config: str | None = None
    """Folder or config.json of the vision-language model, for checkpoints that name it without holding it (SmolVLA,
    GR00T): heads, image token and the like."""

    embodiment: str | None = None
    """Which of the model's robots this is, by upstream's tag (gr1, so100, new_embodiment, ...) or number; else the only
    one that the checkpoint has statistics of (GR00T)."""
    cameras: tuple[str, ...] | None = None
    """Names of the cameras of model-ready observations, for models that read any (GR00T)."""

    def model_settings(self) -> dict[str, Any]:
        """The flags by the names of ``load_model``; None leaves a setting to the model."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelFlags)}
