"""What README, BUILD and docs/ tell people to type exists: commands, flags, targets, extras, scripts, files."""

import dataclasses
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from clp_jax import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("studies/*/README.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

BLANKS = {"$BATCH": "32", "CHIPS": "16"}
"""What a reader fills in where a flag wants a number."""
OTHERS = {"git", "cd", "export", "gcloud", "source", "uv", "$EDITOR", "apt", "taskset", "on_all", "on_all()", "}"}
"""Programs that are not ours."""
OTHERS_FLAGS = {
    *(
        "--command",
        "--worker",
        "--no-deps",
        "--weight-loader",
        "--policy",
        "--exp-name",
        "--lora-full-model",
        "--pruned",
    ),
    *("--signal", "--targets", "--work", "--logdir", "--xla_backend_optimization_level"),
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib",
}
"""Flags of other programs, and of our own tools for developers, that pages mention in their sentences."""
JOINS = {"&&", "|", ";", "&", "||"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in the ``console`` blocks of a page, of nested and of joined ones too."""
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.strip().startswith("$ "):
                yield from simple_commands(line.strip()[2:])


def simple_commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(re.sub(r" > \S+", "", line), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in JOINS:
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words:
                yield words
            words = []
        else:
            if " clp " in f" {word} ".replace("/", " ") and " " in word:
                yield from simple_commands(word.split("=", 1)[-1] if word.startswith("--command=") else word)
            words.append(BLANKS.get(word, word))


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """Name and flags of a command of ours; None of another program."""
    if words[0].split("/")[-1] == "clp":
        return words[1], words[2:]
    if words[:3] == ["python", "-m", "clp_jax"]:
        return words[3], words[4:]
    if words[0] == "python" and words[1].startswith("scripts/"):
        launcher = ROOT / words[1]
        assert launcher.exists(), f"there is no {words[1]}"
        found = re.search(r'launch\("(.*)"\)', launcher.read_text())
        return (found[1], words[2:]) if found else None
    return None


def check_other(words: list[str]) -> None:
    """A command of another program must at least name targets, extras and modules that there are."""
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets, words
    elif program == "pip" or words[:3] == ["python", "-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = {name for word in rest for found in re.findall(r"\[(.*)\]", word) for name in found.split(",")}
        assert asked <= extras.keys(), words
    elif program == "python" and rest[0] == "-m":
        assert (ROOT / rest[1].replace(".", "/")).exists() or rest[1] in ("venv", "pytest", "twine"), words
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), words
    elif program == "python":
        assert (ROOT / rest[0]).exists(), words
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        for flag in (word for word in rest[1:] if word.startswith("--") and rest[0].startswith("scripts/")):
            field = flag[2:].replace("-", "_")
            assert f'"{flag}"' in source or f"\n    {field}: " in source, f"{rest[0]} has no {flag}"
    else:
        assert program in OTHERS, f"{words}: a program that no page had so far; add it to OTHERS if it is not ours"


@pytest.mark.parametrize("page", NAMES)
def test_the_commands_of_a_page_can_be_typed(page, capsys):
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        call = ours(words)
        if call is None:
            check_other(words)
        elif call[0].startswith("-"):
            assert call[0] in ("--help", "--version", "--tyro-print-completion"), words
        elif "--help" not in call[1]:
            try:
                cli.read_flags(*call)
            except (SystemExit, ValueError) as error:
                raise AssertionError(f"{shlex.join(words)}: {error} {''.join(capsys.readouterr())}") from None


def test_wrong_commands_would_be_found():
    found = list(commands("```console\n$ A=1 .venv/bin/clp prune --keep 0,1 \\\n    --out p && clp serve  # x\n```"))
    assert found == [[".venv/bin/clp", "prune", "--keep", "0,1", "--out", "p"], ["clp", "serve"]]
    nested = list(simple_commands('on_all "cd x && .venv/bin/clp finetune --batch-size $BATCH"'))
    assert [".venv/bin/clp", "finetune", "--batch-size", "32"] in nested
    with pytest.raises(AssertionError):
        check_other(["make", "coffee"])
    with pytest.raises(AssertionError):
        check_other(["pip", "install", ".[coffee]"])
    with pytest.raises(ValueError, match="--chekpoint"):
        cli.read_flags("serve", ["--chekpoint", "x"])


def test_flags_that_pages_mention_exist():
    known = {"--help", "--version", "--debug", "--tyro-print-completion"} | OTHERS_FLAGS
    for name in cli.COMMANDS:
        for field in dataclasses.fields(cli.config_class(name)):
            flag = field.name.replace("_", "-")
            known |= {f"--{flag}", f"--no-{flag}"}
    for page in NAMES:
        if page == "CHANGELOG.md" or page.startswith("studies"):
            continue
        prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        prose = re.sub(r"`(make|ARGS|pip|python -m pip|MUJOCO|tensorboard)[^`]*`|\(`ARGS=[^)]*\)|<!--.*?-->", "", prose)
        mentioned = {
            flag for code in re.findall(r"`([^`]*)`", prose) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        }
        assert mentioned <= known, f"{page} mentions flags that no command has"


def test_the_page_on_the_command_line_lists_every_command():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == cli.COMMANDS.keys()


@pytest.mark.parametrize("page", NAMES)
def test_commands_in_sentences_exist_with_their_flags(page):
    """`clp prune --heal` in a sentence is of `prune`, not of any command that has such a flag."""
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in re.findall(r"`([^`\n]*)`", prose):
        program, *words = code.split() or [""]
        if program == "make" and words:
            assert [word for word in words if word in targets], f"{code}: the Makefile has no such target"
        elif program == "clp" and words and not words[0].startswith("-") and words[0] not in ("COMMAND", "NAME"):
            assert words[0] in cli.COMMANDS, f"{code}: there is no such command"
            fields = {field.name.replace("_", "-") for field in dataclasses.fields(cli.config_class(words[0]))}
            flags = {word[2:].split("=")[0].removeprefix("no-") for word in words if word.startswith("--")}
            assert flags - {"help", "debug"} <= fields, f"{code}: clp {words[0]} has no such flag"


@pytest.mark.parametrize("page", NAMES)
def test_what_one_types_stands_in_blocks_that_are_read(page):
    blocks = re.findall(
        r"^ *```(\w*)\n(.*?)^ *```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for language, text in blocks:
        assert language in ("console", "json", "python", "text"), f"{page}: a block of {language!r}"
        assert language == "console" or not re.search(r"^\W*clp [a-z]", text, re.MULTILINE), f"{page}: {text}"


@pytest.mark.parametrize("page", NAMES)
def test_links_between_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)|src=\"([^\"]+)\"", text):
        link = "".join(target)
        if not re.match(r"\w+:", link):
            assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_readme_is_short_and_its_pictures_are_small():
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert len(words) < 700
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 200_000, picture


def test_the_pictures_are_drawn_by_a_command_that_can_be_typed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import make_pictures

    name, *flags = make_pictures.COMMAND
    cli.read_flags(name, [*flags, "--out", "x"])
    drawn = {f"{picture.replace('+', '_')}.png" for picture in make_pictures.PICTURES}
    assert drawn == {file.name for file in (ROOT / "docs" / "pictures").glob("*.png")}
    del sys.modules["make_pictures"]
