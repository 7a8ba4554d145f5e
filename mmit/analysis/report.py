"""Reports of a study: report.json, report.md, report.html with one plot, and plot.svg.

In: the findings of a study. Out: files that say the same. Every mean has its number of seeds, images and
questions; every verdict its numbers; baselines stand in every table, "not known" where they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmit.analysis.findings import findings
from mmit.io import write_atomic
from mmit.pages import page
from mmit.text import plain

if TYPE_CHECKING:
    from mmit.analysis.study import Study


def write_report(study: Study) -> str:
    """Write all files and return the Markdown."""
    found = findings(study)
    text = markdown(found)
    write_atomic(study.out / "report.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_atomic(study.out / "report.md", plain(text))
    drawn = plot(found)
    write_atomic(study.out / "report.html", html(found, drawn))
    if drawn:
        write_atomic(study.out / "plot.svg", drawn)
    return text


def sections(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the report as (heading, text or table or list), whatever it is written in."""
    parts: list[tuple[str, Any]] = [("", found["question"])]
    arms = [arm["keys"] for arm in found["arms"].values()]
    varies = sorted({key for arm in arms for key in arm if any(other.get(key) != arm[key] for other in arms)})
    told = f"The arms differ in {', '.join(f'`{key}`' for key in varies) or 'nothing'}."
    margin = found["margin"]
    parts.append(
        ("", f"{told} Seeds: {', '.join(map(str, found['seeds']))}. Differences below {margin:g} count as none.")
    )
    for name, asked in found["questions"].items():
        if not asked["arms"]:
            parts.append((f"Questions: {name}", "No arm has answered them yet."))
            continue
        heading = f"Questions: {name} ({asked['n']:,} about {asked['images']:,} images)"
        parts.append((heading, _arms(asked)))
        if asked["spaces_from_answers"]:
            tasks = ", ".join(asked["spaces_from_answers"])
            parts.append(("", f"Guessing for {tasks} is among the answers that the task has in the study's records."))
        if asked["by_task"]:
            parts.append((f"{name}, by task", _by_task(asked)))
        if asked["sensitivity"]:
            parts.append((f"{name}, by wording", _wordings(asked["sensitivity"])))
        if asked["trend"]:
            parts.append((f"{name}, trend", _trend(asked["trend"])))
        if asked["mixture"]:
            parts.append((f"{name}, mixture", _mixture(asked["mixture"])))
        if asked["style"]:
            parts.append((f"{name}, style", _style(asked["style"])))
    parts.append(("Contrasts", _contrasts(found["contrasts"]) if found["contrasts"] else "None can be made yet."))
    if found["failed"]:
        lines = [f"{f['arm']}, seed {f['seed']}: {f['error']} (`{f['command']}`)" for f in found["failed"]]
        parts.append(("Failed", lines))
    if found["waiting"]:
        parts.append(("Not run yet", found["waiting"]))
    if costs := _costs(found["arms"]):
        parts.append(("What the runs took", costs))
    parts.append(("What this cannot tell", found["cannot_tell"]))
    parts.append(("Commands", [f"`{command}`" for command in found["commands"]]))
    return parts


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(ci: Sequence[float] | None) -> str:
    return "none" if ci is None else f"{ci[0]:.3f} to {ci[1]:.3f}"


def _arms(asked: Mapping[str, Any]) -> list[list[str]]:
    rows = [["arm", "score", "95 % interval", "seeds", "lowest and highest seed"]]
    for arm, one in asked["arms"].items():
        span = f"{min(one['by_seed']):.3f} to {max(one['by_seed']):.3f}"
        rows.append([arm, _number(one["mean"]), _interval(one["ci95"]), str(one["seeds"]), span])
    for name, value in asked["baselines"].items():
        rows.append([name, "not known" if value is None else _number(value), "", "", ""])
    return rows


def _by_task(asked: Mapping[str, Any]) -> list[list[str]]:
    columns = [*asked["arms"], "random in label space"]
    rows = [["task", *columns]]
    return rows + [[task, *(_number(values[c]) for c in columns)] for task, values in asked["by_task"].items()]


def _wordings(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["arm", "sensitivity (deviation / mean)", "lowest wording", "highest wording"]]
    for arm, one in found.items():
        ends = [f"{name} {value:.3f}" for name, value in (one["lowest"], one["highest"])]
        rows.append([arm, _number(one["sensitivity"]), *ends])
    return rows


def _trend(found: Mapping[str, Any]) -> str:
    slope = found["slope_per_doubling"]
    told = f"Each doubling of `{found['key']}` changes the score by {slope['slope']:+.3f}"
    told += f" (95 % interval over seeds {_interval(slope['ci95'])})." if slope["ci95"] else " (one seed, no interval)."
    if "curve" in found:
        curve = found["curve"]
        if curve is None:
            told += " No saturating curve fits: give four sizes or more."
        else:
            told += f" Saturating curve: {curve['a']:.3f} - {curve['b']:.3f} n^-{curve['c']:.2f}; {curve['verdict']}"
            told += f" ({_interval(curve['ci95'])})."
    return told


