"""The app's server under load and under attack: nothing lost, nothing leaked, nobody stops another's job, clear refusals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import pickle
import shutil
import socket
import stat
import struct
import tempfile
import types
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import psutil
import pytest
from app_server import runs, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vfmlab import api
from vfmlab.cli import main
from vfmlab.data.decode import MAX_PIXELS
from vfmlab.errors import ConfigError
from vfmlab.runs import create, scan

pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")
Client, handle_file = gradio_client.Client, gradio_client.handle_file
pytestmark = [pytest.mark.xdist_group("app_safety"), pytest.mark.timeout(400)]

PUBLIC = {
    "/reconstruct", "/sample", "/sample_table", "/interpolate_images", "/interpolate_samples", "/leaderboard", "/evaluate",
    "/explore", "/similarity",
}  # fmt: skip
QUIET = {"verbose": False, "analytics_enabled": False, "httpx_kwargs": {"timeout": 120}}  # a busy machine answers late
SAMPLE = {
    "beside": "none", "label": "every class", "count": 1, "seed": 0, "steps": 4, "solver": "euler", "scale": 1.5, "low": 0, "high": 1, "shift": 1, "ema": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = runs(tmp_path_factory.mktemp("safety_runs"))
    (root.parent / "secret.json").write_text('{"name": "secret", "data": {}}')
    with serving(root) as page:
        yield page.local_url, root, {run.id.rpartition("-")[0]: run.id for run in scan(root)}, page


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
    cards, *_, state = reconstruct(client, picture, [server[2]["bundled_plain_vae_tokenizer"]])
    assert "PSNR" in cards
    return json.loads(state)


# -- what a client can do ---------------------------------------------------------------------------------------------


def test_endpoints_are_named_documented_and_all_there_is(client):
    told = client.view_api(return_format="dict", print_info=False)
    assert set(told["named_endpoints"]) == PUBLIC
    assert not told["unnamed_endpoints"]
    for name in PUBLIC:
        assert len(told["named_endpoints"][name]["description"]) > 40, name


def calls(server, picture) -> dict[str, tuple]:
    """Arguments of a small right call of every endpoint that gives Python lines."""
    ids, sample = server[2], {**SAMPLE, "steps": 2}
    tokenizer, run = ids["bundled_plain_vae_tokenizer"], ids["tiny_vfm_vae"]
    image = handle_file(picture)
    return {
        "/reconstruct": (image, [tokenizer], 0.5, 1, 4, 2, False), "/sample": (run, *sample.values()),
        "/sample_table": (run, *sample.values(), "guidance", "1, 2", "steps", "1, 2"), "/explore": (tokenizer, image, 4, False, 0.5, 0.5),
        "/interpolate_images": (image, image, [tokenizer], "linear", 3),
        "/interpolate_samples": ([run], "classes", "0", "1", 0, 1, "linear", 3, 2, 1), "/leaderboard": ("", False, "gfd", "rfd", "gfd", ""),
    }  # fmt: skip


def test_the_python_lines_of_every_endpoint_run_and_name_the_true_root(client, picture, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("picture.png", "first.png", "second.png"):
        shutil.copy(picture, name)
    results = {}
    for endpoint, arguments in calls(server, picture).items():
        answers = client.predict(*arguments, api_name=endpoint)
        code = next(a for a in answers if isinstance(a, str) and a.startswith(("import vfmlab", "from vfmlab")))
        assert repr(str(server[1])) in code, endpoint
        results[endpoint] = {}
        exec(code, results[endpoint])
    assert results["/sample"]["last"].final
    assert results["/sample_table"]["last"].final
    state = alive(client, picture, server)
    (numbers,) = state["numbers"].values()
    assert {"psnr", "ssim"} <= numbers.keys()


def test_previews_come_before_the_end_and_a_picture_can_be_saved(client, server):
    job = client.submit(server[2]["tiny_vfm_vae"], *{**SAMPLE, "steps": 60}.values(), api_name="/sample")
    answers = list(job)
    assert "step " in answers[0][0]
    assert "done;" in answers[-1][0]
    assert len(answers) >= 5
    with Image.open(answers[-1][1]) as sheet:
        assert sheet.format == "PNG"


def test_many_requests_of_ten_clients(server, picture, client):
    """None is lost, and memory does not grow with them."""
    url, _, ids, _ = server
    samples = {**SAMPLE, "label": "0", "steps": 2}
    process = psutil.Process()

    def one(number: int) -> bool:
        mine = Client(url, **QUIET)
        both = [ids["bundled_plain_vae_tokenizer"], ids["tiny_vfm_vae_tokenizer"]]
        first = "PSNR" in reconstruct(mine, picture, both)[0]
        return first and "done;" in mine.predict(ids["tiny_vfm_vae"], *{**samples, "seed": number}.values(), api_name="/sample")[0]

    one(0)  # everything is loaded once
    gc.collect()
    before = process.memory_info().rss
    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(one, range(10)))
    gc.collect()
    assert process.memory_info().rss - before < 150 * 2**20  # ten clients live in this process too; a leak would be far more


# -- cancelling -------------------------------------------------------------------------------------------------------

SLOW = {**SAMPLE, "steps": 250, "solver": "heun", "count": 4, "scale": 2.0}


def running() -> int:
    """Samplings that are under way in this process."""
    return sum(isinstance(o, types.GeneratorType) and o.__name__ == "trajectory" and o.gi_frame is not None for o in gc.get_objects())


def begun(client, server, **changes):
    job = client.submit(server[2]["tiny_vfm_vae"], *{**SLOW, **changes}.values(), api_name="/sample")
    next(iter(job))  # the first preview
    return job


def test_cancelling_frees_what_the_job_held(client, server, picture):
    job = begun(client, server)
    assert running() > 0
    job.cancel()
    alive(client, picture, server)  # one job computes at a time: when this has run, the other one has ended
    assert running() == 0
    assert not any("done;" in output[0] for output in job.outputs())


def test_a_second_client_cannot_cancel_the_first(client, server, picture):
    job = begun(client, server)
    config = httpx.get(f"{server[0]}config").json()
    fn_index = next(d["id"] for d in config["dependencies"] if d["api_name"] == "sample")
    other = Client(server[0], **QUIET)
    for session in (other.session_hash, "", "*", "%", "None"):
        body = {"session_hash": session, "fn_index": fn_index, "event_id": "0" * 32}
        assert httpx.post(f"{server[0]}gradio_api/cancel", json=body).status_code in (200, 400)
    assert "done;" in job.result()[0]


# -- hostile input ----------------------------------------------------------------------------------------------------


def hostile_ids(server):
    _, root, ids, _ = server
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
            ((wrong, *SAMPLE.values(), "seed", "1", "steps", "1"), "/sample_table"),
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
    url, root, ids, _ = server
    config = root / ids["tiny_vfm_vae"] / "config.json"
    weights = root / ids["tiny_vfm_vae"] / "checkpoints" / "ema.safetensors"
    assert config.exists()
    assert weights.exists()
    wanted = [
        "/etc/passwd", str(config), str(weights), str(root.parent / "secret.json"), f"{root}/../secret.json", "../../../../etc/passwd", "pyproject.toml",
        str(Path(__file__)), f"{Path.cwd()}/vfmlab/api.py", "~/.bashrc", "/proc/self/environ",
    ]  # fmt: skip
    with httpx.Client(base_url=url, timeout=60) as web:
        for path in wanted:
            for form in (path, quote(path, safe=""), quote(quote(path, safe=""), safe=""), path.replace("/", "//"), path.replace("/", "%5c")):
                for door in ("gradio_api/file=", "file=", "static/", "theme.css/"):
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
    "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "not a picture"),
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


def test_a_call_with_named_values_is_answered(server):
    """The form that the page's own help shows for curl."""
    address = f"{server[0]}gradio_api/call/v2/leaderboard"
    named = {"which": "", "phases": False, "metric": "gfd", "x": "rfd", "y": "gfd", "run": ""}
    begun = httpx.post(address, json=named, timeout=60).json()
    with httpx.stream("GET", f"{address}/{begun['event_id']}", timeout=120) as answer:
        assert "event: complete" in answer.read().decode()


