"""Fills the support table of docs/support.md with what the last test run found.

A hook of mkdocs, which calls `on_page_markdown`; the rest needs nothing but Python. The test run
writes build/support.json: every combination of loss, target, mask, dtype and backend it tried.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKER = "<!-- support table -->"
RESULTS = Path(__file__).parent.parent / "build" / "support.json"
BACKENDS = {
    "reference": "Reference: plain PyTorch",
    "cpu": "CPU: native kernels",
    "emulated": "CUDA kernels, run on the CPU by the tests",
    "cuda": "CUDA kernels on a GPU",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker in a page by the tables."""
    if MARKER not in markdown:
        return markdown
    return markdown.replace(MARKER, support_tables(RESULTS))


def support_tables(path: Path) -> str:
    """Return the tables for the results in `path`, as Markdown."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _warning(
            "No results",
            "This site was built without test results. `make test` writes them, then `make docs` "
            "shows them here.",
        )
    cells = results["cells"]
    combinations = f"{len(cells):,} combinations" if len(cells) != 1 else "1 combination"
    parts = [
        f"Tested with mlloss_cuda {results['version']} under torch {results['torch']}: "
        f"{combinations}, {sum(cell['ok'] for cell in cells):,} of them passed."
    ]
    if not results["complete"]:
        parts.append(
            _warning(
                "Incomplete",
                "Only some of the tests ran, so the counts are too low. A whole `make test`, then "
                "`make docs`, completes them.",
            )
        )
    for backend in [*BACKENDS, *sorted({cell["backend"] for cell in cells} - set(BACKENDS))]:
        parts.append(f"## {BACKENDS.get(backend, backend)}")
        parts.append(_backend_table([cell for cell in cells if cell["backend"] == backend]))
    return "\n\n".join(parts)


def _backend_table(cells: Sequence[dict[str, Any]]) -> str:
    """One table: losses down, target formats across, each cell `passed/tried`."""
    if not cells:
        return "Not run."
    losses, targets, masks, dtypes = (
        list(dict.fromkeys(cell[axis] for cell in cells))
        for axis in ("loss", "target", "mask", "dtype")
    )
    lines = [
        f"| loss | {' | '.join(targets)} |",
        "|---|" + "---|" * len(targets),
    ]
    for loss in losses:
        counts = []
        for target in targets:
            ok = [cell["ok"] for cell in cells if (cell["loss"], cell["target"]) == (loss, target)]
            text = f"{sum(ok)}/{len(ok)}" if ok else "-"
            counts.append(text if all(ok) else f"**{text}**")
        lines.append(f"| `{loss}` | {' | '.join(counts)} |")
    tables = [
        "\n".join(lines),
        f"Each count is over the masks {_listed(masks)} and the dtypes {_listed(dtypes)}, "
        "as far as they can be combined.",
    ]
    failed = [cell for cell in cells if not cell["ok"]]
    if failed:
        tables.append(
            "Failed:\n\n"
            + "\n".join(
                f"- `{cell['loss']}`, target {cell['target']}, mask {cell['mask']}, {cell['dtype']}"
                for cell in failed
            )
        )
    return "\n\n".join(tables)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _warning(title: str, text: str) -> str:
    return f'!!! warning "{title}"\n    {text}'
