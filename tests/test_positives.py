"""CMA positives against a float64 brute force: random, clustered, collapsed and duplicated banks, both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from avstore.errors import UsageError
from trainers import draws, negatives, positives, search
from trainers.positives import AGREEMENTS, combine, mine_positives, rounding_slack

ENGINES = ("torch", "faiss")


def random_bank(n: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return draws.unit_vectors(seed, 0, n, 2, dim).float()


def clustered_bank(n: int, clusters: int, seed: int = 0, dim: int = 16, noise: float = 0.1):
    label = torch.arange(n) % clusters
    noise_n2d = random_bank(n, dim, seed + 1) * noise
    return normalize(random_bank(clusters, dim, seed)[label] + noise_n2d, dim=-1), label


def truth(memory: torch.Tensor, k: int, agreement: str = "consensus", eligible: torch.Tensor | None = None):
    """All N x N scores in float64, self out, order (-score, row): rows ascending, and the sorted scores."""
    v, a = memory[:, 0].double(), memory[:, 1].double()
    s = combine(v @ v.T, a @ a.T, agreement)
    s.fill_diagonal_(-torch.inf)
    if eligible is not None:
        s[:, ~eligible] = -torch.inf
    s, rows = s.sort(dim=1, descending=True, stable=True)
    return rows[:, :k].sort(1).values, s


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("agreement", AGREEMENTS)
def test_exact_on_random_banks(engine, agreement):
    memory = random_bank(600)
    mined = mine_positives(memory, 8, agreement=agreement, engine=engine, first=200)
    expected, _ = truth(memory, 8, agreement)
    assert mined.certified == 1.0 and mined.ties == 0 and mined.left_out == 0
    assert torch.equal(mined.rows, expected)
    own = combine(
        (memory[:, None, 0].double() * memory[mined.rows, 0].double()).sum(-1),
        (memory[:, None, 1].double() * memory[mined.rows, 1].double()).sum(-1),
        agreement,
    )
    torch.testing.assert_close(mined.agreement, own)


def test_engines_agree_and_short_lists_fall_back():
    memory = random_bank(3000, 16)
    short, long = (mine_positives(memory, 8, engine="faiss", first=m) for m in (12, 1500))
    brute = mine_positives(memory, 8, engine="torch")
    assert short.certified_first < 0.5, "12 candidates by the sum certify few minima of a random bank"
    assert short.certified == long.certified == brute.certified == 1.0
    assert torch.equal(short.rows, brute.rows) and torch.equal(long.rows, brute.rows)
    assert brute.certified_first == 1.0


def test_auto_goes_by_rows_and_positives_are_the_same_on_both_sides(monkeypatch):
    memory = random_bank(400)
    eligible = torch.arange(400) % 7 > 0
    few = mine_positives(memory, 8, eligible_N=eligible)
    monkeypatch.setattr(negatives, "FAISS_FROM", 400)
    many = mine_positives(memory, 8, eligible_N=eligible)
    assert (few.engine, many.engine) == ("torch", "faiss") and (few.stats["faiss"], many.stats["faiss"]) == (0.0, 1.0)
    assert torch.equal(few.rows, many.rows)
    torch.testing.assert_close(few.agreement, many.agreement, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(search, "faiss_flavour", lambda: None)
    assert mine_positives(memory, 8, eligible_N=eligible).engine == "torch", "what is not there is not taken"
    assert mine_positives(memory, 8, engine="torch").engine == "torch"


def test_the_threshold_is_the_one_that_was_measured():
    text = (Path(__file__).resolve().parents[1] / "docs" / "decisions.md").read_text()
    assert f"{negatives.FAISS_FROM:,} rows" in text
    empty = torch.empty(negatives.FAISS_FROM, 0)  # no memory, but a length
    assert negatives.choose_engine("auto", empty) and not negatives.choose_engine("auto", empty[1:])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(12, 90), st.integers(1, 8), st.sampled_from(AGREEMENTS),
    st.sampled_from(ENGINES), st.sampled_from(["random", "collapsed", "duplicates"]), st.integers(9, 40),
)  # fmt: skip
def test_what_is_certified_is_true(seed, n, k, agreement, engine, kind, first):
    """Whatever the bank, a certified row is the float64 truth; an uncertified one is right up to rounding."""
    memory = random_bank(n, 6, seed)
    if kind == "collapsed":
        memory = normalize(memory[:1] + 1e-4 * memory, dim=-1)
    if kind == "duplicates":
        memory = memory[torch.arange(n) % max(2, n // 3)]
    mined = mine_positives(memory, k, agreement=agreement, engine=engine, first=first, fallback=first)
    expected, s = truth(memory, k, agreement)
    worst = mined.agreement.amin(1)
    assert (mined.rows[:, 1:] > mined.rows[:, :-1]).all() if k > 1 else True, "ascending and distinct"
    assert (mined.rows != torch.arange(n)[:, None]).all(), "never self"
    assert (s[:, k - 1] - worst).abs().max() <= 2 * rounding_slack(2 * 6), "no better row is lost beyond rounding"
    wrong = (mined.rows != expected).any(1).sum()
    assert int(wrong) <= mined.ties, "only rows that were counted as ties may differ"
    assert mined.ties == round((1 - mined.certified) * n)


def test_the_certificate_fails_where_it_must():
    """Many exact copies: no list shorter than the bank can decide, and it is said so."""
    memory = random_bank(3, 8)[torch.zeros(700, dtype=torch.long)]
    mined = mine_positives(memory, 8, engine="torch", fallback=64)
    assert mined.certified == 0.0 and mined.ties == 700
    assert torch.equal(mined.agreement, mined.agreement[:1].expand(700, -1))
    everything = mine_positives(memory, 8, engine="torch", fallback=700)
    assert everything.certified_first == 0.0 and everything.certified == 1.0, "a list of all rows can miss nothing"
    assert everything.rows[100].tolist() == list(range(8)), "ties go to the lower row"
    assert everything.rows[3].tolist() == [0, 1, 2, 4, 5, 6, 7, 8], "and self is out even among its copies"


def test_planted_clusters_are_recovered():
    memory, label = clustered_bank(400, 20)
    mined = mine_positives(memory, 10)
    assert (label[mined.rows] == label[:, None]).all()


def test_one_modality_alone_cannot_raise_the_rank():
    memory = random_bank(200)
    before = mine_positives(memory, 5)
    target = int(torch.tensor([r for r in range(1, 200) if r not in before.rows[0].tolist()])[7])
    worse_by_sound = float(memory[0, 1] @ memory[target, 1]) < float(before.agreement[0].min())
    assert worse_by_sound, "the planted row's sound must be what keeps it out"
    changed = memory.clone()
    changed[target, 0] = memory[0, 0]  # the same sight
    assert target not in mine_positives(changed, 5).rows[0].tolist()
    assert target in mine_positives(changed, 5, agreement="union").rows[0].tolist()
    assert target in mine_positives(changed, 5, agreement="video").rows[0].tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_both_modalities_take_no_part(engine):
    memory, eligible = random_bank(300), torch.ones(300, dtype=torch.bool)
    eligible[torch.arange(0, 300, 6)] = False
    memory[0] = memory[1]  # tempting
    mined = mine_positives(memory, 4, engine=engine, eligible_N=eligible)
    expected, _ = truth(memory, 4, eligible=eligible)
    assert (mined.rows[~eligible] == -1).all() and mined.left_out == 50
    assert torch.equal(mined.rows[eligible], expected[eligible])
    some = torch.tensor([17, 0, 250])
    part = mine_positives(memory, 4, engine=engine, eligible_N=eligible, query_Q=some)
    assert torch.equal(part.rows, mined.rows[some]) and part.left_out == 1


def test_blocks_and_float64_do_not_matter(monkeypatch):
    memory = random_bank(500)
    expected = mine_positives(memory, 6).rows
    assert torch.equal(mine_positives(memory, 6, engine="torch", block=37).rows, expected)
    assert torch.equal(mine_positives(memory.double(), 6, engine="torch").rows, expected)
    assert torch.equal(mine_positives(memory.double(), 6, engine="faiss").rows, expected)
    monkeypatch.setattr(positives, "_RESCORE", 11)
    assert torch.equal(mine_positives(memory, 6).rows, expected)


def test_bf16_autocast_around_it_changes_nothing():
    memory = random_bank(400)
    expected = mine_positives(memory, 6, engine="torch")
    with torch.autocast("cpu", torch.bfloat16):
        mined = mine_positives(memory, 6, engine="torch")
    assert torch.equal(mined.rows, expected.rows) and mined.certified_first == expected.certified_first == 1.0


def test_wrong_requests_are_refused():
    memory = random_bank(20)
    with pytest.raises(UsageError, match="consensus"):
        mine_positives(memory, 3, agreement="concensus")
    with pytest.raises(UsageError, match="positives among 20"):
        mine_positives(memory, 20)
    with pytest.raises(UsageError, match="positives among 2 "):
        mine_positives(memory, 3, eligible_N=torch.arange(20) < 2)
    with pytest.raises(UsageError, match="unit length"):
        mine_positives(memory * 2, 3)
    with pytest.raises(UsageError, match="N, 2, D"):
        mine_positives(memory[:, 0], 3)
    with pytest.raises(UsageError, match="engine"):
        mine_positives(memory, 3, engine="annoy")