def test_pictures_are_files_that_were_uploaded(client, server, picture):
    url, root, ids, _ = server
    ours = {"_type": "gradio.FileData"}
    uri = "data:image/png;base64,iVBORw0KGgo="
    for value in (
        {"path": "/etc/passwd", "meta": ours}, {"path": str(root / ids["tiny_vfm_vae"] / "config.json"), "meta": ours}, {"path": url, "meta": ours},
        {"path": "http://169.254.169.254/", "meta": ours}, {"path": "x.png", "url": uri, "meta": ours}, {"path": None, "url": uri, "meta": ours}, "/etc/passwd", 7,
    ):  # fmt: skip
        answer = call(url, "reconstruct", [value, [ids["bundled_plain_vae_tokenizer"]], 0, 0, 0, 0, False])
        assert "event: error" in answer, value
        assert "PSNR" not in answer
        assert "root:" not in answer
    alive(client, picture, server)


def test_numbers_that_are_none(client, server, picture):
    url, _, ids, _ = server
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
            wire.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=xyz\r\n" + header + b"\r\n\r\n")
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
    _, root, ids, _ = server
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


PLACES = (
    "", "config", "config/", "gradio_api/info", "gradio_api/app_id", "gradio_api/file=x.png", "gradio_api/queue/status", "theme.css",
    "gradio_api/queue/data?session_hash=a", "gradio_api/heartbeat/a", "manifest.json", "assets/index.js",
)  # fmt: skip


