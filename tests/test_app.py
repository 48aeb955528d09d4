"""The app, driven in a real browser on bundled tokenizers and a tiny pipeline: every tab, from upload to leaderboard."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import threading
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
        yield url, {run.id.rpartition("-")[0]: run.id for run in scan(root)}, root


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
    page.get_by_text("layers of the VFM", exact=False).first.wait_for()
    for card in (cards.nth(0), cards.nth(1)):
        assert re.search(r"PSNR [\d.]+ dB at (16|32) px", card.inner_text())
        assert "SSIM" in card.inner_text()
        assert "N = 1" in card.inner_text()
    slider, divided = cards.nth(0).locator("input[type=range]"), cards.nth(0).locator(".vl-compare")
    slider.fill("80")
    assert divided.evaluate("e => getComputedStyle(e).getPropertyValue('--cut')").strip() == "80%"
    slider.press("ArrowLeft")
    assert divided.evaluate("e => getComputedStyle(e).getPropertyValue('--cut')").strip() == "79%"
    cuts = ".vl-compare >> nth={} "
    assert page.locator(cuts.format(1)).evaluate("e => e.style.getPropertyValue('--cut')") == "79%"  # all move together
    page.get_by_label("move all dividers together").uncheck()
    slider.fill("20")
    assert page.locator(cuts.format(1)).evaluate("e => e.style.getPropertyValue('--cut')") == "79%"
    colours = [cards.nth(i).evaluate("e => e.style.getPropertyValue('--method')").strip() for i in (0, 1)]
    assert len(set(colours)) == 2


def start(page, verb: str) -> None:
    page.get_by_role("button", name=verb, exact=True).locator("visible=true").click()


def stop(page) -> None:
    page.get_by_role("button", name="stop", exact=True).locator("visible=true").click()


def facts(page, text: str):
    return page.locator(".vl-facts:visible").get_by_text(text, exact=False)


# Every state of the note that the page ever showed, and every box that says an error covers an output.
WATCH = """() => {
  window.shown = []; window.errors = 0;
  new MutationObserver(() => {
    document.querySelectorAll('.vl-facts').forEach((e) => {
      const state = e.innerText.match(/(stopped at )?step \\d+ of \\d+|done;/);
      if (state && window.shown.at(-1) !== state[0]) window.shown.push(state[0]);
    });
    window.errors += document.querySelectorAll('.wrap .error, .toast-body.error').length;
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
LONG = {"steps": 50, "count": 1}


def test_samples_form_before_the_eyes_and_each_has_its_title(server, page):
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], beside=TWIN, steps=100, solver="heun", count=1)
    page.evaluate(WATCH)
    start(page, "sample")
    facts(page, "done;").nth(1).wait_for()  # both runs
    shown = page.evaluate("window.shown")
    assert shown[0].startswith("step ")
    assert shown[-1] == "done;"
    titles = page.locator(".vl-figures.many figcaption").all_inner_texts()
    assert len(titles) == 20
    assert "striped disc" in titles


@pytest.fixture
def hold(monkeypatch):
    """Make a function of the library wait, before one of its results, until the stop has arrived: nothing depends on time."""
    from apps import page as rules

    began, stopped, ask = threading.Event(), threading.Event(), rules.Page.stop
    monkeypatch.setattr(rules.Page, "stop", lambda self, session: (ask(self, session), stopped.set()))

    def hold(place, name: str, before: int = 0) -> threading.Event:
        compute = getattr(place, name)

        def stream(*args, **more):
            for i, result in enumerate(compute(*args, **more)):
                if i == before:
                    began.set()
                    assert stopped.wait(WAIT / 1000)
                yield result

        def call(*args, **more):
            began.set()
            assert stopped.wait(WAIT / 1000)
            return compute(*args, **more)

        monkeypatch.setattr(place, name, stream if inspect.isgeneratorfunction(compute) else call)
        return began

    return hold


@pytest.mark.parametrize("part", range(3))
def test_stop_is_no_error_and_the_last_preview_stays(server, page, hold, part):
    """In Sample, before the first preview and between others: a stop that meets a preview on its way must not show."""
    from vfmlab.studies import interpolate

    began = hold(interpolate, "together", part)
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], **LONG)
    page.evaluate(WATCH)
    start(page, "sample")
    assert began.wait(WAIT / 1000)
    stop(page)
    facts(page, "stopped at step").first.wait_for()
    assert page.evaluate("window.errors") == 0
    assert page.get_by_text("Error", exact=True).count() == 0
    assert page.locator(".vl-figures.many img").locator("visible=true").count() == 10  # the last preview stays
    assert "done;" not in page.evaluate("window.shown")
    if part == 0:  # and the next job starts
        start(page, "sample")
        facts(page, "done;").first.wait_for()


