"""How a notebook hands out what it found: `vfmlab.studies.sweep.result(...)` in its last cell.

The numbers are displayed under a MIME type of their own, so the executed notebook itself carries them; a sweep reads them
from there. Outside of a sweep the call shows a line of text, and the picture if there is one.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

from vfmlab.errors import ConfigError

MIME = "application/vnd.vfmlab.result+json"


def result(*reports: Mapping[str, Any], images: Any = None, **numbers: float) -> None:
    """Hand out the results of this notebook.

    Args:
        reports: as from `vfmlab.evaluate` or `vfmlab.studies.measure.measure`; every number keeps the hash of its protocol.
        images: a picture to know the point by: [N 3 H W] in [-1, 1], a list of such with one row each, or a PIL image.
        numbers: others, by name; they count as measured alike in every point of one notebook.

    Raises:
        ConfigError: what is given is no report, a number is no number, or the same name is given twice.
    """
    from IPython.display import display

    found: dict[str, dict[str, Any]] = {}
    runs = []
    for report in reports:
        if not isinstance(report, Mapping) or not isinstance(report.get("metrics"), Mapping):
            raise ConfigError(f"result: expected a report with 'metrics', as vfmlab.evaluate gives it, not {type(report).__name__}; plain numbers go by name")
        entries = {k: v for k, v in report["metrics"].items() if v.get("value") is not None}
        if twice := sorted(found.keys() & entries.keys()):
            raise ConfigError(f"result: two reports have the number '{twice[0]}'; hand out one of them, or the other by another name")
        found |= {k: {"value": float(v["value"]), "protocol": v.get("protocol"), "n": v.get("n"), "better": v.get("better")} for k, v in entries.items()}
        runs += [report["run"]] if report.get("run") else []
    for name, value in numbers.items():
        if name in found:
            raise ConfigError(f"result: '{name}' is in a report already; give the number another name")
        try:
            found[name] = {"value": float(value), "protocol": None, "n": None, "better": None}
        except (TypeError, ValueError):
            raise ConfigError(f"result: '{name}' = {value!r} is no number") from None
    for entry in found.values():
        if not math.isfinite(entry["value"]):
            entry["value"] = None  # JSON has no such number; the table shows it as missing
    text = "  ".join(f"{k} {v['value']:.4g}" if v["value"] is not None else f"{k} –" for k, v in found.items())
    bundle = {MIME: {"numbers": found, "runs": runs}, "text/plain": f"handed out: {text or 'no numbers'}"}
    if images is not None:
        bundle["image/png"] = base64.b64encode(_png(images)).decode()
    display(bundle, raw=True)


def _png(images: Any) -> bytes:
    if not hasattr(images, "save"):
        import torch

        from vfmlab.plots import primitives

        images = primitives.tile(torch.cat(images), columns=len(images[0])) if isinstance(images, list | tuple) else primitives.tile(images)
    buffer = io.BytesIO()
    images.save(buffer, format="PNG")
    return buffer.getvalue()


def harvest(notebook: Mapping[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """What an executed notebook handed out: {"numbers", "runs"} of all its calls, later ones winning, and the last picture (PNG)."""
    found: dict[str, Any] = {"numbers": {}, "runs": []}
    picture = None
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            bundle = output.get("data", {})
            if MIME in bundle:
                found["numbers"] |= bundle[MIME]["numbers"]
                found["runs"] = list(dict.fromkeys([*found["runs"], *bundle[MIME]["runs"]]))
                picture = base64.b64decode(bundle["image/png"]) if "image/png" in bundle else picture
    return found, picture
