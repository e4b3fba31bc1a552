"""Replace the functions of openpi that know a depth, verify the result, and undo it."""

import contextlib
import contextvars
import copy
import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from openpi_patches.depths import Depths, PatchError, depths_of_checkpoint, depths_of_params, depths_of_safetensors

ENVIRONMENT = "OPENPI_PRUNED_CHECKPOINT"
"""Names the checkpoint whose depth every model gets, like ``install(checkpoint=...)``."""

_BOUND = "_openpi_patches_weights"
_MODULES = {
    "gemma": "openpi.models.gemma",
    "gemma_fast": "openpi.models.gemma_fast",
    "siglip": "openpi.models.siglip",
    "model": "openpi.models.model",
    "pi0_config": "openpi.models.pi0_config",
    "pi0_fast": "openpi.models.pi0_fast",
    "gemma_pytorch": "openpi.models_pytorch.gemma_pytorch",
    "pi0_pytorch": "openpi.models_pytorch.pi0_pytorch",
    "config": "openpi.training.config",
    "weight_loaders": "openpi.training.weight_loaders",
    "download": "openpi.shared.download",
}

_logger = logging.getLogger(__name__)
_scope: contextvars.ContextVar[Depths | None] = contextvars.ContextVar("openpi_patches_depths", default=None)
_default: Depths | None = None
_undo: list[tuple[Any, str, Any]] = []


def install(checkpoint: str | os.PathLike[str] | None = None) -> None:
    """Patch the installed openpi. Calling it again only sets another default checkpoint.

    Args:
      checkpoint: whose depth models get that are built without weights (step folder, ``params``, or a folder with
        ``model.safetensors``); None takes ``$OPENPI_PRUNED_CHECKPOINT``, and without that the config's own weights.

    Raises:
      PatchError: no openpi is installed, it is not one that this module knows, or the checkpoint has no depth.
    """
    global _default  # noqa: PLW0603 - one openpi in one process
    openpi = _import_openpi()
    named = os.fspath(checkpoint) if checkpoint is not None else os.environ.get(ENVIRONMENT)
    default = depths_of_checkpoint(openpi["download"].maybe_download(named)) if named else None
    if not _undo:
        try:
            _replace_all(openpi)
            _verify(openpi)
        except BaseException:
            uninstall()
            raise
    _default = default


def uninstall() -> None:
    """Put openpi's own functions back."""
    global _default  # noqa: PLW0603
    _default = None
    while _undo:
        setattr(*_undo.pop())


def _import_openpi() -> dict[str, ModuleType]:
    try:
        importlib.import_module("openpi")
    except ModuleNotFoundError as error:
        raise PatchError("openpi is not installed for this Python; run this in openpi's environment.") from error
    modules = {}
    for short, name in _MODULES.items():
        try:
            modules[short] = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("openpi."):
                raise  # openpi is there, but not what it needs: its own message says more
            raise _unknown(f"it has no {name}") from error
    return modules


def _unknown(why: str) -> PatchError:
    return PatchError(
        f"this openpi is not one that openpi_patches knows ({why}); it knows commit 15a9616: check that out, or get a "
        "newer openpi_patches. Nothing was changed."
    )


def _replace_all(openpi: dict[str, ModuleType]) -> None:
    """Every replacement: where a depth is used, and where it becomes known."""
    _replace(openpi["gemma"], "get_config", _with_llm_depth)
    _replace(openpi["gemma_fast"], "get_config", _with_llm_depth)
    _replace(openpi["siglip"], "Module", _with_vision_depth)
    _replace(openpi["gemma_pytorch"], "PaliGemmaForConditionalGeneration", _with_torch_vision_depth)

    _replace(openpi["model"].BaseModelConfig, "load", _scoped_by_params)
    _replace(openpi["model"].BaseModelConfig, "load_pytorch", _scoped_by_file)
    _replace(openpi["pi0_config"].Pi0Config, "create", lambda create: _scoped_by_config(create, openpi))
    _replace(openpi["pi0_fast"].Pi0FASTConfig, "create", lambda create: _scoped_by_config(create, openpi))
    _replace(openpi["pi0_pytorch"].PI0Pytorch, "__init__", lambda init: _scoped_by_config(init, openpi, position=1))
    _replace(openpi["config"].TrainConfig, "__post_init__", lambda post: _bound_to_weights(post, openpi))
    for config in openpi["config"]._CONFIGS:  # those made before
        _bind(config, openpi)


