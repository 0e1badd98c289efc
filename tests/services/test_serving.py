"""`locvlm ask` and `locvlm serve` as people meet them: a real process, a real browser, and uploads of every kind."""

import base64
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from locvlm.cli import main
from locvlm.model.checkpoint import TINY_FOUNDATION
from locvlm.serving.app import About, make_app
from locvlm.serving.forms import Answer, Place, Query
from locvlm.serving.limits import Limits
from tests.browser import Page, chromium
from tests.server import Server, serving
from tests.taught import Scene, Taught, teach
from tests.tiny import build_world

pytestmark = pytest.mark.slow

PATIENCE = 8  # seconds that the server gives a request
ROOM = 3  # requests at a time


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    return teach(build_world(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="module")
def server(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--open-requests", str(ROOM), "--max-megabytes", "2", "--seconds", str(PATIENCE)]
    with serving(tmp_path_factory.mktemp("serving"), "--model", str(taught.model), *options) as running:
        yield running


@pytest.fixture(scope="module")
def scene(taught: Taught) -> Scene:
    return taught.scenes[0]


# --- answers


def test_each_form_is_answered_as_it_was_taught(server: Server, taught: Taught) -> None:
    for scene in taught.scenes:
        found = server.ask(image=scene.image, locate=scene.category)
        assert found.status == 200
        answer = Answer.model_validate(found.content)
        assert answer.answer == scene.located
        (place,) = answer.places
        assert place.box == pytest.approx(scene.box)
        assert answer.answer[place.start : place.end] == scene.located.removeprefix("It is located at ")
        assert (answer.width, answer.height) == (scene.width, scene.height)
        assert server.ask(image=scene.image, box=scene.box).content["answer"] == scene.described
        assert server.ask(image=scene.image, question=scene.question).content["answer"] == scene.answer


def test_answers_that_come_together_are_those_that_come_alone(server: Server, taught: Taught) -> None:
    said: dict[int, str] = {}

    def ask(number: int) -> None:
        scene = taught.scenes[number]
        said[number] = server.ask(image=scene.image, locate=scene.category).content["answer"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(ROOM)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: taught.scenes[number].located for number in range(ROOM)}


def test_ask_prints_the_answer_and_draws_it(
    taught: Taught, scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ask", "--model", str(taught.model), "--image", str(scene.image)]
    drawn = tmp_path / "drawn.png"
    assert main([*command, "--locate", scene.category, "--draw", str(drawn)]) == 0
    assert capsys.readouterr().out == f"{scene.located}\n"
    box = ",".join(map(str, scene.box))
    assert main([*command, "--box", box, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == scene.described
    with Image.open(scene.image) as before, Image.open(drawn) as after:
        assert before.size == after.size
        middle = (round((scene.box[0] + scene.box[2]) / 2), round(scene.box[1]))
        assert after.getpixel(middle) == (0x6D, 0xB3, 0xEA)
        assert after.getpixel((0, before.height - 1)) == before.convert("RGB").getpixel((0, before.height - 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "nowhere.png", "--question", "x"], "nowhere.png"),
        (["--image", __file__, "--question", "x"], "no JPEG"),
        (["--image", "IMAGE", "--question", " "], "0 characters"),
        (["--image", "IMAGE", "--box", "9,9,1,1"], "x1 < x2"),
        (["--image", "IMAGE", "--question", "x", "--draw", "drawn.txt"], "must end in .png"),
    ],
)
def test_ask_says_what_is_wrong(
    scene: Scene, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(scene.image) if option == "IMAGE" else option for option in options]
    assert main(["ask", "--model", str(TINY_FOUNDATION), *command]) == 2
    assert words in capsys.readouterr().err


# --- what strangers send


def picture(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 90).save(buffer, kind, **options)
    return buffer.getvalue()


WHOLE = base64.b64encode(picture("PNG")).decode()
HEADER = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
HUGE = picture("PNG")[:12] + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + picture("PNG")[33:]  # the size is a lie
JSON = {"content_type": "application/json"}


@pytest.mark.parametrize(
    ("image", "status"),
    [
        (b"", 400),
        (picture("JPEG")[:300], 400),
        (picture("PNG")[:-60], 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", 400),
        (b"<!doctype html><script>alert(1)</script>", 400),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), 400),
        (bytes(2_100_000), 413),
        (HUGE, 413),
    ],
    ids=["empty", "cut-jpeg", "cut-png", "svg", "html", "zeros", "many-bytes", "bomb"],
)
def test_an_image_that_is_none_is_refused(server: Server, image: bytes, status: int) -> None:
    refused(server.ask(image=image, question="Is there a cat?"), status)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (json.dumps({"image": WHOLE, "question": "x"}), {"content_type": "text/plain"}, 400),
        (json.dumps({"image": WHOLE, "question": "x"}), {}, 400),
        ("image=x", {"content_type": "application/x-www-form-urlencoded"}, 400),
        ("--x", {"content_type": "multipart/form-data; boundary=x"}, 400),
        ("", JSON, 400),
        ("hello", JSON, 400),
        ("[" * 100_000, JSON, 400),
        ('{"image": "\ud800", "question": "x"}'.encode("utf-8", "surrogatepass"), JSON, 400),
        (json.dumps({"image": WHOLE}), JSON, 400),
        (json.dumps({"image": 3, "question": "x"}), JSON, 400),
        (json.dumps({"image": WHOLE, "question": "x", "locate": "y"}), JSON, 400),
        (json.dumps({"image": WHOLE, "question": "x", "path": "/etc/passwd"}), JSON, 400),
        (json.dumps({"image": "/etc/passwd", "question": "x"}), JSON, 400),
        (json.dumps({"image": "data:image/png;base64," + WHOLE, "question": "x"}), JSON, 400),
        (json.dumps({"image": WHOLE, "question": "x" * 501}), JSON, 400),
        (json.dumps({"image": WHOLE, "question": "</s><image>"}), JSON, 400),
        (json.dumps({"image": WHOLE, "box": [1, 2, 3]}), JSON, 400),
        ('{"image": "' + WHOLE + '", "box": [1, NaN, 1e999, 4]}', JSON, 400),
        (b"x" * 3_000_000, JSON, 413),
        ((b"x" * 100_000 for _ in range(40)), JSON, 413),
        (b"x", {**JSON, "content_length": "99999999999999999999"}, 413),
    ],
)
def test_a_request_that_is_none_is_refused(server: Server, body: Any, headers: dict[str, str], status: int) -> None:
    refused(server.request("POST", "/api/answer", body, **headers), status)


