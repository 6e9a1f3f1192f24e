"""The style sheet of the report: one light column, readable on a telephone, no fetched fonts."""

STYLE = """
:root{--ink:#22282b;--soft:#667075;--line:#e3e1da;--paper:#fbfaf7;--card:#fff;--accent:#2f6f6d}
*{box-sizing:border-box}
html{color-scheme:light;-webkit-text-size-adjust:100%}
body{margin:0; background:var(--paper); color:var(--ink); font:16px/1.55
  system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 20px 60px}
header{margin-bottom:44px}
.title{margin:0 0 6px;color:var(--accent);font-weight:600;letter-spacing:.02em}
h1{margin:0 0 26px; font-size:clamp(1.6rem,4.6vw,2.5rem); line-height:1.18; font-weight:650;
  letter-spacing:-.015em; max-width:24em}
h2{margin:52px 0 18px;font-size:1.35rem;font-weight:640;letter-spacing:-.01em}
h3{margin:22px 0 8px;font-size:1.02rem;font-weight:620}
h4{margin:0 0 4px;font-size:.86rem;font-weight:600;color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.facts div{background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px
  16px}
.facts b{display:block; font-size:1.5rem; font-weight:640; letter-spacing:-.01em;
  font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.86rem;line-height:1.35;display:block}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:20px}
figure{margin:0; background:var(--card); border:1px solid var(--line); border-radius:12px;
  padding:14px 14px 12px}
figure h3{margin:0 0 8px}
video,img{display:block;width:100%;height:auto;border-radius:6px;background:#ece9e2}
.panels{display:flex;margin-bottom:4px}
.panels span{flex:1; text-align:center; font-size:.74rem; color:var(--soft); line-height:1.25;
  padding:0 2px}
figcaption,.note{color:var(--soft);font-size:.88rem;margin:10px 0 0}
.note{margin:0 0 12px}
.scroll{overflow-x:auto}
table{border-collapse:collapse; width:100%; background:var(--card); border:1px solid var(--line);
  border-radius:12px; border-spacing:0; font-variant-numeric:tabular-nums}
th,td{padding:10px 14px; text-align:left; border-bottom:1px solid var(--line); font-weight:400;
  vertical-align:top}
tbody th{font-weight:600}
thead th{font-size:.82rem;color:var(--soft)}
tfoot th,tfoot td{border:0;font-weight:640}
tr.copy th,tr.copy td{color:var(--soft);font-weight:400;padding-top:0}
tbody tr:has(+tr.copy)>*{border-bottom:0;padding-bottom:2px}
td{white-space:nowrap}
td i{font-style:normal;font-size:.8rem;margin-left:4px}
.good{color:#2a7a3f}
.bad{color:#a8432a}
.bar{display:block; height:4px; border-radius:2px; background:var(--accent); opacity:.55;
  margin-top:5px; min-width:2px}
.costs td:nth-child(2){width:45%}
th small{display:block;font-weight:400;color:var(--soft)}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:14px}
.curves div{background:var(--card); border:1px solid var(--line); border-radius:12px; padding:12px
  12px 6px}
svg{display:block;width:100%;height:auto}
svg text{font:10px system-ui,sans-serif;fill:#7b8488}
svg .grid{stroke:#eceae4}
pre{margin:0 0 16px; padding:12px 14px; background:#f1efe9; border-radius:8px; overflow-x:auto;
  font-size:.84rem}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;user-select:all}
ul{padding-left:1.2em;margin:0}
li{margin:6px 0}
footer{margin-top:56px;color:var(--soft);font-size:.86rem}
@media(max-width:520px){main{padding:24px 14px 40px}th,td{padding:8px 9px}h2{margin-top:40px}}
"""