@pytest.fixture(scope="module")
def locked(server):
    """A server with a login, and the address of a client that is logged in."""
    with serving(server[1], auth=("user", "right"), passwords=(3, 3600.0)) as page, httpx.Client(base_url=page.local_url, timeout=60) as web:
        assert web.post("login", data={"username": "user", "password": "right"}).status_code == 200
        yield page, web


def test_a_login_serves_nothing_but_its_form(server, locked):
    page, inside = locked
    for place in PLACES:
        answer = httpx.get(page.local_url + place)
        assert answer.status_code == 401, place
        assert not any(run_id in answer.text for run_id in server[2].values())
        assert "<form" in answer.text if place == "" else len(answer.text) < 100
    for call in ("call/leaderboard", "queue/join", "upload", "cancel", "reset"):
        assert httpx.post(f"{page.local_url}gradio_api/{call}", json={"data": []}).status_code == 401
    assert server[2]["tiny_vfm_vae"] in inside.get("config").text
    login = Client(page.local_url, auth=("user", "right"), **QUIET)
    assert login.predict("", False, "gfd", "rfd", "gfd", "", api_name="/leaderboard")


def test_passwords_cannot_be_tried_one_after_the_other(locked):
    page, inside = locked
    wrong = [httpx.post(f"{page.local_url}login", data={"username": "user", "password": str(i)}).status_code for i in range(12)]
    assert wrong == [400] * 3 + [429] * 9
    assert httpx.post(f"{page.local_url}login", data={"username": "user", "password": "right"}).status_code == 429
    assert inside.get("config").status_code == 200  # who is in stays in


