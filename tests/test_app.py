"""The app, driven in a real browser on bundled tokenizers and a tiny pipeline: every tab, from upload to leaderboard."""

from __future__ import annotations

import json
import shutil
import time
from urllib.parse import urlencode

import pytest
from app_server import TWIN, runs, served
from PIL import Image

from vfmlab.runs import scan
from vfmlab.weights import bundled

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WAIT = 120_000  # ms; machines of CI are slow now and then
pytestmark = [pytest.mark.xdist_group("app"), pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    root = runs(tmp_path_factory.mktemp("app_runs"))
    with served(root) as url:
        yield url, {run.id.rpartition("-")[0]: run.id for run in scan(root)}


@pytest.fixture(scope="module")
def browser(server):
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A fresh page; errors of the page itself fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(WAIT)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert not wrong


def opened(page, server, tab: str, **state):
    """The page at a shared state."""
    page.goto(f"{server[0]}?{urlencode({'state': json.dumps({'tab': tab, **state})})}")
    page.get_by_text(f"Set to a shared state of '{tab.partition('_')[0]}'").wait_for()


def test_an_upload_through_two_tokenizers_and_the_slider(server, page, tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    page.goto(server[0])
    page.locator("input[type=file]").first.set_input_files(str(path))
    page.get_by_role("button", name="reconstruct", exact=True).click()
    cards = page.locator(".vl-card:has(.vl-compare)")
    cards.nth(1).wait_for()
    page.get_by_text("what the VFM", exact=False).first.wait_for()
    for card in (cards.nth(0), cards.nth(1)):
        assert "PSNR" in card.inner_text()
        assert "SSIM" in card.inner_text()
        assert "N = 1" in card.inner_text()
    slider, divided = cards.nth(0).locator("input[type=range]"), cards.nth(0).locator(".vl-compare")
    slider.fill("80")
    assert divided.evaluate("e => getComputedStyle(e).getPropertyValue('--cut')").strip() == "80%"
    slider.press("ArrowLeft")
    assert divided.evaluate("e => getComputedStyle(e).getPropertyValue('--cut')").strip() == "79%"
    colours = [cards.nth(i).evaluate("e => e.style.getPropertyValue('--method')").strip() for i in (0, 1)]
    assert len(set(colours)) == 2


WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => document.querySelectorAll('.vl-facts').forEach((e) => {
    const found = e.innerText.match(/step \\d+ of \\d+|done;/);
    if (found) window.seen.push(found[0]);
  })).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
LONG = {"steps": 250, "solver": "heun", "count": 16, "scale": 2}


def test_samples_form_before_the_eyes(server, page):
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], beside=TWIN, steps=100, solver="heun", count=2)
    page.evaluate(WATCH)
    page.get_by_role("button", name="sample", exact=True).click()
    page.wait_for_function("() => [...document.querySelectorAll('p.vl-facts')].some(e => (e.innerText.match(/done;/g) || []).length === 2)")  # both runs
    seen = page.evaluate("window.seen")
    assert seen[0].startswith("step ")
    assert seen[-1] == "done;"
    assert page.locator(".vl-pixels img").count() >= 2


def test_stop_ends_a_long_job_and_the_next_one_starts(server, page):
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], **LONG)
    page.get_by_role("button", name="sample", exact=True).click()
    page.get_by_text("step ", exact=False).first.wait_for()
    page.get_by_role("button", name="stop", exact=True).locator("visible=true").click()
    time.sleep(3.0)
    assert page.get_by_text("done;", exact=False).count() == 0
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], steps=2, count=1)
    page.get_by_role("button", name="sample", exact=True).click()
    page.get_by_text("done;", exact=False).first.wait_for()


