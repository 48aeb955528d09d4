"""Execute notebooks one after the other with papermill and export each as HTML; the process behind one lane of the demo."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def execute(source: str, target: str, parameters: dict[str, Any]) -> None:
    """Run one notebook, unless this very notebook was already executed with these parameters, and export it as HTML.

    The executed copy carries a digest of source and parameters, so that an edited notebook or another setting runs anew.
    """
    import papermill
    from nbconvert import HTMLExporter

    page = Path(target).with_suffix(".html")
    mark = hashlib.sha256((Path(source).read_text() + json.dumps(parameters, sort_keys=True)).encode()).hexdigest()
    stamp = f"<!-- vfmlab {mark} -->"
    if page.exists() and stamp in page.read_text()[-200:]:
        return
    page.unlink(missing_ok=True)
    papermill.execute_notebook(source, target, parameters, progress_bar=False, log_output=True, kernel_name="python3")
    html, _ = HTMLExporter().from_filename(target)
    beside = page.with_suffix(".tmp")
    beside.write_text(f"{html}\n{stamp}\n")
    beside.replace(page)


def main() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for job in json.loads(sys.argv[1]):
        execute(**job)


if __name__ == "__main__":
    main()
