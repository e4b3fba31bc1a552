"""Steps of a run on disk, in openpi's layout: ``RUN/<step>/{params,train_state,assets}``, and our ``clp.json``.

Orbax writes asynchronously and from all hosts, into a temporary folder that is renamed when it is complete. As in
openpi, folder N holds the state after step N, whose counter says N + 1; ``params`` holds what inference wants (the
average if there is one) and ``train_state`` the rest.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import struct

from clp_jax.aliases import Leaf, Tree
from clp_jax.checkpoint.manifest import list_arrays, list_files
from clp_jax.checkpoint.orbax.checksums import check_item, listed_with_checksums
from clp_jax.checkpoint.orbax.chunks import PARAMS, TRAIN_STATE, stored_arrays
from clp_jax.checkpoint.orbax.params import files_beside
from clp_jax.checkpoint.orbax.spec import RECORD_FILE, fingerprint, read_item, translated
from clp_jax.checkpoint.record import read_record
from clp_jax.errors import InputError
from clp_jax.outputs import write_manifest
from clp_jax.training.state import TrainState
from clp_jax.trees import difference, flatten, unflatten

DELETED = ".deleted"
"""Folder in RUN into which an old step is moved before it is removed: a kill leaves no half step under its number."""
_VALUE = "value"
"""openpi's training ends the name of every parameter in it."""


@struct.dataclass
class _Stored:
    """The ``train_state`` item, with openpi's fields: either program restores what the other saved."""

    step: Leaf
    params: Leaf
    opt_state: Leaf
    model_def: Leaf = None
    ema_params: Leaf = None


class Steps:
    """The saved steps of a run.

    Args:
      folder: RUN; created if absent.
      write_assets: fills a step's ``assets`` folder (normalisation statistics).
      keep_period: keep the steps that this divides; of the others the newest alone. None keeps only the newest.
    """

    def __init__(
        self, folder: str | os.PathLike, *, write_assets: Callable[[epath.Path], None], keep_period: int | None = None
    ):
        self._write_assets = write_assets
        trees = {name: ocp.PyTreeCheckpointHandler() for name in (PARAMS, TRAIN_STATE)}
        self._manager = ocp.CheckpointManager(
            epath.Path(folder).resolve(),
            item_handlers=trees | {"assets": _Beside()},
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1,
                keep_period=keep_period,
                todelete_subdir=DELETED,
                create=True,
                async_options=ocp.AsyncOptions(timeout_secs=7200),
            ),
        )

        self._remove_old()

    @property
    def latest(self) -> int | None:
        """Number of the newest complete step; None without."""
        return self._manager.latest_step()

    def save(self, state: TrainState, record: Mapping[str, Any]) -> int:
        """Begin to save a state, after the save before it is complete; the state may be donated once this returns.

        Args:
          state: after at least one step.
          record: content of the step's ``clp.json``.

        Returns:
          The step's number.

        Raises:
          OSError: the save before failed; what was saved before that is whole.
        """
        number = int(state.step) - 1
        params, rest = _to_items(state)
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            train_state=ocp.args.PyTreeSave(rest),
            assets=_BesideSave(self._write_assets, record),
        )
        self.wait()
        with self._saving():
            self._manager.save(number, args=items, force=True)
        return number

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Read a state into the shapes, dtypes and shardings of ``abstract``.

        Raises:
          InputError: the step holds other names, shapes or dtypes (all are listed), or cannot be read.
        """
        items = dict(zip((PARAMS, TRAIN_STATE), _to_items(abstract), strict=True))
        for name, tree in items.items():
            _check(self._manager.directory / str(step) / name, tree)
        restore = {
            name: ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in items.items()
        }
        with translated(self._manager.directory / str(step)):
            found = self._manager.restore(step, args=ocp.args.Composite(**restore))
        return _from_items(found["params"], found["train_state"])

    def record(self, step: int) -> dict[str, Any]:
        """Content of a step's ``clp.json``.

        Raises:
          InputError: it has none: openpi saved it, and its settings and place in the data are unknown.
        """
        file = self._manager.directory / str(step) / RECORD_FILE
        if not file.exists():
            raise InputError(
                f"{file.parent} has no {RECORD_FILE}, so clp finetune did not save it and cannot go on where it ended; "
                f"begin another run with --checkpoint {file.parent}."
            )
        record = read_record(file)
        last, training = (record["steps"] or [{}])[-1], record.get("training") or {}
        if not isinstance(last.get("config"), dict) or not isinstance(training.get("position"), str):
            raise InputError(f"{file} does not say what the run was told or where it stands; resume from another step.")
        return record

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
          OSError: it failed; what was saved before is whole.
        """
        with self._saving():
            self._manager.wait_until_finished()
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove the steps that are no longer kept: before the next save needs their room, and at the end."""
        if jax.process_index() == 0 and (deleted := self._manager.directory / DELETED).exists():
            deleted.rmtree(missing_ok=True)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turn whatever Orbax's threads raise about a full disk and the like into one line."""
        try:
            yield
        except Exception as error:
            reason = str(error).split("[source locations=")[0].split("\n")[0].strip() or type(error).__name__
            steps = self._manager.all_steps(read=True)
            whole = f"step {max(steps)} is whole" if steps else "no step was saved before"
            raise OSError(f"a step could not be saved, {whole}; make room and go on with --resume: {reason}") from error

    def close(self) -> None:
        """Wait, and release Orbax's threads."""
        self._manager.close()


