"""The style sheet of the report page, for light and dark, without anything from outside the page."""

from __future__ import annotations

CSS = """\
:root {
  color-scheme: light dark;
  --back: #ffffff; --on: #ffffff; --card: #f5f6f8; --text: #1d2430; --dim: #667080; --edge: #dde1e7;
  --data: #d99a00; --compute: #2b6cb0; --wait: #d9534f; --optimizer: #2f9e6e; --other: #a3abb8;
  --train: #2b6cb0; --validation: #d9660a; --best: #12895c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14181f; --on: #14181f; --card: #1d232d; --text: #e4e8ee; --dim: #97a1b0; --edge: #313a47;
    --data: #e3b341; --compute: #5b9bd9; --wait: #ea7a75; --optimizer: #4fbf90; --other: #6d7686;
    --train: #6aa9e9; --validation: #f2994a; --best: #3ddc97;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; }
p.sub { color: var(--dim); margin: .2rem 0 0; overflow-wrap: anywhere; }
.chip { font-size: .8rem; padding: .15rem .6rem; border-radius: 1rem; vertical-align: middle;
  color: #fff; background: var(--dim); }
.chip.finished { background: #12805a; } .chip.failed { background: #c03a36; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(12.5rem, 1fr)); gap: .7rem;
  margin-top: 1.4rem; }
.card { background: var(--card); border-radius: .6rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: .82rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
svg { width: 100%; height: auto; background: var(--card); border-radius: .6rem; }
.grid { stroke: var(--edge); } .axis { stroke: var(--dim); } .tick { fill: var(--dim); font-size: 11px; }
.end { text-anchor: end; } .mid { text-anchor: middle; }
path.raw, path.line, path.join { fill: none; stroke: var(--train); stroke-linejoin: round; }
path.raw { opacity: .3; } path.line { stroke-width: 2; } path.join { stroke: var(--validation);
  opacity: .6; }
circle.line { fill: var(--train); } circle.raw, circle.join { opacity: 0; }
circle.dots { fill: var(--validation); } circle.best { fill: none; stroke: var(--best); stroke-width: 2.5; }
.legend { color: var(--dim); font-size: .85rem; margin: .5rem 0; display: flex; flex-wrap: wrap;
  gap: .2rem 1.2rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem;
  margin-right: .35rem; vertical-align: -.08rem; }
.legend i.ring { background: none; border: 2.5px solid var(--best); border-radius: 50%; }
.row { display: grid; grid-template-columns: 11rem 1fr 8rem; gap: .8rem; align-items: center;
  margin: .3rem 0; }
@media (max-width: 40rem) { .row { grid-template-columns: 4.5rem 1fr 5.5rem; } }
.row > :last-child { color: var(--dim); text-align: right; font-variant-numeric: tabular-nums; }
.row small { color: var(--dim); }
.bar { display: flex; height: 1.3rem; border-radius: .3rem; overflow: hidden; background: var(--card); }
.bar i { color: var(--on); font-size: .75rem; line-height: 1.3rem; text-align: center; overflow: hidden;
  font-style: normal; }
.data { background: var(--data); } .compute { background: var(--compute);
  } .wait { background: var(--wait); }
.optimizer { background: var(--optimizer); } .other { background: var(--other); }
.training { background: var(--train); } .validation { background: var(--validation); }
pre { background: var(--card); border-radius: .6rem; padding: .9rem 1.1rem; overflow: auto;
  max-height: 32rem; margin: 0;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem; border-bottom: 1px solid var(--edge); }
th { color: var(--dim); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child, td.text, th.text { text-align: left; padding-left: 0; }
tr.best td { color: var(--best); font-weight: 600; }
ul.notes { margin: 0; padding-left: 1.2rem; } ul.notes small { color: var(--dim); }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--dim); }
.error { border-left: 4px solid #c03a36; padding: .3rem 0 .3rem .9rem; margin: .7rem 0;
  overflow-wrap: anywhere; }
"""