@pytest.mark.parametrize("tab", ["interpolate_samples", "interpolate", "reconstruct"])
def test_stop_in_the_other_tabs(server, page, hold, tab):
    from vfmlab.studies import explore, interpolate

    held = {"interpolate_samples": (interpolate, "noises", 1), "interpolate": (interpolate, "images"), "reconstruct": (explore, "reconstruct")}
    began = hold(*held[tab])
    ids = [server[1]["tiny_vfm_vae_tokenizer"], server[1]["bundled_plain_vae_tokenizer"]]
    samples = {"runs": [server[1]["tiny_vfm_vae"]], "what": "noises", "steps": 100, "frames": 9}
    opened(page, server, tab, **(samples if "samples" in tab else {"runs": ids}))
    page.evaluate(WATCH)
    start(page, tab.partition("_")[0])
    assert began.wait(WAIT / 1000)
    stop(page)
    line = "stopped at step" if "samples" in tab else "stopped after 1 of 2 tokenizers"
    page.get_by_text(line, exact=False).locator("visible=true").first.wait_for()
    assert page.locator(".vl-card img").locator("visible=true").count() > 0  # what it had stays
    assert page.evaluate("window.errors") == 0


def test_a_table_of_settings_a_random_seed_and_the_last_calls(server, page):
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], steps=2, count=1, seed=0)
    page.get_by_role("button", name="random seed").click()
    page.wait_for_function("document.querySelector('input[aria-label=\"seed\"]').value !== '0'")
    start(page, "sample")
    facts(page, "done;").first.wait_for()
    page.get_by_text("The last calls of this page").click()
    page.get_by_role("link", name="these settings").wait_for()
    page.get_by_text("A table: one setting against another").click()
    page.get_by_role("button", name="sample the table").click()
    page.locator(".vl-table td img").nth(5).wait_for()
    heads = page.locator(".vl-table th").all_inner_texts()
    assert heads == ["", "guidance 1", "guidance 1.5", "guidance 3", "steps 5", "steps 20"]


def test_interpolation_between_images_and_between_classes(server, page):
    ids = [server[1]["tiny_vfm_vae_tokenizer"], server[1]["bundled_plain_vae_tokenizer"]]
    opened(page, server, "interpolate", first="example:0", second="example:1", runs=ids, frames=5)
    page.get_by_role("button", name="interpolate", exact=True).locator("visible=true").click()
    page.locator(".vl-card:has(.vl-strip)").nth(2).wait_for()  # pixels and two tokenizers
    assert page.get_by_text("path length", exact=False).count() == 3
    view, slider = (page.locator(".vl-card:has(.vl-strip)").nth(1).locator(where) for where in (".vl-view", "input[type=range]"))
    slider.fill("2")
    assert view.evaluate("e => e.style.backgroundPosition") == "50% 0px"
    assert page.get_by_role("link", name="save").count() == 3
    opened(page, server, "interpolate_samples", runs=[server[1]["tiny_vfm_vae"]], what="classes", label="plain disc", other="striped square", frames=3, steps=3)
    page.get_by_role("button", name="interpolate", exact=True).locator("visible=true").click()
    page.get_by_text("there and back").locator("visible=true").first.wait_for()
    assert page.get_by_text("from plain disc to striped square", exact=False).count() > 0


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
    page.get_by_text("Sampler, interval of guidance").click()
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


def test_primary_buttons_and_results_are_in_view_on_a_laptop(server, browser):
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.set_default_timeout(WAIT)
    verbs = {"reconstruct": "reconstruct", "sample": "sample", "interpolate": "interpolate", "interpolate_samples": "interpolate", "explore": "look inside"}
    for tab, verb in verbs.items():
        opened(page, server, tab)
        button = page.get_by_role("button", name=verb, exact=True).locator("visible=true")
        assert button.bounding_box()["y"] < 300, tab
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], beside=TWIN, steps=2, count=2)
    start(page, "sample")
    facts(page, "done;").nth(1).wait_for()
    last = page.locator(".vl-figures.many figure").locator("visible=true").last.bounding_box()
    assert last["y"] + last["height"] <= 768
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366
    page.close()


def test_two_runs_of_one_name_are_told_apart(server, page):
    opened(page, server, "sample", run=server[1]["tiny_vfm_vae"], beside=TWIN)
    inputs = [page.get_by_label(label).input_value() for label in ("diffusion or ar run", "beside it, from the same noise")]
    assert len(set(inputs)) == 2
    assert all(text.startswith("tiny_vfm_vae") for text in inputs)


def test_the_login_form_in_the_browser(server, browser):
    with served(server[2], auth=("user", "right")) as url:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(url)
        for password in ("wrong", "right"):
            page.get_by_label("user").fill("user")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="log in").click()
            if password == "wrong":
                page.get_by_text("wrong user or password").wait_for()
        page.get_by_role("button", name="reconstruct", exact=True).wait_for()
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