def _mixture(found: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{source}: {share:g}" for source, share in found["proposed"].items())
    worth = ", ".join(f"{source} {b:+.3f}" for source, b in found["coefficients"].items())
    told = f"Proposed: `proposed: {{data.shares: {{{shares}}}}}`, fitted score {found['predicted']:.3f}, one run of it "
    told += (
        f"{_interval(found['ci95'])}. The best mix that was run is {found['best_run']} with {found['best_seen']:.3f}."
    )
    lines = [
        f"Fitted gain for e times the records of a source: {worth}.",
        told,
        "The proposal is a guess until it has been run: add it as an arm and run the study again.",
    ]
    if (left := found["left_out"]) is not None:
        told = f"Each mix predicted from the others: rank correlation {left['rank_correlation']:.2f}"
        lines.append(f"{told}; {left['held']} of {left['runs']} runs within their interval.")
    return lines


def _style(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["arm", "median words", "with lists", "in the frame", "learned style", "commonest opening", "empty"]]
    for arm, one in found.items():
        opening = f"{one['opening']} ({one['opening_share']:.2f})" if "opening" in one else "-"
        shares = [_number(one.get(key), 2) for key in ("lists", "in_frame", "learned")]
        rows.append([arm, str(one.get("median_words", "-")), *shares, opening, str(one["empty"])])
    return rows


def _contrasts(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["questions", "contrast", "difference", "95 % interval", "p (Holm)", "verdict", "smallest detectable"]]
    for one in found:
        d = one["difference"]
        p = "-" if one["holm"] is None else ("< .001" if one["holm"] < 0.001 else f"{one['holm']:.3f}")
        told = [one["questions"], f"{one['a']} - {one['b']}", f"{d['mean']:+.3f}", _interval(d["ci95"]), p]
        rows.append([*told, one["verdict"], _number(d["detectable"])])
    return rows


def _costs(arms: Mapping[str, Any]) -> list[list[str]]:
    keys = ("steps", "epochs", "records", "tokens", "seconds")
    known = [key for key in keys if any(key in arm["cost"] for arm in arms.values())]
    if not known:
        return []
    rows = [["arm", *known]]
    for name, arm in arms.items():
        rows.append([name, *(f"{arm['cost'][key]:,.4g}" if key in arm["cost"] else "-" for key in known)])
    return rows


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [f"# Study: {found['study']}", ""]
    for heading, content in sections(found):
        if heading:
            lines += [f"## {heading}", ""]
        if isinstance(content, str):
            lines += [content, ""]
        elif content and isinstance(content[0], list):
            head, *rows = content
            lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
        else:
            lines += [f"- {line}" for line in content] + [""]
    return "\n".join(lines)


def html(found: Mapping[str, Any], drawn: str) -> str:
    """Return the report as one HTML page with its plot `drawn` inside, "" for none."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    body = environment.from_string(_BODY).render(parts=sections(found), plot=drawn)
    return page(f"Study: {found['study']}", body, kind="evaluation")


_BODY = """\
{% for heading, content in parts %}
{% if heading %}<h2>{{ heading }}</h2>{% endif %}
{% if content is string %}<p>{{ content }}</p>
{% elif content and content[0] is not string %}
<table><tr>{% for cell in content[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in content[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% else %}<ul>{% for line in content %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
{% if loop.index == 2 and plot %}<figure>{{ plot | safe }}</figure>{% endif %}
{% endfor %}
"""


def plot(found: Mapping[str, Any]) -> str:
    """Return an SVG: a panel for each set of questions, every seed a dot, means with intervals, baselines as lines."""
    asked = {name: one for name, one in found["questions"].items() if one["arms"]}
    if not asked:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "mmit", "svg.fonttype": "path"}):
        width = 1.5 + 0.8 * len(found["arms"])
        figure = Figure(figsize=(max(width * len(asked), 5.0), 3.6), layout="constrained")
        named: dict[str, Any] = {}  # the same baselines in every panel: one legend, which hides no dot
        for axis, (name, one) in zip(figure.subplots(1, len(asked), squeeze=False)[0], asked.items(), strict=True):
            for place, arm in enumerate(one["arms"].values()):
                axis.plot([place] * len(arm["by_seed"]), arm["by_seed"], "o", color="tab:blue", alpha=0.5)
                low, high = arm["ci95"] or (arm["mean"], arm["mean"])
                axis.plot([place + 0.2] * 2, [low, high], color="black")
                axis.plot([place + 0.2], [arm["mean"]], "_", color="black", markersize=12)
            for number, (label, value) in enumerate(one["baselines"].items()):
                if value is not None:
                    style = ("--", ":", "-.")[number % 3]
                    named[label] = axis.axhline(value, linestyle=style, color=f"C{number + 1}")
            axis.set_xticks(range(len(one["arms"])), list(one["arms"]), rotation=30, ha="right")
            axis.set_title(name)
            axis.set_xlim(-0.5, len(one["arms"]) - 0.5)
            axis.set_ylim(-0.02, 1.02)
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=2, fontsize=7, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]
