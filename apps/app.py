"""The app: look at reconstructions and samples of the runs in one folder.

    vfmlab app --runs DIR

It serves this machine only unless told otherwise, shows only runs of that folder, and computes one job at a time.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from apps import models, reconstruct, sample
from vfmlab import config, figures, viz

UPLOAD = "12mb"


def build(root: str | Path) -> gr.Blocks:
    """The interface over the runs in `root`."""
    root = Path(root).resolve()
    with gr.Blocks(title="vfmlab", analytics_enabled=False) as page:
        gr.Markdown("# vfmlab\nLook at what tokenizers keep of an image and at what diffusion models make of their latents.")
        if not models.finished(root, "tokenizer"):
            gr.Markdown(f"No finished runs in `{root.name}` yet. `make demo` makes two pipelines; `vfmlab train tiny_vfm_vae` makes one in a minute.")
        with gr.Tab("Reconstruct"):
            reconstruct.build(root, _examples(root))
        with gr.Tab("Sample"):
            sample.build(root)
    return page.queue(default_concurrency_limit=1, max_size=64)


def _examples(root: Path) -> list[str]:
    """A few held-out images of the drawn scenes, written once beside the runs."""
    folder = root / ".examples"
    paths = [folder / f"scene_{i}.png" for i in range(4)]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        images, _, _ = figures.examples(config.Data(size=64), n=len(paths), seed=1)
        for image, path in zip(images, paths, strict=True):
            viz.tile(image, scale=1).save(path)
    return [str(path) for path in paths]


def launch(root: str | Path = "runs", host: str = "127.0.0.1", port: int | None = None, auth: tuple[str, str] | None = None, block: bool = True):
    """Serve the app. host: only this machine by default. auth: (user, password) to ask for."""
    page = build(root)
    return page.launch(
        server_name=host, server_port=port, share=False, auth=auth, max_file_size=UPLOAD, show_error=True, prevent_thread_lock=not block,
        allowed_paths=[], quiet=not block,
    )
