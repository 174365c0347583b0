"""Pages: self-contained HTML that opens from disk, on a phone and on a desktop, in light and dark.

    page("nearest by sight", "demo.zarr", [section("Query", html), ...])     # one text, no file or network beside it

Nothing is loaded from anywhere: style, script, pictures and sounds are in the text, and its content policy forbids the
browser to fetch anything. Text that users or media bring goes through `escaped`. Not here: charts
(`chart.py`), pictures and sounds of videos (`card.py`), what a page is about (`sheet.py`, `report.py`, `explain.py`).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
from collections.abc import Iterable, Sequence
from typing import Any

from avstore.errors import UsageError
from benchmarks.table import Table

NOTES = 4  # under a table; more are folded

STYLE = """
:root{color-scheme:light dark;--bg:#faf9f7;--card:#fff;--ink:#1d1d1f;--soft:#63636b;--line:#e3e1dc;--accent:#0f766e;
--good:#15803d;--bad:#b4413c;--shade:#f1efeb;--c0:#0f766e;--c1:#c2571a;--c2:#4f5bd5;--c3:#b0307a;--c4:#7a7d12;
--c5:#0284c7;--c6:#7c3aed;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--bg:#141416;--card:#1d1d20;--ink:#ececee;--soft:#a0a0a8;--line:#323237;
--accent:#4fd1c5;--good:#5fce86;--bad:#f0857f;--shade:#26262a;--c0:#4fd1c5;--c1:#f0995a;--c2:#98a2ff;--c3:#f07fbb;
--c4:#cdd052;--c5:#5cc0f2;--c6:#b794f6;--c7:#9ca3af}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
sans-serif;-webkit-text-size-adjust:100%}
main,header,footer{max-width:1200px;margin:0 auto;padding:0 clamp(14px,3vw,32px)}
header{padding-top:clamp(22px,5vw,48px)}
h1{font-size:clamp(1.5rem,1.1rem + 1.9vw,2.3rem);line-height:1.15;letter-spacing:-.02em;margin:0;text-wrap:balance;
overflow-wrap:anywhere}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:0 0 .2rem}
h3{font-size:1rem;margin:1.4rem 0 .5rem;overflow-wrap:anywhere}
.sub,.note{color:var(--soft);margin:.35rem 0 0;overflow-wrap:anywhere;max-width:76ch}
.note{font-size:.85rem}
section{margin-top:clamp(28px,4vw,44px)}
footer{color:var(--soft);font-size:.8rem;padding-top:28px;padding-bottom:36px}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin-top:1rem;font-size:.9rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(132px,100%),1fr));gap:10px;margin-top:14px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px}
.tile b{display:block;font-size:1.12rem;line-height:1.25;letter-spacing:-.01em;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.tile span{color:var(--soft);font-size:.8rem}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(158px,46%),1fr));margin-top:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden;margin:0;min-width:0;
display:flex;flex-direction:column}
.card.asked{border-color:var(--accent);box-shadow:0 0 0 1px var(--accent)}
.film{background-repeat:no-repeat;background-size:calc(var(--n)*100%) 100%;width:100%;background-color:#000;
animation:film var(--d) steps(var(--n),jump-none) infinite}
.film.still{animation:none}
@keyframes film{from{background-position:0 0}to{background-position:100% 0}}
@media(prefers-reduced-motion:reduce){.film{animation-play-state:paused}}
.none{display:grid;place-items:center;color:var(--soft);background:var(--shade);font-size:.8rem}
.heard{position:relative;display:block;width:100%;padding:0;border:0;background:#000;cursor:pointer;line-height:0}
.heard img{width:100%;height:58px;object-fit:fill;display:block}
.heard i{position:absolute;left:6px;bottom:6px;width:26px;height:26px;border-radius:50%;background:rgba(0,0,0,.55)}
.heard i::after{content:"";position:absolute;left:10px;top:7px;border:solid transparent;border-width:6px 0 6px 9px;
border-left-color:#fff}
.playing .heard i::after{left:8px;top:8px;width:10px;height:10px;border:solid #fff;border-width:0 3px}
.heard u{position:absolute;top:0;bottom:0;left:-2px;width:2px;background:#fff}
.heard:focus-visible{outline:2px solid var(--accent);outline-offset:-2px}
.card audio{display:none;width:100%;height:34px}
figcaption{padding:8px 10px 10px;font-size:.8rem;line-height:1.35;min-width:0}
.name{overflow-wrap:anywhere;display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;overflow:hidden}
.meta{color:var(--soft);display:flex;flex-wrap:wrap;gap:0 .6em;font-variant-numeric:tabular-nums}
.badge{font-weight:600}.badge.yes{color:var(--good)}.badge.no{color:var(--bad)}
.row{margin-top:16px;padding-top:14px;border-top:1px solid var(--line)}
.row .cards{margin-top:0}
@media(max-width:560px){.row .cards{grid-template-columns:none;grid-auto-flow:column;grid-auto-columns:43%;
overflow-x:auto;scroll-snap-type:x proximity;padding-bottom:6px}.row .card{scroll-snap-align:start}}
.scroll{overflow-x:auto;margin-top:10px;border:1px solid var(--line);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:left;white-space:nowrap;border-top:1px solid var(--line)}
tr:first-child th{border-top:0}thead th{color:var(--soft);font-weight:600;background:var(--shade)}
td.num,th.num{text-align:right}tr td.same{color:transparent!important}
td.wide{white-space:normal;min-width:16ch;overflow-wrap:anywhere}
tr.control td{color:var(--soft)}tr.first td{border-top:1px solid var(--soft)}
.charts{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));margin-top:12px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 12px 12px;margin:0;
min-width:0}
.chart figcaption{padding:0 0 4px;font-weight:600;font-size:.88rem}
.chart svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:10px;font-family:inherit;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}.thin{stroke-width:1;opacity:.3}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8rem;color:var(--soft);margin-top:4px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;vertical-align:-1px}
.legend span{overflow-wrap:anywhere;min-width:0}
.bars{display:grid;grid-template-columns:minmax(8ch,max-content) 1fr max-content;gap:4px 10px;align-items:center;
font-size:.85rem;margin-top:10px}
.bars b{height:10px;border-radius:5px;background:var(--bad);min-width:3px;display:block}
.bars span{overflow-wrap:anywhere}.bars em{font-style:normal;font-variant-numeric:tabular-nums}
.picture{display:block;max-width:100%;height:auto;border-radius:8px;border:1px solid var(--line);background:#fff}
.pictures{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));margin-top:12px}
.pictures figure{margin:0;min-width:0}
.timelines{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));margin-top:12px}
.timeline{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0;min-width:0;
padding:0 12px 10px}
.timeline figcaption{padding:9px 0 7px;font-weight:600;font-size:.88rem;overflow-wrap:anywhere}
.timeline img,.timeline svg{display:block;width:100%}.timeline svg{height:64px;background:var(--shade);margin-top:6px}
.timeline .curve{vector-effect:non-scaling-stroke}.kept{opacity:.28}
.timeline i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;vertical-align:-1px}
.ends{display:flex;justify-content:space-between;color:var(--soft);font-size:.75rem;margin-top:4px}
details{margin-top:14px}summary,summary.note{cursor:pointer;color:var(--accent)}
@media print{.card,.chart,.row{break-inside:avoid}.heard i{display:none}}
"""

SCRIPT = """
document.querySelectorAll('.card').forEach(function(card){
 var sound=card.querySelector('audio'),button=card.querySelector('.heard');if(!sound||!button)return;
 var film=card.querySelector('.film'),head=button.querySelector('u'),on=false;
 function tick(){
  var m=film&&film.getAnimations()[0];if(m)m.currentTime=sound.currentTime*1000;
  if(head)head.style.left=(sound.duration?100*sound.currentTime/sound.duration:0)+'%';
  if(on)requestAnimationFrame(tick);
 }
 sound.addEventListener('play',function(){
  document.querySelectorAll('audio').forEach(function(other){if(other!==sound)other.pause();});
  on=true;card.classList.add('playing');tick();
 });
 function stop(){on=false;card.classList.remove('playing');}
 sound.addEventListener('pause',stop);sound.addEventListener('ended',stop);
 button.addEventListener('click',function(){if(sound.paused)sound.play();else sound.pause();});
});
"""


def escaped(text: Any) -> str:
    """Text for HTML, in an attribute too: control and direction characters and lone surrogates as escapes, so that a
    file name neither becomes markup nor turns the line around."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return html.escape(shown, quote=True)


