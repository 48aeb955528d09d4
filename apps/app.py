"""The app: look at reconstructions, samples, paths, numbers and features of the runs in one folder.

    vfmlab app --root DIR

It serves this machine unless another host is named, shows runs of that folder, one job at a time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import gradio as gr

from apps import compare, explore, folder, guard, interpolate, models, pictures, reconstruct, sample, share
from apps.common import LIGHT
from apps.page import Page
from vfmlab.errors import ConfigError
from vfmlab.weights import bundled

QUEUE = 64  # jobs that may wait; the next one is asked to come back
SWEEP = 600.0  # seconds between two looks at old files
HERE = Path(__file__).parent


def build(root: str | Path, temporary: Path) -> Page:
    """The interface over the runs in `root`; where there are none, the bundled ones are put there.

    temporary: a folder for its own files.
    """
    root = Path(root).expanduser()
    fresh = not models.choices(root, "tokenizer")
    if fresh:
        bundled.put(root)
    examples, whose = pictures.examples(root, temporary / folder.EXAMPLES)
    with Page(title="vfmlab", analytics_enabled=False) as page:
        page.listening = Counter()
        about = "What tokenizers keep of an image, and what diffusion models make of their latents."
        gr.Markdown(f"# vfmlab\n{about}", elem_classes="vl-head")
        if fresh:
            note = "held no runs, so two small tokenizers that come with vfmlab were put there."
            gr.Markdown(f"The folder `{root.name}` {note} `make demo` trains whole pipelines.")
        left_out = gr.Markdown(models.unreadable(root), elem_classes="vl-facts")
        with gr.Tabs() as tabs:
            with gr.Tab("Reconstruct", id="reconstruct"):
                parts = [reconstruct.build(root, examples, whose)]
            with gr.Tab("Sample", id="sample"):
                parts.append(sample.build(root))
            with gr.Tab("Interpolate", id="interpolate"):
                paths, inner = interpolate.build(root, examples)
                parts += paths
            with gr.Tab("Compare", id="compare"):
                compared, (read, *reading) = compare.build(root)
                parts.append(compared)
            with gr.Tab("Explore", id="explore"):
                parts.append(explore.build(root, examples, whose))
        with gr.Accordion("Open a shared state", open=False):
            given = gr.Textbox(label="state (JSON, from below a figure)", lines=2, max_lines=6)
            apply = gr.Button("set the page to it")
        came = gr.Markdown(elem_id="vl-came", elem_classes="vl-facts")
        fields = [component for part in parts for component in part.fields.values()]
        outputs = [came, left_out, tabs, inner, *fields]

        def restore(text: str | None) -> list[Any]:
            state = share.parse(text)
            changes = [share.updates(part, state) for part in parts]
            both = zip(parts, changes, strict=True)
            part, mine = next((one for one in both if one[0].name == state.get("tab")), (None, []))
            chosen = part and part.name.partition("_")[0]
            within = gr.Tabs(selected=part.name) if chosen == "interpolate" else gr.skip()
            message = "This is no shared state of this page." if text else ""
            message = f"Set to a shared state of '{chosen}'." if chosen else message
            if part and (missing := share.left_out(part, state, mine)):
                message += f" Not as it says, since gone from here or not fitting: {', '.join(missing)}."
            outer = gr.Tabs(selected=chosen) if chosen else gr.skip()
            shown = [message, models.unreadable(root), outer, within]
            return [*shown, *(update for of_part in changes for update in of_part)]

        def opened(request: gr.Request) -> list[Any]:
            return restore(request.query_params.get("state"))

        tables = {"api_visibility": "private", "show_progress": "hidden", "concurrency_id": "tables"}
        page.load(opened, None, outputs, **LIGHT).then(read, *reading, **tables)
        apply.click(restore, given, outputs, **LIGHT)
    return page.queue(default_concurrency_limit=1, max_size=QUEUE)


def launch(root: str | Path = "runs", host: str = "127.0.0.1", port: int | None = None,
           auth: tuple[str, str] | None = None, mcp: bool = False, block: bool = True, quiet: bool = False,
           hosts: Iterable[str] = (), **limits: tuple[float, float]) -> Page:
    """Serve the app; the served page, whose `local_url` is the address.

    Args:
        host: where to listen; only this machine by default. hosts: further names under which it is addressed,
            e.g. of a proxy. auth: (user, password) to ask for. mcp: offer the endpoints as tools of the Model
            Context Protocol too. block: return only when stopped. limits: those of :class:`apps.guard.Guard`.

    Raises:
        ConfigError: the port is no port or taken, the host is not this machine's, or mcp is asked for and
            its package is missing.
    """
    if mcp and importlib.util.find_spec("mcp") is None:
        raise ConfigError("mcp needs the package 'mcp', which is not installed: uv pip install 'gradio[mcp]'")
    if port is not None and not 0 < port < 65536:
        raise ConfigError(f"port = {port}: give a number from 1 to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        place = f"{host}, port {port}," if port is not None else host
        raise ConfigError(f"{place} cannot be listened on ({error}); choose another --port, or another "
                          "--host: an address of this machine") from None
    with ExitStack() as stack:
        temporary = stack.enter_context(folder.private())
        page = build(root, temporary)
        until_closed = stack.pop_all()

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.to_thread(folder.sweep, temporary)
                await asyncio.sleep(SWEEP)

        task = asyncio.create_task(sweep())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            until_closed.close()

    rules = guard.middleware(host, hosts, folder=temporary, listening=page.listening, mcp=mcp, **limits)
    closed = [str(Path(root).expanduser().resolve())]
    try:
        page.launch(server_name=host, server_port=port, share=False, auth=auth,
                    max_file_size=f"{guard.UPLOAD_MB}mb", show_error=True, prevent_thread_lock=not block,
                    allowed_paths=[], blocked_paths=closed, quiet=quiet, mcp_server=mcp, ssr_mode=False,
                    run_history=False, enable_monitoring=False, footer_links=["api", "settings"],
                    css_paths=HERE / "page.css", js=(HERE / "page.js").read_text(),
                    app_kwargs={"middleware": rules, "lifespan": lifespan})
    except BaseException as error:
        until_closed.close()
        if isinstance(error, OSError):
            raise ConfigError(f"no port is free on {host} ({error}); name one with --port") from None
        raise
    return page
