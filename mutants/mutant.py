"""What a deliberate fault is."""

from pathlib import Path
from typing import NamedTuple


class StaleError(Exception):
    """A fault no longer applies to the code."""


class Mutant(NamedTuple):
    """One fault and the tests that must notice it.

    Attributes:
      name: of the fault, unique.
      file: that holds it, relative to the repository.
      text: occurs exactly once in the file.
      replacement: stands in its place in the mutant.
      tests: arguments of pytest, node ids as a rule; one of their tests must fail.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    def apply(self, root: Path) -> None:
        """Put the fault into the copy of the repository at ``root``.

        Raises:
          StaleError: the text does not occur exactly once.
        """
        path = root / self.file
        source = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (found := source.count(self.text)) != 1:
            raise StaleError(f"its text occurs {found} times in {self.file}")
        path.write_text(source.replace(self.text, self.replacement), encoding="utf-8")


def faults(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """Several faults of one file that the same tests must notice.

    Args:
      file: as in `Mutant`.
      tests: arguments of pytest, separated by blanks.
      changes: name, text and replacement of each.

    >>> [mutant.name for mutant in faults("a.py", "tests/test_a.py", ("one", "1", "2"), ("plus", "+", "-"))]
    ['one', 'plus']
    """
    return [Mutant(name, file, text, replacement, tuple(tests.split())) for name, text, replacement in changes]
