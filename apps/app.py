"""The app: look at reconstructions, samples, paths, numbers and features of the runs in one folder.

    vfmlab app --runs DIR

It serves this machine only unless told otherwise, shows only runs of that folder, and computes one job at a time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from apps import cards, compare, explore, interpolate, limits, models, pictures, reconstruct, sample, share
from apps.common import LIGHT
from vfmlab.errors import ConfigError
from vfmlab.weights import bundled

QUEUE = 64  # jobs that may wait; the next one is told to come back
HOUR = 3600
CSS = cards.CSS + """
.vl-pixels img { image-rendering: pixelated; }
.gradio-container { max-width: 1500px !important; }
footer { opacity: .7; }
@media (max-width: 640px) { .gradio-container { padding: 6px !important; } }
"""


def build(root: str | Path) -> gr.Blocks:
    """The interface over the runs in `root`; where there are none, the bundled ones are put there."""
    root = Path(root).resolve()
    fresh = not models.finished(root, "tokenizer")
    if fresh:
        bundled.put(root)
    examples = pictures.examples(root)
    with gr.Blocks(title="vfmlab", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown("# vfmlab\nWhat tokenizers keep of an image, and what diffusion models make of their latents.")
        if fresh:
            gr.Markdown(f"The folder `{root.name}` held no runs, so two small tokenizers that come with vfmlab were put there. `make demo` trains whole pipelines.")
        with gr.Tabs() as tabs:
            with gr.Tab("Reconstruct", id="reconstruct"):
                parts = [reconstruct.build(root, examples)]
            with gr.Tab("Sample", id="sample"):
                parts.append(sample.build(root))
            with gr.Tab("Interpolate", id="interpolate"):
                paths, inner = interpolate.build(root, examples)
                parts += paths
            with gr.Tab("Compare", id="compare"):
                compared, (read, *reading) = compare.build(root)
                parts.append(compared)
            with gr.Tab("Explore", id="explore"):
                parts.append(explore.build(root, examples))
        with gr.Accordion("Open a shared state", open=False):
            text = gr.Textbox(label="state (JSON, from below a figure)", lines=2, max_lines=6)
            apply = gr.Button("set the page to it")
        came = gr.Markdown(elem_id="vl-came", elem_classes="vl-facts")
        fields = [component for part in parts for component in part.fields.values()]

        def restore(state: dict) -> list:
            name = str(state.get("tab", ""))
            part = next((part.name for part in parts if part.name == name), None)
            chosen = part and part.partition("_")[0]
            within = gr.Tabs(selected=part) if chosen == "interpolate" else gr.skip()
            told = f"Set to a shared state of '{chosen}'." if chosen else ""
            return [told, gr.Tabs(selected=chosen) if chosen else gr.skip(), within, *(update for part in parts for update in share.updates(part, state))]

        def opened(request: gr.Request) -> list:
            return restore(share.parse(request.query_params.get("state")))

        page.load(opened, None, [came, tabs, inner, *fields], **LIGHT).then(read, *reading, api_visibility="private", show_progress="hidden", concurrency_id="tables")
        apply.click(lambda text: restore(share.parse(text)), text, [came, tabs, inner, *fields], **LIGHT)
    return page.queue(default_concurrency_limit=1, max_size=QUEUE)


def launch(
    root: str | Path = "runs", host: str = "127.0.0.1", port: int | None = None, auth: tuple[str, str] | None = None, mcp: bool = False,
    block: bool = True, quiet: bool = False,
) -> gr.Blocks:  # fmt: skip
    """Serve the app; the served page, whose `local_url` is the address.

    Args:
        host: only this machine by default. auth: (user, password) to ask for. mcp: offer the endpoints as tools of the Model Context
            Protocol too. block: return only when stopped.

    Raises:
        ConfigError: the port is taken, or mcp is asked for and its package is missing.
    """
    if mcp and importlib.util.find_spec("mcp") is None:
        raise ConfigError("mcp needs the package 'mcp', which is not installed: uv pip install 'gradio[mcp]'")
    page = build(root)
    try:
        page.launch(
            server_name=host, server_port=port, share=False, auth=auth, max_file_size=f"{limits.UPLOAD_MB}mb", show_error=True,
            prevent_thread_lock=not block, allowed_paths=[], blocked_paths=[str(Path(root).resolve())], quiet=quiet, mcp_server=mcp, ssr_mode=False,
            run_history=False, enable_monitoring=False, footer_links=["api", "settings"], css=CSS, js=f"() => {{ {compare.CLICKS} }}",
            app_kwargs={"middleware": [Middleware(limits.Limits)]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"port {port} on {host} cannot be used ({error}); choose another --port") from None
    return page
