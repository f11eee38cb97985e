"""What the report's file holds; test_report_browser.py looks at it."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from genrec_ext import cli, metrics
from genrec_ext.ops import sid_report
from genrec_ext.training import figures, report

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

USERS, ITEMS, LEVELS = 120, 300, 4


def made_up(path):
    """Writes a report of a run that never was: all three stages, long and awkward titles."""
    rng = np.random.default_rng(0)
    popularity = rng.permutation(np.arange(1, ITEMS + 1) ** -1.0)
    counts = rng.poisson(900 * popularity / popularity.sum())
    codes = np.stack([rng.integers(0, 16, ITEMS) for _ in range(LEVELS)], 1)
    targets = rng.choice(ITEMS, USERS)
    log, rows = [], {}
    for stage in ("sft", "bilevel", "rl"):
        start = 40.0 * ("sft", "bilevel", "rl").index(stage)
        for step in range(1, 21):
            line = {"stage": stage, "step": step, "seconds": start + 1.7 * step}
            log.append({**line, "loss": 9 / step + rng.random()})
            if stage == "rl":
                log[-1]["hit_rate"] = rng.random()
            if step % 5 == 0:
                log.append({**line, "valid": {"recall@10": 0.2 + 0.01 * step}})
                if stage == "bilevel":
                    told = {"step": step, "churn": 0.3 / step, "entropy_bits": [3.1, 3.6, 3.9]}
                    log.append({**line, "codes": told})
        items = np.argsort(-np.log(popularity) - 1.5 * rng.gumbel(size=(USERS, ITEMS)), 1)[:, :20]
        items[: USERS // 4, 3] = targets[: USERS // 4]
        histories = [rng.choice(ITEMS, 6) for _ in range(USERS)]
        rows[stage] = metrics.evaluate_rankings(
            items,
            targets,
            num_items=ITEMS,
            train_counts=counts,
            ks=(5, 10, 20),
            length=10,
            codes=codes,
            scores=-np.arange(20.0)[None] - rng.random((USERS, 20)),
            histories=histories,
        )
    search = {"prefix_survival": [0.9, 0.6, 0.5, 0.45], "pruned": [0.1, 0.3, 0.1, 0.05]}
    stages = {stage: {"test": {**test, **search}, "padding": 0.13} for stage, test in rows.items()}
    conflicts = {f"encoder.layers.{i}.weight": i / 6 for i in range(6)}
    stages["bilevel"]["codes"] = {"conflicts": conflicts}
    told = {
        "test": stages["rl"]["test"],
        "stages": stages,
        "ids": sid_report(torch.from_numpy(codes)),
        "baselines": {"popularity": rows["sft"], "covisitation": rows["bilevel"]},
        "best_possible": rows["rl"],
        "seconds": 1234.5,
        "config": {
            "name": "Office & <Home>",
            "sft": {"rate": 1e-3, "objective": "msl"},
            "level_sizes": [16] * LEVELS,
            "parameters": 123456,
            "genrec": "0.0",
            "torch": "2.0",
            "threads": 2,
            "seed": 0,
            "data": "/a/very/long/path/" + "folder" * 30,
        },
    }
    titles = [f"Item {i}, a title of an ordinary length" for i in range(ITEMS)]
    titles[0] = "<script>console.error('from a title')</script>"
    titles[1] = "Unbreakable" * 12
    titles[2] = "Quotes \" and ' and & — 日本語"
    examples = [
        report.Example([0, 1, 2], [3, 4, 5, 0, 1], 5),
        report.Example([7, 8], [9, 10, 11, 12, 13], 2),
    ]
    items = items[:, :10]
    report.write(path, told, log, items, counts, targets, codes, titles, examples)
    return path


class Elements(HTMLParser):
    """Every element with its attributes, and whether elements close in order."""

    VOID = {"meta", "path", "use", "br"}  # noqa: RUF012

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("report") / "report.html").read_text()


def test_the_file_needs_no_other(page):
    elements = Elements(page)
    assert not elements.open
    tags = [tag for tag, _ in elements.found]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    for _, attributes in elements.found:
        for name in ("href", "src", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith("#"), "only parts of the page itself"
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in page and "@import" not in page
    assert set(re.findall(r"url\(([^)]*)", page)) <= {f"#{i}" for i in ids_of(elements)}


def ids_of(elements):
    return [attributes["id"] for _, attributes in elements.found if "id" in attributes]


def test_pictures_share_no_names(page):
    elements = Elements(page)
    ids = ids_of(elements)
    assert len(ids) == len(set(ids)) > 10
    used = [a["xlink:href"][1:] for tag, a in elements.found if tag == "use"]
    assert used and set(used) <= set(ids)


def test_every_part_is_there(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Results", "Training", "Prefix survival", "Codebooks", "How the tokenizer moved",
        "Popularity of what is recommended", "Cold start", "Examples", "Configuration",
    ]  # fmt: skip
    labels = re.findall(r'<svg role="img" aria-label="(.*?)"', page)
    assert len(labels) == len(set(labels)) == page.count("<figcaption><b>") == 20
    for title in ("Loss of rl", "Level 4", "Conflicts", "By tenths of the catalogue"):
        assert title in labels
    assert "<h1>Office &amp; &lt;Home&gt;</h1>" in page
    assert "&lt;script&gt;console.error" in page and "日本語" in page
    assert page.count("<b>taken next</b>") == 1, "only the first user was hit"
    assert "sft.rate" in page and "0.001" in page
    for name in (*report.COLUMNS, "miscalibration@10", "popularity_lift@10", "rare_users"):
        assert name in page


def test_the_same_run_gives_the_same_file(page, tmp_path):
    assert made_up(tmp_path / "again.html").read_text() == page


def luminance(color):
    """WCAG 2.1's relative luminance."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def test_text_stands_out_in_both_schemes(page):
    roots = re.findall(r":root\{(.*?)\}", page)
    assert len(roots) == 2, "light and dark"
    for root in roots:
        color = dict(re.findall(r"--(\w+):(#\w+)", root))
        pairs = [("ink", under, 7) for under in ("page", "card", "hit")]
        pairs += [("grey", under, 4.5) for under in ("page", "card")]
        pairs += [(series, "page", 3) for series in ("blue", "orange", "green", "grey")]
        for over, under, least in pairs:
            light, dark = sorted((luminance(color[over]), luminance(color[under])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (over, under)


def test_popularity_shares_are_their_definition():
    rng = np.random.default_rng(1)
    recommended, targets = rng.integers(-1, 9, (20, 4)), rng.integers(0, 9, 20)
    counts = np.bincount(rng.integers(0, 9, 50), minlength=9)
    found = figures.popularity_shares(recommended, counts, targets)
    filled = [item for row in recommended.tolist() for item in row if item >= 0]
    for item in range(9):
        assert found["recommended"][item] == pytest.approx(filled.count(item) / len(filled))
        assert found["taken"][item] == pytest.approx(targets.tolist().count(item) / 20)
        assert found["training"][item] == pytest.approx(counts[item] / 50)
    nothing = figures.popularity_shares(np.full((2, 3), -1), counts, targets)
    assert nothing["recommended"].tolist() == [0] * 9


def test_a_run_that_did_little_has_a_report(tmp_path, monkeypatch):
    """One epoch, no lists drawn, texts in no catalogue."""
    lines = [f"{u} " + " ".join(str(1 + (u * 7 + i) % 40) for i in range(6)) for u in range(1, 31)]
    (tmp_path / "data.txt").write_text("\n".join(lines) + "\n")
    small = ["--epochs", "1", "--stages", "sft", "--set", "model.width=16"]
    arguments = ["train", "--data", str(tmp_path / "data.txt"), "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, *small]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "item 8" in page and "Loss of rl" not in page
    Elements(page)
