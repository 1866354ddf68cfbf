"""The report in a real browser: no error on the console, and every picture shows."""

import json
import re
import shutil
import subprocess

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=3000",
)
# Added to a copy of the page: after loading, writes the size of every picture and every error into the document.
PROBE = """
<script>
const errors = [];
addEventListener("error", e => errors.push(String(e.message || e.target.outerHTML.slice(0, 80))), true);
addEventListener("load", () => {
  const images = [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]);
  const box = document.createElement("pre");
  box.id = "probe";
  box.textContent = JSON.stringify({images, errors, page: document.documentElement.scrollWidth, view: innerWidth});
  document.body.append(box);
});
</script>
"""


@pytest.fixture(scope="module")
def browser():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return pytest.skip("no browser: install chromium to have the report rendered")


def render(browser, path, profile, width):
    """The document as the browser has it after loading, and what it wrote to its console."""
    command = [
        browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},1400", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(("task", "width"), [("regression", 1200), ("multiclass", 500)])
def test_every_picture_shows_and_the_console_is_silent(browser, make_report, tmp_path, task, width):
    page = make_report(task)
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / "probe.html"
    copy.write_text(text.replace("</head>", PROBE + "</head>"), encoding="utf-8")
    document, console = render(browser, copy, tmp_path / "profile", width)
    assert console == []
    seen = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL).group(1))
    assert seen["errors"] == []
    assert len(seen["images"]) == text.count("<img ")
    for complete, natural, shown in seen["images"]:
        assert complete
        assert natural > 300
        assert 200 < shown <= max(width, 640)  # on a telephone pictures keep their size and scroll in their frames
    assert seen["page"] <= seen["view"]  # the page itself never scrolls sideways, only its tables do


def test_the_probe_sees_a_broken_picture_and_an_error(browser, tmp_path):
    """The test above can fail: a page with a broken picture and a script error is caught."""
    page = tmp_path / "broken.html"
    bad = '<img src="data:image/png;base64,AAAA"><script>console.error("loud"); missing()</script>'
    page.write_text(f"<!DOCTYPE html><html><head>{PROBE}</head><body>{bad}</body></html>", encoding="utf-8")
    document, console = render(browser, page, tmp_path / "profile", 800)
    seen = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL).group(1))
    assert seen["images"][0][1] == 0
    assert any("missing" in text for text in seen["errors"])
    assert any("loud" in line for line in console)
