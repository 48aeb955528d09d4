"""A served app over bundled tokenizers and a tiny pipeline, for the tests that drive it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

from vfmlab import api
from vfmlab.weights import bundled

QUICK = {"diffusion.train.evaluate_at": []}
TWIN = "tiny_vfm_vae_twin-00000000"


def runs(root: Path) -> Path:
    """The bundled tokenizers, a tiny pipeline that is measured, and a copy of its diffusion run under another id."""
    bundled.put(root)
    for event in api.train("tiny_vfm_vae", root, QUICK):
        last = event.run_id
    shutil.copytree(root / last, root / TWIN)
    for run in (api.tokenizer_run(last, root).id, last):
        api.evaluate(run, root)
    return root


@contextmanager
def serving(root: Path, **options):
    """The app over `root` as the served page; everything of it has ended when this is left."""
    from apps import app

    page = app.launch(root, block=False, quiet=True, **options)
    try:
        yield page
    finally:
        page.close()
        page.server.thread.join()  # its temporary folder goes last


@contextmanager
def served(root: Path, **options):
    """The app over `root`; its address."""
    with serving(root, **options) as page:
        yield page.local_url
