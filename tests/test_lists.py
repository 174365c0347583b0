"""Lists as a source: plain ones in every form, wrong ones with their line, and the official lists as published."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import avstore
from avstore.errors import AvstoreError, ConflictError, NotFoundError, UsageError
from avstore.ingest import ingest
from avstore.lists import columns_from_list, is_list, read_classes, read_list
from avstore.official_lists import KINDS, detect
from tests.ingest_media import digest, write_wav
from tests.tiny_store import Tiny, make_store


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder of files that nobody decodes."""
    root = tmp_path / "media"
    for name in ("a.mp4", "b.mp4", "train/dog/c.mp4", "train/cat/d e.mp4", "x,y.wav"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    return root


def write(media: Path, name: str, text: str) -> Path:
    path = media / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_keeps_every_column_as_text(media: Path) -> None:
    path = write(
        media, "l.csv", 'path,label,fold,speaker\na.mp4,dog,1,s1\n"x,y.wav",cat,02,\n\nb.mp4,1.50,3,"say ""hi"""\n'
    )
    listing, report = read_list(path)
    assert [(e.key, e.path, e.size, e.columns) for e in listing.entries] == [
        ("a.mp4", "a.mp4", 5, {"label": "dog", "fold": "1", "speaker": "s1"}),
        ("b.mp4", "b.mp4", 5, {"label": "1.50", "fold": "3", "speaker": 'say "hi"'}),
        ("x,y.wav", "x,y.wav", 7, {"label": "cat", "fold": "02", "speaker": None}),
    ]
    assert (report.kind, report.rows, report.matched, report.missing, report.duplicates) == ("plain", 3, 3, [], 0)
    assert listing.root == media.resolve() and not listing.whole


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "path,label\na.mp4,dog\nb.mp4,cat\n"),
        ("l.csv", "\ufefflabel,path\r\ndog,a.mp4\r\ncat,./b.mp4\r\n"),
        ("l.csv", "filename;label\na.mp4;dog\nb.mp4;cat\n"),
        ("l.tsv", "path\tlabel\na.mp4\tdog\nb.mp4\tcat"),
        ("l.txt", "path|label\na.mp4|dog\nb.mp4|cat\n"),
        ("l.txt", "a.mp4 dog\nb.mp4 cat\n"),
        ("l.csv", "a.mp4,dog\nb.mp4,cat\n"),
        ("l.jsonl", '{"path": "a.mp4", "label": "dog"}\n{"label": "cat", "path": "b.mp4"}\n'),
    ],
)
def test_delimiters_headers_and_json_are_found_out(media: Path, name: str, text: str) -> None:
    listing, report = read_list(write(media, name, text))
    assert {e.key: e.columns["label"] for e in listing.entries} == {"a.mp4": "dog", "b.mp4": "cat"}
    assert report.rows == 2 and report.missing == []


def test_one_path_a_line(media: Path) -> None:
    listing, _ = read_list(write(media, "l.txt", "train/cat/d e.mp4\ntrain/dog/c.mp4\nnot/there.mp4\n"))
    assert [(e.key, e.columns) for e in listing.entries] == [
        ("train/cat/d e.mp4", {"label": "cat", "split": "train"}),
        ("train/dog/c.mp4", {"label": "dog", "split": "train"}),
    ]
    assert listing.skipped == [("not/there.mp4", "in the list, but not under media")]


def test_json_values_keep_their_text(media: Path) -> None:
    row = '{"path": "a.mp4", "n": 1.50, "big": 12345678901234567890123, "ok": true, "no": null, "l": [1, "é"]}'
    (entry,) = read_list(write(media, "l.jsonl", row))[0].entries
    assert entry.columns == {"n": "1.50", "big": "12345678901234567890123", "ok": "true",
                             "no": None, "l": '["1", "é"]'}  # fmt: skip


