"""Reports as a page of HTML: one file, without scripts and without anything from elsewhere.

All it takes is what `report.make_report` returns, so that a page can be made of JSON at any time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from mlloss_cuda.xmc.charts import Bar, Line, Part, bar_chart, escaped, legend, line_chart
from mlloss_cuda.xmc.classifier import GROUPS
from mlloss_cuda.xmc.data import atomic_file
from mlloss_cuda.xmc.report import write_report
from mlloss_cuda.xmc.settings import Settings

Report = Mapping[str, Any]  # of `report.make_report`, or read from its JSON

SUFFIXES = (".html", ".htm")
NOTHING = "–"  # noqa: RUF001 - a score that is not defined, a setting that is None
CURVES = ("P@1", "P@5", "PSP@5")  # of the scores after every epoch, the ones that are drawn
SCORE = re.compile(r"(?P<metric>\w+)@(?P<k>\d+)(?: (?P<group>\w+))?")
MEANINGS = {
    "P": "share of the k best labels that are right",
    "PSP": "propensity-scored P: a rare label that is right counts more",
    "nDCG": "right labels count more in the first places; 100 if none could be better",
    "PSnDCG": "propensity-scored nDCG: rare labels count more",
    "R": "share of a row's labels that are among its k best",
    "coverage": "of the labels that any row has, the share that is right for some row",
}
GROUP_MEANING = "what {} labels add to P@k"


# What comes of reading a page out of JSON that is something else.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Cell(NamedTuple):
    """A cell of a table that looks different from the others.

    Attributes:
        text: what it says.
        style: a class.
    """

    text: str
    style: str


class Run(NamedTuple):
    """A run and how the page calls it.

    Attributes:
        name: differs from those of the other runs.
        report: what there is to say about it.
    """

    name: str
    report: Report


def save_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write HTML where the name of the file says so, and otherwise JSON."""
    if is_html(path):
        write_html_report(path, [report])
    else:
        write_report(path, report)


def is_html(path: str | os.PathLike[str]) -> bool:
    """Whether a file is HTML by its name."""
    return Path(path).suffix.lower() in SUFFIXES


def write_html_report(
    path: str | os.PathLike[str],
    reports: Sequence[Report],
    *,
    names: Sequence[str] | None = None,
    timing: Report | None = None,
) -> None:
    """Write the page. The file appears under its name only when it is complete.

    Args:
        path: of the file.
        reports: at least one, see `report.make_report`; several stand side by side.
        names: what to call them, all different; by default after their losses.
        timing: of the losses, `loss_timing.LossTiming` as a dictionary.

    Raises:
        OSError: it cannot be written.
    """
    page = html_report(reports, names=names, timing=timing)
    with atomic_file(path) as temporary:
        # Names of files need not be valid Unicode.
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))


