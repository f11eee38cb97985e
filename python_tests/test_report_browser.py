"""The report in a browser: nothing fails, every figure is drawn, and it can be read at both widths.

Needs Debian's chromium, or another Chromium on the path, and the package playwright.
"""

import io
import shutil

import numpy as np
import pytest
from test_report import made_up

playwright = pytest.importorskip("playwright.sync_api")
image = pytest.importorskip("matplotlib.image")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path")

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip

# What a reader sees of each text: its size in pixels, scaled as the figure that it stands in is.
SIZES = """() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), parent = walk.currentNode.parentElement;
    if (!text || !parent.getClientRects().length) continue;
    const at = parent.getScreenCTM ? parent.getScreenCTM() : {a: 1, b: 0};
    found.push([text, parseFloat(getComputedStyle(parent).fontSize) * Math.hypot(at.a, at.b)]);
  }
  return found;
}"""
# Each figure's size, and its texts' boxes relative to it.
FIGURES = """() => [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim()).map(t => {
    const box = t.getBoundingClientRect();
    return [t.textContent.trim(), box.left - frame.left, box.top - frame.top,
            box.right - frame.left, box.bottom - frame.top];
  });
  const images = [...figure.querySelectorAll('img')].map(image => image.naturalWidth);
  const content = svg.getBBox();
  return {title: svg.getAttribute('aria-label'), width: frame.width, height: frame.height,
          left: frame.left, top: frame.top + scrollY,
          content: [content.width, content.height], boxes, images};
})"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(
    params=[(1280, "light"), (390, "light"), (390, "dark")], ids=lambda p: f"{p[0]}-{p[1]}"
)
def opened(request, browser, report_file):
    """(page with everything unfolded, width, scheme); what went wrong fails the test at its end."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong, asked = [], []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page, width, scheme
    page.close()
    assert wrong == [] and asked == [report_file.as_uri()]


def test_the_page_does_not_scroll_sideways(opened):
    page, width, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Tables do, within themselves, where they are too wide.
    tables = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(s => [s.scrollWidth, s.clientWidth, "
        "s.getBoundingClientRect().right])"
    )
    assert len(tables) == 4 and all(right <= width for _, _, right in tables)
    assert any(inner > outer for inner, outer, _ in tables) == (width == 390) or width == 1280


def test_text_is_large_enough(opened):
    page, _, _ = opened
    sizes = page.evaluate(SIZES)
    assert len(sizes) > 300
    small = [(text, size) for text, size in sizes if size < 12]
    assert small == []


def test_every_figure_is_drawn(opened):
    page, width, scheme = opened
    shown = page.evaluate(FIGURES)
    assert len(shown) == 20
    series = page.evaluate(
        "['blue','orange','green','grey'].map(n => getComputedStyle(document.documentElement)"
        ".getPropertyValue('--' + n))"
    )
    series = np.array([[int(c.strip()[i : i + 2], 16) for i in (1, 3, 5)] for c in series])
    picture = image.imread(io.BytesIO(page.screenshot(full_page=True)))[..., :3] * 255
    for each in shown:
        title = each["title"]
        assert 250 < each["width"] <= width and each["height"] > 120, title
        assert min(each["content"]) > 0 and all(each["images"]), title
        for text, left, top, right, bottom in each["boxes"]:
            inside = left > -2 and top > -2
            inside &= right < each["width"] + 2 and bottom < each["height"] + 2
            assert inside, (title, text)
        left, top = round(each["left"]), round(each["top"])
        pixels = picture[top:, left:][: round(each["height"]), : round(each["width"])]
        near = np.abs(pixels[:, :, None] - series).max(-1).min(-1) < 24
        assert near.sum() > 100, f"{title}: nothing of its series is to be seen"
        ground = pixels[2, 2].mean()
        assert (ground > 200) == (scheme == "light"), title


def test_texts_of_a_figure_do_not_cover_each_other(opened):
    page, _, _ = opened
    for each in page.evaluate(FIGURES):
        boxes = each["boxes"]
        assert len(boxes) >= 5, each["title"]
        for i, (a, *one) in enumerate(boxes):
            for b, *other in boxes[:i]:
                over = min(one[2], other[2]) - max(one[0], other[0])
                down = min(one[3], other[3]) - max(one[1], other[1])
                assert over < 2 or down < 4, (each["title"], a, b)


def test_the_checks_can_fail(browser, tmp_path):
    """A page that is wrong in each way that the others look for."""
    page = browser.new_page(viewport={"width": 390, "height": 900})
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    (tmp_path / "wrong.html").write_text(
        "<body><img src=missing.png><div style='width:500px'>wide</div><p style='font-size:9px'>"
        "small</p><figure><svg aria-label=x width=300 height=200 viewBox='0 0 600 400'>"
        "<text x=10 y=50 style='font-size:20px'>a</text><text x=-50 y=90>b</text></svg></figure>"
    )
    page.goto((tmp_path / "wrong.html").as_uri())
    assert len(wrong) == 1 and "ERR_FILE_NOT_FOUND" in wrong[0]
    assert page.evaluate("document.documentElement.scrollWidth") > 390
    sizes = dict(page.evaluate(SIZES))
    assert sizes["small"] == 9 and sizes["a"] == pytest.approx(10)
    (shown,) = page.evaluate(FIGURES)
    assert shown["boxes"][1][1] < -2
    page.close()
