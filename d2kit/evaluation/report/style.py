"""The style sheet of a report: light and dark, telephone and desk."""

STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1c2430;--dim:#5b6675;--rule:#dde2e9;
--accent:#1a6fd6;--bad:#c2410c;--c0:#1a6fd6;--c1:#d1495b;--c2:#2f855a;--c3:#8d5a97;--c4:#b7791f;
--c5:#0f8b8d;--c6:#7a6c5d;--c7:#d53f8c;--heat:26,111,214}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1b212a;--ink:#e6eaf0;--dim:#9aa7b8;
--rule:#313a47;--accent:#6cb0ff;--bad:#ff9a5c;--c0:#6cb0ff;--c1:#ff8896;--c2:#68d391;--c3:#c9a0d4;
--c4:#f6c667;--c5:#5fd3d5;--c6:#bfae9b;--c7:#f687b3;--heat:108,176,255}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 10px}h3{font-size:15px;margin:0 0 8px}
p{margin:6px 0;max-width:78ch}small,.dim{color:var(--dim);font-size:13px}a{color:var(--accent)}
code{font-size:13px;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:12px 0;font-size:14px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:16px 0}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,390px),1fr));gap:14px;
align-items:start}
.card{min-width:0}.wide{grid-column:1/-1}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:14px}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--rule);
white-space:nowrap}
th{font-weight:600;color:var(--dim)}tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:7em;max-width:24em}
table.words td,table.words th{text-align:left;white-space:normal;overflow-wrap:anywhere;
vertical-align:top}
.matrix td,.matrix th{padding:6px 10px;text-align:center;border:1px solid var(--rule)}
.matrix th,.matrix th:first-child{min-width:5em;max-width:10em;
white-space:normal;overflow-wrap:break-word}
.matrix tr:last-child td{border-bottom:1px solid var(--rule)}
svg{display:block;width:100%;height:auto;max-width:520px}
svg text{fill:var(--dim);font-size:12px}.middle{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--rule);fill:none}.axis{stroke:var(--dim);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
path.reference{stroke:var(--dim);stroke-dasharray:4 4;stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;margin-top:6px}
.legend span{overflow-wrap:anywhere}
.legend i{display:inline-block;width:14px;height:3px;margin:0 6px 4px 0;border-radius:2px}
i.reference{background:var(--dim)}
.bar{display:grid;grid-template-columns:minmax(6em,34%) 1fr minmax(8.5em,auto);gap:10px;
align-items:center;padding:3px 0;font-size:14px}
.bar span:first-child{overflow-wrap:anywhere}.bar span:last-child{font-variant-numeric:tabular-nums}
.track{background:var(--rule);border-radius:4px;height:10px;overflow:hidden}
.track i{display:block;height:100%;background:var(--accent)}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px}
.panes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:8px}
.panes img{display:block;width:100%;border-radius:5px}.panes span{font-size:13px;color:var(--dim)}
figcaption{font-size:13px;margin-top:6px;overflow-wrap:anywhere}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin:0 5px 0 12px}
.note{border-left:3px solid var(--bad);padding-left:10px}
pre{overflow:auto;max-height:420px;font-size:12.5px;line-height:1.45}
summary{cursor:pointer;font-weight:600}
""" + "".join(f".c{i}{{stroke:var(--c{i})}}i.c{i}{{background:var(--c{i})}}" for i in range(8))