def test_start_and_end_cut_segments(media: Path) -> None:
    text = "path,start,end,label\na.mp4,0,10,x\na.mp4,10,20.5,y\nb.mp4,1/3,,z\nb.mp4,,,whole\n"
    listing, report = read_list(write(media, "l.csv", text))
    assert [(e.key, e.start, e.end, e.columns["label"]) for e in listing.entries] == [
        ("a.mp4#0-10", "0", "10", "x"),
        ("a.mp4#10-41/2", "10", "41/2", "y"),
        ("b.mp4", None, None, "whole"),
        ("b.mp4#1/3-", "1/3", None, "z"),
    ]
    assert report.matched == 4 and all({"start", "end"}.isdisjoint(e.columns) for e in listing.entries)


def test_equal_rows_count_once_and_others_are_an_error_naming_both_lines(media: Path) -> None:
    text = "path,label\na.mp4,dog\nb.mp4,cat\n./a.mp4,dog\n"
    listing, report = read_list(write(media, "l.csv", text))
    assert [e.key for e in listing.entries] == ["a.mp4", "b.mp4"] and report.duplicates == 1
    with pytest.raises(UsageError) as e:
        read_list(write(media, "l.csv", text + f"{media}/a.mp4,cow\n"))
    assert "l.csv:2 and l.csv:5" in e.value.what and "a.mp4" in e.value.what and "label" in e.value.why
    with pytest.raises(UsageError, match=r"l\.csv:2 and l\.csv:3"):  # a file that is missing as well
        read_list(write(media, "l.csv", "path,label\nnone.mp4,dog\nnone.mp4,cow\na.mp4,x\n"))


def test_columns_of_every_store_get_another_name(media: Path) -> None:
    (entry,), report = (r := read_list(write(media, "l.csv", "path,frames,key\na.mp4,300,k\n")))[0].entries, r[1]
    assert entry.columns == {"list_frames": "300", "list_key": "k"}
    assert report.renamed == {"frames": "list_frames", "key": "list_key"} and "renamed" in str(report)


def test_root_and_absolute_paths(media: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "l.csv", f"path\na.mp4\n{media}/b.mp4\n")
    assert [e.key for e in read_list(path, root=media)[0].entries] == ["a.mp4", "b.mp4"]
    link = tmp_path / "link"
    link.symlink_to(media)
    assert [e.key for e in read_list(write(tmp_path, "l.csv", f"path\n{link}/a.mp4\n"), root=link)[0].entries] == [
        "a.mp4"
    ]
    with pytest.raises(NotFoundError, match=r"nothing of the list .* lies under"):
        read_list(write(tmp_path, "l.csv", "path\na.mp4\n"))


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/passwd", "train/../../x.mp4", ".."])
def test_paths_that_leave_the_root_are_refused(media: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"l\.csv:2: .* lies outside"):
        read_list(write(media, "l.csv", f"path\n{name}\n"))


def test_names_that_are_not_utf8_or_look_like_segments(media: Path) -> None:
    (media / "c#1-2").write_bytes(b"")
    with open(bytes(media) + b"/\xff.mp4", "wb"):
        pass
    (media / "l.csv").write_bytes(b"path\n\xff.mp4\nc#1-2\n")
    assert [e.key for e in read_list(media / "l.csv")[0].entries] == ["%FF.mp4", "c%231-2"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("l.csv", "", "empty"),
        ("l.csv", "name,label\na,b\n", "no column `path`"),
        ("l.csv", "path,label\na.mp4\n", "l.csv:2 has 1 cells"),
        ("l.csv", "path,label\na.mp4,x,y\n", "l.csv:2 has 3 cells"),
        ("l.csv", "path,,x\na.mp4,1,2\n", "no name"),
        ("l.csv", "path,x,x\na.mp4,1,2\n", "two have one"),
        ("l.csv", "file,video\na.mp4,b.mp4\n", "several columns of paths"),
        ("l.csv", 'path,x\na.mp4,"open\n', "l.csv:2 is no CSV"),
        ("l.csv", "path,label\n,x\n", "l.csv:2 has no path"),
        ("l.csv", "path,start\na.mp4,soon\n", "l.csv:2: 'soon' is no time"),
        ("l.csv", "path,start\na.mp4,-1\n", "before the file"),
        ("l.csv", "path,start\na.mp4,1e999999999\n", "no time"),
        ("l.csv", "path,end\na.mp4,nan\n", "no time"),
        ("l.csv", "path,end\na.mp4,1/0\n", "no time"),
        ("l.csv", "path,start,end\na.mp4,5,5\n", "l.csv:2 ends at 5 s"),
        ("l.csv", "path\n\0\n", "NUL"),
        ("l.jsonl", "{'path': 1}\n", "l.jsonl:1 is no JSON"),
        ("l.jsonl", "[1]\n", "l.jsonl:1 is no object"),
        ("l.jsonl", '{"label": "x"}\n', "has no `path`"),
    ],
)
def test_wrong_lists_say_what_and_where(media: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UsageError) as e:
        read_list(write(media, name, text))
    assert words in str(e.value)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".txt"]))
