"""The page: hostile text stays text, everything on it is there, and it works in a browser."""

import json
import os
import re
import runpy
import struct
import sys
import time
import zlib
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_sampler.artifacts.scorefile import Scores
from distill_sampler.report.page import render, write_report
from distill_sampler.report.payload import MAX_POINTS, payload
from distill_sampler.report.text import visible
from distill_sampler.report.traces import MAX_TRACE_TOKENS
from tests.cli.conftest import call, write_lines

SCREENSHOTS = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "screenshots.py"), run_name="imported")
chromium = SCREENSHOTS["chromium"]
HOSTILE = [
    "<script>document.documentElement.dataset.owned = 'script'</script>",
    "</script><script>document.documentElement.dataset.owned = 'closed'</script>",
    "<img src=x onerror=\"document.documentElement.dataset.owned = 'image'\">",
    "<a href=\"javascript:document.documentElement.dataset.owned = 'link'\">look</a>",
    "{{ 7 * 7 }} {% raw %} ${7*7} <!-- --> ]]> &lt;b&gt; \u2028 \u2029",
    "admin\u202egpj.exe\u2066hidden\u2069 \x00\x07\x1b[31m",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scores file whose every text is hostile: names, prompts, tokens; one trace of 5 MB."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(24):
        text = HOSTILE[number % len(HOSTILE)]
        tokens = ["x" * 50] * 100_000 if number == 7 else [text, *text]
        surprisal = rng.uniform(0.1, 3)
        rank = rng.uniform(1, 9)
        rows.append(
            {
                "sample": number,
                "prompt_id": f"{number // 4} {HOSTILE[(number // 4) % len(HOSTILE)]}",
                "teacher": HOSTILE[number % 4],
                "domain": HOSTILE[number % 3],
                "correct": [True, False, None][number % 3],
                "num_tokens": len(tokens),
                "mean_rank": rank,
                "mean_surprisal": surprisal,
                "rank_surprisal_ratio": rank / surprisal,
                "prompt_text": text,
                "tokens": tokens,
                "token_ranks": [1 + place % 300 for place in range(len(tokens))],
                "token_surprisals": [float(place % 9) for place in range(len(tokens))],
            }
        )
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"distill_sampler.model": HOSTILE[0]})
    pq.write_table(table, folder / "scores.parquet")
    return folder / "scores.parquet"


