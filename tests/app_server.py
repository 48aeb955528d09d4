"""A served app over two tiny pipelines, for the tests that drive it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from vfmlab import api

QUICK = {"diffusion.train.evaluate_at": []}


def runs(root: Path) -> Path:
    """Two tiny pipelines in `root`; the VFM tokenizer's is measured."""
    for preset in ("tiny_plain_vae", "tiny_vfm_vae"):
        for event in api.train(preset, root, QUICK):
            last = event.run_id
    api.evaluate(last, root)
    api.evaluate(api.tokenizer_run(last, root).path, root)
    return root


@contextmanager
def served(root: Path, **options):
    """The app over `root`; its address."""
    from apps import app

    page = app.launch(root, block=False, quiet=True, **options)
    try:
        yield page.local_url
    finally:
        page.close()