def test_only_own_hosts_and_own_pages(server, locked):
    for url, get in ((server[0], httpx.get), (locked[0].local_url, locked[1].get)):
        host = urlsplit(url).netloc
        for place in PLACES[:8]:
            for name in ("evil.example", "evil.example:80", f"127.0.0.1.evil.example:{urlsplit(url).port}", "", "a b", "[::2]"):
                assert get(url + place, headers={"host": name}).status_code == 400, (place, name)
            for foreign in (
                {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": f"http://{host}0"}, {"sec-fetch-site": "cross-site"},
                {"origin": "http://localhost:1"}, {"sec-fetch-site": "same-site"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
                {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
            ):  # fmt: skip
                assert get(url + place, headers=foreign).status_code == 403, (place, foreign)
        for call in ("call/leaderboard", "upload", "cancel"):
            assert httpx.post(f"{url}gradio_api/{call}", headers={"origin": "http://evil.example"}, content="{}").status_code == 403
        assert get(url, headers={"origin": f"http://{host}"}).status_code == 200
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
        assert get(url, headers=link).status_code == 200  # a link that somebody sent


def test_hosts_are_those_of_the_start():
    from apps.guard import hosts

    assert hosts("127.0.0.1") == ["127.0.0.1", "localhost", "[::1]", "127.0.0.1"]
    assert socket.gethostname() in hosts("0.0.0.0", ["lab.example"])
    assert hosts("10.0.0.7", ["lab.example", "fe80::1"])[3:] == ["10.0.0.7", "lab.example", "[fe80::1]"]
    assert not any("*" in name for name in hosts("0.0.0.0"))


def test_no_answer_may_be_framed(server, locked):
    for url in (server[0], locked[0].local_url):
        for place in (*PLACES, "nothing/here", "gradio_api/file=/etc/passwd"):
            if "heartbeat" in place or "queue/data" in place:
                continue  # streams without an end
            headers = httpx.get(url + place).headers
            assert headers["x-frame-options"] == "DENY"
            assert headers["content-security-policy"] == "frame-ancestors 'none'"


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


JUNK = [None, True, -1, 1e308, "x", "\ud800", [], ["a"], {"a": 1}, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]


def test_junk_to_every_function_is_an_answer_and_one_line(server, caplog, capfd):
    """Every function of the page, those of its own buttons too, with junk for all its inputs; no 5xx and no traceback."""
    url, *_, page = server
    functions = {(fn.name, len(fn.inputs)): fn for fn in page.fns.values() if fn.inputs or fn.name in ("pick_row", "click")}
    assert len(functions) > 15
    for fn in functions.values():
        session = f"junk{fn._id}"
        for value in JUNK:
            call = {"data": [value] * len(fn.inputs), "fn_index": fn._id, "session_hash": session, "event_data": {"index": value, "value": value}}
            json_type = {"content-type": "application/json"}
            answer = httpx.post(f"{url}gradio_api/queue/join", content=json.dumps(call), headers=json_type, timeout=60)
            assert answer.status_code == 200, (fn.api_name, value, answer.text)
        with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
            ends = stream.read().decode().count("process_completed")
        assert ends == len(JUNK)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert all("\n" not in record.getMessage() and not record.exc_info for record in caplog.records if record.name == "vfmlab.app")
    assert not [r.getMessage() for r in caplog.records if r.name == "vfmlab.app" and r.levelname == "ERROR"]  # all was checked first


BODIES = [
    b"", b"{", b"7", b"[]", b'{"data": 3}', b'{"fn_index": "x"}', b'{"fn_index": 10000}', b'{"fn_index": true}', b"\xff\xfe", b"9" * 5000, deep(5000).encode(),
    b'{"data": ' + deep(50).encode() + b', "fn_index": 0}', b'{"fn_index": 0, "session_hash": "../x"}', b'{"fn_index": 0, "session_hash": {"a": 1}}',
    b'{"fn_index": 0, "trigger_id": "x", "data": []}', b'{"fn_index": 0, "event_data": 3, "data": []}', b'{"data": [' + b"0," * 40 + b"0]}",
]  # fmt: skip


def test_junk_requests_are_4xx(server, capfd):
    url = server[0]
    with httpx.Client(base_url=url, timeout=60) as web:
        for state in (deep(2000), deep(40), json.dumps({"tab": json.loads(deep(40))})):
            assert web.get(f"?{urlencode({'state': state})}").status_code == 400
        assert web.get("?state=no{json").status_code == 200  # an old or torn link opens the page
        assert web.get(f"?state={'a' * 20_000}").status_code == 414
        for call in ("queue/join", "call/sample", "call/nothing", "call/v2/sample", "cancel"):
            for body in BODIES:
                headers = {"content-type": "application/json"}
                assert 400 <= web.post(f"gradio_api/{call}", content=body, headers=headers).status_code < 500, (call, body[:40])
        for range_ in ("bytes=0-1,2-3", "bytes=x", "lines=1-2", "bytes=--1"):
            assert web.get("theme.css", headers={"range": range_}).status_code == 416
        frame = "--x\r\nContent-Disposition: form-data; name=\"files\"; filename=\"{}\"\r\n\r\nabc\r\n--x--\r\n"
        for name in ("", ".", "..", "/", "a/../..", "\x00", "a" * 5000, "\\"):
            headers = {"content-type": "multipart/form-data; boundary=x"}
            assert web.post("gradio_api/upload", content=frame.format(name).encode(), headers=headers).status_code < 500, name
        for headers in ({}, {"content-type": "multipart/form-data"}, {"content-type": "multipart/form-data; boundary=x"}):
            assert 400 <= web.post("gradio_api/upload", content=b"--x\r\n\r\n", headers=headers).status_code < 500
        for length in ("-1", "x", "9" * 30):
            with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) as wire:
                wire.sendall(f"POST /gradio_api/cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
                assert b" 4" in wire.recv(20)
        for method in ("PUT", "DELETE", "PATCH", "TRACE"):
            assert web.request(method, "config").status_code == 405
        for place in ("gradio_api/proxy=http://a", "monitoring", "gradio_api/vibe-code", "gradio_api/component_server", "gradio_api/run/sample",
                      "gradio_api/dev/reload", "gradio_api/deep_link", "gradio_api/stream/a/b/1/playlist.m3u8"):  # fmt: skip
            assert web.get(place).status_code == 404, place
            assert web.post(place).status_code == 404, place
    assert "Traceback" not in "".join(capfd.readouterr())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "POST", "HEAD", "PUT"]), path=st.one_of(st.text(max_size=40), st.sampled_from(PLACES)), query=st.binary(max_size=60),
    headers=st.lists(st.tuples(st.sampled_from([b"origin", b"range", b"cookie", b"content-length", b"sec-fetch-site", b"host"]), st.binary(max_size=30)), max_size=4),
    body=st.binary(max_size=200),
)  # fmt: skip
def test_the_guard_answers_anything_once(method, path, query, headers, body):
    from apps.guard import Guard

    async def inner(scope, receive, send):
        raise KeyError("what an application makes of nonsense")

    app = types.SimpleNamespace(auth=None, get_blocks=lambda: types.SimpleNamespace(fns={}, blocks={}, _id=0))
    guard, answers = Guard(inner, Path("/nowhere"), Counter()), []
    scope = {"type": "http", "method": method, "path": f"/{path}", "query_string": query, "headers": headers, "app": app, "server": ("h", 1),
             "client": ("1.2.3.4", 5), "scheme": "http", "root_path": ""}  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        answers.append(message)

    asyncio.run(guard(scope, receive, send))
    (start,) = [a for a in answers if a["type"] == "http.response.start"]
    assert 400 <= start["status"] < 500


