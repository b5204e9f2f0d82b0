"""Reports as a page: what is in it, that it is well-formed, and that it needs nothing else."""

import dataclasses
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

pytest.importorskip("tqdm", reason="mlloss_cuda.xmc needs tqdm")

from mlloss_cuda.xmc import GeneratorSettings, Settings, cli, fit, generate, write_dataset
from mlloss_cuda.xmc.charts import Bar, Line, Part, bar_chart, line_chart
from mlloss_cuda.xmc.cli import main
from mlloss_cuda.xmc.html_report import (
    CURVES,
    NOTHING,
    html_report,
    is_html,
    read_reports,
    write_html_report,
)
from mlloss_cuda.xmc.report import label_frequency, make_report, write_report

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = GeneratorSettings(train_rows=300, test_rows=100, num_features=200, num_labels=50)
QUICK = Settings(loss="sigmoid", epochs=3, hidden=16, batch_size=64)
NASTY = '<b>&"x.txt'


@pytest.fixture(scope="module")
def trained():
    """The report of an ensemble with scores after every epoch; tests change copies."""
    train, test = generate(SIZES)
    settings = dataclasses.replace(QUICK, ensemble=2)
    classifier = fit(train, settings, evaluate_on=test, progress=False)
    return json.dumps(make_report(classifier, train, test, classifier.evaluate(test)))


@pytest.fixture
def report(trained):
    return json.loads(trained)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, dataset in zip(("train", "test"), generate(SIZES), strict=True):
        write_dataset(folder / f"{name}.txt", dataset)
    return folder


