"""Our HTML pages as tests read them."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree


class Page(HTMLParser):
    """Rows of the tables by the table's class, each (is marked, texts of the cells); fails on unbalanced tags."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str | None] = []
        self.tables: dict[str, list[tuple[bool, list[str]]]] = {}
        self.table = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "table":
            self.table = str(found["class"])
        elif tag == "tr" and "tbody" in self.open:
            self.tables.setdefault(self.table, []).append((found.get("class") == "marked", []))
        elif tag == "td":
            self.tables[self.table][-1][1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open and "title" not in self.open:
            self.tables[self.table][-1][1][-1] += data

    def marked_blocks(self) -> list[int]:
        return [int(cells[0]) for marked, cells in self.tables["blocks"] if marked]


def svgs(text: str) -> list[ElementTree.Element]:
    """The figures of the page; they are well-formed XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<figure[^>]*>(<svg.*?</svg>)", text, re.DOTALL)]


def assert_self_contained(text: str) -> None:
    """The page is well-formed, names nothing twice, loads nothing, and is small."""
    ids = Page(text).ids
    assert len(ids) == len(set(ids)) > 0
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r"https?:|<link|<script|@import|\bsrc=|url\((?!#)", outside)
    assert len(text.encode()) < 2_000_000
