"""The demo's result for people: a text table, and a chart."""

from __future__ import annotations

import textwrap

WIDTH = 100


def table(report: dict) -> str:
    """Side by side: the dense cache, this cache, and their ratio; then both texts."""
    dense, ours = report["runs"]["dynamic"], report["runs"]["seqkv"]
    quality = report["quality"]
    rows = [("", dense["cache"]["kind"], ours["cache"]["kind"], "")]
    rows += [
        _row("cache", dense["cache"]["bytes"], ours["cache"]["bytes"], _megabytes, inverse=True),
        *((f"  {name}", "", _megabytes(size), "") for name, size in ours["cache"]["parts"].items() if size),
        ("bits per value", f"{dense['cache']['bits_per_value']:.0f}", _bits(ours["cache"]["bits_per_value"]), ""),
        _row("process before prefill", dense["before_prefill_bytes"], ours["before_prefill_bytes"], _megabytes),
        _row("  added when done", _added(dense, "after"), _added(ours, "after"), _megabytes),
        _row("  added at its peak", _added(dense, "peak"), _added(ours, "peak"), _megabytes),
        _row("prefill", dense["prefill_seconds"], ours["prefill_seconds"], "{:.2f} s".format),
        _row("decode step, median", dense["median_step_seconds"], ours["median_step_seconds"], _milliseconds),
        _row("decode tokens / s", dense["decode_tokens_per_second"], ours["decode_tokens_per_second"], "{:.2f}".format),
        ("perplexity", f"{quality['dense_perplexity']:.3f}", f"{quality['perplexity']:.3f}", _ratio(quality)),
        ("KL from dense", "", f"{quality['kl']:.5f}", "nats a token"),
        ("same most likely token", "", f"{quality['top1']:.2%}", ""),
        ("same generated tokens", "", f"{report['same_tokens']} of {len(dense['tokens'])}", "before the first other"),
    ]
    lines = [_title(report), ""]
    lines += [f"{name:<24}{a:>16}{b:>16}   {note}".rstrip() for name, a, b, note in rows]
    for run in (dense, ours):
        lines += ["", f"{run['cache']['kind']} wrote:", textwrap.indent(textwrap.fill(run["text"], WIDTH), "  ")]
    return "\n".join(lines)


def _title(report: dict) -> str:
    run, machine = report["runs"]["seqkv"], report["machine"]
    return (
        f"{run['model']}, {run['run']['dtype']}; {run['run']['context']} + {run['run']['new_tokens']} tokens; "
        f"perplexity over {report['quality']['tokens']} tokens\n"
        f"{machine['cpu']}, {machine['cores']} cores; threads: {run['threads']}"
    )


def _row(name: str, dense: float, ours: float, form, inverse: bool = False) -> tuple[str, str, str, str]:
    if inverse:
        note = f"{dense / ours:.2f}x smaller"
    else:
        note = f"x {ours / dense:.3f}" if dense > 0 else ""  # a tiny run may add no memory
    return name, form(dense), form(ours), note


def _added(run: dict, when: str) -> int:
    """Resident bytes beyond those before the prefill."""
    return run[f"{when}_bytes"] - run["before_prefill_bytes"]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _bits(bits: float | None) -> str:
    return "no page yet" if bits is None else f"{bits:.3f}"


def _ratio(quality: dict) -> str:
    return f"x {quality['ratio']:.4f} ± {quality['ratio_error']:.4f}"


def plot(report: dict, path: str) -> None:
    """Chart of the cache's bytes by part, and of the time of each step; the file's suffix is its format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for run in report["runs"].values():
        base, kind = 0.0, run["cache"]["kind"]
        for name, size in run["cache"]["parts"].items():
            if size:
                memory.bar(kind, size / 1e6, bottom=base, label=name.replace("_", " "))
                base += size / 1e6
        memory.text(kind, base, f"{base:.1f} MB", ha="center", va="bottom")
        time.plot([s * 1e3 for s in run["step_seconds"]], label=f"{kind}, {_milliseconds(run['median_step_seconds'])}")
    memory.set(ylabel="cache, MB", title=f"{report['runs']['seqkv']['cache']['tokens']} tokens")
    time.set(xlabel="step", ylabel="ms", title="decode, with the median", ylim=(0, None))
    memory.legend()
    time.legend()
    figure.savefig(path, dpi=150)