def saved_record(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Content of ``clp.json`` of a run's newest saved step; None without steps, or without the file in it."""
    run = epath.Path(folder).expanduser()
    steps = [int(child.name) for child in run.iterdir() if child.name.isdigit()] if run.is_dir() else []
    file = run / str(max(steps, default="")) / RECORD_FILE
    return read_record(file) if steps and file.exists() else None


def _to_items(state: TrainState) -> tuple[dict, _Stored]:
    """The trees of the items ``params`` and ``train_state``."""
    averaged = state.ema_params is not None
    rest = _Stored(
        step=state.step,
        params=_with_value(state.params) if averaged else {},
        opt_state=jax.tree.map(
            lambda x: _with_value(x) if isinstance(x, dict) else x,
            state.opt_state,
            is_leaf=lambda x: isinstance(x, dict),
        ),
    )
    return {"params": _with_value(state.ema_params if averaged else state.params)}, rest


def _from_items(params: Tree, rest: _Stored) -> TrainState:
    """The inverse of `_to_items`."""
    main, live = _without_value(params["params"]), rest.params and _without_value(rest.params)
    opt_state = jax.tree.map(
        lambda x: _without_value(x) if isinstance(x, dict) else x, rest.opt_state, is_leaf=lambda x: isinstance(x, dict)
    )
    return TrainState(rest.step, live or main, opt_state, main if live else None)


def _with_value(tree: Tree) -> dict:
    return unflatten({f"{path}/{_VALUE}": leaf for path, leaf in flatten(tree).items()})


def _without_value(tree: Tree) -> dict:
    return unflatten({path.removesuffix(f"/{_VALUE}"): leaf for path, leaf in flatten(tree).items()})


def _check(folder: epath.Path, tree: Any) -> None:
    """Compare with what is stored, which Orbax would cast without a word, and its bytes with their checksums."""
    with translated(folder):
        stored = stored_arrays(folder)
    found = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in stored.items()}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    expected = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    lines = difference(expected, found, dtypes=True)
    if lines:
        raise InputError(f"{folder} does not fit this run, {len(lines)} paths differ:\n  " + "\n  ".join(lines))
    with translated(folder):
        check_item(folder)


class _Beside(ocp.CheckpointHandler):
    """Writes a step's small files on the first host, the manifest last.

    Orbax finalizes items in the order in which they were registered, this one after those that hold arrays: in a thread
    of the first host, when all hosts have written, and before the step gets its name. So the checksums cost training no
    time, and a step has them or does not exist.
    """

    def save(self, directory: epath.Path, args: "_BesideSave") -> None:
        if jax.process_index() == 0:
            args.write_assets(directory)
            text = json.dumps(args.record, indent=2, allow_nan=False) + "\n"
            (directory.parent / RECORD_FILE).write_text(text)

    def finalize(self, directory: epath.Path) -> None:
        step = directory.parent
        list_arrays(
            step,
            arrays=listed_with_checksums(step / PARAMS),
            train_state=listed_with_checksums(step / TRAIN_STATE),
            fingerprint=fingerprint(read_item(step / PARAMS)),
        )
        list_files(step, files_beside(step))
        write_manifest(step, written_by="clp finetune")

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        raise NotImplementedError("the small files of a step are read directly")


@ocp.args.register_with_handler(_Beside, for_save=True)
@dataclasses.dataclass
class _BesideSave(ocp.args.CheckpointArgs):
    write_assets: Callable[[epath.Path], None]
    record: Mapping[str, Any]


@ocp.args.register_with_handler(_Beside, for_restore=True)
@dataclasses.dataclass
class _BesideRestore(ocp.args.CheckpointArgs):
    pass