def test_one_client_cannot_fill_the_queue_and_jobs_without_a_listener_are_dropped(server, client, picture, caplog):
    url, _, ids, page = server
    held = begun(client, server)
    body = {"data": [ids["tiny_vfm_vae"], *SAMPLE.values()]}
    answers = [httpx.post(f"{url}gradio_api/call/sample", json=body).status_code for _ in range(20)]
    assert answers == [200] * 16 + [429] * 4
    for queue in page._queue.event_queue_per_concurrency_id.values():
        for event in queue.queue:
            event.enqueue_time -= 3600  # nobody listened to them for an hour
    held.cancel()
    alive(client, picture, server)  # comes after them all
    dropped = [record for record in caplog.records if "Nobody listens" in record.getMessage()]
    assert len(dropped) == 16


def test_uploads_of_one_client_are_capped(server):
    with serving(server[1], uploads=(3 * 2**20, 3600.0)) as page:
        file = {"files": ("a.png", b"\0" * 2**20, "image/png")}
        answers = [httpx.post(f"{page.local_url}gradio_api/upload", files=file, timeout=60).status_code for _ in range(5)]
        assert answers == [200, 200, 429, 429, 429]
        assert httpx.get(f"{page.local_url}config").status_code == 200


def test_the_temporary_folder_is_private_and_goes_with_the_server(server, tmp_path, monkeypatch):
    from apps import folder as folders

    (tmp_path / "gradio").write_text("somebody else's")  # gradio's shared folder cannot be made, and is not needed
    monkeypatch.setattr(folders, "_open", [])  # as another process
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with serving(server[1]) as page:
        (folder,) = tmp_path.glob("vfmlab_app_*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (path,) = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("a.png", b"abc")}).json()
        assert Path(path).is_relative_to(folder)
        assert httpx.get(f"{page.local_url}gradio_api/file={path}").content == b"abc"
        (tmp_path / "other.png").write_bytes(b"secret")
        (folder / "link.png").symlink_to(tmp_path / "other.png")
        for foreign in (tmp_path / "other.png", tmp_path / "gradio", folder / "link.png", folder / ".." / "other.png"):
            assert httpx.get(f"{page.local_url}gradio_api/file={foreign}").status_code == 403
        wire = socket.create_connection((urlsplit(page.local_url).hostname, urlsplit(page.local_url).port))
        wire.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
                     b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; name=\"files\"; "
                     b"filename=\"b.png\"\r\n\r\n" + b"\0" * 100_000)  # fmt: skip
        wire.close()  # an upload that breaks off
    assert not list(tmp_path.glob("*vfmlab_app_*"))
    assert os.environ["GRADIO_TEMP_DIR"] == str(tmp_path / "gradio")


