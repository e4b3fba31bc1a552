"""The pages of the site that are made of something else, and the links between docs/ and the rest of the repository.

A hook of mkdocs (see mkdocs.yml). Pages are made of files that stay where people look for them (README.md and so on),
of the dataclasses of the commands, of the public names, and of the notebook. A link that a page has in the repository
leads to the same place in the site; one that leads nowhere fails the build.
"""

import ast
import dataclasses
import inspect
import json
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import clp_jax
from clp_jax.cli import COMMANDS, WAYS, config_class

ROOT = Path(__file__).resolve().parent.parent
STUDY = "studies/metaworld"
ELSEWHERE = {
    "README.md": "index.md",
    "BUILD.md": "building.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    f"{STUDY}/README.md": "study/index.md",
    f"{STUDY}/RESULTS.md": "study/results.md",
    **{f"{STUDY}/plots/{name}.png": f"study/plots/{name}.png" for name in ("curves", "masks", "ratings")},
}
"""Files outside of docs/ that are in the site, by their path in the repository."""

NOTEBOOK = "docs/notebooks/clp.ipynb"
MODULES = (
    *("analysis", "cka", "similarity", "sensitivity", "healing", "plan", "planning", "prune", "sampling", "errors"),
    *("selection", "selection.evidence", "selection.result", "selection.twins", "selection.jumps", "selection.gates"),
    *("selection.baselines", "data", "data.calibration", "models", "models.family", "models.towers"),
)
"""Whose public names the page on modules lists."""

_PLACES = ELSEWHERE | {NOTEBOOK: "notebooks/clp.md"}
_LINK = re.compile(r"(?P<before>\]\(|src=\")(?P<target>[^)\s\"#:]+)(?P<after>[)#\"\s])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for source, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    made = {
        "notebooks/clp.md": _notebook(json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))),
        "reference/commands.md": _commands(),
        "reference/api.md": _public_names(),
        "reference/modules.md": _modules(),
    }
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links between places in the repository links between pages."""
    uri = page.file.src_uri
    source = next((path for path, place in ELSEWHERE.items() if place == uri), f"docs/{uri}")

    def relink(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        place = _PLACES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        target = link["target"] if place is None else posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return link["before"] + target + link["after"]

    # HTML is shown as it is: what <img> names is relative to the page's address, a folder below that of its file.
    markdown = _LINK.sub(relink, markdown)
    return markdown if uri.endswith("index.md") else markdown.replace('src="', 'src="../')


def _notebook(notebook: dict[str, Any]) -> str:
    """The cells and their saved outputs as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f"![Picture drawn by the code above](data:image/png;base64,{picture})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    """Every flag of every command, as `clp COMMAND --help` has them."""
    parts = ["# Flags of every command\n\nMade of the same dataclasses that `clp COMMAND --help` shows."]
    for way, commands in WAYS.items():
        parts.append(f"## {way}")
        for name in commands:
            flags = config_class(name)
            parts += [f"### clp {name}", inspect.cleandoc(flags.__doc__ or COMMANDS[name]), _table(flags)]
    return "\n\n".join(parts) + "\n"


def _table(flags: type) -> str:
    """One line for each flag, the required ones first."""
    fields = dataclasses.fields(flags)
    fields = sorted(fields, key=lambda field: field.default is not dataclasses.MISSING)
    texts = _docs_of(flags)
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in fields:
        name = field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        flag = f"--no-{name}" if field.default is True and field.type is bool else f"--{name}"
        flag = name.upper() if "Positional" in str(field.type) else flag
        default = "required" if required else _value(field.default)
        meaning = " ".join(texts[field.name].split()) + _choices(field.type)
        lines.append(f"| `{flag}` | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _value(default: Any) -> str:
    if default is None or default == () or isinstance(default, bool):
        return ""
    return " ".join(f"`{one}`" for one in (default if isinstance(default, tuple) else (default,)))


def _choices(annotation: Any) -> str:
    """The words that a flag takes, where they are few."""
    kinds = [annotation, *get_args(annotation)]
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind) if word is not None]
    return f" Choices: {', '.join(f'`{word}`' for word in words)}." if len(words) > 1 else ""


def _docs_of(flags: type) -> dict[str, str]:
    """The text below each field of a dataclass and of those that it is made of."""
    texts: dict[str, str] = {}
    for cls in reversed(flags.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = str(text.value.value)
    return texts


def _public_names() -> str:
    """What `import clp_jax` gives, by the module that it lives in."""
    homes: dict[str, list[str]] = {}
    for name, home in clp_jax._HOME.items():
        homes.setdefault(f"clp_jax.{home}", []).append(name)
    parts = ["# Public names\n\nWhat `import clp_jax` gives. [As a library](../library.md) shows how they go together."]
    for module, names in sorted(homes.items()):
        parts += [f"## {module}", *(f"::: {module}.{name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def _modules() -> str:
    parts = ["# Modules\n\nThe parts that people build on, without the [public names](api.md)."]
    for module in MODULES:
        elsewhere = "|".join(name for name, home in clp_jax._HOME.items() if home == module) or "_"
        options = f"    options:\n      show_root_heading: false\n      filters: ['!^_', '!^({elsewhere})$']"
        parts += [f"## clp_jax.{module}", f"::: clp_jax.{module}\n{options}"]
    return "\n\n".join(parts) + "\n"
