"""The report page as text: whole, self-contained, and faithful to the rows it was made of."""

import base64
import re
from html.parser import HTMLParser

import pytest

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for found, attrs in self.tags if found == tag]


@pytest.fixture(params=["regression", "binary", "multiclass"], scope="module")
def page(request, make_report):
    return request.param, make_report(request.param).read_text(encoding="utf-8")


def test_page_is_whole_and_holds_everything_itself(page):
    """Tags nest, nothing is fetched, every picture is an embedded PNG with words for those who cannot see it."""
    task, text = page
    parsed = Page(text)
    assert not parsed.all("script")
    addresses = [v for _, attrs in parsed.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data")]
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import", text)
    pictures = parsed.all("img")
    assert len(pictures) == (4 if task == "regression" else 2)
    for picture in pictures:
        content = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) > 3000
        assert "calm, wild" in picture["alt"]
        assert 200 < int(picture["width"]) < 1200


def test_page_tells_data_scores_and_diagnostics(page):
    task, text = page
    words = " ".join(" ".join(Page(text).text).split())
    assert "toy <&> set: 2 posteriors compared" in words
    assert "toy <&> set: 60 rows, 2 inputs" in words
    assert "2, 20 test points each" in words
    assert ": engine calm" in words
    assert "NumericalWarning: jitter had to grow to 1e-4" in words
    assert "How to read this" in words
    columns = {"regression": ("RMSE", "NLPD", "CRPS", "coverage 95%")}.get(task, ("accuracy", "NLL", "Brier", "ECE"))
    assert all(column in words for column in columns)
    assert "1.010" in words  # R-hat
    assert " 90 " in words  # the smallest ESS of those listed
    assert text.count('class="best"') >= 4
    assert "nan" not in words.lower().replace("finance", "")


def test_an_engine_that_failed_is_shown_with_its_message(make_report):
    words = "".join(Page(make_report(engines=("calm", "sick"), fail=("sick",)).read_text(encoding="utf-8")).text)
    assert "failed on 2 of 2" in words
    assert "it must not be <asked> to fail" in words


def test_a_report_without_any_success_still_stands(make_report):
    text = make_report(engines=("calm", "sick"), fail=("sick", "calm")).read_text(encoding="utf-8")
    parsed = Page(text)
    assert not parsed.all("img")
    assert "failed on 2 of 2" in "".join(parsed.text)


def test_nothing_of_matplotlib_remains_behind(make_report):
    """No pyplot, no changed settings, no figures kept."""
    import sys

    import matplotlib as mpl

    had_pyplot, before = "matplotlib.pyplot" in sys.modules, mpl.rcParams.copy()
    make_report(num_splits=1)
    assert mpl.rcParams.copy() == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
