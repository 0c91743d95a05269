"""What ``mergekit-dare inspect`` shows of a report: as text, and as JSON."""

from __future__ import annotations

import math
from typing import Any

from mergekit_dare.diagnostics.deltas.inspection import ModelReport, Report
from mergekit_dare.diagnostics.deltas.verdict import LARGE, SMALL, Verdict
from mergekit_dare.kernel.sampling import Sampling

QUANTILES = (0.5, 0.9, 0.99, 0.999)


def as_json(report: Report) -> dict[str, Any]:
    """Return everything that was found, as values for JSON."""
    verdicts = report.verdicts()
    models = {}
    for name, model in report.models.items():
        total = model.total
        models[name] = {
            "deltas": total.count,
            "smallest": total.smallest,
            "largest": total.largest,
            "mean_magnitude": total.mean_magnitude,
            "quantiles": {str(q): total.quantile(q) for q in QUANTILES},
            "relative_norm": total.relative_norm,
            "zero_share": total.zero_share,
            "changed_share": model.changed_share,
            f"share_above_{SMALL}": total.share_above(SMALL),
            f"share_above_{LARGE}": total.share_above(LARGE),
            "non_finite": total.non_finite,
            "densities": sorted(model.densities),
            "relative_noise": model.relative_noise(),
            "relative_noise_by_magnitude": model.relative_noise(Sampling.MAGNITUDE),
            "standing_out": {
                tensor: dict(zip(("largest", "relative_norm"), model.tensors[tensor], strict=True))
                for tensor in model.standing_out()
            },
            "verdict": verdicts[name].kind,
            "sentence": verdicts[name].sentence,
            "suggested_density": verdicts[name].density,
            "reason": verdicts[name].reason,
        }
    pairs = [
        {
            "models": list(pair),
            "cosine": p.cosine,
            "both_change": p.both_share,
            "sign_conflicts": p.conflict_share,
        }
        for pair, p in report.pairs.items()
    ]
    change = report.change
    merged_change = None
    if change is not None:
        merged_change = {
            "dtype": change.dtype,
            "sampling": change.sampling.value,
            "rounding": change.rounding.value,
            "survives_rounding_to_nearest": change.survives,
            "relative_noise_of_stochastic_rounding": change.stochastic_noise,
        }
    found = {
        "share_of_bytes_read": report.share_read,
        "halves_of_the_sample_differ_by": {n: m.error() for n, m in report.models.items()},
        "models": models,
        "pairs": pairs,
        "merged_change": merged_change,
        "advice": report.advice(),
        "left_out": report.left_out,
    }
    return {key: _finite(value) for key, value in found.items()}


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(report: Report) -> str:
    """Return the report for people."""
    verdicts = report.verdicts()
    lines = [_of_excerpts(report), ""] if report.is_partial else []
    for name, model in report.models.items():
        lines += [name, *_model_lines(model, verdicts[name]), ""]
    for (first, second), pair in report.pairs.items():
        if pair.both:
            lines.append(
                f"{first} and {second}: cosine {pair.cosine:.3f}; both change "
                f"{pair.both_share:.1%} of the elements, {pair.conflict_share:.1%} of those with "
                "opposite signs"
            )
    change = report.change
    if change is not None and change.survives is not None:
        lines += [
            "",
            (
                f"Merged and rounded to {change.dtype}: {change.survives:.0%} of the expected "
                "change; stochastic rounding would add noise of "
                f"{change.stochastic_noise:.2g} times its norm"
            ),
        ]
    if advice := report.advice():
        lines += ["", *(f"Advice: {sentence}" for sentence in advice)]
    if report.left_out:
        lines += ["", "Not compared:"]
        lines += [
            f"  {name}: {why}" for name, reasons in report.left_out.items() for why in reasons
        ]
    return "\n".join(lines).rstrip()


def _of_excerpts(report: Report) -> str:
    error = max((model.error() for model in report.models.values()), default=0.0)
    return (
        f"From a sample of {report.share_read:.2%} of the bytes, evenly spread and the same in "
        f"every run.\nIts two halves differ by at most {max(error, 0.001):.1%} in the 99% quantile "
        "and the relative norm; ranges are those of the sample. To read everything: --full"
    )


def _model_lines(model: ModelReport, verdict: Verdict) -> list[str]:
    total = model.total
    lines = [
        f"  verdict        {verdict.sentence}",
        f"  try density    {verdict.density:g}: {verdict.reason}",
    ]
    if not total.count:
        return lines
    quantiles = ", ".join(f"{q:.1%} {total.quantile(q):.2g}" for q in QUANTILES)
    densities = sorted(model.densities)
    shown = " to ".join(f"{d:g}" for d in dict.fromkeys((densities[0], densities[-1])))
    lines += [
        f"  range          {total.smallest:.3g} to {total.largest:.3g}",
        f"  |delta|        mean {total.mean_magnitude:.2g}; quantiles: {quantiles}",
        (
            f"  shares         exactly 0: {total.zero_share:.2%}; above {SMALL}: "
            f"{total.share_above(SMALL):.2%}; above {LARGE}: {total.share_above(LARGE):.2%}"
        ),
        f"  relative norm  {total.relative_norm:.3g} of the base model's norm",
        (
            f"  DARE's noise   {model.relative_noise():.3g} of the base model's norm, "
            f"{model.relative_noise(Sampling.MAGNITUDE):.3g} with sampling by magnitude, "
            f"at density {shown}"
        ),
        "  standing out   "
        + "\n                 ".join(
            f"{tensor}: |delta| up to {model.tensors[tensor][0]:.3g}, "
            f"relative norm {model.tensors[tensor][1]:.2g}"
            for tensor in model.standing_out()
        ),
    ]
    return lines
