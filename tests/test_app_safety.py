"""The app's server under load and under attack: nothing lost, nothing leaked, nobody stops another's job, clear refusals."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import pickle
import shutil
import socket
import struct
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil
import pytest
from app_server import runs, served
from PIL import Image

from vfmlab.cli import main
from vfmlab.data.decode import MAX_PIXELS
from vfmlab.runs import scan

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")
Client, handle_file = gradio_client.Client, gradio_client.handle_file
pytestmark = [pytest.mark.xdist_group("app_safety"), pytest.mark.timeout(400)]

PUBLIC = {"/reconstruct", "/sample", "/interpolate_images", "/interpolate_samples", "/leaderboard", "/evaluate", "/explore", "/similarity"}
QUIET = {"verbose": False, "analytics_enabled": False}
SAMPLE = {
    "beside": "none", "label": "every class", "count": 1, "seed": 0, "steps": 4, "solver": "euler", "scale": 1.5, "low": 0, "high": 1, "shift": 1, "ema": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = runs(tmp_path_factory.mktemp("safety_runs"))
    (root.parent / "secret.json").write_text('{"name": "secret", "data": {}}')
    with served(root) as url:
        yield url, root, {run.id.rpartition("-")[0]: run.id for run in scan(root)}


@pytest.fixture(scope="module")
def client(server):
    return Client(server[0], **QUIET)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return str(path)


def reconstruct(client, picture, ids):
    return client.predict(handle_file(picture), ids, 0, 0, 0, 0, False, api_name="/reconstruct")


def alive(client, picture, server):
    """The server still answers, and rightly."""
    cards, _, _, state = reconstruct(client, picture, [server[2]["bundled_plain_vae_tokenizer"]])
    assert "PSNR" in cards
    return json.loads(state)


# -- what a client can do ---------------------------------------------------------------------------------------------


def test_endpoints_are_named_documented_and_all_there_is(client):
    told = client.view_api(return_format="dict", print_info=False)
    assert set(told["named_endpoints"]) == PUBLIC
    assert not told["unnamed_endpoints"]
    for name in PUBLIC:
        assert len(told["named_endpoints"][name]["description"]) > 40, name


def test_numbers_come_with_what_makes_them_again(client, picture, server):
    state = alive(client, picture, server)
    (numbers,) = state["numbers"].values()
    assert {"psnr", "ssim"} <= numbers.keys()
    _, link, code, _ = reconstruct(client, picture, [server[2]["tiny_vfm_vae_tokenizer"]])
    assert "?state=" in link
    compile(code, "code", "exec")
    *_, code, state = client.predict(server[2]["tiny_vfm_vae"], *SAMPLE.values(), api_name="/sample")
    lines = code.replace(f"root={server[1].name!r}", f"root={str(server[1])!r}")
    made: dict = {}
    exec(lines, made)  # what the app says reproduces the figure, and runs
    assert made["last"].final
    assert json.loads(state)["run"] == server[2]["tiny_vfm_vae"]


def test_previews_come_before_the_end(client, server, record_testsuite_property):
    began = time.monotonic()
    job = client.submit(server[2]["tiny_vfm_vae"], *{**SAMPLE, "steps": 60}.values(), api_name="/sample")
    notes, first = [], None
    for note, *_ in job:
        first = first or time.monotonic() - began
        notes.append(note)
    record_testsuite_property("seconds to the first preview", round(first, 2))
    assert "step " in notes[0]
    assert "done;" in notes[-1]
    assert len(notes) >= 5


def test_fifty_requests_of_ten_clients(server, picture, client, record_testsuite_property):
    """None is lost, and memory does not grow with them."""
    url, _, ids = server
    samples = {**SAMPLE, "steps": 2}
    process = psutil.Process()

    def one(number: int) -> bool:
        mine = Client(url, **QUIET)
        for k in range(5):
            if (number + k) % 2:
                done = "PSNR" in reconstruct(mine, picture, [ids["bundled_plain_vae_tokenizer"], ids["tiny_vfm_vae_tokenizer"]])[0]
            else:
                done = "done;" in mine.predict(ids["tiny_vfm_vae"], *{**samples, "seed": 10 * number + k}.values(), api_name="/sample")[0]
            if not done:
                return False
        return True

    one(0)  # everything is loaded once
    gc.collect()
    before = process.memory_info().rss
    with ThreadPoolExecutor(10) as pool:
        began = time.monotonic()
        assert all(pool.map(one, range(10)))
        seconds = time.monotonic() - began
    gc.collect()
    grown = (process.memory_info().rss - before) / 2**20
    record_testsuite_property("seconds of 50 requests", round(seconds, 1))
    record_testsuite_property("MB grown", round(grown))
    assert grown < 150  # ten clients live in this process too; a leak of one model or one batch a request would be far more


# -- cancelling -------------------------------------------------------------------------------------------------------

SLOW = {**SAMPLE, "steps": 250, "solver": "heun", "count": 4, "scale": 2.0}


def running() -> int:
    """Samplings that are under way in this process."""
    return sum(isinstance(o, types.GeneratorType) and o.__name__ == "trajectory" and o.gi_frame is not None for o in gc.get_objects())


def begun(client, server, **changes):
    job = client.submit(server[2]["tiny_vfm_vae"], *{**SLOW, **changes}.values(), api_name="/sample")
    for _ in range(1200):
        if job.outputs():
            return job
        time.sleep(0.05)
    raise AssertionError("no preview within a minute")


def test_cancelling_frees_what_the_job_held(client, server, picture):
    job = begun(client, server)
    assert running() > 0
    job.cancel()
    for _ in range(400):
        if not running():
            break
        time.sleep(0.05)
    assert running() == 0
    assert not any("done;" in output[0] for output in job.outputs())
    alive(client, picture, server)


def test_a_second_client_cannot_cancel_the_first(client, server, picture):
    job = begun(client, server)
    config = httpx.get(f"{server[0]}config").json()
    fn_index = next(d["id"] for d in config["dependencies"] if d["api_name"] == "sample")
    other = Client(server[0], **QUIET)
    for session in (other.session_hash, "", "*", "%", "None"):
        body = {"session_hash": session, "fn_index": fn_index, "event_id": "0" * 32}
        assert httpx.post(f"{server[0]}gradio_api/cancel", json=body).status_code == 200
    assert "done;" in job.result()[0]


# -- hostile input ----------------------------------------------------------------------------------------------------


def hostile_ids(server):
    _, root, ids = server
    run = ids["bundled_plain_vae_tokenizer"]
    return [
        "../../etc", "/etc", "..", ".", "", str(root / run), f"{run}/../{run}", f"../{root.name}/{run}", "%2e%2e%2f", run + "\x00", "no-such-run",
        "../secret.json", "a" * 9000,
    ]  # fmt: skip


def test_ids_are_never_paths(client, server, picture):
    run, refusal = server[2]["tiny_vfm_vae"], "no finished|Choose at least|There is no run"
    for wrong in hostile_ids(server):
        with pytest.raises(Exception, match=refusal):
            reconstruct(client, picture, [wrong])
    for wrong in hostile_ids(server)[:2]:
        for data, endpoint in (
            ((wrong, *SAMPLE.values()), "/sample"), ((wrong, handle_file(picture), 4, False, 0.5, 0.5), "/explore"), ((wrong,), "/evaluate"),
            ((wrong, handle_file(picture), 0.5, 0.5), "/similarity"), (([wrong], "noises", 0, 1, 0, 1, "linear", 3, 2, 1), "/interpolate_samples"),
            ((handle_file(picture), handle_file(picture), [wrong], "linear", 3), "/interpolate_images"),
        ):  # fmt: skip
            with pytest.raises(Exception, match=refusal):
                client.predict(*data, api_name=endpoint)
    with pytest.raises(Exception, match="no finished"):
        client.predict(run, *{**SAMPLE, "beside": "../../etc"}.values(), api_name="/sample")
    with pytest.raises(Exception, match="not one of this run's"):
        client.predict(run, *{**SAMPLE, "label": "../../etc/passwd"}.values(), api_name="/sample")
    assert client.predict("../../etc", False, "gfd", "rfd", "gfd", "/etc", api_name="/leaderboard")  # a table that is not there: the first one
    alive(client, picture, server)


def test_messages_carry_no_markup(client, picture):
    with pytest.raises(Exception) as refused:
        reconstruct(client, picture, ["<img src=x onerror=alert(1)>"])
    assert "<img" not in str(refused.value)


def test_no_file_is_served_that_is_not_a_result(server):
    url, root, ids = server
    config = root / ids["tiny_vfm_vae"] / "config.json"
    weights = root / ids["tiny_vfm_vae"] / "checkpoints" / "ema.safetensors"
    assert config.exists()
    assert weights.exists()
    wanted = [
        "/etc/passwd", str(config), str(weights), str(root.parent / "secret.json"), f"{root}/../secret.json", "../../../../etc/passwd", "pyproject.toml",
        str(Path(__file__)), f"{Path.cwd()}/vfmlab/api.py", "~/.bashrc", "/proc/self/environ",
    ]  # fmt: skip
    with httpx.Client(base_url=url) as web:
        for path in wanted:
            for form in (path, quote(path, safe=""), quote(quote(path, safe=""), safe=""), path.replace("/", "//"), path.replace("/", "%5c")):
                for door in ("gradio_api/file=", "gradio_api/file/", "file=", "static/", "assets/", "theme.css/"):
                    answer = web.get(door + form)
                    assert answer.status_code in (400, 403, 404, 405, 422), (door + form, answer.status_code)
                    assert b"root:" not in answer.content
        for door in ("gradio_api/file=", "gradio_api/proxy=", "gradio_api/file%3D"):
            for address in (url, "http://169.254.169.254/latest/meta-data", "file:///etc/passwd"):
                assert web.get(door + address).status_code in (400, 403, 404), door + address
                assert web.get(door + quote(address, safe="")).status_code in (400, 403, 404), door + address


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 9999)) + chunk(b"IEND", b"")


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/vfmlab_pickle_was_run", "w"))


FILES = {
    "bomb.png": (png_header(30_000, 30_000), "pixels"),
    "large.png": (png_header(9000, 9000), "pixels"),
    "picture.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "not a picture"),
    "page.html": (b"<html><script>alert(1)</script></html>", "not a picture"),
    "model.png": (pickle.dumps(Evil()), "not a picture"),
    "empty.png": (b"", "not a picture"),
    "cut.png": (png_header(40, 40)[:60], "not a picture|cannot be decoded"),
    "torn.jpg": (b"\xff\xd8\xff\xe0" + b"\0" * 300, "not a picture"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_picture_is_refused(client, server, picture, tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    before = psutil.Process().memory_info().rss
    with pytest.raises(Exception, match=message) as refused:
        reconstruct(client, str(path), [server[2]["bundled_plain_vae_tokenizer"]])
    assert "/tmp" not in str(refused.value)
    assert psutil.Process().memory_info().rss - before < MAX_PIXELS * 3  # nothing was decoded
    assert not Path("/tmp/vfmlab_pickle_was_run").exists()
    alive(client, picture, server)


def call(url: str, endpoint: str, data: list) -> str:
    """A request as no client of gradio's would send it; what is answered, error or not."""
    begun = httpx.post(f"{url}gradio_api/call/{endpoint}", content=json.dumps({"data": data}), headers={"content-type": "application/json"}, timeout=60)
    if begun.status_code != 200:
        return f"event: error {begun.status_code}"
    with httpx.stream("GET", f"{url}gradio_api/call/{endpoint}/{begun.json()['event_id']}", timeout=120) as answer:
        return answer.read().decode()