def test_interpolation_between_images_and_between_classes(server, page):
    ids = [server[1]["tiny_vfm_vae_tokenizer"], server[1]["bundled_plain_vae_tokenizer"]]
    opened(page, server, "interpolate", first="example:0", second="example:1", runs=ids, frames=5)
    page.get_by_role("button", name="interpolate", exact=True).locator("visible=true").click()
    page.locator(".vl-card:has(.vl-strip)").nth(2).wait_for()  # pixels and two tokenizers
    assert page.get_by_text("path length", exact=False).count() == 3
    opened(page, server, "interpolate_samples", runs=[server[1]["tiny_vfm_vae"]], what="classes", frames=3, steps=3)
    page.get_by_role("button", name="interpolate", exact=True).locator("visible=true").click()
    page.get_by_text("there and back").locator("visible=true").first.wait_for()


def test_the_leaderboard_and_a_click_on_a_point(server, page):
    run = server[1]["tiny_vfm_vae"]
    opened(page, server, "compare", metric="gfd", x="rfd", y="gfd", run=run)
    page.locator("#vl-board").get_by_text(run).locator("visible=true").first.wait_for()  # beside it stands a hidden row that measures widths
    assert page.get_by_text("protocol", exact=False).count() > 0
    point = page.locator("#vl-compare .js-plotly-plot").last.locator(".scatterlayer .point").first
    point.wait_for()
    page.locator("#vl-compare .js-plotly-plot[data-vl]").last.wait_for()
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.mouse.click(x, y)
    page.get_by_text("of training", exact=False).first.wait_for()
    assert run in page.locator("#vl-picked textarea, #vl-picked input").input_value()
    page.get_by_text('"lightningdit"', exact=False).first.wait_for()  # its config


def test_inside_a_tokenizer_and_a_click_on_a_patch(server, page):
    opened(page, server, "explore", run=server[1]["tiny_vfm_vae_tokenizer"], image="example:1", across=0.5, down=0.5)
    page.get_by_role("button", name="look inside").click()
    page.get_by_text("channel 0").wait_for()
    assert page.get_by_text("nearest in the latent space", exact=False).count() == 1
    before = page.locator(".vl-card:has-text('what resembles the patch') img").first.get_attribute("src")
    page.locator("#vl-canvas img").first.click(position={"x": 30, "y": 30})
    page.wait_for_function("src => document.querySelector('.vl-card figure img') && [...document.querySelectorAll('.vl-card')]"
                           ".filter(c => c.innerText.includes('what resembles')).some(c => c.querySelector('img').src !== src)", arg=before)


def test_a_shared_state_sets_the_page_and_nothing_hostile_gets_in(server, page):
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], seed=17, steps=9, solver="heun", scale=float("nan"), high="<img src=x onerror=alert(1)>")
    page.get_by_role("button", name="sample", exact=True).wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('input[type=number]')].some(e => e.value === '17')")
    assert page.get_by_label("heun").locator("visible=true").is_checked()
    page.goto(f"{server[0]}?{urlencode({'state': 'not json {'})}")
    page.get_by_role("button", name="reconstruct", exact=True).wait_for()


def test_everything_fits_on_a_phone_and_in_the_dark(server, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.set_default_timeout(WAIT)
    page.goto(f"{server[0]}?__theme=dark")
    page.get_by_role("button", name="reconstruct", exact=True).click()
    page.locator(".vl-card").nth(1).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 391  # nothing to scroll sideways
    text, ground = (page.locator(".vl-card h3").first.evaluate(f"e => getComputedStyle({where}).{what}")
                    for where, what in (("e", "color"), ("e.closest('.vl-card')", "backgroundColor")))
    light = [sum(int(part) for part in value[value.index("(") + 1 : -1].split(",")[:3]) for value in (text, ground)]
    assert light[0] > light[1] + 300  # bright on dark
    page.close()


def test_a_folder_without_runs_shows_the_bundled_ones(browser, tmp_path):
    with served(tmp_path / "empty") as url:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(url)
        page.get_by_role("button", name="reconstruct", exact=True).click()
        page.locator(".vl-card:has(.vl-compare)").nth(1).wait_for()
        shown = page.locator(".vl-cards").first.inner_text()
        page.close()
    assert all(name in shown for name in bundled.NAMES)