def test_any_text_is_a_list_or_told_why_not(tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / f"l{suffix}").write_text(text, encoding="utf-8")
    try:
        listing, _ = read_list(folder / f"l{suffix}")
    except AvstoreError as e:
        assert e.what
    else:
        assert listing.entries


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(3, 5), st.sampled_from("xy")), min_size=1)
)
def test_rows_against_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for name in "ab":
        (folder / name).write_bytes(b"")
    path = folder / "l.jsonl"
    path.write_text("".join(json.dumps({"path": p, "start": s, "end": e, "label": c}) + "\n" for p, s, e, c in rows))
    expected: dict[tuple[str, int, int], str] = {}
    clash = any(expected.setdefault((p, s, e), c) != c for p, s, e, c in rows)
    there = {k: v for k, v in expected.items() if k[0] != "c"}
    if clash:
        with pytest.raises(UsageError, match="name the same video"):
            read_list(path)
    elif not there:
        with pytest.raises(NotFoundError):
            read_list(path)
    else:
        listing, report = read_list(path)
        assert {(x.path, int(x.start or 0), int(x.end or 0)): x.columns["label"] for x in listing.entries} == there
        assert report.duplicates == len(rows) - len(expected) and report.rows == len(rows)


def test_what_is_a_list_by_its_name(media: Path) -> None:
    assert is_list(write(media, "l.CSV", "path\n")) and is_list(write(media, "l.txt", "x\n"))
    assert not is_list(media) and not is_list(media / "a.mp4") and not is_list(media / "none.csv")


def test_errors_of_arguments(media: Path) -> None:
    with pytest.raises(NotFoundError, match="no list"):
        read_list(media / "none.csv")
    with pytest.raises(UsageError, match="ucf101"):
        read_list(write(media, "l.csv", "path\na.mp4\n"), kind="ucf")
    with pytest.raises(NotFoundError, match="no folder"):
        read_list(write(media, "l.csv", "path\na.mp4\n"), root=media / "none")
    with pytest.raises(UsageError, match="no list files that avstore knows"):
        read_list(media)
    with pytest.raises(UsageError, match="is a folder"):
        read_list(media, kind="plain")
    with pytest.raises(NotFoundError, match="no list files of ucf101"):
        read_list(media, kind="ucf101")