def page(title: str, sub: str, sections: Sequence[str], *, menu: bool = False) -> str:
    """The whole document. `sections`: HTML made here; `title`, `sub`: plain text. menu: links to the sections, by their
    headings."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = ""
    if menu:
        found = [s.split("<h2>", 1)[1].split("</h2>", 1)[0] for s in sections if "<h2>" in s]
        items = [s.split('id="', 1)[1].split('"', 1)[0] for s in sections if "<h2>" in s]
        links = "<nav>" + "".join(f'<a href="#{i}">{t}</a>' for i, t in zip(items, found, strict=True)) + "</nav>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style>"
        "<noscript><style>.card audio{display:block}.heard i{display:none}</style></noscript></head>\n<body>"
        f'<header><h1>{escaped(title)}</h1><p class="sub">{escaped(sub)}</p>{links}</header>\n<main>\n'
        + "\n".join(sections)
        + f"\n</main>\n<footer>Made by avstore. This page is one file: it needs no network.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A part of a page under its heading; title and note are plain text, the body HTML."""
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in title.lower()).strip("-")
    told = f'<p class="note">{escaped(note)}</p>' if note else ""
    return f'<section id="{name}"><h2>{escaped(title)}</h2>{told}{body}</section>'


def tiles(values: Iterable[tuple[str, Any]]) -> str:
    """Big numbers with their names."""
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escaped(v)}</b><span>{escaped(name)}</span></div>' for name, v in values
    ) + "</div>"  # fmt: skip