class Outline(HTMLParser):
    """The tags of a page, with their attributes, and what stands in its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_hostile_text_adds_no_tag_no_script_and_no_url(hostile: Path, tmp_path: Path) -> None:
    page = write_report(hostile, tmp_path / "report.html").read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert [tag for tag, _ in outline.tags].count("script") == 3  # data, plotly, the page's own
    assert not [tag for tag, _ in outline.tags if tag in ("img", "a", "iframe", "object", "link")]
    assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on") or name == "src"]
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # without plotly, which names addresses in its text
    assert "http://" not in own.replace("http-equiv", "")
    assert "https://" not in own
    assert not re.search("[\x00-\x08\x0b-\x1f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]", own)
    (policy,) = (a["content"] for tag, a in outline.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_hidden_characters_become_visible() -> None:
    assert visible("a\x00b\u202ec") == "a␀b⟦U+202E⟧c"
    assert visible("line\nand\ttab") == "line\nand\ttab"
    assert visible("x" * 10, 4) == "xxxx… (6 more characters)"


def test_long_traces_are_cut_and_say_so(hostile: Path) -> None:
    data = payload(Scores.open(hostile))
    (long,) = (item for prompt in data["traces"] for item in prompt["items"] if item["more"])
    assert len(long["tokens"]) == MAX_TRACE_TOKENS
    assert long["more"] == 100_000 - MAX_TRACE_TOKENS
    assert len(json.dumps(data)) < 2_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scores file of more samples than a page shows one by one, with an outlier."""
    size = 5 * MAX_POINTS
    rng = np.random.default_rng(0)
    rank, surprisal = rng.uniform(1, 9, size), rng.uniform(0.1, 3, size)
    rank[1234] = 99.0
    columns = {
        "sample": np.arange(size),
        "prompt_id": [f"p{number // 3}" for number in range(size)],
        "teacher": [f"t{number % 3}" for number in range(size)],
        "correct": rng.random(size) < 0.4,
        "num_tokens": rng.integers(20, 200, size),
        "mean_rank": rank,
        "mean_surprisal": surprisal,
        "rank_surprisal_ratio": rank / surprisal,
    }
    path = tmp_path_factory.mktemp("large") / "scores.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_large_data_is_sampled_and_the_page_stays_small(large: Path) -> None:
    data = payload(Scores.open(large))
    assert len(data["points"]["sample"]) == MAX_POINTS
    assert 1234 in data["points"]["sample"]  # outliers are kept
    assert "highest" in data["rule"]
    assert data["chosen"] == -(-5 * MAX_POINTS // 3)  # of all, not of those drawn
    assert data["traces"] == []
    assert len(json.dumps(data)) < 2_000_000


def test_a_run_shows_its_passes_and_its_plans(tmp_path: Path) -> None:
    passes = []
    for epoch in range(3):
        rank = np.array([1.0, 2.0, 3.0, 4.0]) + epoch
        passes.append(
            pa.table(
                {
                    "sample": [0, 1, 2, 3],
                    "prompt_id": ["a", "a", "b", "b"],
                    "teacher": ["x", "y", "x", "y"],
                    "epoch": [epoch] * 4,
                    "mean_rank": rank,
                    "mean_surprisal": np.ones(4),
                    "rank_surprisal_ratio": rank,
                }
            )
        )
    pq.write_table(pa.concat_tables(passes), tmp_path / "scores.parquet")
    pq.write_table(pa.table({"epoch": [0, 0, 1, 1], "sample": [0, 2, 1, 2]}), tmp_path / "plans.parquet")
    data = payload(Scores.open(tmp_path))
    assert data["passes"]["epochs"] == [0, 1, 2]
    assert data["passes"]["teachers"] == [[2, 3, 4], [3, 4, 5]]
    assert data["passes"]["spread"] == pytest.approx([np.std([0, 1, 2])] * 4, rel=1e-3)
    assert [(bar["label"], bar["counts"]) for bar in data["composition"]] == [
        ("candidates", [2, 2]),
        ("epoch 0", [2, 0]),
        ("epoch 1", [1, 1]),
    ]
    assert data["points"]["chosen"] == [0, 1, 1, 0]
    assert data["progress"]["teachers"] == data["teachers"]  # one colour for a teacher on the whole page
    assert data["progress"]["shares"] == [[2, 0], [1, 1], None]
    assert render(data, title="run").count("<h1>run</h1>") == 1


def test_scores_without_teachers_groups_or_tokens_still_make_a_page(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample": [0, 1], "global_naturalness": [-1.0, -2.0]}), tmp_path / "scores.parquet")
    page = write_report(tmp_path / "scores.parquet", tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Which teacher suits" not in page


def test_every_sample_has_its_reason(scored: Path, tmp_path: Path) -> None:
    data = payload(Scores.open(scored))
    reasons = data["points"]["reason"]
    assert sum("kept by BestOf" in reason for reason in reasons) == 6
    assert all("of 3 with prompt_id" in reason for reason in reasons)
    ended = call("report", scored, "--output", tmp_path / "r.html", "--policy", "WithinLength(max_tokens=70)")
    assert ended.code == 0, ended.said
    assert "left out by WithinLength: " in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny
    from tests.cli.conftest import rows

    folder = tmp_path_factory.mktemp("report")
    tiny.model().save_pretrained(folder / "student")
    tiny.tokenizer().save_pretrained(folder / "student")
    data = write_lines(folder / "candidates.jsonl", rows())
    call("score", data, "--model", folder / "student", "--output", folder / "scores.parquet")
    return folder / "scores.parquet"


def opened(page: Path) -> str:
    """The document after its scripts have run."""
    return chromium("--virtual-time-budget=20000", "--window-size=1200,900", "--dump-dom", page.as_uri()).stdout


@pytest.fixture
def needs_chromium() -> None:
    if SCREENSHOTS["browser"]() is None:
        pytest.skip("no Chromium is installed")


DRIVER = """
<script>
addEventListener("load", () => {
  const told = {};
  const all = (selector) => [...document.querySelectorAll(selector)];
  told.ready = document.documentElement.dataset.ready;
  told.plots = all(".plot .main-svg").length > 0;
  told.points = all("#plane-plot .scatterlayer .point").length;
  const before = document.getElementById("count").textContent;
  all("#teachers button")[0].click();
  told.filtered = before !== document.getElementById("count").textContent;
  all("#teachers button")[0].click();
  const domain = document.getElementById("domain");
  domain.value = "1";
  domain.dispatchEvent(new Event("change"));
  told.domain = all("#rows tbody tr").length;
  domain.value = "";
  domain.dispatchEvent(new Event("change"));
  document.getElementById("next").click();
  told.traces = all("#traces article").length;
  told.tokens = all("#traces bdi").length;
  all("#traces bdi")[1].click();
  told.tip = document.getElementById("tip").textContent;
  told.painted = all("#traces bdi").filter((node) => node.style.background).length > 0;
  document.querySelector("input[value=none]").click();
  told.unpainted = all("#traces bdi").filter((node) => node.style.background).length;
  all("#rows thead th")[1].click();
  told.sorted = all("#rows thead th")[1].textContent.includes("↑");
  const press = (key, target) => target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  all("#rows tbody tr")[3].children[0].click();
  told.why = document.getElementById("detail").textContent.includes("reason: ");
  const box = document.getElementById("rows-box");
  press("ArrowDown", box);
  told.at = document.querySelector("#rows tr.on").dataset.place;
  const promptBefore = document.getElementById("prompt").value;
  press("n", document.body);
  told.next = promptBefore !== document.getElementById("prompt").value;
  press("Enter", box);
  told.read = document.getElementById("traces").textContent.length > 0;
  press("/", document.body);
  const find = document.getElementById("find");
  told.focused = document.activeElement === find;
  find.value = "#11";
  find.dispatchEvent(new Event("input", { bubbles: true }));
  setTimeout(() => {
  told.byId = all("#rows tbody tr").length;
  told.byIdTraces = all("#traces article").length;
  press("Escape", find);
  told.cleared = all("#rows tbody tr").length;
  find.value = "{% raw %}";
  find.dispatchEvent(new Event("input", { bubbles: true }));
  setTimeout(() => {
  told.byText = all("#rows tbody tr").length;
  told.strays = all("#traces script, #traces img, #traces a, #rows a, #rows img, .plot a, blockquote *").length;
  told.owned = document.documentElement.dataset.owned || null;
  document.documentElement.dataset.told = JSON.stringify(told);
  }, 400);
  }, 400);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.usefixtures("needs_chromium")
@pytest.mark.parametrize("live", ["", "Epoch 1 of 3 begins."], ids=["the last page", "a page of a run"])
def test_a_page_of_a_run_reloads_itself_until_it_is_the_last(live: str, hostile: Path, tmp_path: Path) -> None:
    page, read = tmp_path / "report.html", []
    write_report(hostile, page, live=live)

    class Reads(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            if self.path == "/report.html":
                read.append(code)
                write_report(hostile, page)  # the run ends while somebody looks at its page
                later = time.time() + 60  # HTTP gives times in seconds: the new page must not look like the old
                os.utime(page, (later, later))

        def log_error(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Reads) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/report.html"
        document = chromium("--virtual-time-budget=100000", "--dump-dom", address).stdout
        server.shutdown()
    assert len(read) == 1 + bool(live)
    assert 'id="live"' not in document


@pytest.mark.slow
@pytest.mark.usefixtures("needs_chromium")
def test_no_code_from_the_data_runs_and_the_page_works(hostile: Path, tmp_path: Path) -> None:
    page = write_report(hostile, tmp_path / "report.html")
    document = opened(page)
    head = document[: document.index("<head")]
    assert 'data-ready="yes"' in head, "the page's own scripts run under its policy"
    assert "data-owned" not in head

    # without the policy, escaping alone has to hold; and somebody uses the page
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    driven = tmp_path / "driven.html"
    driven.write_text(text.replace("</body>\n</html>", DRIVER + "</body>\n</html>"), encoding="utf-8")
    document = opened(driven)
    told = re.search(r'data-told="([^"]*)"', document)
    assert told is not None
    found = json.loads(told.group(1).replace("&quot;", '"'))
    assert found["owned"] is None
    assert found["strays"] == 0
    assert found["ready"] == "yes"
    assert found["plots"]
    assert found["points"] >= 24
    assert found["filtered"]
    assert found["domain"] == 8
    assert found["traces"] == 4
    assert found["tokens"] > 100
    assert found["tip"].startswith("rank ")
    assert found["painted"]
    assert found["unpainted"] == 0
    assert found["sorted"]
    assert found["why"]
    assert found["at"] == "4"
    assert found["next"]
    assert found["read"]
    assert found["focused"]
    assert found["byId"] == found["byIdTraces"] == 1
    assert found["cleared"] == 24
    assert 4 <= found["byText"] < 24


SCROLL = """
<script>
addEventListener("load", () => {
  const told = {};
  const box = document.getElementById("rows-box");
  told.inDocument = document.querySelectorAll("#rows tbody tr").length;
  told.high = box.scrollHeight;
  box.scrollTop = 60000;
  box.dispatchEvent(new Event("scroll"));
  told.first = document.querySelector("#rows tr[data-place]").dataset.place;
  told.note = document.getElementById("table-note").textContent;
  document.documentElement.dataset.told = JSON.stringify(told);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.usefixtures("needs_chromium")
def test_a_long_list_scrolls_with_few_rows_in_the_document(large: Path, tmp_path: Path) -> None:
    page = write_report(large, tmp_path / "report.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    page.write_text(text.replace("</body>\n</html>", SCROLL + "</body>\n</html>"), encoding="utf-8")
    told = re.search(r'data-told="([^"]*)"', opened(page))
    assert told is not None
    found = json.loads(told.group(1).replace("&quot;", '"'))
    assert found["inDocument"] < 100
    assert found["high"] > 30 * MAX_POINTS
    assert int(found["first"]) > 1000
    assert "drawn at random" in found["note"]


@pytest.mark.slow
@pytest.mark.usefixtures("needs_chromium")
@pytest.mark.parametrize("view", ["light", "dark", "phone"])
def test_pictures_of_the_page_can_be_taken(view: str, large: Path, tmp_path: Path) -> None:
    page = write_report(large, tmp_path / "report.html")
    taken = SCREENSHOTS["screenshot"](page, tmp_path / "page.png", view=view, height=900)
    pixels = first_rows(taken, 200)[:, : SCREENSHOTS["VIEWS"][view][0]]
    assert len(np.unique(pixels)) > 50  # not one colour: the page was drawn
    assert (np.median(pixels) < 60) == (view == "dark")


def first_rows(png: Path, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`[count, width]` the brightness of a PNG's first rows, from its 8-bit colours (RFC 2083, filters 0 to 4)."""
    content = png.read_bytes()
    width, _, depth, kind = struct.unpack(">IIBB", content[16:26])
    assert depth == 8
    channels = {2: 3, 6: 4}[kind]
    data, at = b"", 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        data += content[at + 8 : at + 8 + length] if content[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    raw = zlib.decompressobj().decompress(data, count * (width * channels + 1))
    rows = [[0] * (width * channels)]
    for line in range(count):
        begin = line * (width * channels + 1)
        filtered, above, row = raw[begin + 1 : begin + 1 + width * channels], rows[-1], []
        for place, value in enumerate(filtered):
            left, up = row[place - channels] if place >= channels else 0, above[place]
            corner = above[place - channels] if place >= channels else 0
            nearest = min((left, up, corner), key=lambda each: abs(left + up - corner - each))
            row.append((value + (0, left, up, (left + up) // 2, nearest)[raw[begin]]) % 256)
        rows.append(row)
    return np.array(rows[1:]).reshape(count, width, channels)[:, :, :3].mean(axis=2)


def test_without_plotly_the_report_says_what_to_install(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ValueError, match=r"pip install 'distill_sampler\[report\]'"):
        write_report(hostile, tmp_path / "report.html")