# The official lists


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_every_official_file_is_recognised_and_whole(shared: Path) -> None:
    lists = shared / "lists"
    counts = {
        "ave/Annotations.txt": ("ave", 4143),
        "kinetics-sound/my_test.txt": ("kinetics-sounds", 2597),
        "kinetics-sound/my_train.txt": ("kinetics-sounds", 14799),
        "kinetics400/val_videofolder.txt": ("kinetics", 19328),
        "ucf101/testlist01.txt": ("ucf101", 3783),
        "ucf101/testlist02.txt": ("ucf101", 3734),
        "ucf101/testlist03.txt": ("ucf101", 3696),
        "ucf101/trainlist01.txt": ("ucf101", 9537),
        "ucf101/trainlist02.txt": ("ucf101", 9586),
        "ucf101/trainlist03.txt": ("ucf101", 9624),
        "vggsound/AStest.csv": ("vggsound", 6927),
        "vggsound/test.csv": ("vggsound", 15446),
    }
    for name, (kind, n) in counts.items():
        assert detect(lists / name) == kind
        assert sum(1 for _ in KINDS[kind][0](lists / name)) == n, name
    hmdb = sorted((lists / "hmdb51" / "testTrainMulti_7030_splits").iterdir())
    assert len(hmdb) == 153 and {detect(p) for p in hmdb} == {"hmdb51"}
    assert sum(1 for p in hmdb for _ in KINDS["hmdb51"][0](p)) == 3 * 6766
    others = {"audioset-esc/class_labels_indices.csv", "audioset-esc/esc_class_labels_indices.csv",
              "kinetics400/ClassInd.txt", "ucf101/classInd.txt", "vggsound/stat.csv"}  # fmt: skip
    read = {str(p.relative_to(lists)) for p in lists.rglob("*") if p.is_file()} - {
        str(p.relative_to(lists)) for p in hmdb
    }
    assert read == set(counts) | others
    for name in others:
        with pytest.raises(UsageError, match="lists classes, not videos"):
            read_list(lists / name)


def test_class_lists(shared: Path) -> None:
    lists = shared / "lists"
    ucf = read_classes(lists / "ucf101" / "classInd.txt")
    assert (len(ucf), ucf["1"], ucf["101"]) == (101, "ApplyEyeMakeup", "YoYo")
    kinetics = read_classes(lists / "kinetics400" / "ClassInd.txt")
    assert (len(kinetics), kinetics["0"], kinetics["399"]) == (400, "abseiling", "zumba")
    audioset = read_classes(lists / "audioset-esc" / "class_labels_indices.csv")
    assert (len(audioset), audioset["1"]) == (527, "Male speech, man speaking")
    assert read_classes(lists / "audioset-esc" / "esc_class_labels_indices.csv")["1"] == "rooster"
    vgg = read_classes(lists / "vggsound" / "stat.csv")
    assert (len(vgg), vgg["2"]) == (309, "bird chirping, tweeting")
    with pytest.raises(UsageError, match="lists no classes"):
        read_classes(lists / "ucf101" / "testlist01.txt")


def test_ucf101_over_the_real_files(shared: Path) -> None:
    listing, report = read_list(shared / "lists" / "ucf101" / "testlist01.txt", root=shared / "ucf")
    assert (report.kind, report.rows, report.matched, len(report.missing)) == ("ucf101", 3783, 15, 3768)
    assert {e.columns["split"] for e in listing.entries} == {"test"}
    assert {e.columns["label"]: e.columns["target"] for e in listing.entries} == {
        "ApplyEyeMakeup": "1", "BenchPress": "10", "Diving": "26"}  # fmt: skip
    assert listing.entries[0].size == (shared / "ucf" / listing.entries[0].path).stat().st_size > 0
    with pytest.raises(NotFoundError, match="nothing of the list"):
        read_list(shared / "lists" / "ucf101" / "trainlist01.txt", root=shared / "ucf")


def test_ucf101_all_splits_of_the_folder(shared: Path) -> None:
    listing, report = read_list(shared / "lists" / "ucf101", root=shared / "ucf")
    assert (report.rows, report.matched, len(report.missing)) == (3 * 13320, 15, 13320 - 15)
    found = {tuple(e.columns[c] for c in ("split", "split1", "split2", "split3")) for e in listing.entries}
    assert found == {("test", "test", "train", "train")}


