"""Files that are written anew while people look at them."""

from etils import epath

from clp_jax.folders import is_remote


def write_whole(file: epath.Path, text: str) -> None:
    """Replace the content of a file: whoever opens it finds the old or the new, whole, also after a kill.

    Args:
      file: to write. Remote stores show nothing of a file before it is whole.
      text: its content.
    """
    if is_remote(file):
        file.write_text(text, encoding="utf-8")
        return
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
