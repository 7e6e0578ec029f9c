"""One self-contained HTML page of a result file: tables, plots, spoiled samples with their pictures, settings.

No script, no font, no image is loaded from anywhere; every text from a model or a file is escaped.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_attn.evaluation import tables
from vlm_attn.evaluation.curves import NEAR
from vlm_attn.evaluation.kept import drawing
from vlm_attn.evaluation.local_docs import Pictures
from vlm_attn.evaluation.plots import CURVE_NAMES, all_plots, colours, is_control, short, single
from vlm_attn.evaluation.recorder import RunRecorder
from vlm_attn.evaluation.store import write_text
from vlm_attn.evaluation.summary import Rater, flips, rater_for
from vlm_attn.images import load_image

__all__ = ["build_report", "page", "write_report"]

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --good: #2f855a; --bad: #c53030; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 20px 60px; }
header h1 { margin: 0 0 2px; font-size: 26px; }
header p, .note { color: var(--soft); margin: 4px 0 0; } header p.bad { color: var(--bad); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px; margin-top: 20px; }
h2 { margin: 0 0 8px; font-size: 18px; } h3 { margin: 18px 0 6px; font-size: 15px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; width: 100%; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, .left { text-align: left; }
td small { color: var(--soft); } tr.control td:first-child { color: var(--soft); } tr.base td { font-weight: 600; }
.warn { color: #9c6a00 !important; } .good { color: var(--good); } .bad { color: var(--bad); }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
figure { margin: 0; } figure svg { max-width: 100%; height: auto; } figcaption { color: var(--soft); font-size: 13px; }
.flips { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
.flip { display: flex; gap: 12px; border: 1px solid var(--line); border-radius: 8px; padding: 10px; font-size: 13px; }
.flip img { width: 112px; height: 112px; object-fit: contain; border-radius: 6px; background: #f5f7fa; }
.flip p { margin: 0 0 4px; } .flip .who { color: var(--soft); font-size: 12px; }
.kept { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 12px; margin-top: 10px; }
.kept svg { display: block; border-radius: 6px; } .kept figcaption { font-size: 12px; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f5f7fa; border-radius: 6px; padding: 10px 12px; overflow-x: auto; margin: 6px 0; }
details summary { cursor: pointer; color: var(--soft); }
"""


def write_report(path: Path, results: Mapping[str, Any], recorder: RunRecorder) -> Path:
    """Write the page (atomically) and return its path."""
    write_text(path, build_report(results, recorder))
    return path


def build_report(results: Mapping[str, Any], recorder: RunRecorder) -> str:
    """The whole page as text."""
    plots = [_plot(*plot) for plot in all_plots(results)]
    parts = [_head(results), *plots[:1]]
    parts += [f"<section><h2>{escape(short(task))}</h2>{table}</section>" for task, table in _tables(results)]
    parts += [_pooled(results), *plots[1:], _curves(results), _kept(results, recorder), _flips(results, recorder)]
    parts += [_parsers(results), _settings(results)]
    return page(f"vlm-attn: {results['model']}", "".join(parts))


def page(title: str, body: str) -> str:
    """A page that needs nothing else; ``title`` is plain text, ``body`` is HTML."""
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
            f"content='width=device-width'><title>{escape(title)}</title><style>{_STYLE}</style></head>"
            f"<body><main>{body}</main></body></html>\n")  # fmt: skip


def _plot(title: str, caption: str, svg: str) -> str:
    return (
        f"<section><h2>{escape(title)}</h2><figure><div class='scroll'>{svg}</div>"
        f"<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def _many(n: int, what: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{n} {what}{'s' * (n != 1)}"


def _head(results: Mapping[str, Any]) -> str:
    env = results["env"]
    versions = env.get("versions", {})
    where = ", ".join(str(env[key]) for key in ("device", "dtype", "attention") if key in env)
    with_ = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "lmms-eval") if name in versions
    )
    failed = "".join(f"<p class='bad'>{escape(label)} was not finished: {escape(message)}</p>"
                     for label, message in results["failed"].items())  # fmt: skip
    pictures = [score["images"] for tasks in results["scores"].values() for score in tasks.values()]
    if pictures and min(pictures) < tables.FEW_PICTURES:
        failed += f"<p class='warn'>{escape(tables.few_pictures(min(pictures)))}</p>"
    n = len(results["results"])
    return (
        f"<header><h1>Evaluation of {escape(results['model'])}</h1>"
        f"<p>{_many(n, 'column')} on {_many(len(results['config']['benchmarks']), 'benchmark')}, every sample through "
        f"lmms-eval. {escape(where)}; {escape(with_)}; {_many(env.get('threads', 0), 'thread')}.</p>{failed}</header>"
    )


