"""The app, driven in a real browser at the `tiny` tier: a picture through a tokenizer, samples that form, and bad input."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from vfmlab import api

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The app over one tiny pipeline, and its folder."""
    from apps import app

    root = tmp_path_factory.mktemp("app_runs")
    for _ in api.train("tiny_plain_vae", root, {"diffusion.train.evaluate_at": []}):
        pass
    launched = app.build(root)
    _, url, _ = launched.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True, max_file_size=app.UPLOAD)
    yield url, root
    launched.close()


@pytest.fixture(scope="module")
def page():
    if BROWSER is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser.new_page(viewport={"width": 1280, "height": 1000})
        browser.close()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return path


@pytest.mark.xdist_group("app")
@pytest.mark.timeout(300)
def test_reconstruct_in_a_browser(server, page, picture):
    page.goto(server[0])
    page.locator("input[type=file]").first.set_input_files(str(picture))
    page.get_by_role("button", name="reconstruct", exact=True).click()
    page.get_by_text("PSNR", exact=False).first.wait_for(timeout=60_000)
    assert page.locator("text=original").count() >= 1


@pytest.mark.xdist_group("app")
@pytest.mark.timeout(300)
def test_samples_in_a_browser(server, page):
    page.goto(server[0])
    page.get_by_role("tab", name="Sample").click()
    page.get_by_role("button", name="sample", exact=True).click()
    page.get_by_text("done;", exact=False).first.wait_for(timeout=60_000)


@pytest.mark.xdist_group("app")
@pytest.mark.timeout(300)
def test_bad_input_is_told_and_nothing_outside_is_served(server, picture, tmp_path):
    from gradio_client import Client, handle_file

    url, root = server
    client = Client(url, verbose=False)
    run_id = api.runs.scan(root)[0].id
    images, note = client.predict(handle_file(str(picture)), [run_id], api_name="/reconstruct")
    assert len(images) == 3
    assert "dB" in note
    for wrong in ("../../etc", "/etc", "no-such-run", str(root / run_id)):
        with pytest.raises(Exception, match="no finished tokenizer run|not in the list of choices"):
            client.predict(handle_file(str(picture)), [wrong], api_name="/reconstruct")
    noise = tmp_path / "not_an_image.png"
    noise.write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(Exception):  # noqa: B017  (gradio's own refusal or ours)
        client.predict(handle_file(str(noise)), [run_id], api_name="/reconstruct")
    assert client.predict(handle_file(str(picture)), [run_id], api_name="/reconstruct")
