"""What pages have in common: a style sheet, light and dark, from a phone to a wide screen, without any other file."""

from __future__ import annotations

from shnet_jax.retrieve.html import Child, Markup, tag

CSS = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1d1d22;--soft:#5f6068;--line:#e2e0db;--good:#1a7f4b;
--goodbg:#e5f4eb;--bad:#b4372f;--badbg:#fbeae8;--a:#2f6fb5;--b:#c96a1b;--hot:#d6285a}
@media(prefers-color-scheme:dark){:root{--bg:#17171b;--card:#212127;--ink:#ececf0;--soft:#a3a4ae;--line:#35353d;
--good:#5ecb92;--goodbg:#1c3a2a;--bad:#f08a80;--badbg:#44231f;--a:#77b0ec;--b:#f0a45f;--hot:#ff5c8d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:52px 0 4px}
h3{font-size:1rem;margin:26px 0 8px;overflow-wrap:anywhere}
p{margin:4px 0 12px;max-width:68ch}
.muted,figcaption,.sub{color:var(--soft);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 22px;font-size:.925rem}
a{color:var(--a)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:18px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tiles b{display:block;font-size:1.5rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.8125rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:6px 0 12px}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,table.words td{text-align:left}
table.words td{white-space:normal;overflow-wrap:anywhere}
th{font-weight:600}
thead th{color:var(--soft);font-weight:500}
details{margin:8px 0}
summary{cursor:pointer;color:var(--a)}
figure{margin:14px 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 28px}
.chart{width:100%;max-width:600px;height:auto;display:block;font-size:11px;fill:var(--soft)}
.chart .grid{stroke:var(--line)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.s0,.s1,.s2{stroke:var(--a);fill:var(--a)}.s3,.s4,.s5{stroke:var(--b);fill:var(--b)}
.s1,.s4{opacity:.65}.s2,.s5{opacity:.35}
polyline[class]{fill:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8125rem;color:var(--soft);margin-top:6px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;background:var(--soft)}
.legend i.s0,.legend i.s1,.legend i.s2{background:var(--a)}
.legend i.s3,.legend i.s4,.legend i.s5{background:var(--b)}
.bar{display:flex;height:30px;border-radius:7px;overflow:hidden;font-size:.8125rem;line-height:30px;text-align:center;
margin-top:6px;color:#fff}
.bar div{flex-basis:0;min-width:2px;overflow:hidden}
.q0{background:#1a7f4b}.q1{background:#4c9a72}.q2{background:#86a85e}.q3{background:#c48a3f}.q4{background:#b4504a}
.legend i.q0{background:#1a7f4b}.legend i.q1{background:#4c9a72}.legend i.q2{background:#86a85e}
.legend i.q3{background:#c48a3f}.legend i.q4{background:#b4504a}
.query{border-top:1px solid var(--line);padding:14px 0 6px}
.query:first-of-type{border-top:0}
.say{font-size:1.0625rem;margin:0 0 2px;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin:8px 0 10px;
align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden;font-size:.8125rem;
line-height:1.35}
.card.good{border:2px solid var(--good)}
.card .text{padding:7px 10px 9px;overflow-wrap:anywhere}
.card .sub{font-size:.8125rem}
.head{display:flex;justify-content:space-between;gap:8px;font-variant-numeric:tabular-nums}
.good .mark{color:var(--good);font-weight:600}.bad .mark{color:var(--bad)}
.pic{position:relative;width:100%;aspect-ratio:1;background:var(--line);overflow:hidden}
.pic .base,.over{position:absolute;inset:0;width:100%;height:100%}
.base{background-size:100% 100%}
.dim{filter:grayscale(1) brightness(1.1) opacity(.4)}
.over{display:block}
.over rect{fill:none;vector-effect:non-scaling-stroke}
.outline{stroke:#1d1d22;stroke-opacity:.45;stroke-width:1}
.halo{stroke:#fff;stroke-opacity:.9;stroke-width:4.5}
.halo.thin{stroke-width:3;stroke-opacity:.6}
.high{stroke:var(--hot);stroke-width:2.5}
.low{stroke:#33333b;stroke-width:1.5;stroke-dasharray:4 3}
.tag{position:absolute;transform:translate(2px,2px);font-size:11px;line-height:1.3;padding:0 4px;border-radius:4px;
color:#fff;background:#d6285a;font-variant-numeric:tabular-nums}
.tag.weak{background:#55555e}
.keys{display:flex;flex-wrap:wrap;gap:1px 9px}
.keys i{display:inline-block;width:9px;height:9px;border-radius:2px;margin-right:4px;border:1px solid #0003}
.side{display:grid;grid-template-columns:minmax(120px,190px) 1fr;gap:16px;align-items:start;margin-top:6px}
ol{list-style:none;margin:0;padding:0}
li{display:grid;grid-template-columns:1.2em 4.4em 1fr;gap:8px;padding:5px 8px;border-radius:7px;margin-bottom:3px;
overflow-wrap:anywhere}
li.good{background:var(--goodbg)}
li .num{font-variant-numeric:tabular-nums;color:var(--soft)}
@media(max-width:520px){.chart{font-size:16px}.tiles{grid-template-columns:repeat(3,1fr)}.tiles div{padding:8px 10px}
.cards{grid-template-columns:repeat(2,1fr)}.side{grid-template-columns:1fr}
.side>.card{max-width:200px}main{padding-top:20px}h2{margin-top:40px}li{padding:5px 6px}}
"""


def document(title: str, style: Markup, *body: Child) -> str:
    """A whole page. style: further rules of the style sheet; body: what is on the page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS), style),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body)), lang='en')}\n"
