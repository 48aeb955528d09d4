"""The numbers that a notebook gives out: `vfmlab.studies.sweep.result(...)` in its last cell.

The numbers are displayed under a MIME type of their own, so the executed notebook itself carries them; a
sweep reads them from there. Elsewhere the call shows a line of text, and the picture.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Mapping
from typing import Any

from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation.number import Number, Report

MIME = "application/vnd.vfmlab.result+json"


def result(*reports: Report, images: Any = None, **numbers: float) -> None:
    """Hand out the results of this notebook.

    Args:
        reports: as from `vfmlab.evaluate` or `vfmlab.studies.measure.measure`; every number keeps the hash of
            its protocol. images: a picture to know the point by: [N 3 H W] in [-1, 1], a list of such with
            one row each, or a PIL image. numbers: others, by name; they count as measured alike in every
            point of one notebook.

    Raises:
        ConfigError: what is given is no report, a number is no number, or the same name is given twice.
    """
    from IPython.display import display

    every: dict[str, Number] = {}
    for report in reports:
        if not isinstance(report, Report):
            raise ConfigError("result: expected a report, as vfmlab.evaluate gives it, not "
                              f"{type(report).__name__}; plain numbers go by name")
        if twice := sorted(every.keys() & report.measured.keys()):
            raise ConfigError(f"result: two reports have the number '{twice[0]}'; hand out one of them, or "
                              "the other by another name")
        every |= report.measured
    for name, value in numbers.items():
        if name in every:
            raise ConfigError(f"result: '{name}' is in a report already; give the number another name")
        try:
            # one that is not finite is missing: JSON has none
            every[name] = Number.from_json(name, {"value": float(value)})
        except (TypeError, ValueError):
            raise ConfigError(f"result: '{name}' = {value!r} is no number") from None
    text = "  ".join(f"{k} –" if v.absent else f"{k} {v.value:.4g}" for k, v in every.items())
    entries, runs = {k: v.as_json() for k, v in every.items()}, [r.run for r in reports if r.run]
    bundle = {MIME: {"numbers": entries, "runs": runs}, "text/plain": f"handed out: {text or 'no numbers'}"}
    if images is not None:
        if not hasattr(images, "save"):  # a PIL image does not wait for torch
            import torch

            from vfmlab.plots import primitives

            columns = {"columns": len(images[0])} if isinstance(images, list | tuple) else {}
            images = primitives.tile(torch.cat(images) if columns else images, **columns)
        buffer = io.BytesIO()
        images.save(buffer, "PNG")
        bundle["image/png"] = base64.b64encode(buffer.getvalue()).decode()
    display(bundle, raw=True)


def numbers(outcome: Mapping[str, Any]) -> dict[str, Number]:
    """The numbers of a point's result.json; entries that are none are left out."""
    every = {}
    for name, entry in outcome.get("numbers", {}).items():
        with contextlib.suppress(DataError):
            every[name] = Number.from_json(name, entry)
    return every


def read(notebook: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """{"numbers", "runs"} of all `result` calls of an executed notebook, and the last picture (PNG)."""
    outcome: dict[str, Any] = {"numbers": {}, "runs": []}
    picture = None
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            bundle = output.get("data", {})
            if MIME in bundle:
                outcome["numbers"] |= bundle[MIME]["numbers"]
                outcome["runs"] = list(dict.fromkeys([*outcome["runs"], *bundle[MIME]["runs"]]))
                picture = base64.b64decode(bundle["image/png"]) if "image/png" in bundle else picture
    return outcome, picture