def test_ucf101_flat_converted_or_twice(shared: Path, tmp_path: Path) -> None:
    path = shared / "lists" / "ucf101" / "testlist01.txt"
    root = touch(tmp_path / "flat", "v_ApplyEyeMakeup_g01_c01.mp4", "deep/er/v_Diving_g01_c02.avi")
    assert [e.key for e in read_list(path, root)[0].entries] == sorted(
        ["v_ApplyEyeMakeup_g01_c01.mp4", "deep/er/v_Diving_g01_c02.avi"])  # fmt: skip
    touch(root, "other/v_ApplyEyeMakeup_g01_c01.mkv")
    with pytest.raises(UsageError, match=r"may be .* or "):
        read_list(path, root)
    touch(root, "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.webm")  # the published folder decides
    assert "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.webm" in [e.key for e in read_list(path, root)[0].entries]


def test_hmdb51(shared: Path, tmp_path: Path) -> None:
    splits = shared / "lists" / "hmdb51" / "testTrainMulti_7030_splits"
    odd = "Goalkeeper_Training_Day_#_2_catch_f_cm_np1_ba_bad_3.avi"
    root = touch(tmp_path, f"catch/{odd}", "run/20060723sfjffangelina_run_f_cm_np2_fr_med_3.avi")
    listing, report = read_list(splits, root)
    assert (report.kind, report.rows, report.matched, len(report.missing)) == ("hmdb51", 3 * 6766, 2, 6764)
    catch, run = listing.entries
    assert catch.key == f"catch/{odd}" and catch.columns["label"] == "catch"
    published = {}
    for n in (1, 2, 3):
        lines = (splits / f"catch_test_split{n}.txt").read_text().splitlines()
        code = next(line.split()[-1] for line in lines if line.startswith(odd))
        published[f"split{n}"] = {"0": "unused", "1": "train", "2": "test"}[code]
    assert {k: v for k, v in catch.columns.items() if k.startswith("split")} == {
        **published,
        "split": published["split1"],
    }
    assert run.columns["split1"] == "unused"
    assert read_list(splits / "run_test_split1.txt", root)[1].matched == 1


def test_kinetics_names_and_cuts(tmp_path: Path) -> None:
    path = write(tmp_path, "kinetics_val.csv", "label,youtube_id,time_start,time_end,split,is_cc\n"
                 'abseiling,0wR5jVB-WPk,417,427,val,0\n"a, b",3caPS4FHFF8,36,46,val,0\nzumba,--4-0ihtnBU,58,68,val,1\n'
                 "zumba,notThereAtA,1,11,val,0\n")  # fmt: skip
    root = touch(tmp_path / "k", "abseiling/0wR5jVB-WPk_000417_000427.mp4", "3caPS4FHFF8.mkv", "--4-0ihtnBU.mp4",
                 "--4-0ihtnBU_000058_000068.webm")  # fmt: skip
    listing, report = read_list(path, root)
    assert report.kind == "kinetics" and report.missing == ["notThereAtA_000001_000011"]
    assert [(e.key, e.start, e.end) for e in listing.entries] == [
        ("--4-0ihtnBU_000058_000068.webm", None, None),
        ("3caPS4FHFF8.mkv#36-46", "36", "46"),
        ("abseiling/0wR5jVB-WPk_000417_000427.mp4", None, None),
    ]
    assert listing.entries[1].columns == {"label": "a, b", "youtube_id": "3caPS4FHFF8", "split": "val", "is_cc": "0"}


def test_kinetics_frame_list_and_sounds(shared: Path, tmp_path: Path) -> None:
    root = touch(
        tmp_path, "abseiling/0wR5jVB-WPk_000417_000427.mp4", "ks/-3Mwkq-7TV4_000002_000012.mp4", "-74csnCOiUs.mp4"
    )
    (entry,) = read_list(shared / "lists" / "kinetics400" / "val_videofolder.txt", root)[0].entries
    assert entry.columns == {"label": "abseiling", "youtube_id": "0wR5jVB-WPk", "target": "0", "split": "val"}
    listing, report = read_list(shared / "lists" / "kinetics-sound", root)
    assert (report.rows, report.matched) == (2597 + 14799, 2)
    assert [(e.key, e.columns["label"], e.columns["split"]) for e in listing.entries] == [
        ("-74csnCOiUs.mp4#0-10", "14", "test"),
        ("ks/-3Mwkq-7TV4_000002_000012.mp4", "23", "test"),
    ]


