"""The page of a report: valid, whole and alone, and nothing in it is taken for markup."""

import math
import re
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tinyllm import files
from tinyllm.errors import ConfigError
from tinyllm.sanity.page import curves, md, refuse, write_page
from tinyllm.sanity.report import Report, summary
from tinyllm.sanity.result import Check, Result, failed, passed, skipped, warned

EVIL = "<script>alert(1)</script> & \"|`*_a_ [b](c) 'd'"
VOID = {"meta", "br", "hr", "img", "link", "input"}
CURVE = ((0, 7.3), (1, math.nan), (2, 6.0), (3, math.inf), (4, 1.2))


def check(name: str, group: str) -> Check:
    def function(subject) -> Result:
        raise AssertionError("not to be called")

    function.__module__ = f"tinyllm.sanity.{group}"
    return Check(name, "", function)


@pytest.fixture
def report(make_run):
    """A report with every verdict, two curves of results, and odd text wherever there can be text."""
    run = make_run()
    evil = run.config.data.model_copy(update={"separator": EVIL + "\n```"})
    run = replace(run, config=run.config.model_copy(update={"data": evil}))
    results = {
        "token ids": ("data", passed("ids up to 1,535", "below 1,536")),
        "documents": ("data", skipped("not marked")),
        "learning rate": ("arithmetic", passed("up and down", curve=CURVE)),
        "overfit one batch": ("trainings", warned(EVIL, EVIL, EVIL, EVIL, curve=CURVE)),
        "short run": ("trainings", failed("worse\n- than before", "", "it unlearns", "mend it", curve=CURVE)),
        "no curve": ("cost", passed("1 GB", curve=((0, math.nan), (1, 2.0)))),
    }
    return Report(
        config="some/<run>.toml",
        run=run,
        checks=tuple(check(name, group) for name, (group, _) in results.items()),
        results=tuple(replace(result, name=name, seconds=0.1) for name, (_, result) in results.items()),
        quick=False,
        seconds=21.44,
        when=datetime(2026, 2, 3, 4, 5, tzinfo=UTC),
    )


class Reader(HTMLParser):
    """Raises for tags that do not match; keeps the tags, the ids and the text by the tag around it."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.text = [], Counter(), [], [], {}

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.text[tag] = self.text.get(tag, "") + data


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


def test_summary():
    one = {verdict: Result(verdict, "") for verdict in ("pass", "warn", "fail", "skip")}
    assert summary([one["pass"]]) == "1 passed"
    assert summary([one["skip"], one["fail"], *[one["pass"]] * 31]) == "31 passed, 1 failed, 1 skipped"
    assert summary([one["warn"]] * 2) == "2 to look at"


def test_the_html_is_whole_and_alone(report, tmp_path):
    write_page(report, tmp_path / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>\n")
    page = read(tmp_path / "page.html")
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert page.tags["svg"] == 3, "the learning rate, and two curves"
    assert all(count == 1 for count in Counter(page.ids).values()), "though there are three pictures"
    targets = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    targets += re.findall(r"url\((.*?)\)", text)
    assert all(target.startswith("#") and target[1:] in page.ids for target in targets), "nothing from elsewhere"
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 80_000


def test_the_html_says_what_was_found_and_takes_nothing_for_markup(report, tmp_path):
    write_page(report, tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert page.text["h1"] == "<run>.toml"
    assert "Not ready to train" in page.text["p"]
    assert "3 passed, 1 to look at, 1 failed, 1 skipped, in 21.4 s" in page.text["p"]
    assert page.text["time"] == "3 February 2026, 04:05"
    assert page.text["dd"].count(EVIL) == 2, "diagnosis and fix"
    assert page.text["td"].count(EVIL) == 2, "measured and expected"
    assert page.text["pre"].count("<script>") == 1
    assert "block_size = 16" in page.text["pre"]
    assert ("span", "aria-label", "failed") in page.attributes
    assert re.search(r"tinyllm \S+, Python 3\S+, PyTorch 2\S+", page.text["dd"])
    assert report.run.runtime.summary in page.text["dd"]


def test_a_good_report_is_ready(report, tmp_path):
    good = replace(report, checks=report.checks[:2], results=report.results[:2], quick=True)
    write_page(good, tmp_path / "page.HTML")
    page = read(tmp_path / "page.HTML")
    assert "Ready to train" in page.text["p"]
    assert "1 passed, 1 skipped of the quick checks" in page.text["p"]
    assert page.tags["svg"] == 1


def test_curves_are_drawn_as_far_as_they_are_finite(report):
    rate, overfit, short = curves(report)
    assert rate.name == "learning rate"
    assert [x for x, _ in rate.points] == list(range(20))
    assert overfit.points == short.points == [(0, 7.3), (2, 6.0), (4, 1.2)]


def test_the_markdown_has_its_pictures_beside_it(report, tmp_path):
    write_page(report, tmp_path / "my page.md")
    text = (tmp_path / "my page.md").read_text(encoding="utf-8")
    pictures = dict(re.findall(r"^!\[(.*?)\]\((.*?)\)$", text, re.M))
    assert pictures == {
        "learning rate": "my%20page-learning-rate.svg",
        "overfit one batch": "my%20page-overfit-one-batch.svg",
        "short run": "my%20page-short-run.svg",
    }
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"my page.md"} | {name.replace("%20", " ") for name in pictures.values()}
    for name in files - {"my page.md"}:
        ElementTree.parse(tmp_path / name)


def test_the_markdown_keeps_its_form(report, tmp_path):
    write_page(report, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text.startswith("# &lt;run>.toml\n\n**Not ready to train**: 3 passed, 1 to look at")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6 + 4, "titles, checks, groups"
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}
    assert "- **Measured:** worse - than before\n- **Diagnosis:** it unlearns\n- **Fix:** mend it\n" in text
    prose, config = text.split("````toml\n")  # one more than the config holds
    assert "<script>" not in prose
    config, rest = config.split("\n````\n")
    assert "<script>" in config
    assert rest == "\n</details>\n"


def test_markdown_is_escaped():
    assert md("a|b `c` *d* _e_ [f] ~g~ $h$ <i> &amp; \\") == (
        r"a\|b \`c\` \*d\* \_e\_ \[f\] \~g\~ \$h\$ " + r"&lt;i> &amp;amp; \\"
    )
    assert md("optim.grad_clip\n\n# x") == "optim.grad_clip # x", "in one line, and readable"


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(report, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_page(report, path)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["page.pdf", "page", "missing/page.md", "folder.html"])
def test_refusals(tmp_path, name):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError) as caught:
        refuse(tmp_path / name)
    assert caught.value.fix
    refuse(tmp_path / "page.html")
    refuse(tmp_path / "PAGE.MD")
