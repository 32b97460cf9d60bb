"""The server's page in a browser: by keyboard, on a phone, under a content security policy, through axe."""

import base64
import contextlib
import importlib.util
import io
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright", reason="needs the extra `browser`")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = resources.files("megjax.serve") / "page"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
INFO = {
    "model": "tiny",
    "sizes": [[64, 64]],
    "steps": [4, 10],
    "ratio": [0.0, 0.9],
    "guidance": [0.0, 20.0],
    "dtypes": ["float16", "bfloat16", "int8"],
    "profile": "paper",
    "policies": [
        {
            "conditioned": True,
            "limits": [{"latency_s": 2.0, "energy_j": 1200.0}, {"latency_s": 3.0, "energy_j": 1800.0}],
            "steps": [4, 12],
        }
    ],
}


def picture(shift):
    rows, columns = np.mgrid[:64, :64]
    image = np.stack([rows * 4, columns * 4, np.full_like(rows, shift)], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def answered(body):
    by_policy = "limits" in body
    return {
        "result": {
            "id": "a-1",
            "steps": 6 if by_policy else body["steps"],
            "ratio": 0.35 if by_policy else body["ratio"],
            "chosen_by": "policy" if by_policy else "request",
            "batch": 1,
            "seed": body["seed"],
            "tokens": 39,
            "payload_bits": 10136,
            "timings": {"queue_s": 0.004, "text_s": 0.01, "denoise_s": 0.2, "merge_s": 0.02, "total_s": 0.31},
            "latency_s": {"es": 0.5, "tx": 0.0123, "ue": 0.2, "total": 0.7123},
            "energy_j": {"es": 150.0, "tx": 0.0123, "ue": 10.0, "fixed": 0.0, "total": 160.0123},
        },
        "image": picture(100),
        "reference": picture(160),
        "mse": 0.0012,
        "psnr_db": 29.2,
    }


@pytest.fixture(scope="module")
def server():
    """The page and canned answers; `answers` is emptied first, then every request is answered well."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, kind, content, **headers):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Security-Policy": POLICY, **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def do_GET(self):
            path = "/index.html" if self.path == "/" else self.path
            if path == "/v1/info":
                return self.reply(200, "application/json", json.dumps(running.info).encode())
            file = PAGE / path.lstrip("/")
            if not file.is_file():
                running.missing.append(self.path)
                return self.reply(404, "text/plain", b"")
            return self.reply(200, TYPES[Path(path).suffix], file.read_bytes())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.bodies.append(body)
            if running.answers:
                status, said, headers = running.answers.pop(0)
                if status == "hold":
                    return running.held.wait(20)
                return self.reply(status, "application/json", json.dumps({"error": said}).encode(), **headers)
            return self.reply(200, "application/json", json.dumps(answered(body)).encode())

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium to launch: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def visit(server, browser):
    """(width, height, scheme) -> the page, which must neither complain nor ask anybody else."""
    server.bodies, server.answers, server.missing, server.info = [], [], [], INFO
    server.held = threading.Event()
    complaints, asked, contexts = [], [], []
    address = f"http://127.0.0.1:{server.server_port}/"

    def visit(width=1440, height=900, scheme="light", info=INFO, **options):
        server.info = info
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#facts li")
        return page

    visit.complaints = complaints
    yield visit
    server.held.set()
    for context in contexts:
        context.close()
    assert complaints == []
    assert server.missing == []
    assert all(url.startswith((address, "data:")) for url in asked)


def says(page, place, text):
    """Wait for a text; `wait_for_function` would need what the policy forbids."""
    from playwright.sync_api import expect

    expect(page.locator(place)).to_contain_text(text, timeout=15_000)


def generate(page):
    page.click("#generate")
    page.wait_for_selector("#account:not([hidden])")
    says(page, "#n-payload", "of raw")
    assert page.evaluate("document.getElementById('image').naturalWidth") == 64


@pytest.mark.parametrize("width", [390, 1440])
def test_type_generate_and_see_the_picture(visit, server, width):
    page = visit(width)
    page.fill("#prompt", "a green star")
    generate(page)
    (body,) = server.bodies
    assert body["prompt"] == "a green star"
    assert (body["steps"], body["ratio"]) == (8, 0.4)
    assert body["channel"]["psnr_db"] == 10
    # Eq. (4) at 250 m, as `megjax.link.channel` has it.
    from megjax.link import channel

    assert body["channel"]["rate_bps"] == pytest.approx(float(channel.rate_bps(channel.snr(250.0))), rel=1e-4)
    text = page.inner_text("#results")
    for said in ("1,267 B", "5.2 % of raw", "40 %", "29.2 dB", "712 ms", "160 J", "your choice", "12.3 ms"):
        assert said in text
    assert page.get_attribute("#image", "alt") == "On the device: a green star"
    assert "Done: 8 steps" in page.inner_text("#status")
    # The bar's parts have the lengths of their shares.
    boxes = [page.locator(f"#model-bar .{kind}").bounding_box()["width"] for kind in ("es", "tx", "ue")]
    assert boxes[0] / boxes[2] == pytest.approx(0.5 / 0.2, rel=0.05)
    assert "Edge server 70.2 %" in page.get_attribute("#model-bar", "aria-label")
    # Nothing is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_by_keyboard_alone(visit, server):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    for name in (
        "prompt",
        "SUMMARY",
        "by-request",
        "steps",
        "ratio",
        "distance",
        "psnr",
        "perfect",
        "generate",
    ):
        assert name in reached
    page.focus("#steps")
    page.keyboard.press("ArrowRight")
    page.focus("#ratio")
    page.keyboard.press("Home")
    page.focus("#perfect")
    page.keyboard.press("Space")
    assert page.get_attribute("#steps", "aria-valuetext") == "9 steps"
    page.focus("#generate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#account:not([hidden])")
    assert (server.bodies[0]["steps"], server.bodies[0]["ratio"]) == (9, 0)
    assert server.bodies[0]["channel"]["psnr_db"] is None
    assert page.evaluate("document.activeElement.id") == "generate"
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    says(page, "#status", "Done")
    assert len(server.bodies) == 2


def test_the_policy_chooses_within_limits(visit, server):
    page = visit()
    page.check("#by-policy")
    assert not page.is_visible("#steps")
    assert "2 to 3 s, 1.2 to 1.8 kJ" in page.inner_text("#kept")
    page.fill("#latency", "2.5")
    generate(page)
    (body,) = server.bodies
    assert body["limits"] == {"latency_s": 2.5, "energy_j": 1800}
    assert not {"steps", "ratio"} & set(body)
    assert "the policy's choice" in page.inner_text("#results")


def test_without_a_policy_one_cannot_be_chosen(visit):
    page = visit(info=INFO | {"policies": []})
    assert page.is_disabled("#by-policy")
    assert "--policy" in page.inner_text("#no-policy")


def test_bounds_are_the_servers(visit):
    page = visit()
    assert page.get_attribute("#steps", "max") == "10"
    assert page.get_attribute("#ratio", "max") == "0.9"


def test_errors_are_told_and_what_passes_is_tried_again(visit, server):
    page = visit()
    server.answers += [(422, "prompt: <b>no</b> such word", {}), (429, "full", {"Retry-After": "1"})]
    page.click("#generate")
    page.wait_for_selector("#error:not(:empty)")
    assert page.inner_text("#error") == "Prompt: <b>no</b> such word"
    generate(page)
    assert page.inner_text("#error") == ""
    assert len(server.bodies) == 3
    # The browser itself reports both answers.
    assert len(visit.complaints) == 2
    visit.complaints.clear()


def test_a_request_can_be_cancelled(visit, server):
    page = visit()
    server.answers += [("hold", "", {})]
    page.click("#generate")
    page.click("#cancel")
    says(page, "#status", "Cancelled.")
    assert not page.is_visible("#cancel")
    assert page.evaluate("document.activeElement.id") == "generate"
    generate(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing(visit, width, scheme):
    if importlib.util.find_spec("axe_playwright_python") is None:
        pytest.skip("needs the extra `browser`")
    from axe_playwright_python.sync_playwright import Axe

    page = visit(width, scheme=scheme, bypass_csp=True)
    page.click("summary")
    before = Axe().run(page)
    generate(page)
    page.check("#by-policy")
    for found in (before, Axe().run(page)):
        assert found.violations_count == 0, found.generate_report()


def test_nothing_is_inline(server):
    html = (PAGE / "index.html").read_text()
    assert "style=" not in html
    assert not re.search(r"\son\w+\s*=", html)
    assert html.count("<script") == html.count("<script src=") == 1
    assert "http" not in html.replace("http-equiv", "")
    assert "innerHTML" not in (PAGE / "app.js").read_text()