def bars(counts: Iterable[tuple[str, int]]) -> str:
    """Counts as horizontal bars."""
    counts = list(counts)
    most = max((n for _, n in counts), default=1) or 1
    return '<div class="bars">' + "".join(
        f'<span>{escaped(name)}</span><b style="width:{100 * n / most:.1f}%"></b><em>{n}</em>' for name, n in counts
    ) + "</div>"  # fmt: skip


CONTROLS = ("chance", "random", "raw", "pixels", "motion", "mean frame", "mean abs", "spectrogram", "commonest",
            "scratch", "uniform", "human", "people", "published")  # fmt: skip


def table(value: Table) -> str:
    """A table of results: numbers to the right, empty columns and repeated leading words left out, controls in grey."""
    filled = tuple(c for c in value.columns if any(r.get(c) not in (None, "") for r in value.rows))
    value = dataclasses.replace(value, columns=filled)
    cells = value.cells()
    numeric = [
        any(isinstance(r.get(c), int | float) for r in value.rows)
        and all(isinstance(r.get(c), int | float | None) for r in value.rows)
        for c in value.columns
    ]
    kinds = ["num" if n else "wide" if any(len(r[i]) > 44 for r in cells) else "" for i, n in enumerate(numeric)]
    head = "".join(f'<th class="{k}">{escaped(c)}</th>' for c, k in zip(value.columns, kinds, strict=True))
    out, leading = [], next((i for i, n in enumerate(numeric) if n), len(numeric))
    for at, row in enumerate(cells):
        before = cells[at - 1] if at else None
        same = [before is not None and row[: i + 1] == before[: i + 1] for i in range(min(leading - 1, len(row)))]
        words = " ".join(row[:leading]).lower()
        line = "".join(
            f'<td class="{k}{" same" if i < len(same) and same[i] else ""}">{escaped(c)}</td>'
            for i, (c, k) in enumerate(zip(row, kinds, strict=True))
        )
        names = ["control"] * any(w in words for w in CONTROLS) + ["first"] * bool(same and at and not same[-1])
        out.append(f'<tr class="{" ".join(names)}">{line}</tr>')
    told = [f'<p class="note">{escaped(n)}</p>' for n in value.notes]
    notes = "".join(told[:NOTES])
    if told[NOTES:]:
        more = f"{len(told) - NOTES} more note{'s' if len(told) - NOTES > 1 else ''}"
        notes += f'<details><summary class="note">{more}</summary>{"".join(told[NOTES:])}</details>'
    return (
        f"<h3>{escaped(value.title)}</h3>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(out)}</tbody></table></div>{notes}'
    )


def picture(uri: str, caption: str = "") -> str:
    """A picture (a data: address) with a caption."""
    if not uri.startswith("data:image/"):
        raise UsageError("a picture that is not in the page", "an address beginning with data:image/ is wanted")
    told = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f'<figure><img class="picture" alt="{escaped(caption)}" src="{escaped(uri)}">{told}</figure>'