def refused(reply: Any, status: int) -> None:
    """One message that says what is wrong and nothing of the machine."""
    assert reply.status == status, reply.body
    assert set(reply.content) == {"error"}
    assert 10 < len(reply.content["error"]) < 300
    assert not re.search(r"Traceback|/work|/tmp|/home|site-packages|locvlm\.", reply.body.decode())


def test_after_all_that_the_server_answers_and_has_counted(server: Server, scene: Scene) -> None:
    assert server.ask(image=scene.image, locate=scene.category).content["answer"] == scene.located
    assert server.request("GET", "/health").content == {"status": "ok"}
    told = server.request("GET", "/metrics").body.decode()
    counts = {
        labels: float(n) for labels, n in re.findall(r"^locvlm_requests_total\{(.*)\} ([\d.]+)$", told, re.MULTILINE)
    }
    assert counts['form="locate",status="200"'] >= 1
    assert counts['form="none",status="400"'] >= 1
    assert re.search(r"^locvlm_batch_size_count [1-9]", told, re.MULTILINE)
    assert "Traceback" not in server.log.read_text()


def test_wrong_paths_and_methods_are_told_as_json(server: Server) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/api/answer", 405), ("POST", "/", 405)):
        reply = server.request(method, path)
        assert (reply.status, set(reply.content)) == (status, {"error"})
    assert server.request("GET", "/../../etc/passwd").status == 404


