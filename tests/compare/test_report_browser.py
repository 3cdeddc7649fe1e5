"""The report in a real browser: nothing is refused or fetched, and no page is wider than the screen it is read on."""

import html
import json
import re
import shutil
import subprocess

import pytest
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders

from selfsup_fastai.compare.report import write_report
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from tests.compare.made_up import GAINS, made_up
from tests.conftest import write_images

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
FRAME = """<!DOCTYPE html><body>
<iframe id="page" style="width: {width}px; height: 900px" srcdoc="{page}"></iframe>
<script>
const frame = document.getElementById("page"), refused = [];
const watch = setInterval(() => {{ const d = frame.contentDocument; if (d && !d.watched) {{ d.watched = true;
  d.addEventListener("securitypolicyviolation", e => refused.push(e.violatedDirective)); }} }}, 1);
frame.onload = () => setTimeout(() => {{
  clearInterval(watch);
  const d = frame.contentDocument, wide = d.scrollingElement, box = e => e.getBoundingClientRect();
  const seen = {{ asked: frame.contentWindow.innerWidth, width: wide.scrollWidth, refused,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
    broken: [...d.images].filter(i => !i.naturalWidth).length, images: d.images.length,
    over: [...d.querySelectorAll("main *")].filter(e => !e.closest(".scroll") && !e.closest("thead")
      && box(e).right > frame.contentWindow.innerWidth).map(e => e.outerHTML.slice(0, 80)),
    small: [...d.querySelectorAll("p, td, th, li, dd, figcaption, small")].filter(
      e => parseFloat(getComputedStyle(e).fontSize) < 12.5).length,
    styled: getComputedStyle(d.querySelector(".verdict")).borderLeftStyle }};
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
}}, 300);
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with all there is, and names that are long."""
    out = tmp_path_factory.mktemp("report")
    for part, n in (("train", 6), ("valid", 4)):
        for i, name in enumerate(("abdomen", "a_class_whose_name_is_one_long_word_without_an_end")):
            write_images(out / "images" / part / name, n, (48, 48), seed=i)
    dls = UnlabeledDataLoaders.from_folder(out / "images", size=48, bs=8, num_workers=0)
    labeled = ImageDataLoaders.from_folder(out / "images", valid="valid", item_tfms=Resize(48), bs=4, num_workers=0)
    encoder = save_encoder(create_encoder("resnet10t", size=48), out / "encoders" / "simclr-42.safetensors")
    gains = {**GAINS, "rotation+relative_position+colorization_with_a_long_name": 0.02}
    comparison = made_up(gains, encoders={"simclr": [encoder]}, command="selfsup compare " + "x" * 200)
    comparison.settings.update({"tasks": ["simclr", "rotation"], "a setting": "y" * 150})
    return write_report(comparison, dls, labeled, out).read_text("utf-8")


def seen(page: str, width: int, folder, **style) -> dict:
    """What a browser of this width makes of a page, which stands in a frame with all its own rules."""
    file = folder / "frame.html"
    file.write_text(FRAME.format(width=width, page=html.escape(page)), "utf-8")
    line = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    line += ["--disable-background-networking", "--virtual-time-budget=10000", "--dump-dom", file.as_uri()]
    dom = subprocess.run(line, capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search("SEEN(.*?)SEEN", dom, re.S)[1]))


@pytest.mark.parametrize("width", [360, 390, 768, 1440])
def test_no_page_is_wider_than_its_screen_and_nothing_is_fetched(page, width, tmp_path):
    found = seen(page, width, tmp_path)
    assert found["asked"] == width and found["width"] <= width and found["over"] == []
    assert found["refused"] == [] and found["fetched"] == []
    assert found["images"] > 30 and found["broken"] == 0 and found["small"] == 0
    assert found["styled"] == "solid"


def test_the_browser_would_have_noticed(page, tmp_path):
    """A picture from elsewhere is refused by the page's own policy, a style of others, too; a wide thing is found."""
    wide = '<p class="wide"><img src="https://example.invalid/x.png" alt="x"></p><div style="width: 900px">x</div>'
    spoiled = page.replace("<main>", f"<main>{wide}<pre>{'w' * 90}</pre>").replace("overflow-wrap: anywhere", "")
    found = seen(spoiled, 390, tmp_path)
    assert {directive.split("-")[0] for directive in found["refused"]} == {"img", "style"}
    assert found["broken"] == 1
    lax = seen(re.sub("style-src '[^']*'", "style-src 'unsafe-inline'", spoiled), 390, tmp_path)
    assert lax["width"] >= 900 and any("900px" in element for element in lax["over"])