def test_ave_joins_two_annotations_of_one_video(shared: Path, tmp_path: Path) -> None:
    path = shared / "lists" / "ave" / "Annotations.txt"
    root = touch(tmp_path / "AVE", "-1qyr-IzqKY.mp4", "RUhOCu3LNXM.mp4")
    listing, report = read_list(path, root)
    assert (report.rows, report.matched, len(report.missing)) == (4143, 2, 4097 - 2)
    assert [e.columns["label"] for e in listing.entries] == ["Ukulele;Accordion", "Church bell"]
    assert listing.entries[0].start is None and listing.entries[0].columns["event_end"] == "10"
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "Annotations.txt").write_text("Category&VideoID&Quality&StartTime&EndTime\n" + path.read_text())
    (folder / "trainSet.txt").write_text("Church bell&RUhOCu3LNXM&good&0&10\n")
    (folder / "testSet.txt").write_text("Accordion&-1qyr-IzqKY&good&0&10\n")
    splits = {e.key: (e.columns["split"], e.columns["label"]) for e in read_list(folder, root)[0].entries}
    assert splits == {"-1qyr-IzqKY.mp4": ("test", "Ukulele;Accordion"), "RUhOCu3LNXM.mp4": ("train", "Church bell")}


def test_vggsound_over_the_real_files(shared: Path, tmp_path: Path) -> None:
    listing, report = read_list(shared / "lists" / "vggsound" / "test.csv", root=shared / "av-events")
    assert report.rows == 15446 and report.matched == 7
    assert {e.columns["split"] for e in listing.entries} == {"test"}
    labels = {e.key.rsplit("/", 1)[-1][:11]: e.columns["label"] for e in listing.entries}
    text = (shared / "lists" / "vggsound" / "test.csv").read_text()
    for name, label in labels.items():
        assert f"{name}_" in text and str(label) in next(line for line in text.splitlines() if line.startswith(name))
    path = write(
        tmp_path, "vggsound.csv", '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,waterfall burbling,train\n'
    )
    touch(tmp_path, "---g-f_I2yQ_000001.mp4", "--0PQM4-hqg.mp4")
    assert [(e.key, e.columns["split"]) for e in read_list(path)[0].entries] == [
        ("---g-f_I2yQ_000001.mp4", "test"), ("--0PQM4-hqg.mp4#30-40", "train")]  # fmt: skip


def test_audioset(tmp_path: Path) -> None:
    head = "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=20371\n# YTID, start_seconds, end_seconds\n"
    rows = '--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/07q6cd_"\n--BfvyPmVMo, 20.500, 30.500, "/m/03l9g"\n'
    path = write(tmp_path, "eval_segments.csv", head + rows)
    touch(tmp_path, "--4gqARaEJE_0_10.wav", "--BfvyPmVMo.m4a")
    listing, report = read_list(path)
    assert report.kind == "audioset"
    assert [(e.key, e.columns["label"], e.columns["split"]) for e in listing.entries] == [
        ("--4gqARaEJE_0_10.wav", "/m/068hy,/m/07q6cd_", "eval"),
        ("--BfvyPmVMo.m4a#41/2-61/2", "/m/03l9g", "eval"),
    ]


def esc_csv(shared: Path, folder: Path) -> Path:
    """ESC-10 in the layout of esc50.csv, from the names of the real files."""
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for file in sorted((shared / "esc10-ogg").rglob("*.ogg")):
        fold, source, take = file.stem.split("-")
        number, category = file.parent.name.split(" - ")
        name = f"{file.stem}-{int(number) - 1}.wav"
        rows.append(f"{name},{fold},{int(number) - 1},{category.lower().replace(' ', '_')},True,{source},{take}")
    return write(folder, "esc50.csv", "\n".join(rows) + "\n")


