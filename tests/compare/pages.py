"""A page taken apart: its elements, its tables and its text, by the parser of the standard library."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """`elements`: (tag, attributes) in order; `tables`: rows of cells' text; `text`: everything a person reads."""

    def __init__(self, file: Path):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.parts: dict[str, list[str]] = {"text": [], "style": [], "h1": [], "title": []}
        self.source = file.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        place = next((tag for tag in self.open if tag in self.parts), "text")
        self.parts[place].append(data)
        if any(tag in ("td", "th") for tag in self.open):
            row = self.tables[-1][-1]
            row[-1] = " ".join([*row[-1].split(), *data.split()])

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts["text"] + self.parts["h1"]).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, *starts: str) -> list[str]:
        """The first row whose cells start with these."""
        rows = [row for table in self.tables for row in table]
        return next(row for row in rows if all(cell.startswith(start) for cell, start in zip(row, starts)))