def test_sweeps_take_what_is_old_or_dead_and_respect_locks(tmp_path, monkeypatch):
    from apps import folder

    monkeypatch.setattr(folder, "_open", [])  # as another process
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folder.private() as mine:
        dead, outside = tmp_path / "vfmlab_app_dead", tmp_path / "outside"
        for place in (dead, outside):
            place.mkdir()
            (place / "upload").write_bytes(b"x")
        (tmp_path / "vfmlab_app_link").symlink_to(outside)
        assert folder.sweep_dead() == ["vfmlab_app_dead"]
        assert mine.is_dir()
        assert (outside / "upload").exists()
        (mine / "sub").mkdir()
        old = [mine / "tmpbroken", mine / "sub" / "result.png", mine / folder.EXAMPLES / "example_0.png"]
        for path in (*old, mine / "new.png"):
            path.write_bytes(b"x")
        for path in (*old, mine / "sub"):
            os.utime(path, (1, 1))
        os.utime(mine / ".lock", (1, 1))
        folder.sweep(mine)
        left = {str(path.relative_to(mine)) for path in mine.rglob("*")} - {"sub"}  # which changed just now
        assert left == {".lock", "new.png", "examples", "examples/example_0.png"}
    assert not mine.exists()


def test_names_of_runs_hold_no_paths(tmp_path):
    from apps import models

    for source in ("folder:/mnt/my photos/cats", "folder:/srv/dogs"):
        run = create(api.resolve("tiny_plain_vae", {"data.source": source}).phases()[0], tmp_path)
        run.ema.touch()
    names = [name for name, _ in models.choices(tmp_path, "tokenizer")]
    assert sorted(name.partition(" ")[2] for name in names) == ['(data.source="folder:cats")', '(data.source="folder:dogs")']