def test_esc10_over_the_real_files(shared: Path, tmp_path: Path) -> None:
    listing, report = read_list(esc_csv(shared, tmp_path), root=shared / "esc10-ogg")
    assert (report.kind, report.rows, report.matched, report.missing) == ("esc", 400, 400, [])
    folds = [e.columns["fold"] for e in listing.entries]
    assert {f: folds.count(f) for f in folds} == dict.fromkeys("12345", 80)
    for e in listing.entries:
        assert e.path.rsplit("/", 1)[-1][0] == e.columns["fold"]
        assert e.columns["label"] == e.path.split(" - ")[1].split("/")[0].lower().replace(" ", "_")


def test_grid_with_speakers(shared: Path, tmp_path: Path) -> None:
    files = sorted((shared / "grid").rglob("*.mpg"))
    rows = "".join(f"{f.relative_to(shared / 'grid')},{f.parent.name},{f.stem[0]}\n" for f in files)
    listing, report = read_list(write(tmp_path, "grid.csv", "path,speaker,command\n" + rows), root=shared / "grid")
    assert report.matched == 100 and {e.columns["speaker"] for e in listing.entries} == {"s1", "s2", "s3", "s4", "s5"}


# Over a store that is there


def test_official_columns_for_a_store(shared: Path, tmp_path: Path) -> None:
    files = sorted(str(p.relative_to(shared / "ucf")) for p in (shared / "ucf").rglob("*.avi"))
    store = avstore.open(make_store(tmp_path / "s.zarr", [Tiny(1, key=k) for k in [*files, "home/video.mp4"]]))
    columns, report = columns_from_list(store, shared / "lists" / "ucf101")
    assert (report.matched, report.unlisted, len(report.missing)) == (15, ["home/video.mp4"], 13305)
    for name in ("label", "split", "split1", "split2", "split3", "target", "group"):
        assert len(columns[name]) == store.total == 16 and columns[name][15] is None
    assert columns["label"][:15] == [k.split("/")[0] for k in files]
    assert set(columns["split"][:15]) == {"test"}
    with pytest.raises(NotFoundError, match=r"no video of .* is in the list"):
        columns_from_list(store, shared / "lists" / "ave" / "Annotations.txt")


def test_plain_columns_for_a_store(tmp_path: Path) -> None:
    keys = ["x/a.mp4", "x/b.mp4", "y/c.mp4"]
    store = avstore.open(make_store(tmp_path / "s.zarr", [Tiny(1, key=k) for k in keys]))
    path = write(tmp_path, "l.csv", "path,fold,start,end\nmedia/x/a.mp4,1,,\nb.mp4,2,,\nc.mp4,3,0,1\nd.mp4,4,,\n")
    columns, report = columns_from_list(store, path)
    assert columns == {"fold": ["1", "2", None]}
    assert report.missing == ["c.mp4#0-1", "d.mp4"] and report.unlisted == ["y/c.mp4"]
    columns, _ = columns_from_list(store, write(tmp_path, "l.txt", "x/a.mp4 dog\ny/c.mp4 cat\n"))
    assert columns == {"label": ["dog", None, "cat"]}


def test_fractions_of_a_list_are_exact() -> None:
    from avstore.official_lists import time_of

    assert time_of("l:1", "0.1") == Fraction(1, 10) and time_of("l:1", "7/3") == Fraction(7, 3)


# Ingested