def _replace(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    original = vars(owner).get(name)
    if original is None:
        raise _unknown(f"{getattr(owner, '__name__', owner)} has no {name}")
    _undo.append((owner, name, original))
    setattr(owner, name, wrap(original))


def _with_llm_depth(get_config: Callable) -> Callable:
    def get_pruned_config(variant: str) -> Any:
        config = copy.copy(get_config(variant))
        if depths := _current():
            config.depth = depths.llm
        return config

    return get_pruned_config


def _with_vision_depth(module: Callable) -> Callable:
    def pruned_module(num_classes: int | None = None, **sizes: Any) -> Any:
        depths = _current()
        return module(num_classes, **(sizes | {"depth": depths.vision} if depths else sizes))

    return pruned_module


def _with_torch_vision_depth(model: Callable) -> Callable:
    def pruned_model(config: Any) -> Any:
        if depths := _current():
            config.vision_config.num_hidden_layers = depths.vision
        return model(config=config)

    return pruned_model


def _scoped_by_params(load: Callable) -> Callable:
    def load_pruned(self: Any, params: Any, **options: Any) -> Any:
        with _depths(depths_of_params(params)):
            return load(self, params, **options)

    return load_pruned


def _scoped_by_file(load_pytorch: Callable) -> Callable:
    def load_pruned(self: Any, train_config: Any, weight_path: str) -> Any:
        with _depths(depths_of_safetensors(Path(weight_path))):
            return load_pytorch(self, train_config, weight_path)

    return load_pruned


def _scoped_by_config(build: Callable, openpi: dict[str, ModuleType], position: int = 0) -> Callable:
    """Around what builds a model from a config, given at that position: the depth of the weights bound to it."""

    def build_pruned(*args: Any, **options: Any) -> Any:
        config = args[position] if len(args) > position else options["config"]
        path = getattr(config, _BOUND, None)
        if path is None or _current() is not None:
            return build(*args, **options)
        with _depths(_depths_of_weights(path, openpi)):
            return build(*args, **options)

    return build_pruned


def _depths_of_weights(path: str, openpi: dict[str, ModuleType]) -> Depths | None:
    """What openpi itself will load; where it is gone (a resumed run does not read it again) nothing is known."""
    try:
        return depths_of_checkpoint(openpi["download"].maybe_download(path))
    except FileNotFoundError:
        _logger.warning("%s is gone: the model gets openpi's own depth; --pruned names another checkpoint.", path)
        return None


def _bound_to_weights(post_init: Callable, openpi: dict[str, ModuleType]) -> Callable:
    def post_init_and_bind(self: Any) -> None:
        post_init(self)
        _bind(self, openpi)

    return post_init_and_bind


def _bind(train_config: Any, openpi: dict[str, ModuleType]) -> None:
    """Lets a training config's model know where its weights come from; read only when the model is built."""
    loader, path = train_config.weight_loader, train_config.pytorch_weight_path
    if isinstance(loader, openpi["weight_loaders"].CheckpointWeightLoader):
        path = path or loader.params_path
    if path is None and not hasattr(train_config.model, _BOUND):
        return
    model = copy.copy(train_config.model)  # dataclasses.replace() would share it with a config of other weights
    object.__setattr__(model, _BOUND, path)
    object.__setattr__(train_config, "model", model)


def _current() -> Depths | None:
    return _scope.get() or _default


@contextlib.contextmanager
def _depths(depths: Depths | None) -> Iterator[None]:
    token = _scope.set(depths)
    try:
        yield
    finally:
        _scope.reset(token)


def _verify(openpi: dict[str, ModuleType]) -> None:
    """Builds abstract models of a depth that openpi does not have, and looks at their leading axes."""
    import flax.nnx as nnx
    import jax

    wanted = Depths(llm=3, vision=2)
    config = openpi["pi0_config"].Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy")
    with _depths(wanted):
        abstract: Any = nnx.state(nnx.eval_shape(config.create, jax.random.key(0)))
    found = depths_of_params(abstract.to_pure_dict())
    if found != wanted:
        raise _unknown(f"asked for {wanted}, it built {found}")
    if dataclasses.asdict(openpi["gemma"].get_config("gemma_2b"))["depth"] != 18:
        raise _unknown("its Gemma 2B has not 18 blocks")
