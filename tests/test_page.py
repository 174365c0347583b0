"""Pages: what hostile text becomes, that nothing is fetched, charts by hand, and what cards show of a planted store."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import wave
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import avstore
from avstore.errors import CorruptError, NotFoundError, UsageError
from avstore.store import Store
from benchmarks.archive import archive, archived
from benchmarks.budget import Budget
from benchmarks.card import Told, card, coloured, film, png, shrunk, wav, window
from benchmarks.chart import Curve, Dots, chart, histogram, scatter, standalone, ticks
from benchmarks.page import SCRIPT, escaped, page, section, table
from benchmarks.report import contact, failures, read_picture, read_tables, report
from benchmarks.sheet import draw, nearest, sheet
from benchmarks.table import Table
from benchmarks.timeline import Teller, figure, films, timelines
from benchmarks.video_summary import VideoSummary
from cli.main import invoke
from tests.test_retrieval import LABELS, planted
from tests.tiny_store import Tiny, default_spec, make_store, picture

HOSTILE = "\"><script>alert('x')</script>\u202e\x1b[31m&amp;\ud800.mp4"


class Parsed(HTMLParser):
    """Tags in order with their attributes; complains of tags that are closed and were not open."""

    VOID = ("meta", "img", "br", "line", "polyline", "polygon", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag]


def jpegs(text: str) -> list[bytes]:
    return [base64.b64decode(x) for x in re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", text)]


def wavs(text: str) -> list[wave.Wave_read]:
    found = re.findall(r"data:audio/wav;base64,([A-Za-z0-9+/=]+)", text)
    return [wave.open(io.BytesIO(base64.b64decode(x))) for x in found]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """18 videos in three classes, the first with a hostile name, one failed, one silent, one without picture."""
    videos = [
        Tiny(2 + i % 2, key=f"{i:02d}.mp4" if i else HOSTILE.encode("utf-8", "replace").decode(), label=LABELS[i % 3],
             split="test" if i % 3 == 0 or i > 12 else "train", sound=None if i == 5 else -1.0)
        for i in range(18)
    ]  # fmt: skip
    videos.append(
        Tiny(1, key="<b>broken</b>.mp4", status="failed", sound=None, picture=False, label="cat", split="train")
    )
    made = avstore.open(make_store(tmp_path_factory.mktemp("page") / "s.zarr", videos, default_spec(sample_rate=24000)))
    planted(made, "avid")
    return made


@given(st.text())
def test_text_never_becomes_markup(text: str) -> None:
    safe = escaped(text)
    assert not set(safe) & set("<>\"'") and all(c.isprintable() for c in safe)
    assert len(Parsed(f'<p title="{safe}">{safe}</p>').tags) == 1


def test_a_page_forbids_the_network_and_allows_its_own_script_only() -> None:
    text = page(HOSTILE, HOSTILE, [section("One", "<p>1</p>"), section("Two two", "")], menu=True)
    text.encode("utf-8")
    parsed = Parsed(text)
    policy = next(a["content"] for a in parsed.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert text.count("<script>") == 1 and [a["href"] for a in parsed.named("a")] == ["#one", "#two-two"]
    assert [a["id"] for a in parsed.named("section")] == ["one", "two-two"]
    assert not re.search(r"https?://", text)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.41, [0.2, 0.3, 0.4]), (-3, 2, [-3, -2, -1, 0, 1, 2]), (7, 7, [7])],
)
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_a_chart_draws_each_point_where_it_belongs_and_leaves_gaps_out() -> None:
    text = chart("Loss", [Curve("loss", [0, 10, 20, 30], [0.0, 5.0, None, 10.0])], zero=True)
    points = np.array([[float(v) for v in p.split(",")] for p in re.search(r'points="([^"]+)"', text)[1].split()])
    assert len(points) == 3
    assert np.allclose(points[[0, 2], 0], [46, 350])  # from axis to right edge
    assert points[1, 0] == pytest.approx(46 + 304 / 3, abs=0.1)
    assert points[1, 1] - points[2, 1] == pytest.approx(points[0, 1] - points[1, 1], abs=0.2)
    assert chart("Loss", [Curve("loss", [0, 1], [None, float("nan")])]) == ""
    with pytest.raises(UsageError, match="2 x for 1 y"):
        chart("Loss", [Curve("loss", [0, 1], [1.0])])


def test_a_running_mean_and_a_histogram_by_hand() -> None:
    text = chart("x", [Curve("x", list(range(5)), [0, 4, 0, 4, 0])], smooth=2)
    thin, strong = re.findall(r'class="curve( thin)?"[^>]*points="([^"]+)"', text)
    ys = [float(p.split(",")[1]) for p in strong[1].split()]
    assert thin[0] and not strong[0] and len(set(ys[1:])) == 1 and ys[0] > ys[1]  # 0, 2, 2, 2, 2; y grows downwards
    shares = histogram("h", [("all left", np.zeros(9)), ("half", np.array([0.0, 1.0]))], x="cosine", bins=2)
    assert shares.count("<polygon") == 2 and "all left" in shares
    assert histogram("h", [("none", np.array([np.nan]))], x="cosine") == ""


def test_a_map_puts_dots_to_one_scale_and_stands_alone_as_svg() -> None:
    import xml.etree.ElementTree as tree

    dots = [Dots("a", np.array([[0.0, 0.0], [2.0, 1.0]]), 0), Dots("a", np.array([[1.0, 0.5]]), 1, "^")]
    text = scatter("<map>", dots, [("a<", 0)])
    at = [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', text)]
    assert at == [(8.0, 266.0), (352.0, 94.0)]  # 172 units for 1, in both directions; y upwards
    assert text.count("<path") == 1 and "a&lt;" in text
    root = tree.fromstring(standalone(text))
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(root) == 4
    with pytest.raises(UsageError, match="not there"):
        scatter("x", [], [])
    with pytest.raises(UsageError, match="without a drawing"):
        standalone("<p>")


def test_a_table_marks_controls_and_drops_what_is_empty() -> None:
    rows = [
        {"pair": "v-v", "features": "avid", "R@1": 0.5, "sd": None},
        {"pair": "v-v", "features": "chance", "R@1": 0.125, "sd": None},
        {"pair": "a-a", "features": HOSTILE, "R@1": 1.0, "sd": None},
    ]
    text = table(Table("t", ("pair", "features", "R@1", "sd"), rows, ("<i>note</i>",)))
    parsed = Parsed(text)
    assert len(parsed.named("th")) == 3 and not parsed.named("script") and not parsed.named("i")
    assert [a["class"] for a in parsed.named("tr")[1:]] == ["", "control", "first"]
    assert '<td class=" same">v-v</td>' in text and '<td class="num">0.125</td>' in text


def test_the_moving_picture_is_the_frames_of_the_tape_in_order(store: Store) -> None:
    text = card(store, 4, second=0, seconds=1.0, sound=False)
    strip = film_of(text)
    height, width = 64, 92  # the box leaves two columns away on either side
    assert strip.shape == (height, 8 * width, 3) and "--n:8;--d:1.00s" in text
    for k in range(8):  # 8 fps from a tape of 16
        shown = strip[:, k * width : (k + 1) * width].astype(int)
        assert np.abs(shown - picture(4, 2 * k, 64, 96)[:, 2:-2].astype(int)).mean() < 6
        assert np.abs(shown - picture(4, 2 * k + 1, 64, 96)[:, 2:-2].astype(int)).mean() > 2


def jpegs_of_films(text: str) -> list[str]:
    return re.findall(r'class="film', text)


def film_of(text: str) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(jpegs(text)[0])


def test_a_player_has_the_seconds_that_are_shown(store: Store) -> None:
    text = card(store, 7, second=1, seconds=1.0)
    (sound,) = wavs(text)
    assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (1, 12000, 12000)
    assert "no sound" in card(store, 5) and not wavs(card(store, 5))
    with pytest.raises(UsageError, match="more than 0"):
        card(store, 4, seconds=0)


def test_a_tone_keeps_its_pitch_and_loudness_when_it_is_thinned() -> None:
    t = np.arange(48000) / 48000
    low, high = (np.round(10000 * np.sin(2 * np.pi * f * t)).astype(np.int16) for f in (1000, 11000))
    for x, expected in ((low, 10000 / np.sqrt(2)), (high, 0)):
        with wave.open(io.BytesIO(wav(x, 48000))) as w:
            y = np.frombuffer(w.readframes(w.getnframes()), "<i2").astype(float)
        assert len(y) == 12000
        assert np.sqrt(np.mean(y[500:-500] ** 2)) == pytest.approx(expected, rel=0.01, abs=120)
        if expected:
            assert np.abs(np.fft.rfft(y)).argmax() == 1000
    with pytest.raises(UsageError, match="int16"):
        wav(np.zeros(3, np.float32), 8000)


def test_windows_stay_inside_the_video(store: Store) -> None:
    assert window(store, 7, 0, 1.0) == (0.0, 1.0)  # 3 s
    assert window(store, 7, 2, 2.0) == (1.0, 2.0)
    assert window(store, 7, None, 1.0) == (1.0, 1.0)
    assert window(store, 4, 1, 9.0) == (0.0, 2.0)


def test_a_hostile_name_stays_a_name_in_a_card(store: Store) -> None:
    parsed = Parsed(card(store, 0, Told(1, 0.5, "<i>a</i>", True)))
    assert not parsed.named("script") and len(parsed.named("i")) == 1  # the play sign's own


def test_a_png_is_what_it_shows() -> None:
    x = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    data = png(x)
    body = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    assert np.array_equal(np.frombuffer(zlib.decompress(body), np.uint8).reshape(5, 22)[:, 1:].reshape(5, 7, 3), x)
    with pytest.raises(UsageError):
        png(x.astype(float))


def test_colours_rise_in_lightness_and_frames_shrink_by_means() -> None:
    assert (np.diff(coloured(np.linspace(0, 1, 64)).astype(int) @ [299, 587, 114]) >= 0).all()
    x = np.arange(2 * 8 * 12 * 3, dtype=np.uint8).reshape(2, 8, 12, 3)
    assert np.array_equal(shrunk(x, 8), x)
    assert shrunk(x, 4)[0, 0, 0, 0] == round(x[0, :2, :2, 0].mean())
    assert 'class="film still"' in film(x[:1], 1.0, "one")


def test_queries_are_drawn_class_by_class() -> None:
    labels = ["a"] * 50 + ["b"] * 3 + ["c"]
    assert sorted(labels[i] for i in draw(labels, 5, 0)) == ["a", "a", "b", "b", "c"]
    assert len(draw(labels, 99, 1)) == 54 and np.array_equal(draw(labels, 4, 3), draw(labels, 4, 3))


def test_the_sheet_shows_what_a_search_by_hand_finds(store: Store) -> None:
    from benchmarks.retrieval import run_features

    features = run_features(store, "avid")[""]
    gallery = store.select(where=["split=train"]).numbers
    query = int(store.select(where=["split=test"]).numbers[2])
    vectors = dict(zip(features.numbers["v"].tolist(), features.vectors["v"], strict=True))
    expected = sorted(gallery.tolist(), key=lambda n: -float(vectors[n] @ vectors[query]))[:3]
    assert [n for n, _ in nearest(features, "v-v", query, gallery, 3)] == expected
    assert query not in [n for n, _ in nearest(features, "v-v", query, store.numbers, 99)]
    sight, sound = sheet(store, "avid", count=2, k=3)
    assert len(Parsed(sight).named("figure")) == 8 and len(jpegs(sight)) == 8 and not wavs(sight)
    assert len(wavs(sound)) + sound.count("no sound") == 8 and "Sound to sound" in sound and not jpegs_of_films(sound)
    with pytest.raises(UsageError, match="no pair"):
        sheet(store, "avid", pairs=["v-x"])
    with pytest.raises(UsageError, match="at least one"):
        sheet(store, "avid", count=0)


def test_a_report_tells_counts_failures_and_results(store: Store, tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    results.write_text(
        json.dumps(Table("retrieval <b>", ("features", "R@1"), [{"features": "avid", "R@1": 0.75}]).to_json())
    )
    seen = tmp_path / "saliency.png"
    seen.write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    text = report(store=store, tables=[results], pictures=[seen], count=4, queries=1)
    parsed = Parsed(text)
    assert {"results", "store", "failures", "contact-sheet", "pictures"} <= {a["id"] for a in parsed.named("section")}
    assert "1 of 19 videos are not in the store" in text and "unreadable" in text and "0.750" in text
    assert "<b>broken" not in text and "&lt;b&gt;broken" in text and "retrieval &lt;b&gt;" in text
    assert contact(store, 0) == "" and len(jpegs(contact(store, 3))) >= 3
    assert "broken" in failures(store)
    with pytest.raises(UsageError, match="nothing"):
        report(store=None)
    with pytest.raises(NotFoundError, match="no embeddings of x"):
        report(store=store, embedded=["x"], count=0)


def test_a_report_refuses_what_is_no_table_or_picture(tmp_path: Path) -> None:
    for content in ("{", '{"rows": 3}', '[{"columns": [], "rows": [1]}]'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(CorruptError):
            read_tables(tmp_path / "x.json")
    with pytest.raises(NotFoundError):
        read_tables(tmp_path / "none.json")
    (tmp_path / "x.html").write_text("")
    with pytest.raises(UsageError, match="no picture"):
        read_picture(tmp_path / "x.html")


def test_the_commands_write_their_pages(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "q.html"
    assert invoke(["query", str(store.path), "--video", "4", "-k", "3", "--html", str(out), "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    parsed = Parsed(out.read_text())
    assert len(parsed.named("figure")) == 4 and all(f"{r['score']:.3f}" in out.read_text() for r in said)
    sheet_file = tmp_path / "s.html"
    bench = ["bench", "retrieval", str(store.path), "--seeds", "0", "--no-raw", "--json", "--html", str(sheet_file)]
    assert invoke(bench) == 0
    assert "Sight to sight (v-v), avid" in sheet_file.read_text()
    assert invoke([*bench, "--folds", "3"]) == 2
    results = tmp_path / "r.json"
    results.write_text(capsys.readouterr().out)
    page_file = tmp_path / "report.html"
    assert invoke(["report", str(store.path), "-o", str(page_file), "--bench", str(results), "--count", "2"]) == 0
    assert "retrieval in" in page_file.read_text() and "Contact sheet" in page_file.read_text()
    assert invoke(["report", str(tmp_path / "nothing"), "-o", str(page_file)]) == 4


def test_the_report_of_a_run_has_its_curves(tmp_path: Path, store: Store) -> None:
    from benchmarks.report import training

    class Logged:
        name, path = "avid", tmp_path

    lines = [
        {"step": s, "loss": 5 - s / 10, "data_wait_s": 0.1, "prepare_s": 0.1, "compute_s": 0.3, "clips_per_s": 40.0 + s,
         "lr": 0.1, "grad_norm": None, "video_to_audio": 1.0 / s, "shrunk": 0.0}
        for s in range(1, 9)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = training(Logged())  # type: ignore[arg-type]
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>", text)
    assert titles == ["Loss", "Milliseconds of a step", "Clips per second", "Learning rate", "video to audio"]
    assert (
        "Waiting for data took 20.0 %" in text
        and "The same throughout: shrunk 0." in text
        and "8 logged steps of 8" in text
    )
    assert "device" not in text  # of a CPU
    lines = [{**x, **({"device_wait_s": 0.01} if x["step"] > 1 else {})} for x in lines]  # none had ended at the first
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    text = training(Logged())  # type: ignore[arg-type]
    assert re.findall(r"<figcaption>([^<]+)</figcaption>", text) == titles  # in the figure of the other times
    assert "device-wait" in text and "copied and augmented 1.8 %" in text and "data took 20.0 %" in text
    (tmp_path / "metrics.jsonl").write_text("")
    assert "not logged two steps" in training(Logged())  # type: ignore[arg-type]


def test_a_budget_leaves_out_and_says_so() -> None:
    now = [0.0]
    budget = Budget(10, clock=lambda: now[0])
    assert budget.allows(9) and not budget.allows(10) and budget.section() == ""
    now[0] = 8
    assert budget.spent == 8 and budget.allows(1.5) and not budget.allows(3)
    budget.leave("maps <b>", "time", "avstore explain")
    text = budget.section()
    assert "maps &lt;b&gt;" in text and "avstore explain" in text and "Left out" in text
    assert not Budget(0).allows()
    with pytest.raises(UsageError):
        Budget(-1)


def test_tables_are_kept_in_the_logs_and_found_by_their_runs(tmp_path: Path) -> None:
    made = avstore.open(make_store(tmp_path / "s.zarr", [Tiny(2)], default_spec()))
    rows = [{"features": "a", "x": np.float64(0.5)}, {"features": "b", "x": float("nan")}]
    value = Table("t", ("features", "x"), rows)
    first = archive(made, value, "linear", ["a"], {"modality": "v", "list": Path("x")})
    assert archive(made, value, "linear", ["a"], {"list": Path("x"), "modality": "v"}) == first  # the same question
    second = archive(made, value, "linear", ["b"], {"modality": "a"})
    assert second != first and set(archived(made)) == {first, second} and archived(made, ["b"]) == [second]
    assert [r["x"] for r in read_tables(first)[0].rows] == [0.5, None]
    assert invoke(["verify", str(made.path)]) == 0  # logs are no part of the store's bytes
    with pytest.raises(UsageError):
        archive(made, value, "../x", [], {})
    second.write_text("{")
    text = report(store=made, count=0, queries=0, saliency=0, summaries=0)
    assert "<td" in text and str(second) in text and "Left out" in text  # the other one is on the page


def summary(run: str, seconds: int, kept: list[tuple[int, int]]) -> VideoSummary:
    from fractions import Fraction

    scores = np.linspace(0, 1, seconds)
    segments = np.array([[i, i + 1] for i in range(seconds)], float)
    pairs = [(Fraction(a), Fraction(b)) for a, b in kept]
    return VideoSummary(run, "by hand", Fraction(seconds), scores, segments, np.zeros(seconds, bool), pairs)


def test_a_timeline_shades_what_is_kept_on_the_videos_axis(store: Store) -> None:
    number = int(store.find(["01.mp4"])[0])
    assert float(store.seconds(number)) == 3
    text = figure(store, number, [summary("avid", 3, [(0, 1)]), summary("<other>", 3, [(1, 3)])])
    rects = re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"', text)
    assert rects == [("0.0", "333.3"), ("333.3", "666.7")]
    assert text.count("<svg") == 2 and "&lt;other&gt;: 2.0 s" in text and "0:00.0 to 0:01.0" in text
    points = re.findall(r'points="([^"]+)"', text)[0].split()
    assert points == ["0.0,94.0", "166.7,94.0", "500.0,50.0", "833.3,6.0", "1000.0,6.0"]
    assert len(jpegs(text)) == 1 and Parsed(text).named("img")


def test_timelines_are_of_the_longest_and_keep_to_their_time(store: Store) -> None:
    chosen = films(store, store.numbers, 3)
    assert [float(store.seconds(n)) for n in chosen] == [3.0, 3.0, 3.0] and chosen == films(store, store.numbers, 3)
    budget = Budget(300)
    text = timelines(store, [Teller("avid")], budget, count=1)
    assert text.count('class="timeline"') == 1 and "DR-DSN" in text
    late = Budget(0)
    assert timelines(store, [Teller("avid")], late, count=2) == ""
    assert late.left_out[0][0] == "summaries of 2 videos" and "--run avid" in late.left_out[0][2]
    none = Budget(9)
    assert timelines(store, [], none) == "" and "no embeddings" in none.left_out[0][1]
    assert timelines(store, [Teller("avid")], none, count=0) == ""


def test_a_report_asks_networks_and_names_what_it_leaves_out(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_run

    from trainers.embed import embed
    from trainers.loop import train

    folder = tmp_path_factory.mktemp("report")
    made = tiny_run.store_in(folder)
    run = train("avid", made, tiny_run.config("steps=2"), folder / "runs" / "r0").run
    out, path = folder / "r.html", str(run.path)
    assert invoke(["report", path, "--store", str(made.path), "-o", str(out), "--clips", "1", "--videos", "1",
                   "--within", "300"]) == 0  # fmt: skip
    text = out.read_text()
    sections = {a["id"] for a in Parsed(text).named("section")}
    assert {"saliency", "left-out"} <= sections and text.count("data:image/png") == 1
    assert "avstore embed" in text  # no embeddings yet: retrieval is named as left out
    assert ("summaries" in sections) == any(float(made.seconds(int(n))) >= 3 for n in made.numbers)
    assert invoke(["report", path, "--store", str(made.path), "-o", str(out), "--within", "0"]) == 0
    text = out.read_text()
    assert "saliency of 2 clips" in text and "data:image/png" not in text and "avstore explain" in text
    assert invoke(["report", path, "--store", str(made.path), "-o", str(out), "--no-saliency", "--no-summaries"]) == 0
    text = out.read_text()
    assert "saliency of" not in text and "data:image/png" not in text
    embed(run, made)
    made = avstore.open(made.path)
    text = report(store=made, count=0, queries=0, saliency=1, summaries=0)  # the run is found beside the store
    assert text.count("data:image/png") == 1
    run.path.rename(folder / "elsewhere")
    text = report(store=made, count=0, queries=0, saliency=1, summaries=0)
    assert "saliency of r0" in text and "not in runs/" in text
