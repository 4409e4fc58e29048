"""What a browser would make of a report, for tests."""

import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """Tags with their attributes, and the text inside the innermost tag that was opened last."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.data: dict[str, str] = {}
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag != "script" else f"script {dict(attrs).get('type', '')}"

    def handle_data(self, data):
        self.data[self.inside] = self.data.get(self.inside, "") + data


def assert_self_contained(page: str) -> None:
    """Nothing is loaded, nothing of a user or a model is markup, the template is filled, the script writes text only."""
    read = Reader(page)
    assert not re.search(r"https?://|@import|url\(|//[a-z]+\.[a-z]", page)
    for tag, attrs in read.tags:
        assert not {"src", "href", "srcset", "data", "action", "poster"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
    assert [t for t, _ in read.tags].count("script") == 2  # the data and the page's own
    assert not re.search(r"\$[a-z{]", page)
    script = page[page.rindex("<script>") :]
    for word in ("innerHTML", "document.write", "insertAdjacentHTML"):
        assert word not in script
