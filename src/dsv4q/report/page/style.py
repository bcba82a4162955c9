"""The page's style sheet: narrow screens first, dark mode by the system's wish, A4 in print."""

from __future__ import annotations

from dsv4q.report.page.colours import DARK, LIGHT, NOTHING, SERIES


def style_sheet() -> str:
    """The whole style sheet."""
    return "\n".join(
        [
            _variables(":root", LIGHT),
            f"@media screen and (prefers-color-scheme: dark) {{ {_variables(':root', DARK)} }}",
            _RULES.replace("NOTHING", NOTHING),
            *(f".c{i} {{ color: var(--c{i}); }}" for i in range(SERIES)),
            _PRINT,
        ]
    )


def _variables(selector: str, colours: dict[str, str]) -> str:
    return f"{selector} {{ {' '.join(f'--{name}: {colour};' for name, colour in colours.items())} }}"


_RULES = """
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
header, nav, main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.75rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--link); }
code, pre { font: .875em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
code { overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--panel); padding: .75rem; border-radius: .4rem; }
.soft, figcaption span, footer { color: var(--soft); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .75rem 0; padding: 0; }
nav a { display: inline-block; padding: .3rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); gap: .6rem; margin: 1rem 0;
  padding: 0; }
.tile { background: var(--panel); border-radius: .5rem; padding: .6rem .8rem; }
.tile dt { font-size: .8125rem; color: var(--soft); }
.tile dd { margin: 0; font-size: 1.2rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile dd + dd { font-size: .8125rem; font-weight: 400; color: var(--soft); }
.facts { display: grid; grid-template-columns: minmax(6.5rem, max-content) 1fr; gap: .3rem 1rem; margin: .75rem 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.gap { border-left: .3rem solid var(--gap); background: var(--panel); padding: .5rem .8rem; }
.gap b { color: var(--gap); }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(46rem, 100vw - 2rem); }
th, td { padding: .22rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; font-weight: 400;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
tbody th { position: sticky; left: 0; background: var(--bg); }
thead th { font-weight: 600; vertical-align: bottom; }
.t { text-align: left; }
td.w { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
td small { display: block; color: var(--soft); font-size: .93em; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); padding: .3rem 0; }
figure { margin: 1.1rem 0 1.5rem; }
figcaption { margin-bottom: .35rem; }
figcaption b { display: block; }
figcaption span { font-size: .875rem; display: block; max-width: 46rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .35rem 0; padding: 0;
  font-size: .8125rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.legend svg { width: 1.6rem; height: .8rem; flex: none; }
.plot { display: grid; grid-template-columns: auto minmax(0, 1fr); column-gap: .4rem; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.area { position: relative; height: var(--h); }
.y { position: relative; min-width: var(--w); font-size: .75rem; color: var(--soft); }
.y span { position: absolute; right: 0; transform: translateY(50%); line-height: 1; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.x { position: relative; grid-column: 2; height: 1.35rem; font-size: .75rem; color: var(--soft); }
.x span { position: absolute; transform: translateX(-50%); white-space: nowrap; top: .2rem; }
.xt { grid-column: 2; font-size: .75rem; color: var(--soft); text-align: center; }
.heat .y { min-width: 2.2rem; }
.heat image { image-rendering: pixelated; }
.hash { position: absolute; right: -.35rem; border-right: .2rem solid var(--text); }
.nothing { color: NOTHING; }
.ramp { max-width: 22rem; margin: .5rem 0 .25rem; }
.ramp > svg { display: block; width: 100%; height: .8rem; }
.bar { display: inline-block; width: 7rem; height: .7rem; vertical-align: middle; }
.map { display: inline-block; width: clamp(8rem, 34vw, 26rem); height: 1.05rem; vertical-align: bottom; }
.wide table { width: 100%; }
svg .grid { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg .fill { fill: currentColor; }
svg .band { fill: currentColor; opacity: .22; }
svg .stroke { stroke: currentColor; stroke-width: 2; fill: none; vector-effect: non-scaling-stroke; }
svg .dot { stroke: currentColor; stroke-width: 6; stroke-linecap: round; fill: none;
  vector-effect: non-scaling-stroke; }
svg .square { stroke-linecap: square; stroke-width: 5; }
svg .mark { stroke: var(--text); stroke-width: 2; fill: none; vector-effect: non-scaling-stroke; }
svg .hit { fill: transparent; }
svg .hit:hover { fill: var(--text); fill-opacity: .1; }
@media (max-width: 40rem) { svg .dot { stroke-width: 4; } }
footer { margin-top: 3rem; padding-bottom: 2rem; font-size: .875rem; }
"""

_PRINT = """
@media print {
  @page { size: A4; margin: 14mm 12mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html { color-scheme: light; font-size: 9.5pt; }
  header, main, footer { max-width: none; padding: 0 .9rem 0 0; }
  footer { margin-top: 1rem; padding-bottom: 0; }
  nav, summary, .config { display: none; }
  h2 { break-after: avoid; margin-top: 1.5rem; }
  figure, .tiles, tr { break-inside: avoid; }
  figcaption { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
  tbody th { position: static; }
  table { font-size: 7.5pt; }
  th, td { padding: .1rem .3rem; }
  details::details-content { content-visibility: visible; display: block; }
}
"""
