"""Tables as Markdown, and the file that keeps them, one section for each part of the benchmarks."""

import dataclasses
import re
import textwrap


@dataclasses.dataclass
class Table:
    """A title, what was measured and how, and rows of cells under a header; or only a reason why not."""

    title: str
    about: str
    header: list[str] = dataclasses.field(default_factory=list)
    rows: list[list] = dataclasses.field(default_factory=list)

    def markdown(self):
        head = f"### {self.title}\n\n{wrapped(self.about)}\n"
        return head + (f"\n{grid(self.header, self.rows)}\n" if self.rows else "")


def wrapped(paragraph):
    return textwrap.fill(" ".join(paragraph.split()), 110, break_long_words=False, break_on_hyphens=False)


def missing(title, reason):
    return Table(title, f"Not measured: {reason}")


def grid(header, rows):
    """The one place where a Markdown table is drawn."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text(cell) for cell in line) + " |" for line in lines)


def text(cell):
    """Numbers with three digits, or with two behind the point; None where there is nothing."""
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    if cell and not 0.01 <= abs(cell) < 1e5:
        return f"{cell:.1e}"
    return f"{cell:.2f}" if abs(cell) < 100 else f"{cell:.0f}"


def section(name, facts, tables):
    """Everything under one `## name`: when and with what, then the tables."""
    return "\n".join([f"## {name}\n", wrapped(facts) + "\n", *(table.markdown() for table in tables)])


def replaced(document, name, new, order):
    """The document with one section new; sections stay in the given order."""
    head, *parts = re.split(r"^(?=## )", document, flags=re.MULTILINE)
    sections = {re.match(r"## (.*)", part)[1]: part.strip() + "\n" for part in parts}
    sections[name] = new.strip() + "\n"
    return "\n".join([head.strip() + "\n", *(sections[known] for known in order if known in sections)])
