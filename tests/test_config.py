"""Configurations: presets, files, `key=value`, stages; unknown keys and wrong types are told with what was meant."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from avstore.errors import NotFoundError, UsageError
from trainers import config as c
from trainers import settings
from trainers.fit import needs_of
from trainers.methods import METHODS
from trainers.typed import as_text


def test_the_paper_s_values_are_the_default() -> None:
    avid = c.resolve("avid")
    assert (avid.method.negatives, avid.method.temperature, avid.loop.learning_rate) == (1024, 0.07, 2e-4)
    assert (avid.loop.batch, avid.loop.epochs, avid.loop.draws, avid.loop.weight_decay) == (256, 30, 10, 1e-5)
    assert c.resolve("avid", preset="paper").values() == avid.values()


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in METHODS for preset in (None, *c.preset_names(name))]
)
def test_both_halves_agree_in_every_preset(name: str, preset: str | None) -> None:
    run = c.resolve(name, preset=preset)
    for field in dataclasses.fields(run.loop):
        assert run.values()[field.name] == getattr(run.loop, field.name), field.name


def test_small_and_tiny_are_what_they_say() -> None:
    small, tiny = c.resolve("avid", preset="small"), c.resolve("avid", preset="tiny")
    assert (small.method.width, small.method.size, small.method.front_end) == (32, 112, "avid-linear129")
    assert (tiny.method.width, tiny.method.size, tiny.loop.batch) == (16, 64, 24)
    assert tiny.loop.statistics_clips == 256


def test_small_is_offered_where_it_fits() -> None:
    """AVID's networks by depth, or a file's own; nowhere else is it listed, and it is refused by name."""
    offered = {name for name in METHODS if "small" in c.preset_names(name)}
    assert offered == {"avid", "avid-softmax", "avid-cma", "temporal", "sscl-stage-1", "sscl"}
    with pytest.raises(UsageError, match="no preset 'small'"):
        c.resolve("simclr", preset="small")
    assert c.resolve("sscl", preset="small").values()["width"] == 32


def test_sets_speak_to_method_and_loop() -> None:
    run = c.resolve("avid", sets=["batch=32", "variant=joint", "precision=bf16", "crop_area=0.5,1", "small=yes"])
    assert (run.method.batch, run.loop.batch, run.method.variant) == (32, 32, "joint")
    assert (run.loop.precision, run.loop.crop_area, run.method.small) == ("bf16", (0.5, 1.0), True)
    assert run.asked == {"batch", "variant", "precision", "crop_area", "small"}
    assert c.resolve("avid", sets=["batch = 8", "batch=16"]).loop.batch == 16  # the last one counts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat=1", "learning_rate"),
        ("batch=many", "a whole number"),
        ("batch=2.5", "a whole number"),
        ("temperature=nan", "a number"),
        ("small=perhaps", "true or false"),
        ("variant=crossed", "one of cross, self, joint"),
        ("crop_area=1", "2 of them"),
        ("batch", "key=value"),
        ("=3", "key=value"),
        ("avidd.batch=3", "avid"),
        ("batch=0", "at least 1"),
        ("accumulate=7", "does not divide"),
        ("schedule=multistep", "multistep"),
    ],
)
def test_wrong_settings_are_named(text: str, words: str) -> None:
    with pytest.raises(UsageError) as e:
        c.resolve("avid", sets=[text])
    assert words in str(e.value)
    assert e.value.exit_code == 2


def test_unknown_methods_and_presets_suggest_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean avid-cma"):
        c.resolve("avidcma")
    with pytest.raises(UsageError, match="did you mean tiny"):
        c.resolve("avid", preset="tinny")


def test_a_toml_file_and_its_tables(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'method = "avid-cma"\npreset = "tiny"\nwidth = 8\nepochs = 3\n[avid]\nepochs = 7\n[avid-cma]\npositives = 4\n'
    )
    run, stage = c.resolve("avid-cma", toml_file=file), c.resolve_stage("avid-cma", toml_file=file)
    assert (run.preset, run.method.width, run.loop.epochs, run.method.positives) == ("tiny", 8, 3, 4)
    assert (stage.name, stage.preset, stage.method.width, stage.loop.epochs) == ("avid", "tiny", 8, 7)
    assert c.resolve("avid-cma", toml_file=file, sets=["width=4"]).method.width == 4  # --set comes after the file
    with pytest.raises(UsageError, match="is for method"):
        c.resolve("avid", toml_file=file)
    file.write_text("[avd]\nepochs = 7\n")
    with pytest.raises(UsageError, match="avid"):
        c.resolve("avid-cma", toml_file=file)
    file.write_text("epochs = = 7\n")
    with pytest.raises(UsageError, match="TOML"):
        c.resolve("avid", toml_file=file)
    with pytest.raises(NotFoundError):
        c.resolve("avid", toml_file=tmp_path / "none.toml")


@pytest.mark.parametrize(("name", "key", "off"), [("simclr", "crop", "resized"), ("l3", "max_offset", 0.0)])
def test_a_run_of_before_a_key_keeps_its_digest(name: str, key: str, off: object) -> None:
    run = c.resolve(name, preset="tiny")
    assert run.values()[key] == off
    before = run.to_json()
    del before["values"][key]
    again = c.RunConfig.from_json(before)
    assert again.values() == run.values() and again.digest == run.digest  # and not the paper's value of today


def test_what_a_stage_takes_over() -> None:
    """Networks, clips and seed go to both; how long and how fast is trained does not."""
    sets = ["seed=3", "dim=32", "epochs=2", "learning_rate=0.5", "positives=4", "avid.epochs=9", "threads=1"]
    run, stage = c.resolve("avid-cma", preset="tiny", sets=sets), c.resolve_stage("avid-cma", preset="tiny", sets=sets)
    assert (run.loop.seed, stage.loop.seed, run.method.dim, stage.method.dim) == (3, 3, 32, 32)
    assert (run.loop.epochs, stage.loop.epochs) == (2, 9)
    assert (run.loop.learning_rate, stage.loop.learning_rate, stage.loop.threads) == (0.5, 2e-3, 1)
    with pytest.raises(UsageError, match="no stage"):
        c.resolve_stage("avid")


def test_show_config_tells_the_paper_and_the_source() -> None:
    rows = {r.key: r for r in settings.show_config(c.resolve("avid", preset="tiny"))}
    assert (rows["width"].value, rows["width"].paper) == (16, 64)
    assert rows["temperature"].source == "[C]" and "eqs. 1-3" in rows["variant"].source
    assert rows["keep_last"].paper is None and rows["keep_last"].source
    assert rows["crop_area"].value == (0.6, 1.0) and rows["crop_area"].paper == (0.08, 1.0)  # a key of the loop
    missing = [r.key for r in rows.values() if not r.source and r.key != "seed"]
    assert not missing


def test_json_round_trip_and_digest() -> None:
    run = c.resolve("avid-cma", preset="tiny", sets=["crop_area=0.3,1", "milestones=1,2"])
    again = c.RunConfig.from_json(__import__("json").loads(c.canonical_json(run.to_json())))
    assert again == run and again.digest == run.digest
    assert run.replace(threads=5).digest == run.digest  # changes no number
    assert run.replace(seed=5).digest != run.digest
    assert run.replace(crop="random").digest != run.digest
    old = run.to_json()
    old["values"]["gone"] = 1
    with pytest.raises(UsageError, match="gone"):
        c.RunConfig.from_json(old)


@hypothesis_settings(deadline=None)  # a busy machine takes longer than 200 ms
@given(st.integers(1, 10**6), st.floats(1e-6, 10, allow_nan=False), st.booleans())
def test_values_survive_being_written_as_text(batch: int, rate: float, small: bool) -> None:
    sets = [f"batch={as_text(batch)}", f"learning_rate={as_text(rate)}", f"small={as_text(small)}"]
    run = c.resolve("avid", sets=sets)
    assert (run.method.batch, run.method.learning_rate, run.method.small) == (batch, rate, small)


@pytest.mark.parametrize(
    ("method", "sets", "shown", "wrong"),
    [
        ("avcl", ("audio=1.2s",), {"seconds": 1.28}, "seconds=5"),
        ("avcl", ("audio=raw",), {"seconds": 1.28, "front_end": "avcl-raw"}, "front_end=avid-linear129"),
        ("ccl", ("loss_scale=code",), {"mix": 0.5}, "mix=0.9"),
    ],
)
@pytest.mark.parametrize("preset", ["paper", "tiny"])
def test_a_setting_that_would_do_nothing_is_refused(method, sets, shown, wrong, preset) -> None:
    """And what is shown is what is done, whatever the preset says; the same value may be said again."""
    done = c.resolve(method, preset=preset, sets=sets)
    assert {k: done.values()[k] for k in shown} == shown
    if method == "avcl":
        needs = needs_of(done)
        assert (needs.seconds, needs.front_end) == (1.28, done.values()["front_end"])
    with pytest.raises(UsageError, match="would do nothing"):
        c.resolve(method, preset=preset, sets=(*sets, wrong))
    again = c.resolve(method, preset=preset, sets=(*sets, *(f"{k}={v}" for k, v in shown.items())))
    assert again.values() == done.values()
    assert c.resolve(method, preset=preset, sets=(wrong,)).asked, "without the mode it counts"
    before = done.to_json()
    before["values"] = before["values"] | ({"seconds": 10.0} if method == "avcl" else {"mix": 0.9})
    assert c.RunConfig.from_json(before).values() == done.values()