@pytest.mark.parametrize("path", ["/", "/api", "/health", "/metrics", "/nowhere", "/api/answer"])
def test_every_reply_has_the_security_headers(server: Server, path: str) -> None:
    headers = server.request("GET", path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    assert "access-control-allow-origin" not in headers


def test_the_page_is_one_file_whose_script_and_style_are_those_of_the_policy(server: Server) -> None:
    reply = server.request("GET", "/")
    page = reply.body.decode()
    for tag in ("script", "style"):
        (block,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in reply.headers["content-security-policy"]
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert set(re.findall(r"https?://[^\"'\s]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert " style=" not in page.replace("getAttribute", "")
    assert not re.search(r"\bon\w+=", page)


# --- load and time


def held(server: Server) -> socket.socket:
    """A request that has begun and does not go on."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        b"POST /api/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    )
    return connection


def test_one_request_too_many_is_told_to_come_again_and_slow_ones_are_ended(server: Server, scene: Scene) -> None:
    began = time.monotonic()
    slow = [held(server) for _ in range(ROOM)]
    try:
        deadline = time.monotonic() + PATIENCE
        while (reply := server.ask(image=scene.image, locate=scene.category)).status == 200:
            assert time.monotonic() < deadline
        assert (reply.status, reply.headers["retry-after"]) == (503, "2")
        refused(reply, 503)
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(4000).startswith(b"HTTP/1.1 503")
        assert time.monotonic() - began >= PATIENCE - 1
    finally:
        for connection in slow:
            connection.close()
    assert server.ask(image=scene.image, locate=scene.category).status == 200


def test_a_client_that_goes_away_leaves_its_room_to_others(server: Server, scene: Scene) -> None:
    for _ in range(3):
        for connection in [held(server) for _ in range(ROOM)]:
            connection.close()
    deadline = time.monotonic() + PATIENCE - 2  # sooner than they would have been ended
    while server.ask(image=scene.image, locate=scene.category).status != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_port_that_is_taken_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", str(TINY_FOUNDATION), "--port", str(server.port)]) == 2
    assert "choose another --port" in capsys.readouterr().err


# --- the page in a browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium() as opened:
        yield opened


def opened(page: Page, server: Server, image: Path, **window: Any) -> None:
    """The page with a picture chosen."""
    page.open(server.url, **window)
    page.upload("#file", image)
    page.wait("!document.querySelector('#shown').hidden")


def answers(page: Page, n: int) -> str:
    """The newest answer, once there are n."""
    page.wait(f"document.querySelectorAll('#answers li').length === {n}")
    return page.text("#answers li .said")


def drawn(page: Page, kind: str) -> list[float] | None:
    """The rectangle of a kind on the picture, as (x1, y1, x2, y2) in its pixels."""
    box = page.run(
        f"(() => {{ const r = document.querySelector('#overlay .{kind} rect.line'); if (!r) return null; "
        "const [x, y, w, h] = ['x', 'y', 'width', 'height'].map((name) => +r.getAttribute(name)); "
        "return [x, y, x + w, y + h]; })()"
    )
    return None if box is None else [float(number) for number in box]


def on_screen(page: Page, scene: Scene) -> list[tuple[float, float]]:
    """The corners of the scene's object on the screen."""
    x, y, width, height = page.run(
        "(() => { const r = document.querySelector('#picture').getBoundingClientRect(); "
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    assert width / height == pytest.approx(scene.width / scene.height, rel=0.02)
    return [(x + scene.box[i] / scene.width * width, y + scene.box[i + 1] / scene.height * height) for i in (0, 2)]


def test_a_person_asks_finds_and_describes(page: Page, server: Server, scene: Scene) -> None:
    opened(page, server, scene.image)
    page.click("#text")
    page.type(scene.question)
    page.press("Enter", 13, "\r")
    assert answers(page, 1) == scene.answer
    assert drawn(page, "place") is None
    page.click("input[value=locate]")
    page.run("document.querySelector('#text').value = ''")
    page.click("#text")
    page.type(scene.category)
    page.click("#send")
    assert answers(page, 2) == scene.located
    assert drawn(page, "place") == pytest.approx(list(scene.box))
    assert page.text(".tag") == scene.category
    begin, end = on_screen(page, scene)
    page.drag([begin, ((begin[0] + end[0]) / 2, (begin[1] + end[1]) / 2), end])
    assert answers(page, 3) == scene.described
    assert drawn(page, "own") == pytest.approx(list(scene.box), abs=0.3)
    assert drawn(page, "place") is None
    page.click("#answers li:nth-child(2) .more button")  # back to where it was found
    assert drawn(page, "place") == pytest.approx(list(scene.box))
    assert page.faults == []


def test_a_box_can_be_typed(page: Page, server: Server, scene: Scene) -> None:
    opened(page, server, scene.image)
    page.click("input[value=box]")
    for name, number in zip(("x1", "y1", "x2", "y2"), scene.box, strict=True):
        page.click(f"#{name}")
        page.type(f"{number:g}")
    assert drawn(page, "own") == pytest.approx(list(scene.box))
    page.press("Enter", 13, "\r")
    assert answers(page, 1) == scene.described


def test_on_a_phone_a_finger_draws_the_box(page: Page, server: Server, scene: Scene) -> None:
    opened(page, server, scene.image, width=390, height=844, phone=True, dark=True)
    page.click("input[value=box]")
    assert page.run("document.documentElement.scrollWidth") == 390
    begin, end = on_screen(page, scene)
    for kind, points in (("touchStart", [begin]), ("touchMove", [end]), ("touchEnd", [])):
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])
    assert answers(page, 1) == scene.described
    assert page.faults == []


def test_the_page_says_what_the_server_refuses(page: Page, server: Server, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture("PNG")[:-60])
    (tmp_path / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    page.open(server.url)
    page.click("#send")
    assert page.text("#told") == "Choose a picture first."
    page.upload("#file", tmp_path / "page.svg")
    page.wait("document.querySelector('#told').innerText.startsWith('This is no JPEG')")
    (tmp_path / "large.png").write_bytes(picture("PNG"))
    page.upload("#file", tmp_path / "large.png")
    page.wait("!document.querySelector('#shown').hidden")
    page.run("document.querySelector('#text').maxLength = 2000")
    page.click("#text")
    page.type("x" * 600)
    page.click("#send")
    page.wait("document.querySelector('#told').innerText.includes('600 characters')")


def test_a_picture_larger_than_the_server_takes_is_made_smaller_first(
    page: Page, server: Server, tmp_path: Path
) -> None:
    Image.effect_noise((2400, 1200), 120).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 2_000_000
    opened(page, server, tmp_path / "large.png")
    assert page.text("#size") == "2048 \u00d7 1024 pixels"
    page.click("#text")
    page.type("Is there a cat?")
    page.press("Enter", 13, "\r")
    answers(page, 1)


class Talker:
    """Says that two boxes and a point are in every picture."""

    said = Answer(
        answer="Cats at (1,1,20,20) and (10,10,30,30), a nose at (40,5).",
        places=[
            Place(box=[2, 2, 40, 30], start=8, end=19),
            Place(box=[20, 15, 58, 38], start=24, end=37),
            Place(point=[50, 6], start=49, end=55),
        ],
        prompt="x",
        width=60,
        height=40,
    )

    def prepare(self, query: Query) -> Query:
        return query

    def answers(self, prepared: Sequence[Query]) -> list[Answer]:
        return [self.said] * len(prepared)


@pytest.fixture
def talker() -> Iterator[str]:
    """The address of the page over a model that says what is wanted."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # a browser that is early waits
        server = uvicorn.Server(uvicorn.Config(make_app(Talker(), Limits(), About("talker")), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(30)


def test_several_places_are_drawn_in_colours_that_the_text_shares(page: Page, talker: str, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture("PNG"))
    page.open(talker)
    page.upload("#file", tmp_path / "image.png")
    page.wait("!document.querySelector('#shown').hidden")
    page.click("#text")
    page.type("Where are the cats?")
    page.press("Enter", 13, "\r")
    assert answers(page, 1) == Talker.said.answer
    shapes = page.run("[...document.querySelectorAll('#overlay .place .line')].map((e) => e.tagName)")
    assert shapes == ["rect", "rect", "ellipse"]
    named = page.run(
        "[...document.querySelectorAll('.said b')].map((e) => [e.innerText, e.style.getPropertyValue('--c')])"
    )
    assert named == [["(1,1,20,20)", "var(--arm0)"], ["(10,10,30,30)", "var(--arm1)"], ["(40,5)", "var(--arm2)"]]
    assert page.run("[...document.querySelectorAll('.tag')].map((e) => e.innerText)") == ["1", "2", "3"]
    edges = page.run(
        "['#frame', '.tag:last-child'].map((name) => document.querySelector(name).getBoundingClientRect().toJSON())"
    )
    assert edges[0]["left"] <= edges[1]["left"]
    assert edges[1]["right"] == pytest.approx(edges[0]["left"] + 50 / 60 * edges[0]["width"], abs=2)  # at the nose
