"""`bench quality` for people: a table, and a chart of divergence against rate."""

from __future__ import annotations

from .bench_report import head


def scopes(result: dict) -> dict[str, dict]:
    """Rows of every text, and of all of them where they are several."""
    return result["texts"] | ({"all": result["all"]} if len(result["texts"]) > 1 else {})


def table(result: dict) -> str:
    """A block for every text and one for all, a line a method."""
    plan = result["plan"]
    most = plan["residual_length"] + plan["page_size"] - 1
    lines = [
        *head(result),
        f"{result['model']}, {result['dtype']}; windows of {plan['window']} tokens, {plan['windows']} a text, scored "
        f"from token {plan['prefill']} on",
        f"dense beside the pages: the first {plan['n_sink']} tokens and the last {plan['residual_length']} to {most}; "
        f"pages of {plan['page_size']} tokens",
        "± standard errors, from means of blocks of neighbouring tokens; MB as a window ends, of pages and of dense "
        f"tokens; the dense cache has {_megabytes(result['dense_bytes'])}",
    ]
    width = max(map(len, result["all"])) + 2
    for scope, rows in scopes(result).items():
        some = next(iter(rows.values()))
        lines += ["", f"{scope}: {some['tokens']} tokens, dense perplexity {some['dense_perplexity']:.3f}"]
        lines.append(
            f"{'':{width}}{'bits a value':>12}{'KL, nats a token':>24}{'perplexity x':>22}{'same top-1':>19}"
            f"{'pages':>9}{'dense':>8}"
        )
        lines += [f"{name:{width}}{_cells(row)}" for name, row in rows.items()]
    return "\n".join([*lines, *([""] if result["notes"] else []), *result["notes"]])


def _cells(row: dict) -> str:
    kl = f"{row['kl']:.5f} ± {row['kl_error']:.5f}"
    ratio = f"{row['ratio']:.4f} ± {row['ratio_error']:.4f}"
    top1 = f"{row['top1']:.2%} ± {100 * row['top1_error']:.2f}"
    pages = row["memory"]["codes"] + row["memory"]["side_information"]
    dense = row["memory"]["sinks"] + row["memory"]["recent"]
    return f"{row['bits_per_value']:>12.3f}{kl:>24}{ratio:>22}{top1:>19}{_megabytes(pages):>9}{_megabytes(dense):>8}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}"


def plot(result: dict, path: str) -> None:
    """Chart of the divergence from dense, on a logarithmic axis, against bits a value; the suffix is the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for scope, rows in scopes(result).items():
        bits, kl, error = ([row[name] for row in rows.values()] for name in ("bits_per_value", "kl", "kl_error"))
        axes.errorbar(bits, kl, yerr=error, fmt="o", markersize=4, capsize=2, label=scope)
    for name, row in rows.items():
        axes.annotate(name, (row["bits_per_value"], row["kl"]), xytext=(5, 4), textcoords="offset points")
    axes.margins(x=0.15)  # room for names
    axes.set(xlabel="bits a value", ylabel="KL from dense, nats a token", yscale="log", title=result["model"])
    axes.legend()
    figure.savefig(path, dpi=150)