def test_ingest_takes_a_list(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    samples = write_wav(media / "a.wav", 4)
    write_wav(media / "b.wav", 2, seed=1)
    path = write(
        tmp_path, "set.csv", "path,start,end,label,fold\na.wav,0,1,x,1\na.wav,1.5,3,y,2\nb.wav,,,z,1\nc.wav,,,w,3\n"
    )
    store = tmp_path / "s.zarr"
    summary = ingest(path, store, root=media, sample_rate=8000, front_ends=())
    assert (summary.ok, summary.failed, summary.new) == (3, 0, 3)
    assert summary.skipped == [("c.wav", "in the list, but not under media")]
    assert summary.listed == "plain list: 4 rows, 3 videos found, 1 missing"
    opened = avstore.open(store)
    assert opened.columns == ["fold", "label"]
    cut = int(opened.find(["a.wav#3/2-3"])[0])
    assert opened.column("label", [cut]) == ["y"] and opened.seconds(cut) == Fraction(3, 2)
    np.testing.assert_array_equal(opened.waveform(cut)[0], samples[12000:24000])
    assert sorted(opened.key(n) for n in opened.select(where=["fold=1"]).numbers) == ["a.wav#0-1", "b.wav"]
    before = digest(store)
    again = ingest(path, store, root=media, sample_rate=8000, front_ends=())
    assert (again.new, again.done, again.note) == (0, 0, None) and digest(store) == before
    path.write_text(path.read_text().replace("b.wav,,,z,1", "b.wav,,,other,1"))
    again = ingest(path, store, root=media, sample_rate=8000, front_ends=())
    assert "1 videos, e.g. b.wav, were planned with other columns" in (again.note or "") and digest(store) == before


def test_ingest_takes_an_official_list(shared: Path, tmp_path: Path) -> None:
    root = tmp_path / "ucf"
    (root / "Diving").mkdir(parents=True)
    name = "v_Diving_g01_c01.avi"
    shutil.copyfile(shared / "ucf" / "Diving" / name, root / "Diving" / name)
    summary = ingest(shared / "lists" / "ucf101", tmp_path / "ucf.zarr", root=root, size=(32, 48), front_ends=())
    assert (summary.ok, len(summary.skipped)) == (1, 13319)
    store = avstore.open(tmp_path / "ucf.zarr")
    assert [store.column(c) for c in ("label", "split", "split2", "target")] == [
        ["Diving"],
        ["test"],
        ["train"],
        ["26"],
    ]


def test_what_to_type_next_after_a_wrong_list(shared: Path, tmp_path: Path) -> None:
    """A folder above the lists, two lists at once, an unknown kind: each is told with what would be right."""
    (tmp_path / "media").mkdir()
    write_wav(tmp_path / "media" / "a.wav", 1)
    one, two = write(tmp_path, "one.csv", "path\na.wav\n"), write(tmp_path, "two.csv", "path\na.wav\n")
    with pytest.raises(UsageError) as e:
        read_list(shared / "lists" / "hmdb51", tmp_path / "media")
    assert "testTrainMulti_7030_splits: name that folder" in e.value.next
    with pytest.raises(ConflictError) as conflict:
        ingest(one, two, root=tmp_path / "media")
    assert "one list at a time" in conflict.value.next
    with pytest.raises(UsageError) as e:
        read_list(one, tmp_path / "media", kind="ucf")
    assert "ucf101" in e.value.why and "plain | ucf101" in e.value.next


def test_unused_rows_are_held_out(shared: Path, tmp_path: Path) -> None:
    """HMDB51 marks videos with 0 that are on neither side of a split: they are not trained on by default."""
    folder = tmp_path / "run"
    folder.mkdir()
    for i, name in enumerate(("a", "b", "c")):
        write_wav(folder / f"{name}.wav", 1, seed=i)
    path = write(tmp_path, "run_test_split1.txt", "a.wav 1\nb.wav 2\nc.wav 0\n")
    ingest(path, tmp_path / "s.zarr", root=tmp_path, sample_rate=8000, front_ends=())
    with avstore.open(tmp_path / "s.zarr") as store:
        assert [store.key(int(n)) for n in store.select(held_out=False).numbers] == ["run/a.wav"]
        assert len(store.select(where=["split=unused"])) == 1
