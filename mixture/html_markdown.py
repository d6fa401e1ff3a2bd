"""Answers that were saved as the HTML of a chat page, turned back into the Markdown that the page was made from."""

from __future__ import annotations

import re
from html.parser import HTMLParser

CHAT_HTML = '<div class="markdown'
"""How ChatGPT's page begins an answer; an answer that is itself a piece of HTML does not begin so."""

MARKS = {"strong": "**", "b": "**", "em": "*", "i": "*", "del": "~~", "s": "~~"}
BLOCKS = {"p", "div", "ul", "ol", "table", "blockquote", "hr", "section", "article"}
NOT_CONTENT = {"button", "script", "style", "svg"}
LANGUAGE_CLASS = re.compile(r"\blanguage-([\w+#.-]+)")
BLANK_LINES = re.compile(r"\n{3,}")


def is_chat_html(text: str) -> bool:
    """Whether the text is the HTML of an answer on a chat page."""
    return text.startswith(CHAT_HTML) or (text[:1].isspace() and text.lstrip().startswith(CHAT_HTML))


def markdown(html: str) -> str:
    """Headings, emphasis, code with its language, lists, tables, links and images of an HTML text as Markdown.

    A small converter with few rules, and not a library: the bytes of the data must not change with a version of one,
    and the header that the chat page puts above code (its language, a button to copy it) is known to nobody else.
    """
    reader = MarkdownReader()
    reader.feed(html)
    reader.close()
    return reader.text()


class MarkdownReader(HTMLParser):
    """Writes Markdown while it reads HTML."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.lists: list[int | None] = []
        """Open lists, outermost first: the number of the next item, None in a list without numbers."""
        self.links: list[str] = []
        self.skipped = 0
        """Depth inside tags whose text is no part of the answer."""
        self.in_code_block = False
        self.code: list[str] | None = None
        """Text of the code block that is open."""
        self.language = ""
        self.cells: list[str] | None = None
        self.cell_start = 0
        self.header_rows = 0

    def text(self) -> str:
        """What was written, with no more than one blank line between blocks."""
        return BLANK_LINES.sub("\n\n", "".join(self.pieces)).strip()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag in NOT_CONTENT:
            self.skipped += 1
        elif tag == "pre":
            self.in_code_block, self.code, self.language = True, None, ""
        elif tag == "code" and self.in_code_block:
            self.code = []
            found = LANGUAGE_CLASS.search(values.get("class", ""))
            self.language = found[1] if found else self.language
        elif self.in_code_block:
            return
        elif tag == "code":
            self.pieces.append("`")
        elif tag in MARKS:
            self.pieces.append(MARKS[tag])
        elif tag == "br":
            self.pieces.append("\n")
        elif tag in ("ul", "ol"):
            self.lists.append(int(values.get("start") or 1) if tag == "ol" else None)
            self.pieces.append("\n" if len(self.lists) > 1 else "\n\n")
        elif tag == "li":
            self.begin_item()
        elif re.fullmatch("h[1-6]", tag):
            self.pieces.append("\n\n" + "#" * int(tag[1]) + " ")
        elif tag == "a":
            self.links.append(values.get("href", ""))
            self.pieces.append("[")
        elif tag == "img":
            self.pieces.append(f"![{values.get('alt', '')}]({values.get('src', '')})")
        elif tag == "tr":
            self.cells = []
        elif tag in ("td", "th"):
            self.begin_cell()
        elif tag == "hr":
            self.pieces.append("\n\n---\n\n")
        elif tag == "blockquote":
            self.pieces.append("\n\n> ")
        elif tag in BLOCKS and not self.inside_item() and not (self.pieces and self.pieces[-1].endswith("> ")):
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in NOT_CONTENT:
            self.skipped = max(self.skipped - 1, 0)
        elif tag == "pre":
            self.end_code_block()
        elif self.in_code_block:
            return
        elif tag == "code":
            self.pieces.append("`")
        elif tag in MARKS:
            self.pieces.append(MARKS[tag])
        elif tag in ("ul", "ol"):
            if self.lists:
                self.lists.pop()
            self.pieces.append("" if self.lists else "\n\n")
        elif tag == "a" and self.links:
            self.pieces.append(f"]({self.links.pop()})")
        elif tag in ("td", "th") and self.cells is not None:
            self.cells[-1] = "".join(self.pieces[self.cell_start :]).strip()
            del self.pieces[self.cell_start :]
        elif tag == "tr" and self.cells is not None:
            self.end_row()
        elif tag == "table":
            self.header_rows = 0
            self.pieces.append("\n")
        elif tag in BLOCKS or re.fullmatch("h[1-6]", tag):
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if self.skipped:
            return
        if self.in_code_block:
            if self.code is not None:
                self.code.append(data)
            elif data.strip():  # the header of the page above the code: its language
                self.language = data.strip()
        elif data.strip():
            self.pieces.append(data if self.inside_text() else data.lstrip())
        elif self.inside_text() and "\n" not in data:
            self.pieces.append(data)

    def inside_text(self) -> bool:
        """Whether blanks at this place stand between words."""
        return bool(self.pieces) and not self.pieces[-1].endswith("\n") and not self.inside_new_item()

    def inside_item(self) -> bool:
        return bool(self.lists) and self.inside_new_item()

    def inside_new_item(self) -> bool:
        return bool(self.pieces) and bool(re.search(r"(?:^|\n)\s*(?:-|\d+\.) $", self.pieces[-1]))

    def begin_item(self) -> None:
        number = self.lists[-1] if self.lists else None
        if number is not None:
            self.lists[-1] = number + 1
        indent = "   " * (len(self.lists) - 1)
        line = "" if self.pieces and self.pieces[-1].endswith("\n") else "\n"
        self.pieces.append(f"{line}{indent}{'-' if number is None else f'{number}.'} ")

    def begin_cell(self) -> None:
        self.cells = [] if self.cells is None else self.cells
        self.cells.append("")
        self.cell_start = len(self.pieces)

    def end_row(self) -> None:
        assert self.cells is not None
        self.pieces.append("| " + " | ".join(self.cells) + " |\n")
        if not self.header_rows:
            self.pieces.append("|" + " --- |" * len(self.cells) + "\n")
        self.header_rows += 1
        self.cells = None

    def end_code_block(self) -> None:
        code = "".join(self.code or []).strip("\n")
        indent = "   " * len(self.lists)
        block = f"```{self.language}\n{code}\n```"
        lines = "\n".join(indent + line if line else line for line in block.split("\n"))
        self.pieces.append(f"\n\n{lines}\n\n" if not self.lists else f"\n{lines}\n")
        self.in_code_block, self.code = False, None
