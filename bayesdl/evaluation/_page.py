"""The report's fixed text: template, style sheet, and how to read it."""

from __future__ import annotations

from string import Template

TEMPLATE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<dl>
$facts
</dl>
</header>
<main>
<section>
<h2>Scores on test points</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Scores">
$table
</div>
<p class="note">$note</p>
</section>
$failures
$pictures
<section>
<h2>Can the fits be trusted?</h2>
$diagnostics
</section>
<section class="how">
<h2>How to read this</h2>
$how
</section>
</main>
<footer>Written by bayesdl $version. Full precision: <code>results.csv</code>. Fitted posteriors: the folder
<code>posteriors</code>; <code>bayesdl.load(path)</code> reads one.</footer>
</body>
</html>
"""
)

STYLE = """
:root { --ink: #1d1f23; --muted: #646a73; --line: #e2e4e8; --page: #fafafa; --card: #ffffff; --mark: #e7f3ec;
  --mark-ink: #0b5c36; --bad: #a3261b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e8ea; --muted: #a0a6ae; --line: #33373d; --page: #16181b; --card: #1e2125; --mark: #173a29;
    --mark-ink: #8fdcb2; --bad: #ff9a8f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1280px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 48px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 20px; }
h2 { font-size: 20px; margin: 0 0 14px; }
h3 { font-size: 16px; margin: 20px 0 4px; }
p { margin: 0 0 12px; max-width: 44em; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 12px 32px; margin: 0; }
dt { color: var(--muted); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; }
section { margin: 44px 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { position: relative; padding: 10px 9px; text-align: right; white-space: nowrap; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--line);
  white-space: normal; vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
th[scope="row"] { text-align: left; font-weight: 600; }
th i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 9px; }
td.best { background: var(--mark); color: var(--mark-ink); font-weight: 650; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
small { color: var(--muted); font-weight: 400; }
small.bad, .failures h2 { color: var(--bad); }
.note { color: var(--muted); font-size: 14px; margin-top: 12px; max-width: 56em; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figure { background: #ffffff; border: 1px solid var(--line); border-radius: 10px; padding: 18px; overflow: hidden; }
figcaption { color: #5c626b; font-size: 14px; margin: 14px auto 0; max-width: 52em; }
ul { padding-left: 20px; margin: 0 0 16px; }
li { margin-bottom: 4px; }
.warnings { margin-top: 16px; font-size: 14.5px; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 10px 12px; font-size: 13px; }
code { font-size: 0.92em; }
.how dl { grid-template-columns: 1fr; gap: 10px; max-width: 46em; }
.how dt { color: var(--ink); font-weight: 600; font-size: 15px; }
footer { color: var(--muted); font-size: 13px; border-top: 1px solid var(--line); padding-top: 18px;
  padding-bottom: 40px; margin-top: 56px; }
@media (max-width: 600px) {
  header, main, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  h1 { font-size: 24px; }
  figure { padding: 8px; overflow-x: auto; }
  figure img { max-width: none; width: 640px; margin: 0; }
  th, td { padding: 8px 10px; }
}
@media print { body { background: #ffffff; } section { break-inside: avoid; } }
"""

_TRUST = """
<dt>R-hat, ESS</dt><dd>Of a sampler, on function values at training inputs: R-hat near 1 (below 1.05) means that the
chains agree; ESS is how many independent draws the correlated ones are worth (100 is little, 400 is comfortable). The
worst over inputs, and over splits, is shown.</dd>
<dt>Divergences</dt><dd>Steps of the sampler that went numerically wrong. More than a few in a thousand: do not trust
the tails.</dd>
<dt>Jitter</dt><dd>What had to be added to the diagonal of a kernel matrix to factorise it; 0 is normal.</dd>
"""

HOW_TO_READ = {
    "regression": f"""
<p>Every engine saw the same training points and was asked for a whole distribution at each test point, in the units of
the target. Look at NLPD and CRPS first: they reward a distribution that is both sharp and honest, and cannot be won by
cheating. Then ask whether the intervals hold what they promise.</p>
<dl>
<dt>RMSE</dt><dd>How far the mean prediction is off. Says nothing about uncertainty. Lower is better.</dd>
<dt>NLPD</dt><dd>Minus the logarithm of the density given to what happened. One confident mistake costs a lot. Lower is
better; a difference of 0.1 means about 10% more density on average.</dd>
<dt>CRPS</dt><dd>Distance between the predicted distribution and what happened, in the units of the target; for a
prediction without uncertainty it is the absolute error. Lower is better.</dd>
<dt>Coverage</dt><dd>The share of test points inside the central 50%, 90% and 95% intervals. Best when equal to the
level: above it the intervals are too wide, below it too narrow.</dd>
<dt>PIT error</dt><dd>Mean distance of the calibration curve from the diagonal. 0 is perfect; the note below the table
says what chance alone produces.</dd>
<dt>Distance to reference</dt><dd>How far the predicted distributions are from the reference engine's (2-Wasserstein, in
the units of the target). Small means the same belief, not a better one.</dd>
{_TRUST}
</dl>
""",
    "classification": f"""
<p>Every engine saw the same training points and was asked for the probability of every class at each test point. Look
at NLL and Brier first: they reward probabilities that are both decisive and honest.</p>
<dl>
<dt>Accuracy</dt><dd>How often the most probable class is right. Higher is better.</dd>
<dt>NLL</dt><dd>Minus the logarithm of the probability given to the true class. One confident mistake costs a lot. Lower
is better.</dd>
<dt>Brier</dt><dd>Squared distance between the probabilities and the truth, summed over classes. Between 0 and 2; lower
is better.</dd>
<dt>ECE</dt><dd>Mean gap between confidence and accuracy over 15 bins. On few test points chance alone makes it a few
hundredths.</dd>
<dt>Distance to reference</dt><dd>Total variation distance to the reference engine's probabilities: 0 is the same, 1 is
entirely different. Small means the same belief, not a better one.</dd>
{_TRUST}
</dl>
""",
}