def test_pictures_are_files_that_were_uploaded(client, server, picture):
    url, root, ids = server
    ours = {"_type": "gradio.FileData"}
    uri = "data:image/png;base64,iVBORw0KGgo="
    for given in (
        {"path": "/etc/passwd", "meta": ours}, {"path": str(root / ids["tiny_vfm_vae"] / "config.json"), "meta": ours}, {"path": url, "meta": ours},
        {"path": "http://169.254.169.254/", "meta": ours}, {"path": "x.png", "url": uri, "meta": ours}, {"path": None, "url": uri, "meta": ours}, "/etc/passwd", 7,
    ):  # fmt: skip
        answer = call(url, "reconstruct", [given, [ids["bundled_plain_vae_tokenizer"]], 0, 0, 0, 0, False])
        assert "event: error" in answer, given
        assert "PSNR" not in answer
        assert "root:" not in answer
    alive(client, picture, server)


def test_numbers_that_are_none(client, server, picture):
    url, _, ids = server
    order = list(SAMPLE)
    for field, values in {
        "count": [float("nan"), 1e9, -3, "many", None], "seed": [float("inf"), -1, 1e300], "steps": [float("nan"), 10**9, 0], "scale": [float("nan"), 1e30],
        "low": [0.9], "high": [float("nan"), -1], "shift": [0, float("inf")], "solver": ["dopri5", "../x"], "label": [float("nan"), -1, {"a": 1}],
    }.items():  # fmt: skip
        for value in values:
            asked = {**SAMPLE, "high": 0.5, field: value}
            answer = call(url, "sample", [ids["tiny_vfm_vae"], *(asked[key] for key in order)])
            assert "event: error" in answer, (field, value)
            assert "done;" not in answer
    alive(client, picture, server)


