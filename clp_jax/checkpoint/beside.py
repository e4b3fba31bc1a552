"""The files beside a checkpoint's arrays: statistics, tokenizers, configurations, and whether they are the same."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from clp_jax.checkpoint.opening import Spec
from clp_jax.checkpoint.orbax.spec import RECORD_FILE
from clp_jax.checkpoint.safetensors.folder import FolderSpec
from clp_jax.folders import files_below
from clp_jax.outputs import MANIFEST

_FOR_PEOPLE = (".md", ".html", ".png")
"""Endings of files with which nothing computes."""
_OF_TRAINING = (".pt", ".pth", ".bin", ".pkl")
"""Of files with which a training goes on, as Hugging Face's Trainer leaves them: gigabytes that no policy reads."""
_OF_ORBAX = "commit_success.txt"
"""Where Orbax says that it wrote a folder, and where that was: so it differs between any two steps."""
_PART = 2**20


def digests_beside(spec: Spec) -> dict[str, str]:
    """SHA-256 of every file that says what the numbers of a checkpoint mean, by its path in the checkpoint.

    What ``clp`` writes about itself (``clp.json``, the manifest), what is for people alone, what a training needs to
    go on and where Orbax wrote a step is left out. Memory holds a part of one file.

    Args:
      spec: the checkpoint; of openpi's form the files are those in ``assets``.

    Returns:
      64 hexadecimal digits each.
    """
    return {name: digest_of(file) for name, file in sorted(_files(spec).items())}


def digest_of(file: Path | epath.Path) -> str:
    """SHA-256 of a file, local or remote, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def differences_beside(here: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    """How the files beside two checkpoints differ.

    Args:
      here: of one, from `digests_beside`.
      there: of the other.

    Returns:
      Per file that is not the same "differs", "only here" or "only there".

    >>> differences_beside({"a": "1", "b": "2"}, {"a": "3", "c": "4"})
    {'a': 'differs', 'b': 'only here', 'c': 'only there'}
    """
    words = {(True, False): "only here", (False, True): "only there", (True, True): "differs"}
    names = sorted(here.keys() | there.keys())
    return {name: words[name in here, name in there] for name in names if here.get(name) != there.get(name)}


def _files(spec: Spec) -> Mapping[str, Path | epath.Path]:
    if not isinstance(spec, FolderSpec):
        if spec.assets is None:
            return {}
        step = spec.assets.parent
        files = (file for file in files_below(spec.assets) if file.name != _OF_ORBAX)
        return {file.relative_to(step).as_posix(): file for file in files}
    return {
        name: file
        for name, file in {"config.json": spec.path / "config.json", **spec.others}.items()
        if name not in (RECORD_FILE, MANIFEST) and is_read(Path(name))
    }


def is_read(file: Path | epath.Path) -> bool:
    """Whether a file in a folder of tensors says what they mean, not how they came to be or what people should know."""
    return not file.name.startswith((".", "LICENSE")) and file.suffix not in (*_FOR_PEOPLE, *_OF_TRAINING)
