"""The page in a real browser: it fits the screen, is legible in both colour schemes, and asks for nothing outside."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folders
from colours import srgb

from pyprune import report
from pyprune.report import page

matplotlib_image = pytest.importorskip("matplotlib.image")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed; Debian has chromium-headless-shell"
)

SCHEMES = {"light": 1, "dark": 0}  # blink's numbers
# Runs behind the page's own content: how wide it is, what it loaded, the contrast of every text with what is behind.
MEASURE = """
<script>
function rgb(text) { const c = text.match(/[0-9.]+/g).map(Number); return [c[0], c[1], c[2], c.length > 3 ? c[3] : 1]; }
function luminance(c) {
  const [r, g, b] = c.slice(0, 3).map(x => x / 255).map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + .05) / (low + .05);
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 1) return c;
  }
}
document.querySelectorAll("details").forEach(details => { details.open = true; });
const texts = [];
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!own || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const style = getComputedStyle(element), svg = element.closest("svg");
  texts.push({text: element.textContent.slice(0, 40), svg: !!svg,
              size: element.getBoundingClientRect().height,
              contrast: contrast(rgb(svg ? style.fill : style.color), behind(element))});
}
const found = {width: innerWidth, content: document.documentElement.scrollWidth, texts,
               loaded: performance.getEntriesByType("resource").map(entry => entry.name),
               background: getComputedStyle(document.body).backgroundColor};
parent.postMessage(JSON.stringify(found), "*");
</script>
"""
# The window of a desktop browser has a least width, the frame of a page in it has none.
FRAME = """
<!doctype html><body><script>
addEventListener("message", event => { document.body.textContent = "MEASURED" + event.data + "MEASURED"; });
</script><iframe src="measured.html" style="border: 0; width: {width}px; height: 1200px"></iframe></body>
"""


def browse(page: Path, scheme: str, width: int, *more: str) -> str:
    """What a headless browser prints."""
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync --disable-extensions --hide-scrollbars"
    quiet += " --disable-background-networking --disable-component-update --disable-default-apps --mute-audio"
    command = [str(BROWSER), *quiet.split(), f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1200", *more, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three runs that has every kind of picture, a long name and a problem."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [
        run_folders.tuned(folder / "tuned"),
        run_folders.compared(folder / "compared"),
        run_folders.pruned(folder / ("a-name-that-is-long-" * 6)),
    ]
    (runs[0] / "metrics.jsonl").open("a").write("{")
    report.make(runs, folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def measured(made: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """By scheme and width of the window, what the script in the page finds. The page's own policy forbids scripts, so
    it is measured without."""
    html = made.read_text()
    policy = html[html.index("<meta http-equiv") :].partition("\n")[0]
    copy = made.with_name("measured.html")
    copy.write_text(html.replace(policy, "").replace("</body>", MEASURE + "</body>"))
    found = {}
    for scheme, width in (("light", 1400), ("dark", 360), ("dark", 1400)):
        frame = made.with_name("frame.html")
        frame.write_text(FRAME.replace("{width}", str(width)))
        printed = browse(frame, scheme, 1500, "--dump-dom", "--virtual-time-budget=10000")
        found[scheme, width] = json.loads(printed.split("MEASURED")[-2])
    return found


def test_nothing_is_wider_than_the_screen(measured: dict[tuple[str, int], dict[str, Any]]) -> None:
    for (_, width), found in measured.items():
        assert found["width"] == width and found["content"] <= width


def test_texts_are_legible_in_both_schemes(measured: dict[tuple[str, int], dict[str, Any]]) -> None:
    """WCAG's 4.5 for every text, names in pictures too, and no text of a picture smaller than 8 pixels on a phone."""
    backgrounds = set()
    for found in measured.values():
        faint = [text for text in found["texts"] if text["contrast"] < 4.5]
        assert not faint and len(found["texts"]) > 300 and sum(text["svg"] for text in found["texts"]) > 100
        backgrounds.add(found["background"])
        assert min(text["size"] for text in found["texts"] if text["svg"]) >= 8
    assert len(backgrounds) == 2


def test_a_screenshot_shows_the_scheme_and_the_pictures(made: Path) -> None:
    """Dark on light, or light on dark, and the colours of the curves are on the screen."""
    for scheme, colors in (("light", page.LIGHT), ("dark", page.DARK)):
        path = made.with_name(f"{scheme}.png")
        browse(made, scheme, 1300, f"--screenshot={path}", "--window-size=1300,2600")
        pixels = matplotlib_image.imread(str(path))[..., :3]
        assert pixels[5, 5].tolist() == pytest.approx(srgb(colors["paper"]), abs=0.01)
        for name in ("ink", "s0", "s1", "s2", "s3"):
            distance = abs(pixels - srgb(colors[name])).max(axis=-1)
            assert (distance < 0.02).sum() > 50, (scheme, name)


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_no_request_leaves_the_page(
    made: Path, measured: dict[tuple[str, int], dict[str, Any]], listener: tuple[str, list[str]]
) -> None:
    """The page loads nothing; and even what somebody put into it could load nothing, for its policy forbids it."""
    assert all(found["loaded"] == [] for found in measured.values())
    address, asked = listener
    html = made.read_text()
    foreign = (
        f'<img src="{address}/image"><script src="{address}/script"></script><link rel=stylesheet href="{address}/css">'
    )
    policy = html[html.index("<meta http-equiv") :].partition("\n")[0]
    tampered = made.with_name("tampered.html")
    tampered.write_text(html.replace("<main>", foreign + "<main>"))
    browse(tampered, "light", 1000, "--dump-dom")
    assert asked == []
    tampered.write_text(html.replace("<main>", foreign + "<main>").replace(policy, ""))
    browse(tampered, "light", 1000, "--dump-dom")
    assert sorted(asked) == ["/css", "/image", "/script"]  # so the silence before was the policy's