def test_bodies_that_are_too_large_are_not_taken(client, server, picture):
    """A gigabyte is refused after a few megabytes, whether its length is announced or not."""
    url, taken, address = server[0], 0, urlsplit(server[0])
    for header in (b"Transfer-Encoding: chunked", b"Content-Length: 1073741824"):
        with socket.create_connection((address.hostname, address.port), timeout=60) as wire:
            wire.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=xyz\r\n" + header + b"\r\n\r\n")
            frame = b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"\0" * 2**20
            taken = 0
            with contextlib.suppress(OSError):  # the server hangs up
                while taken < 2**30:
                    wire.sendall(b"%x\r\n" % len(frame) + frame + b"\r\n" if b"chunked" in header else frame)
                    taken += 2**20
            assert taken < 200 * 2**20
            with contextlib.suppress(OSError):  # the answer is lost where the hang-up came first
                assert b" 413 " in wire.recv(100)
    big = httpx.post(f"{url}gradio_api/call/leaderboard", content=b'{"data": ["' + b"a" * (14 * 2**20) + b'"]}', timeout=60)
    assert big.status_code == 413
    file = {"files": ("a.png", io.BytesIO(b"\0" * (12 * 2**20 + 1000)), "image/png")}
    assert httpx.post(f"{url}gradio_api/upload", files=file, timeout=60).status_code in (400, 413)
    alive(client, picture, server)