def _tables(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(task, html table)`` for every benchmark with scores."""
    hues, holm = colours(results), tables.adjusted(results)
    for benchmark in results["config"]["benchmarks"]:
        task = benchmark["name"]
        rows = {label: tasks[task] for label, tasks in results["scores"].items() if task in tasks}
        if not rows:
            continue
        first = next(iter(rows.values()))
        names = tables.METRICS[first["kind"]]
        compared = tables.COMPARED[first["kind"]]
        heads = ["method", *(tables.title(name) for name in names), f"Δ {tables.title(compared)} [95 %]"]
        heads += ["McNemar p"] if first["kind"] not in ("chair", "amber_g") else ["p"]
        heads.append("p (Holm)")
        heads += ["tokens kept", "compute", "1st token", "per token", "total ms", "p90"]
        lines = []
        for label, score in rows.items():
            pair = results["paired"].get(label, {}).get(task)
            cells = [_dotted(label, hues)]
            cells += [_spread(score, name) for name in names]
            cells += [*_compared(pair, compared), _small(holm[label, task]) if pair else ""]
            kept, times = results["kept_tokens"][label].get(task, {}), results["latency"][label].get(task, {})
            cells.append(f"{kept['kept_tokens']:.0f} of {kept['visual_tokens']:.0f}" if kept else "–")
            cells.append(tables.work(results, label, task))
            cells += [tables.milliseconds(times, name) for name in ("first_token_s", "decode_s_per_token", "total_s")]
            cells.append(f"{1000 * times['total_s']['p90']:.0f}" if "total_s" in times else "–")
            lines.append(_line(results, label, cells))
        reading = f", answers read by the <code>{escape(first['parser'])}</code> parser" if "parser" in first else ""
        on = f"{_many(first['n'], 'sample')} on {_many(first['images'], 'picture')}{reading}"
        note = (
            f"<p class='note'>{on}. Percent, ± half of the 95 % interval; compute is the tokens that an average "
            "decoder layer processed per sample, every pass counted, over the baseline's; times are medians in ms "
            f"over the samples after {_many(results['config']['warmup'], 'warm-up')}. With "
            f"{_many(len(holm), 'comparison')} in this run some differences look real by chance: p (Holm) is adjusted "
            "for their number, colours are not.</p>"
        )
        yield task, _table(heads, lines) + note


def _pooled(results: Mapping[str, Any]) -> str:
    """POPE over all splits of a source together, each method beside the baseline."""
    sources = list(dict.fromkeys(source for pools in results.get("pooled", {}).values() for source in pools))
    hues, out = colours(results), []
    for source in sources:
        rows = {label: pools[source] for label, pools in results["pooled"].items() if source in pools}
        first = next(iter(rows.values()))
        names = tables.METRICS[first["kind"]]
        heads = ["method", *map(tables.title, names), f"Δ {tables.title('accuracy')} [95 %]", "McNemar p"]
        lines = [
            _line(results, label, [_dotted(label, hues), *(_spread(score, name) for name in names),
                                   *_compared(score.get("paired"), "accuracy")])
            for label, score in rows.items()
        ]  # fmt: skip
        note = f"<p class='note'>{', '.join(map(short, first['splits']))} together; the bootstrap draws pictures.</p>"
        out.append(f"<section><h2>{escape(short(source))}, pooled</h2>{_table(heads, lines)}{note}</section>")
    return "".join(out)


def _dotted(label: str, hues: Mapping[str, str]) -> str:
    return f"<span class='dot' style='background:{hues[label]}'></span>{escape(label)}"


def _spread(score: Mapping[str, Any], name: str) -> str:
    half = tables.half_width(name, score["intervals"][name])
    return f"{tables.shown(name, score['metrics'][name])} <small>±{half}</small>"


def _line(results: Mapping[str, Any], label: str, cells: Sequence[str]) -> str:
    kind = "base" if label == results["baseline"] else "control" if is_control(results, label) else ""
    return f"<tr class='{kind}'>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(heads: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _compared(pair: Mapping[str, Any] | None, metric: str) -> list[str]:
    if pair is None:
        return ["", ""]
    return [_signed(pair, metric), _small(tables.p_value(pair))]


def _small(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.3f}"


def _curves(results: Mapping[str, Any]) -> str:
    """The numbers behind the curves, each column against the random control and against itself without debiasing."""
    columns = results.get("curves", {})
    if not columns:
        return ""
    metrics = list(columns[results["baseline"]]["scores"])
    heads = ["column", "kept, %", "control"]
    for metric in metrics:
        heads += [CURVE_NAMES[metric], "Δ to control [95 %]", "Δ of debiasing [95 %]"]
    lines = []
    for label, row in columns.items():
        cells = [escape(label), "–" if row["share"] is None else f"{100 * row['share']:.1f}"]
        cells.append(escape(row["control"] or ""))
        for metric in metrics:
            score = row["scores"][metric]
            cells.append(f"{100 * score['value']:.1f} <small>±{tables.half_width(metric, score)}</small>")
            cells += [
                _signed({"difference": row[key]}, metric) if row[key] else "" for key in ("to_control", "to_plain")
            ]
        lines.append(_line(results, label, cells))
    return (
        "<section><h2>Kept visual tokens: against the control, with and without debiasing</h2>"
        "<p class='note'>Points of percent, paired on the same questions, 95 % interval from resampling pictures; "
        "coloured where it leaves out 0, not corrected for the number of comparisons. Control: the column of "
        f"random_prune whose kept share is nearest, none if it is more than {100 * NEAR:.0f} points away.</p>"
        f"{_table(heads, lines)}</section>"
    )


def _signed(pair: Mapping[str, Any], metric: str) -> str:
    """The difference in one metric with its interval, coloured where it is no matter of chance."""
    difference = pair["difference"][metric]
    sign = "+" if difference["value"] >= 0 else "−"
    low, high = (tables.shown(metric, difference[end]) for end in ("low", "high"))
    text = f"{sign}{tables.shown(metric, abs(difference['value']))} <small>[{low}, {high}]</small>"
    colour = {"better": "good", "worse": "bad"}.get(tables.verdict(pair, metric))
    return f"<span class='{colour}'>{text}</span>" if colour else text


def _flips(results: Mapping[str, Any], recorder: RunRecorder) -> str:
    """Samples that were right under the baseline and are wrong under a method, with their pictures."""
    blocks = []
    baseline = results["method"][results["baseline"]]["hash"]
    for label in single(results, results["paired"]):
        cards = []
        for benchmark in results["config"]["benchmarks"]:
            rater = rater_for(benchmark["name"], results["config"]["parser"], benchmark.get("data"))
            if rater is None:
                continue
            before = recorder.samples(baseline, benchmark["name"])
            after = recorder.samples(results["method"][label]["hash"], benchmark["name"])
            cards += [_card(benchmark, rater, *pair) for pair in flips(rater, before, after, most=2)]
        if cards:
            blocks.append(f"<h3>{escape(label)}</h3><div class='flips'>{''.join(cards[:6])}</div>")
    body = "".join(blocks) or "<p class='note'>None: no method turned a right answer into a wrong one.</p>"
    return (
        f"<section><h2>Worst flips</h2><p class='note'>Right under the baseline and wrong under the method, or the "
        f"captions that gained most hallucinated objects; at most two per benchmark.</p>{body}</section>"
    )


def _card(benchmark: Mapping[str, Any], rater: Rater, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    doc, task = before["doc"], benchmark["name"]
    truth = ", ".join(doc["truth"]) if "truth" in doc else str(doc.get("label", doc.get("answer", "")))
    return (
        f"<div class='flip'>{_picture(benchmark, doc)}<div><p class='who'>{escape(short(task))}, sample "
        f"{before['doc_id']}</p><p>{escape(before['prompt'][:300])}</p><p>truth: <b>{escape(truth)}</b></p>"
        f"<p>baseline: {_answer(before, rater)}</p><p>method: {_answer(after, rater)}</p></div></div>"
    )


def _answer(row: Mapping[str, Any], rater: Rater) -> str:
    """The answer, hallucinated objects marked."""
    text = escape(row["text"].strip()[:400]) or "<i>(empty)</i>"
    bad = rater.mistakes(row)
    return f"{text} <span class='bad'>({escape(', '.join(bad))} not there)</span>" if bad else text


def _picture(benchmark: Mapping[str, Any], doc: Mapping[str, Any]) -> str:
    """The sample's picture inline, where it can be drawn or lies in a local folder."""
    shown = _shown(benchmark, doc)
    return "" if shown is None else f"<img alt='the picture' src='{_data(*shown)}'>"


def _shown(benchmark: Mapping[str, Any], doc: Mapping[str, Any]) -> tuple[Image.Image, str] | None:
    """The sample's picture and the format to send it in."""
    if benchmark["name"].startswith("scenes_"):
        from vlm_attn.evaluation.scenes_docs import picture

        return picture(doc), "png"
    if not benchmark.get("images"):
        return None
    path = Pictures(Path(benchmark["images"])).find(doc["image"], doc.get("category"))
    if path is None:
        return None
    shown = load_image(path)
    shown.thumbnail((336, 336))
    return shown, "jpeg"


def _data(shown: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    shown.save(buffer, format=kind.upper(), optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _kept(results: Mapping[str, Any], recorder: RunRecorder) -> str:
    """The first sample whose kept tokens were noted and whose picture is at hand, once per column that pruned it."""
    for benchmark in results["config"]["benchmarks"]:
        rows = {
            label: row
            for label, method in results["method"].items()
            for row in recorder.samples(method["hash"], benchmark["name"])[:1]
            if row["doc_id"] == 0 and "kept_mask" in row
        }
        first = next(iter(rows.values()), None)
        shown = None if first is None else _shown(benchmark, first["doc"])
        if first is None or shown is None:
            continue
        image, kind = shown
        drawn = "".join(
            f"<figure>{drawing(row['kept_mask'], 'seen', image.size)}<figcaption>{escape(label)}<br>"
            f"{_count(row)}</figcaption></figure>"
            for label, row in rows.items()
        )
        source = (f"<svg width='0' height='0' style='position:absolute'><image id='seen' width='{image.width}' "
                  f"height='{image.height}' href='{_data(image, kind)}'/></svg>")  # fmt: skip
        question = escape(first["prompt"][:300])
        return (
            f"<section><h2>Kept visual tokens</h2><p class='note'>First sample of {escape(short(benchmark['name']))}: "
            f"“{question}” Dark: dropped by the last decoder layer. A cell that others were merged into counts as "
            f"kept.</p>{source}<div class='kept'>{drawn}</div></section>"
        )
    return ""


def _count(row: Mapping[str, Any]) -> str:
    return f"{row['kept_tokens']['last']} of {row['visual_tokens']}" if "kept_tokens" in row else ""


def _parsers(results: Mapping[str, Any]) -> str:
    """All POPE parsers beside each other: same answers, different readings."""
    blocks = []
    for benchmark in results["config"]["benchmarks"]:
        task = benchmark["name"]
        scored = {label: tasks[task] for label, tasks in results["scores"].items() if "parsers" in tasks.get(task, {})}
        if not scored:
            continue
        names = list(next(iter(scored.values()))["parsers"])
        lines = []
        for label, score in scored.items():
            cells = []
            for name in names:
                one = score["parsers"][name]
                unknown = f", {100 * one['unknown_rate']:.1f} % unknown" if one["unknown"] else ""
                cells.append(f"{100 * one['accuracy']:.1f} / {100 * one['f1']:.1f} <small>yes "
                             f"{100 * one['yes_ratio']:.0f} %{unknown}</small>")  # fmt: skip
            lines.append(f"<tr><td>{escape(label)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        table = _table(["method", *names], lines)
        blocks.append(f"<details><summary>{escape(short(task))}</summary>{table}</details>")
    if not blocks:
        return ""
    return (f"<section><h2>The same answers, read by every parser</h2><p class='note'>Accuracy / F1 in percent, "
            f"and the share of predicted yes.</p>{''.join(blocks)}</section>")  # fmt: skip


def _command(results: Mapping[str, Any]) -> str:
    """What to type to get these figures again, in an environment with the same versions."""
    versions = results["env"].get("versions", {})
    pins = [f'"{name}=={version}"' for name, version in versions.items() if name not in ("python", "vlm-attn")
            and version != "not installed"]  # fmt: skip
    own = versions.get("vlm-attn", "")
    return (
        f'pip install "vlm-attn[eval]{"==" + own if own else ""}" {" ".join(pins)}\n'
        f"vlm-attn eval config.yaml --output {shlex.quote(results['config']['output'] + '_again')}"
    )


def _settings(results: Mapping[str, Any]) -> str:
    rows = []
    for label, method in results["method"].items():
        values = json.dumps(method.get("resolved") or method["config"], sort_keys=True)
        cells = f"<td>{escape(label)}</td><td class='left'><code>{escape(values)}</code></td>"
        rows.append(f"<tr>{cells}<td><code>{method['hash']}</code></td></tr>")
    data = {"config": results["config"], "env": results["env"], "lmms_eval": results["lmms_eval_version"]}
    table = f"<tr><th>column</th><th class='left'>method with all its values</th><th>hash</th></tr>{''.join(rows)}"
    details = escape(json.dumps(data, indent=2, sort_keys=True))
    return (
        "<section><h2>How it was made</h2><p class='note'>Repeat it with the file <code>config.yaml</code> beside "
        f"this page:</p><pre>{escape(_command(results))}</pre><div class='scroll'><table>{table}</table></div>"
        f"<details><summary>Settings and versions</summary><pre>{details}</pre></details></section>"
    )