def test_bad_runs_are_named_and_left_out(server, tmp_path):
    """Whatever lies in one run's folder, the page is built and the others are listed."""
    from apps import app, models

    good = server[2]["bundled_plain_vae_tokenizer"]
    shutil.copytree(server[1] / good, tmp_path / good)
    config = (tmp_path / good / "config.json").read_text()
    bad = {
        "nested": deep(5000), "number": "7", "types": config.replace('"tokenizer": {', '"tokenizer": 3, "x": {'), "binary": "\0\1", "cut": config[:200],
        "unknown": config.replace('"method": "plain_vae"', '"method": "no_such"'), "huge": '{"name": ' + "9" * 5000 + "}",
    }  # fmt: skip
    for name, text in bad.items():
        shutil.copytree(tmp_path / good, tmp_path / name)
        (tmp_path / name / "config.json").write_text(text)
    for name, file in (("status", "status.json"), ("report", "report.json"), ("env", "env.json"), ("lines", "metrics.jsonl")):
        shutil.copytree(tmp_path / good, tmp_path / name)
        (tmp_path / name / file).write_text(deep(3000))
    foreign = os.fsencode(tmp_path / good) + b"caf\xe9"
    shutil.copytree(os.fsencode(tmp_path / good), foreign)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "config.json")
    ids = [run_id for _, run_id in models.choices(tmp_path, "tokenizer")]
    assert good in ids
    assert not {*bad, "pipe", os.fsdecode(os.path.basename(foreign))} & set(ids)
    named = models.unreadable(tmp_path)
    assert named.startswith(("8 ", "9 "))
    (tmp_path / "examples").mkdir()
    page = app.build(tmp_path, tmp_path)
    json.dumps(page.get_config_file(), ensure_ascii=False, default=str).encode()
    assert any(named in str(component.value) for component in page.blocks.values() if hasattr(component, "value"))


def test_text_that_is_no_unicode_is_spelled_out():
    from apps.common import printable

    tree = {"caf\udce9": ["caf\udce9", {"a": ("b\udce9",)}], "n": 1.5}
    assert json.dumps(printable(tree), ensure_ascii=False).encode() == b'{"caf\\\\udce9": ["caf\\\\udce9", {"a": ["b\\\\udce9"]}], "n": 1.5}'


def test_ports_that_are_none(server, capsys):
    from apps import app

    for port in (0, -1, 65536, 99999, 10**30):
        with pytest.raises(ConfigError, match="1 to 65535"):
            app.launch(server[1], port=port, block=False)
    taken = urlsplit(server[0]).port
    with pytest.raises(ConfigError, match=f"127.0.0.1, port {taken}, cannot be listened on .*--port"):
        app.launch(server[1], port=taken, block=False)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 cannot be listened on .*--host: an address of this machine"):
        app.launch(server[1], host="192.0.2.1", block=False)
    assert main.main(["app", "--root", str(server[1]), "--port", "99999"]) == 2
    assert "99999" in capsys.readouterr().err


def test_flags_of_the_command_line(monkeypatch, tmp_path, capsys):
    from apps import app

    calls = []
    monkeypatch.setattr(app, "launch", lambda root, **options: calls.append({"root": root, **options}))
    monkeypatch.delenv("VFMLAB_APP_AUTH", raising=False)
    for flag in ("--root", "--runs"):
        assert main.main(["app", flag, str(tmp_path)]) == 0
        assert calls[-1] == {"root": tmp_path, "host": "127.0.0.1", "port": 7860, "auth": None, "mcp": False, "hosts": ()}
    assert capsys.readouterr().out.startswith("vfmlab app: starting on http://127.0.0.1:7860")
    assert main.main(["app", "--hosts", "lab.example", "other"]) == 0
    assert calls[-1]["hosts"] == ("lab.example", "other")
    assert main.main(["app", "--host", "0.0.0.0", "--mcp", "--port", "9000"]) == 0
    assert "VFMLAB_APP_AUTH" in capsys.readouterr().err
    monkeypatch.setenv("VFMLAB_APP_AUTH", "a:b:c")
    assert main.main(["app"]) == 0
    assert calls[-1]["auth"] == ("a", "b:c")
    for wrong in ("user", ":password", "user:"):
        assert main.main(["app", "--auth", wrong]) == 2
        assert "USER:PASSWORD" in capsys.readouterr().err


def test_mcp_is_off_unless_asked_for(server, monkeypatch):
    import importlib.util

    assert httpx.post(f"{server[0]}gradio_api/mcp/", json={}).status_code in (404, 405)
    from apps import app

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mcp" else found(name, *rest))
    with pytest.raises(ConfigError, match=r"gradio\[mcp\]"):
        app.launch(server[1], mcp=True, block=False)