def test_a_run_deleted_while_it_is_shown(client, server, picture):
    _, root, ids = server
    name = "tiny_plain_vae_tokenizer-deadbeef"
    shutil.copytree(root / ids["bundled_plain_vae_tokenizer"], root / name)
    assert "PSNR" in reconstruct(client, picture, [name])[0]
    shutil.rmtree(root / name)
    with pytest.raises(Exception, match="no finished tokenizer run"):
        reconstruct(client, picture, [name])
    shutil.copytree(root / ids["bundled_plain_vae_tokenizer"], root / name)
    (root / name / "checkpoints" / "ema.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(Exception, match="truncated or not safetensors"):
        reconstruct(client, picture, [name])
    shutil.rmtree(root / name)
    alive(client, picture, server)


# -- doors ------------------------------------------------------------------------------------------------------------


def test_a_login_closes_every_door(server):
    with served(server[1], auth=("user", "right")) as url:
        for path in ("config", "gradio_api/info", "gradio_api/file=x.png"):
            assert httpx.get(url + path).status_code == 401, path
        assert httpx.post(f"{url}gradio_api/call/leaderboard", json={"data": []}).status_code == 401
        assert httpx.post(f"{url}login", data={"username": "user", "password": "wrong"}).status_code == 400
        with pytest.raises(Exception, match="Could not|401|auth|login|Invalid"):
            Client(url, **QUIET)
        assert Client(url, auth=("user", "right"), **QUIET).predict("", False, "gfd", "rfd", "gfd", "", api_name="/leaderboard")


def test_flags_of_the_command_line(monkeypatch, tmp_path, capsys):
    from apps import app

    given = []
    monkeypatch.setattr(app, "launch", lambda root, **options: given.append(options))
    monkeypatch.delenv("VFMLAB_APP_AUTH", raising=False)
    assert main.main(["app", "--runs", str(tmp_path)]) == 0
    assert given[-1] == {"host": "127.0.0.1", "port": 7860, "auth": None, "mcp": False}
    assert main.main(["app", "--host", "0.0.0.0", "--mcp", "--port", "9000"]) == 0
    assert "VFMLAB_APP_AUTH" in capsys.readouterr().err
    monkeypatch.setenv("VFMLAB_APP_AUTH", "a:b:c")
    assert main.main(["app"]) == 0
    assert given[-1]["auth"] == ("a", "b:c")
    for wrong in ("user", ":password", "user:"):
        assert main.main(["app", "--auth", wrong]) == 2
        assert "USER:PASSWORD" in capsys.readouterr().err


def test_mcp_is_off_unless_asked_for(server, monkeypatch):
    import importlib.util

    assert httpx.post(f"{server[0]}gradio_api/mcp/", json={}).status_code in (404, 405)
    from apps import app
    from vfmlab.errors import ConfigError

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mcp" else found(name, *rest))
    with pytest.raises(ConfigError, match=r"gradio\[mcp\]"):
        app.launch(server[1], mcp=True, block=False)