class Page(html.parser.HTMLParser):
    """A page in parts; fails where elements are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        # HTML forgives; that a parser of XML reads the same leaves nothing to be forgiven.
        root = ElementTree.fromstring(text)
        assert [element.tag for element in root.iter()] == self.tags
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):  # <path ... /> is its own end
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def tables(text):
    """The rows of every table, as lists of texts."""
    root = ElementTree.fromstring(text)
    return [
        [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
        for table in root.iter("table")
    ]


def rows(text):
    return [row for table in tables(text) for row in table]


def charts(text):
    return [svg for svg in ElementTree.fromstring(text).iter("svg") if svg.get("role") == "img"]


# ---- The page ------------------------------------------------------------------------------------


def test_scores_are_those_of_the_report(report):
    text = html_report([report])
    page = Page(text)
    for name in ("P@1", "P@3", "P@5", "PSP@5"):
        assert f"{name} {report[name]:.2f} %" in page.text
    assert "sigmoid on arrays" in page.text
    assert "Trained on 300 rows, 200 features, 50 labels; tested on 100 rows" in page.text
    metrics = next(table for table in tables(text) if table[0][0] == "metric")
    assert metrics[0] == ["metric", "k = 1", "k = 3", "k = 5", ""]
    found = {
        f"{metric.replace('@k', f'@{k}')}": value
        for metric, *values, _ in metrics[1:]
        for k, value in zip((1, 3, 5), values, strict=True)
    }
    expected = {name: f"{score:.2f}" for name, score in report.items() if "@" in name}
    assert found == expected


def test_sizes_settings_and_versions(report):
    page = Page(html_report([report]))
    for name, value in report["sizes"].items():
        assert f"{name.replace('_', ' ')} {value:,}" in page.text
    chosen, _, every = page.text.partition("All settings")
    assert "different from the defaults" in chosen
    for name in ("epochs", "hidden", "ensemble"):
        assert f"{name} {report['settings'][name]} {getattr(Settings, name)}" in chosen
    assert f"dropout {Settings.dropout}" not in chosen
    for name in report["settings"]:
        assert name in every
    assert f"torch {torch.__version__}" in every
    assert "build native" in every


def test_curves_have_a_line_for_each_model(report):
    text = html_report([report])
    page = Page(text)
    assert "model 1" in page.text
    assert "model 2" in page.text
    titles = [chart.findtext("title") for chart in charts(text)]
    wanted = [f"{name} after each epoch" for name in CURVES]
    assert titles[: len(CURVES) + 1] == ["Training loss by epoch", *wanted]
    for chart in charts(text)[: len(CURVES) + 1]:
        assert sum(g.get("class", "").startswith("line") for g in chart.iter("g")) == 2
        assert len(list(chart.iter("circle"))) == 6
    numbers = next(table for table in tables(text) if table[0][:2] == ["model", "epoch"])
    assert [row[:3] for row in numbers[1:]] == [
        [str(epoch["member"]), str(epoch["epoch"]), f"{epoch['loss']:.4f}"]
        for epoch in report["epochs"]
    ]
    column = numbers[0].index("PSP@3")
    assert [row[column] for row in numbers[1:]] == [f"{e['PSP@3']:.2f}" for e in report["epochs"]]


def test_one_epoch_without_scores(report):
    report["epochs"] = [{"member": 1, "epoch": 1, "loss": 2.5, "seconds": 0.1}]
    text = html_report([report])
    titles = [chart.findtext("title") for chart in charts(text)]
    assert "Training loss by epoch" in titles
    assert not any("after each epoch" in title for title in titles)
    assert ["1", "2.5000", NOTHING, "0.10"] in next(t for t in tables(text) if t[0][0] == "epoch")
    assert "model 1" not in Page(text).text


@pytest.mark.parametrize("missing", [None, math.nan])
def test_scores_that_are_not_defined(report, missing):
    for name in list(report):
        if "@" in name:
            report[name] = missing
    for epoch in report["epochs"]:
        epoch["PSP@5"] = missing
    text = html_report([report])
    assert "nan" not in Page(text).text
    metrics = next(table for table in tables(text) if table[0][0] == "metric")
    assert all(row[1:4] == [NOTHING] * 3 for row in metrics[1:])
    titles = [chart.findtext("title") for chart in charts(text)]
    assert "P@5 after each epoch" in titles
    assert "PSP@5 after each epoch" not in titles


def test_a_line_passes_over_epochs_without_the_score(report):
    report["epochs"][1]["P@1"] = None
    chart = charts(html_report([report]))[1]
    assert chart.findtext("title") == "P@1 after each epoch"
    assert len(list(chart.iter("circle"))) == 5


def test_head_torso_and_tail(report):
    text = html_report([report])
    chart = next(c for c in charts(text) if "head, torso and tail" in c.findtext("title"))
    widths = [float(rect.get("width")) for rect in chart.iter("rect") if rect.get("width")]
    shares = [report[f"P@{k} {g}"] for k in (1, 3, 5) for g in ("head", "torso", "tail")]
    shares = [share for share in shares if share > 0]
    assert widths == pytest.approx([w * widths[0] / shares[0] for w in shares], abs=0.2)
    for group, facts in report["label_frequency"]["groups"].items():
        between = f"{facts['fewest_rows']:,} to {facts['most_rows']:,}"
        assert [group, f"{facts['labels']:,}", between] in rows(text)


def test_label_frequency():
    counts = torch.tensor([100, 0, 1, 2, 3, 4, 90, 0, 80])
    facts = label_frequency(counts)
    assert facts["never_seen"] == 2
    assert [entry["rows"] for entry in facts["histogram"]] == [
        [0, 0], [1, 1], [2, 3], [4, 7], [8, 15], [16, 31], [32, 63], [64, 127]
    ]  # fmt: skip
    assert [sum(entry["labels"].values()) for entry in facts["histogram"]] == [
        2, 1, 2, 1, 0, 0, 0, 3
    ]  # fmt: skip
    groups = facts["groups"]
    assert groups["head"] == {"labels": 1, "fewest_rows": 100, "most_rows": 100}
    assert sum(group["labels"] for group in groups.values()) == len(counts)


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_label_frequency_without_occurrences(report, counts):
    report["label_frequency"] = label_frequency(torch.tensor(counts, dtype=torch.int64))
    report["sizes"]["labels"] = len(counts)
    assert report["label_frequency"]["never_seen"] == len(counts)
    assert report["label_frequency"]["groups"]["head"]["fewest_rows"] is None
    Page(html_report([report]))


def test_labels_that_were_never_seen(report):
    report["label_frequency"]["never_seen"] = 5
    assert "5 of 50 labels (10.0 %) are in no training row" in Page(html_report([report])).text
    report["label_frequency"]["never_seen"] = 0
    text = Page(html_report([report])).text
    assert "Each of the 50 labels is in at least one training row" in text


def test_everything_is_escaped(report):
    report["data"] |= {"train": f"/data/{NASTY}", "test": f"/data/{NASTY}\x00\x1b"}
    report["settings"]["device"] = NASTY
    report["versions"]["platform"] = NASTY
    report["loss"] = NASTY
    text = html_report([report, report], names=[NASTY, f"{NASTY} again"])
    page = Page(text)
    assert "b" not in page.tags
    assert f"/data/{NASTY}\ufffd\ufffd" in page.text
    assert f"{NASTY} again" in page.text


def test_names_of_files_need_not_be_unicode(report, tmp_path):
    report["data"]["train"] = b"/data/\xff.txt".decode("utf-8", "surrogateescape")
    path = tmp_path / "deep" / "run.html"
    write_html_report(path, [report])
    assert "/data/\\udcff.txt" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_nothing_from_elsewhere(report):
    text = html_report([report])
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "action"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"https?:|//|url\(|@import|@font-face", text.replace("</", ""))
    assert "default-src 'none'" in text


def test_readers_of_the_page(report):
    """Light, dark and printed; charts that a screen reader names."""
    text = html_report([report])
    assert "(prefers-color-scheme: dark)" in text
    assert "@media print" in text
    assert '<html lang="en">' in text
    for chart in charts(text):
        assert chart.findtext("title")
        assert chart.findtext("desc")


def test_same_report_same_bytes(trained, tmp_path):
    for name in ("one.html", "two.html"):
        write_html_report(tmp_path / name, [json.loads(trained)])
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_failure_leaves_what_was_there(report, tmp_path):
    path = tmp_path / "run.html"
    path.write_text("before")
    del report["sizes"]
    with pytest.raises(KeyError):
        write_html_report(path, [report])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_several_runs_side_by_side(report):
    other = json.loads(json.dumps(report)) | {"loss": "zlpr", "P@1": report["P@1"] - 1}
    other["settings"]["loss"] = "zlpr"
    text = html_report([other, report])
    page = Page(text)
    assert "2 training runs" in page.text
    assert "zlpr and sigmoid on arrays" in page.text
    metrics = next(table for table in tables(text) if table[0][:2] == ["metric", "run"])
    assert metrics[1][:3] == ["P@k", "zlpr", f"{other['P@1']:.2f}"]
    assert metrics[2][:3] == ["", "sigmoid", f"{report['P@1']:.2f}"]
    best = [e for e in ElementTree.fromstring(text).iter("td") if e.get("class") == "best"]
    assert [cell.text for cell in best] == [f"{report['P@1']:.2f}"]  # and where they tie, none
    # Losses of different kinds can only be compared in relation to where they start.
    assert "% of the first epoch" in page.text
    assert "zlpr, model 1" in page.text


def test_runs_with_the_same_loss_are_numbered(report):
    page = Page(html_report([report, report]))
    assert "1: sigmoid" in page.text
    assert "2: sigmoid" in page.text
    assert "% of the first epoch" not in page.text


# ---- Charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0, 0.0],
        [5.0, 5.0],
        [-3.0, 2.0],
        [1e-9, 2e-9],
        [1e-40, 1e-38],
        [1e12, 3e12],
        [1.0, 1.0 + 1e-15],
    ],
)
def test_lines_of_any_size_stay_in_the_chart(values):
    chart = line_chart("a", "b", [Line("c", list(enumerate(values, 1))), Line("none", [])])
    root = ElementTree.fromstring(chart)
    _, _, width, height = map(float, root.get("viewBox").split())
    circles = list(root.iter("circle"))
    assert len(circles) == len(values)
    for circle in circles:
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height
    ticks = [text.text for text in root.iter("text") if text.get("class") == "end"]
    assert 2 <= len(set(ticks)) == len(ticks) <= 9
    assert max(map(len, ticks)) <= 10


def test_many_epochs():
    points = [(epoch, 1 / epoch) for epoch in range(1, 1001)]
    root = ElementTree.fromstring(line_chart("a", "b", [Line("c", points)]))
    assert not list(root.iter("circle"))
    assert sum(text.get("class") == "middle" for text in root.iter("text")) < 10


@pytest.mark.parametrize("value", [0, 1e-6, 1, 10**7])
def test_bars_of_any_size_stay_in_the_chart(value):
    bars = [Bar("x" * 50, [Part("head", value, "head"), Part("tail", 0, "tail")], "12")]
    root = ElementTree.fromstring(bar_chart("a", "b", bars))
    width = float(root.get("viewBox").split()[2])
    for rect in root.iter("rect"):
        assert 0 < float(rect.get("x")) + float(rect.get("width")) < width
    assert len(list(root.iter("rect"))) == (value > 0)
    assert "x" * 19 + "…" in [text.text for text in root.iter("text")]


# ---- The command line ----------------------------------------------------------------------------


def train(folder, *arguments):
    command = ["train", "--train", str(folder / "train.txt"), "--test", str(folder / "test.txt")]
    command += ["--epochs", "2", "--hidden", "16", "--batch-size", "64", "--quiet"]
    return main([*command, *map(str, arguments)])


@pytest.mark.parametrize(
    ("name", "is_page"),
    [("a.html", True), ("a.HTM", True), ("a.json", False), ("html", False), ("a.html.gz", False)],
)
def test_pages_by_their_names(name, is_page):
    assert is_html(name) == is_page


def test_train_and_evaluate(folder, tmp_path, capsys):
    page, scores = tmp_path / "run.html", tmp_path / "scores.htm"
    model = tmp_path / f"{NASTY}.safetensors"
    assert train(folder, "--report", page, "--model", model) == 0
    assert "sigmoid on train.txt" in Page(page.read_text(encoding="utf-8")).text
    arguments = ["evaluate", "--model", str(model), "--test", str(folder / "test.txt")]
    (tmp_path / "filter.txt").write_text("0 1\n")
    arguments += ["--filter", str(tmp_path / "filter.txt"), "--report", str(scores)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    text = scores.read_text(encoding="utf-8")
    content = Page(text).text
    assert "Evaluation sigmoid on test.txt" in content
    assert f"{model}, trained on 300 rows" in content
    assert "filter.txt" in content
    metrics = next(table for table in tables(text) if table[0][0] == "metric")
    row = next(line.split() for line in printed if line.startswith("PSnDCG"))
    assert ["PSnDCG@k", *row[1:]] in [line[:4] for line in metrics]


def test_rows_without_labels(folder, tmp_path):
    test = tmp_path / "unlabelled.txt"
    test.write_text("2 200 50\n 1:1\n 2:1\n")
    assert train(folder, "--test", test, "--report", tmp_path / "run.html") == 0
    content = Page((tmp_path / "run.html").read_text(encoding="utf-8")).text
    assert "P@1 0.00 %" in content
    assert f"PSP@5 {NOTHING}" in content
    assert "test rows without labels 2" in content
    assert "P@k counts test rows without labels as wrong" in content


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_what_cannot_be_written_is_found_first(folder, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(cli, "fit", lambda *_, **__: pytest.fail("this came to training"))
    page = tmp_path / "run.html"
    page.mkdir()
    if command == "train":
        assert train(folder, "--report", page) == 2
    elif command == "evaluate":
        assert main(["evaluate", "--model", "m", "--test", "t", "--report", str(page)]) == 2
    else:
        assert main(["report", "r.json", "--output", str(page)]) == 2
    assert f"{page}: cannot be written: Is a directory" in capsys.readouterr().err


def test_pages_of_reports(report, tmp_path):
    """One report gives the page that `train` would have written; several one page for all."""
    source, page = tmp_path / "run.json", tmp_path / "run.html"
    write_report(source, report)
    assert main(["report", str(source), "--output", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == html_report([report])

    both = tmp_path / "both.json"
    write_report(both, {"runs": [report, report], "loss_milliseconds": {}})
    assert len(read_reports(both)) == 2
    assert main(["report", str(source), str(both), "--output", str(page)]) == 0
    content = Page(page.read_text(encoding="utf-8")).text
    assert "3 training runs" in content
    for name in ("1: run, sigmoid", "2: both, sigmoid", "3: both, sigmoid"):
        assert name in content


def test_reports_of_older_versions_lack_the_frequencies(report):
    del report["label_frequency"]
    report["settings"]["gone"] = True
    text = html_report([report])
    assert "Label frequencies" not in Page(text).text
    assert ["gone", "True", NOTHING] in rows(text)


@pytest.mark.parametrize(
    "content", ["", "[1]", "{}", '{"runs": []}', '{"P@1": 1.0}', "1" * 400, "[" * 10**5]
)
def test_what_is_no_report(tmp_path, capsys, content):
    source = tmp_path / "other.json"
    source.write_text(content)
    assert main(["report", str(source), "--output", str(tmp_path / "a.html")]) == 2
    assert f"{source}: not a report in JSON of a training run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_a_page_has_to_be_called_one(tmp_path, capsys):
    assert main(["report", "r.json", "--output", str(tmp_path / "a.json")]) == 2
    assert "the name of a page ends with .html" in capsys.readouterr().err
