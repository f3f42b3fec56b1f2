"""The style sheet of all pages, light and dark, from a phone to a wide screen."""

CSS = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1d1d22;--soft:#5f6068;--line:#e2e0db;--shade:#0003;
--good:#1a7f4b;--goodbg:#e5f4eb;--bad:#b4372f;--link:#2f6fb5;--hot:#d6285a}
@media(prefers-color-scheme:dark){:root{--bg:#17171b;--card:#212127;--ink:#ececf0;--soft:#a3a4ae;--line:#35353d;
--shade:#000c;--good:#5ecb92;--goodbg:#1c3a2a;--bad:#f08a80;--link:#77b0ec;--hot:#ff5c8d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 16px 64px}

/* Text */
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:48px 0 4px;overflow-wrap:anywhere}
h3{font-size:1rem;margin:26px 0 8px;overflow-wrap:anywhere}
p{margin:4px 0 12px;max-width:68ch;overflow-wrap:anywhere}
a,summary{color:var(--link)}
summary{cursor:pointer;overflow-wrap:anywhere}
details{margin:8px 0}
ul{padding-left:1.2rem;max-width:68ch}
dl{max-width:68ch}
dt{font-weight:600;margin-top:.6rem}
dd{margin:0;color:var(--soft);overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;overflow-x:auto}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0 22px;font-size:.925rem}
.muted,figcaption,.sub,.keys{color:var(--soft);font-size:.8125rem;line-height:1.4}
.muted{font-size:.875rem}

/* Numbers: tiles, tables that scroll under their first column, charts */
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:18px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.tiles b{display:block;font-size:1.5rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:.8125rem}
.scroll{overflow-x:auto;margin:6px 0 12px;background:linear-gradient(to left,var(--bg) 30%,#0000) 100% 0/40px 100%
no-repeat local,linear-gradient(to left,var(--shade),#0000) 100% 0/14px 100% no-repeat scroll}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th{font-weight:600}
thead th{color:var(--soft);font-weight:500;white-space:normal;vertical-align:bottom}
th:first-child{position:sticky;left:0;background:var(--bg);text-align:left;white-space:normal;min-width:7rem;
max-width:16rem;overflow-wrap:break-word}
table.words td{text-align:left;white-space:normal;overflow-wrap:anywhere}
figure{margin:14px 0}
figure svg{display:block;width:100%;max-width:600px;height:auto}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 28px}
.keys{display:flex;flex-wrap:wrap;gap:1px 12px}
.keys i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px;border:1px solid var(--shade)}
.keys b{margin-right:4px}
.bar{display:flex;height:26px;border-radius:7px;overflow:hidden;font-size:.8125rem;line-height:26px;text-align:center;
margin:6px 0;color:#fff}
.bar div{flex-basis:0;min-width:2px;overflow:hidden}

/* Queries and what they find */
.query{border-top:1px solid var(--line);padding:14px 0 8px}
.query:first-of-type{border-top:0}
.say{font-size:1.0625rem;margin:0 0 2px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px;margin:8px 0 10px}
.card{background:var(--card);border:2px solid var(--line);border-radius:10px;overflow:hidden;font-size:.8125rem;
line-height:1.35}
.card.good{border-color:var(--good)}
.card .text{padding:7px 10px 9px;overflow-wrap:anywhere}
.head{display:flex;justify-content:space-between;gap:6px;font-variant-numeric:tabular-nums;white-space:nowrap}
.good .mark{color:var(--good);font-weight:600}.bad .mark{color:var(--bad)}
.side{display:grid;grid-template-columns:minmax(120px,190px) 1fr;gap:16px;align-items:start;margin-top:6px}
ol{list-style:none;margin:0;padding:0;display:grid;grid-template-columns:max-content max-content 1fr;gap:3px 10px}
ol li{display:grid;grid-template-columns:subgrid;grid-column:1/-1;padding:5px 8px;border-radius:7px;
overflow-wrap:anywhere}
ol li.good{background:var(--goodbg)}
.num{font-variant-numeric:tabular-nums;color:var(--soft);white-space:nowrap}

/* Pictures: each in a square frame, with layers above it */
.frame{display:grid;place-items:center;aspect-ratio:1;background:var(--line)}
.pic{position:relative;width:100%;aspect-ratio:1;overflow:hidden}
.pic .base,.over{position:absolute;inset:0;width:100%;height:100%}
.base{background-size:100% 100%}
.dim{filter:grayscale(1) brightness(1.1) opacity(.4)}
.over{display:block}
.over rect{fill:none;vector-effect:non-scaling-stroke}
.outline{stroke:var(--soft);stroke-width:1}
.halo{stroke:#fff;stroke-opacity:.9;stroke-width:4.5}
.halo.thin{stroke-width:3;stroke-opacity:.6}
.high{stroke:var(--hot);stroke-width:2.5}
.low{stroke:#33333b;stroke-width:1.5;stroke-dasharray:4 3}
.tag{position:absolute;font-size:11px;line-height:15px;padding:0 3px;border-radius:4px;color:#fff;background:#d6285a;
font-variant-numeric:tabular-nums}
.tag.weak{background:#55555e}

@media(max-width:520px){main{padding-top:20px}h2{margin-top:40px}.tiles{grid-template-columns:repeat(3,1fr)}
.tiles div{padding:8px 10px}.cards{grid-template-columns:repeat(2,1fr)}.side{grid-template-columns:1fr}
.side>.card{max-width:200px}ol li{padding:5px 6px}th,td{padding-right:9px}
.scroll th:first-child{min-width:6rem;max-width:8.5rem}}
"""