def html_report(
    reports: Sequence[Report],
    *,
    names: Sequence[str] | None = None,
    timing: Report | None = None,
) -> str:
    """The page, see `write_html_report`. The same reports give the same text."""
    names = _names(reports) if names is None else names
    runs = [Run(name, report) for name, report in zip(names, reports, strict=True)]
    title = _title(runs)
    sections = (
        _headline(runs),
        _curves(runs),
        _groups(runs),
        _metrics(runs),
        _frequencies(runs),
        _data(runs),
        _settings(runs),
        "" if timing is None else _timing(timing),
        _machine(runs),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />\n'
        # What is in the page suffices, whatever a browser would like to load.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\" />\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        '<meta name="color-scheme" content="light dark" />\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<header><p>{_kind(runs)}</p><h1>{escaped(title)}</h1></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def read_reports(path: str | os.PathLike[str]) -> list[Report]:
    """The reports in a JSON file of `train --report`, or of the demonstration.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        found = json.loads(content)
        reports: list[Report] = found.get("runs", [found])
        html_report(reports)  # finds what is wrong anywhere, which a look at a few keys does not
    except DAMAGE as error:
        raise ValueError(f"{os.fspath(path)}: not a report in JSON of a training run") from error
    return reports


# ---- What the page is about ----------------------------------------------------------------------


def _names(reports: Sequence[Report]) -> list[str]:
    losses = [str(report["loss"]) for report in reports]
    if len(set(losses)) == len(losses):
        return losses
    return [f"{number}: {loss}" for number, loss in enumerate(losses, 1)]


def _kind(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} training runs"
    return "Evaluation" if "model" in runs[0].report["data"] else "Training run"


def _title(runs: Sequence[Run]) -> str:
    losses = list(dict.fromkeys(str(run.report["loss"]) for run in runs))
    files = list(dict.fromkeys(_data_name(run.report["data"]) for run in runs))
    return f"{_listed(losses)} on {_listed(files)}"


def _data_name(data: Mapping[str, Any]) -> str:
    """The file a report is about: of the training rows, or those a saved model was tried on."""
    return Path(data["train"] if "train" in data else data["test"]).name or "arrays"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _headline(runs: Sequence[Run]) -> str:
    """What is asked first: precision and time."""
    wanted = ("P@1", "P@3", "P@5", "PSP@5")
    if len(runs) > 1:
        header = ["", *wanted, "training"]
        rows = [
            [
                run.name,
                *(_score(run.report.get(name)) for name in wanted),
                _duration(run.report["train_seconds"]),
            ]
            for run in runs
        ]
        sentences = dict.fromkeys(_sentence(run.report) for run in runs)
        same = f"<p>{escaped(*sentences)}</p>" if len(sentences) == 1 else ""
        return _section("Summary", same + _table(header, rows, caption="scores in %"))
    report = runs[0].report
    facts = [(name, _score(report.get(name)), "%") for name in wanted]
    facts.append(("training", _duration(report["train_seconds"]), ""))
    tiles = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}"
        f"{f'<small> {unit}</small>' if unit and value != NOTHING else ''}</dd></div>"
        for name, value, unit in facts
    )
    return f'<dl class="tiles">{tiles}</dl>\n<p>{escaped(_sentence(report))}</p>'


def _sentence(report: Report) -> str:
    data, sizes = report["data"], report["sizes"]
    rows = (
        f"{sizes['train_rows']:,} rows, {sizes['features']:,} features, {sizes['labels']:,} labels"
    )
    tested = f"{sizes['test_rows']:,} rows"
    if "model" in data:
        return (
            f"{data['model']}, trained on {rows}; evaluated on {tested} of "
            f"{data['test'] or 'arrays'}."
        )
    where = f"of {data['test']}" if data["test"] else "of arrays"
    if data["test"] and data["test"] == data["train"]:
        where = "of the same file"
    return f"Trained on {rows}; tested on {tested} {where}."


# ---- Learning curves -----------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> str:
    # Losses of different kinds have different sizes; what they can be compared by is their shape.
    relative = len({run.report["loss"] for run in runs}) > 1
    label = "mean loss per row" + (", % of the first epoch" if relative else "")
    lines = _lines(runs, "loss", relative=relative)
    drawn = [("Training loss by epoch", label, lines)]
    drawn += [(f"{name} after each epoch", f"{name} (%)", _lines(runs, name)) for name in CURVES]
    charts = "".join(
        _figure(title, line_chart(title, label, own))
        for title, label, own in drawn
        if any(line.points for line in own)
    )
    key = legend(lines) if len(lines) > 1 else ""
    tables = "".join(
        _folded(
            "Numbers of every epoch" + (f" of {run.name}" if len(runs) > 1 else ""),
            _epoch_table(run.report),
        )
        for run in runs
    )
    return _section("Learning curves", f'{key}<div class="grid">{charts}</div>{tables}')


def _lines(runs: Sequence[Run], key: str, *, relative: bool = False) -> list[Line]:
    """A line for each model of each run, without the epochs that do not have the number."""
    lines = []
    for run in runs:
        members = sorted({epoch["member"] for epoch in run.report["epochs"]})
        for member in members:
            points = [
                (epoch["epoch"], float(epoch[key]))
                for epoch in run.report["epochs"]
                if epoch["member"] == member and _is_number(epoch.get(key))
            ]
            if relative and points and points[0][1] > 0:
                points = [(epoch, 100 * value / points[0][1]) for epoch, value in points]
            name = f"model {member}" if len(members) > 1 else run.name
            if len(members) > 1 and len(runs) > 1:
                name = f"{run.name}, model {member}"
            lines.append(Line(name, points))
    return lines


def _epoch_table(report: Report) -> str:
    epochs = report["epochs"]
    scores = [name for name in epochs[0] if SCORE.fullmatch(name)]
    several = any(epoch["member"] != 1 for epoch in epochs)
    header = [*(["model"] if several else []), "epoch", "loss", "learning rate", "seconds", *scores]
    rows = [
        [
            *([str(epoch["member"])] if several else []),
            str(epoch["epoch"]),
            f"{epoch['loss']:.4f}" if _is_number(epoch["loss"]) else NOTHING,
            f"{epoch['learning_rate']:.2g}" if epoch.get("learning_rate") is not None else NOTHING,
            f"{epoch['seconds']:.2f}",
            *(_score(epoch.get(name)) for name in scores),
        ]
        for epoch in epochs
    ]
    return _table(header, rows)


# ---- Scores --------------------------------------------------------------------------------------


def _groups(runs: Sequence[Run]) -> str:
    """What frequent and rare labels add to the precision."""
    ranks = sorted({int(k) for run in runs for _, k, group in _scores(run.report) if group})
    bars = []
    for k in ranks:
        for run in runs:
            shares = [run.report.get(f"P@{k} {group}") for group in GROUPS]
            parts = [
                Part(group, share, f"{group}: {share:.2f} %", f"{share:.1f}")
                for group, share in zip(GROUPS, shares, strict=True)
                if _is_number(share)
            ]
            name = f"P@{k}" + (f" {run.name}" if len(runs) > 1 else "")
            bars.append(Bar(name, parts, _score(run.report.get(f"P@{k}"))))
    if not any(bar.parts for bar in bars):
        return ""
    chart = bar_chart("What head, torso and tail labels add to P@k", "P@k (%)", bars)
    tables = "".join(_group_table(runs, own) for own in _distinct(runs, "label_frequency"))
    return _section(
        "Head, torso and tail",
        "<p>Three groups of labels, from frequent to rare, each with a third of the training "
        "occurrences, and how much of P@k comes from their labels.</p>"
        f'{_group_legend()}<div class="grid"><figure>{chart}</figure>'
        f"<figure>{tables}</figure></div>",
    )


def _group_legend() -> str:
    entries = (
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true"><rect width="12" height="12" '
        f'class="{group}" /></svg> {group}</li>'
        for group in GROUPS
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _group_table(runs: Sequence[Run], own: Sequence[Run]) -> str:
    groups = own[0].report["label_frequency"]["groups"]
    rows = []
    for name, group in groups.items():
        fewest, most = (_plain(group[key]) for key in ("fewest_rows", "most_rows"))
        between = fewest if fewest == most else f"{fewest} to {most}"
        rows.append([name, f"{group['labels']:,}", between])
    caption = "" if len(own) == len(runs) else _listed([run.name for run in own])
    return _table(["", "labels", "training rows of one"], rows, caption=caption)


def _metrics(runs: Sequence[Run]) -> str:
    """Every score, a line for each metric and run; of several runs the best is marked."""
    every = dict.fromkeys(name for run in runs for name in _scores(run.report))
    if not every:
        return ""
    ranks = sorted({int(k) for _, k, _ in every})
    several = len(runs) > 1
    rows: list[list[str | Cell]] = []
    for metric, group in dict.fromkeys((metric, group) for metric, _, group in every):
        columns = []
        for k in ranks:
            name = f"{metric}@{k}" + (f" {group}" if group else "")
            values = [run.report.get(name) for run in runs]
            defined = [value for value in values if _is_number(value)]
            best = max(defined) if len(set(defined)) > 1 else None
            columns.append(
                [
                    _score(value) if best is None or value != best else Cell(_score(value), "best")
                    for value in values
                ]
            )
        meaning = GROUP_MEANING.format(group) if group else MEANINGS.get(metric, "")
        for number, run in enumerate(runs):
            first = number == 0
            rows.append(
                [
                    Cell(f"{metric}@k {group}".strip(), "first") if first else "",
                    *([run.name] if several else []),
                    *(column[number] for column in columns),
                    Cell(meaning if first else "", "meaning"),
                ]
            )
    header = ["metric", *(["run"] if several else []), *(f"k = {k}" for k in ranks)]
    return _section("All metrics", _table([*header, ""], rows, caption="scores in %"))


def _scores(report: Report) -> list[tuple[str, str, str]]:
    """Metric, k and group ('' if there is none) of the scores of a report."""
    found = (SCORE.fullmatch(name) for name in report)
    return [(m["metric"], m["k"], m["group"] or "") for m in found if m is not None]


# ---- Data, settings, versions --------------------------------------------------------------------


def _frequencies(runs: Sequence[Run]) -> str:
    figures = []
    for own in _distinct(runs, "label_frequency"):
        frequency, labels = own[0].report["label_frequency"], own[0].report["sizes"]["labels"]
        bars = []
        for entry in frequency["histogram"]:
            fewest, most = entry["rows"]
            name = f"{fewest:,}" if fewest == most else f"{fewest:,}–{most:,}"  # noqa: RUF001
            parts = [
                Part(group, number, f"{number:,} {group} labels")
                for group, number in entry["labels"].items()
                if group in GROUPS and number
            ]
            number = sum(entry["labels"].values())
            bars.append(Bar(name if most else "none", parts, f"{number:,}"))
        chart = bar_chart("Labels by the number of training rows that have them", "labels", bars)
        names = "" if len(own) == len(runs) else f"{_listed([run.name for run in own])}: "
        never = frequency["never_seen"]
        share = f" ({100 * never / labels:.1f} %)" if labels else ""
        text = (
            f"{names}{never:,} of {labels:,} labels{share} are in no training row: nothing can be "
            "learned about them."
            if never
            else f"{names}Each of the {labels:,} labels is in at least one training row."
        )
        figures.append(f"<figure><p>{escaped(text)}</p>{chart}</figure>")
    if not figures:
        return ""
    return _section(
        "Label frequencies",
        "<p>Labels by the number of training rows that have them.</p>"
        f'{_group_legend()}<div class="grid">{"".join(figures)}</div>',
    )


def _data(runs: Sequence[Run]) -> str:
    sizes = _facts([run.report["sizes"] for run in runs], runs)
    files = _facts([run.report["data"] for run in runs], runs)
    without = any(run.report["sizes"].get("test_rows_without_labels") for run in runs)
    note = "<p>P@k counts test rows without labels as wrong.</p>" if without else ""
    return _section(
        "Data",
        f'{note}<div class="grid"><figure>{sizes}</figure><figure>{files}</figure></div>',
    )


def _settings(runs: Sequence[Run]) -> str:
    """The settings that somebody chose, then all of them."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    names = dict.fromkeys(name for run in runs for name in run.report["settings"])
    changed, every = [], []
    for name in names:
        values = [run.report["settings"].get(name) for run in runs]
        is_changed = name not in defaults or any(value != defaults[name] for value in values)
        row: list[str | Cell] = [
            Cell(name, "first") if is_changed else name,
            *map(_setting, values),
            _setting(defaults.get(name)),
        ]
        every.append(row)
        if is_changed:
            changed.append(row)
    header = ["", *([run.name for run in runs] if len(runs) > 1 else ["value"]), "default"]
    chosen = (
        _table(header, changed, caption="different from the defaults")
        if changed
        else "<p>All have their defaults.</p>"
    )
    return _section("Settings", chosen + _folded("All settings", _table(header, every)))


def _setting(value: object) -> str:
    """As one would type it, without commas in numbers."""
    return NOTHING if value is None else str(value)


def _timing(timing: Report) -> str:
    times = timing["milliseconds"]
    methods = list(dict.fromkeys(method for own in times.values() for method in own))
    rows = [
        [loss, *(f"{own[method]:.2f}" if method in own else NOTHING for method in methods)]
        for loss, own in times.items()
    ]
    caption = (
        f"milliseconds of forward and backward, {timing['rows']:,} x {timing['labels']:,} float32 "
        f"logits, threads: {timing['threads']}"
    )
    note = f"<p>{escaped(timing['note'])}</p>" if timing["note"] else ""
    return _section("Time of the losses", _table(["", *methods], rows, caption=caption) + note)


def _machine(runs: Sequence[Run]) -> str:
    """Everything else: numbers of the run, versions, the build of the library."""
    run_facts = [
        {
            name: value
            for name, value in run.report.items()
            if not SCORE.fullmatch(name)
            and not isinstance(value, (Mapping, list))
            and name not in run.report["settings"]
        }
        for run in runs
    ]
    versions = [_flat(run.report["versions"]) for run in runs]
    return _section(
        "Run and versions",
        _facts(run_facts, runs) + _folded("Versions", _facts(versions, runs)),
    )


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in facts.items():
        inner = _flat(value) if isinstance(value, Mapping) else {"": value}
        flat.update({f"{name} {key}".strip(): own for key, own in inner.items()})
    return flat


def _distinct(runs: Sequence[Run], key: str) -> list[list[Run]]:
    """The runs in groups that have the same under a key, without those that do not have it."""
    groups: list[list[Run]] = []
    for run in runs:
        if key not in run.report:
            continue
        same = (group for group in groups if group[0].report[key] == run.report[key])
        group = next(same, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


# ---- HTML ----------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escaped(title)}</h2>{content}</section>"


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escaped(title)}</figcaption>{content}</figure>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"


def _facts(facts: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    """A table of names and values, with a column for each run where they are not all the same."""
    header = ["", *(run.name for run in runs)]
    if all(own == facts[0] for own in facts):
        header, facts = [], facts[:1]
    names = dict.fromkeys(name for own in facts for name in own)
    rows = [[name.replace("_", " "), *(_plain(own.get(name)) for own in facts)] for name in names]
    has_text = any(isinstance(value, str) for own in facts for value in own.values())
    return _table(header, rows, style="prose" if has_text else "numbers")


def _table(
    header: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    *,
    caption: str = "",
    style: str = "numbers",
) -> str:
    """Text is escaped here. Wide tables scroll, the page does not."""
    parts = [f'<div class="scroll" tabindex="0"><table class="{style}">']
    if caption:
        parts.append(f"<caption>{escaped(caption)}</caption>")
    if header:
        cells = "".join(f'<th scope="col">{escaped(text)}</th>' for text in header)
        parts.append(f"<thead><tr>{cells}</tr></thead>")
    parts.append("<tbody>")
    for first, *others in rows:
        line = _cell(first, "th", ' scope="row"') + "".join(_cell(cell, "td") for cell in others)
        parts.append(f"<tr>{line}</tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def _cell(cell: str | Cell, tag: str, attributes: str = "") -> str:
    if isinstance(cell, Cell):
        return f'<{tag}{attributes} class="{cell.style}">{escaped(cell.text)}</{tag}>'
    return f"<{tag}{attributes}>{escaped(cell)}</{tag}>"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _score(value: float | None) -> str:
    return f"{value:.2f}" if value is not None and _is_number(value) else NOTHING


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# Colours that readers with any kind of colour vision tell apart: of lines nearly those of Okabe and
# Ito, of groups of labels one hue from dark to light (on a dark page from light to dark). On paper
# a page is light.
STYLE = """
:root { --page: #fff; --card: #f6f7f9; --text: #1b1f24; --faint: #59636e; --rule: #d5d9de;
  --c0: #0072b2; --c1: #d55e00; --c2: #007f5f; --c3: #a8437f; --c4: #8a6d00; --c5: #4d4d4d;
  --head: #08306b; --torso: #2171b5; --tail: #6baed6;
  --on-head: #fff; --on-torso: #fff; --on-tail: #10151b; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171b; --card: #1d2127; --text: #e6e9ed; --faint: #a3acb7; --rule: #3a414a;
    --c0: #56b4e9; --c1: #ff9a4d; --c2: #3ad1a3; --c3: #f0a3cf; --c4: #e8d44d; --c5: #c4c4c4;
    --head: #deebf7; --torso: #6baed6; --tail: #2a72b0;
    --on-head: #10151b; --on-torso: #10151b; --on-tail: #fff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 48px; }
header p { margin: 0; color: var(--faint); }
h1 { margin: 0 0 16px; font-size: 1.7rem; line-height: 1.25; }
h1, p, summary { overflow-wrap: anywhere; }
h2 { margin: 40px 0 8px; padding-bottom: 4px; font-size: 1.2rem;
  border-bottom: 1px solid var(--rule); }
p { margin: 8px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 12px; }
.tiles div { flex: 1 1 120px; padding: 10px 14px; border-radius: 8px; background: var(--card); }
.tiles dt { color: var(--faint); font-size: .9rem; }
.tiles dd { margin: 0; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.tiles small { font-size: 1rem; color: var(--faint); }
.grid { display: grid; gap: 20px; margin: 12px 0; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0; padding: 0;
  list-style: none; font-size: .9rem; }
.legend svg { height: 12px; vertical-align: -1px; }
.chart { display: block; width: 100%; max-width: 500px; height: auto; }
.chart text { fill: var(--text); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .label { fill: var(--faint); }
.chart .end { text-anchor: end; }
.chart .middle { text-anchor: middle; }
path.grid { fill: none; stroke: var(--rule); stroke-width: 1; }
path.line { stroke: var(--c); stroke-width: 2; fill: none; stroke-linejoin: round; }
circle { fill: var(--c); stroke: var(--page); stroke-width: 1; }
.line0 { --c: var(--c0); } .line1 { --c: var(--c1); stroke-dasharray: 7 3; }
.line2 { --c: var(--c2); stroke-dasharray: 2 3; }
.line3 { --c: var(--c3); stroke-dasharray: 9 3 2 3; }
.line4 { --c: var(--c4); stroke-dasharray: 4 2; } .line5 { --c: var(--c5); stroke-dasharray: 1 4; }
circle { stroke-dasharray: none; }
rect { stroke: var(--page); stroke-width: 1; }
.head { fill: var(--head); } .torso { fill: var(--torso); } .tail { fill: var(--tail); }
.chart .on { font-size: 11px; } .chart .on.head { fill: var(--on-head); }
.chart .on.torso { fill: var(--on-torso); } .chart .on.tail { fill: var(--on-tail); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); padding-bottom: 4px; }
th, td { padding: 4px 12px; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; font-weight: 400; }
th:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
thead th { color: var(--faint); }
.numbers td, .numbers th { white-space: nowrap; }
.prose td, .prose thead th { text-align: left; overflow-wrap: anywhere; }
.first, .best { font-weight: 600; }
.numbers .meaning { text-align: left; color: var(--faint); }
details { margin: 12px 0; }
summary { cursor: pointer; }
details .scroll { margin-top: 8px; }
@media (max-width: 560px) { th, td { padding: 4px 6px; } }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; } figure, tr, .tiles { break-inside: avoid; }
  h2, section > p, .legend { break-after: avoid; } }
"""
