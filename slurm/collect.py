"""Turn the runs of one configuration into a results table, a plot, a significance test and a
submission.json.

    python slurm/collect.py runs/nfm_7k_seed*                             # table and three files
    python slurm/collect.py runs/nfm_7k_seed* --baseline 1.1213,0.0009,3  # Welch's test
    python slurm/collect.py runs/nfm_7k_seed* --check submission.json     # is every number theirs?
    python slurm/collect.py runs/ablation_* --ablation --out results      # matrix of settings
    python slurm/collect.py train_seed42.log train_seed1337.log           # plain logs do as well
    python slurm/collect.py records/some_folder                           # and folders of logs

A run is a directory written by train_gpt.py (config.json, manifest.json, metrics.jsonl,
scores.json) or a plain log, of train_gpt.py or of another script of the field, with or without
that script's source in it. Runs with EVAL_ONLY add their scores to the training run whose artifact
they scored, if both are given. Only finished runs are averaged; unfinished and failed ones are
listed.

The headline is the strongest evaluation that all runs share and that is legal, in a fixed order:
TTT + SLOT, TTT, SLOT, a last evaluation of another name, sliding, roundtrip. It is never chosen by
its number, except among the logs of other scripts: there the score counts that the folder's
submission.json or README.md claims, if a log prints it, and without a claim an adaptation that
makes the score worse does not. Float weights are no submission. A log cannot prove that its
evaluation is legal: that takes the code.

Units: val_loss in nats per token, val_bpb in bits per byte, eval_time_s and train_time_s in
seconds, step_avg_ms in milliseconds, standard deviations with ddof 1. train_time_s holds what
QUANTIZER=gptq took after the last step: it calibrates on training text, which counts as training.

Exit codes: 0 done; 1 --check found differences; 2 wrong use, or runs that must not be mixed; 3 bad
run data.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

from curves import draw_curves
from groups import group_runs, load_runs
from pages import ablation_text, submission_text
from runs import HEADLINE_ORDER, RunDataProblem, UsageProblem, read_json
from significance import (
    SIGNIFICANT_P,
    choose_headline,
    judged_runs,
    sample_of,
    score_label,
    significance_of,
)

BUDGET_BYTES = 16_000_000
TIME_LIMIT_S = 600.0
# --- submission.json -----------------------------------------------------------------------------

ANY_TEXT = "some text"  # what --check expects of the author's fields
AUTHOR_FIELDS = ("author", "github_id", "name", "blurb", "date", "track")


def common_value(group, name):
    """The value all runs share, several joined by '; ', None if no run states one."""
    # In the order of the runs, each value once
    values = dict.fromkeys(
        str(getattr(run, name)) for run in group if getattr(run, name) is not None
    )
    return "; ".join(values) or None


def largest(values):
    """The largest value, None unless every run states one: all seeds must keep to a limit."""
    # Unknown is not small: one run that does not say is enough for silence
    return None if None in values else max(values)


def rounded(value, digits):
    """The value at so many decimals; JSON knows no nan."""
    # nan stands for a loss that no line printed
    if value is None or math.isnan(value):
        return None
    return round(value, digits)


def within(values, limit):
    """Whether all values keep to a limit, None unless all are known."""
    return None if None in values else max(values) <= limit


def compliance(group, stage, p):
    """{claim: bool} with the claims that these runs measured, and no others."""
    # A claim is made only if every run measured it
    audits = [run.audit_passed for run in group]
    codes = [run.code_sha256 for run in group]
    # One failed audit is a failed audit, whatever is unknown of the others
    passed = None if None in audits else True
    if False in audits:
        passed = False
    # One run is always of one code: that is nothing to claim
    same_code = None
    if None not in codes and len(codes) > 1:
        same_code = len(set(codes)) == 1
    claims = {
        # Limits that every seed has to keep to
        "artifact_under_16mb": within([run.total_bytes for run in group], BUDGET_BYTES),
        "train_under_600s": within([run.training_s for run in group], TIME_LIMIT_S),
        "eval_under_600s": within([run.scores[stage].eval_time_s for run in group], TIME_LIMIT_S),
        "audit_passed": passed,
        "same_code_all_seeds": same_code,
        # All runs were scored on the same data, so the first speaks for all
        "canonical_validation": group[0].scope and group[0].scope == "canonical",
        # What a record needs: three seeds, and a test against the one before
        "three_seeds": sample_of(group, stage).n >= 3,
        "beats_baseline_p_below_0_01": None if p is None else p < SIGNIFICANT_P,
    }
    # A claim that was not measured is not made, neither yes nor no
    return {claim: value for claim, value in claims.items() if value is not None}


def seed_results(group, stage):
    """{seed: result}; a log's name stands for a seed that is unknown or not alone."""
    seeds = [run.seed for run in group]
    results = {}
    for run in group:
        score = run.scores[stage]
        # Repetitions of a seed keep apart by the names of their logs
        alone = run.seed is not None and seeds.count(run.seed) == 1
        results[str(run.seed) if alone else run.path.stem] = {
            "val_bpb": round(score.val_bpb, 8),
            "val_loss": rounded(score.val_loss, 8),
            "artifact_bytes": run.artifact_bytes,
            "steps": run.steps,
            "step_avg_ms": rounded(run.step_avg_ms, 2),
            "train_time_s": rounded(run.training_s, 1),
            "eval_time_s": rounded(score.eval_time_s, 1),
        }
    return results


def build_submission(args, group, stage, p):
    """The submission as a dict; val_bpb is the headline, val_bpb_std is over the seeds."""
    bpbs, preset = sample_of(group, stage), common_value(group, "preset") or group[0].name
    # The sizes are of the same runs as the score
    judged = judged_runs(group)
    return {
        # What no run can tell
        "author": args.author,
        "github_id": args.github_id or args.author,
        "name": args.name or preset,
        "blurb": args.blurb or f"{preset}, {stage} score, {bpbs.n} seed(s)",
        "date": args.date or str(datetime.datetime.now(datetime.timezone.utc).date()),
        "track": args.track,
        # Which score, and on what text
        "score_label": score_label(group, stage),
        "score_scope": group[0].scope,
        "val_loss": rounded(sample_of(judged, stage, "val_loss").mean, 8),
        "val_bpb": round(sample_of(judged, stage).mean, 8),
        "val_bpb_std": rounded(bpbs.sd, 8),
        # Sizes in bytes, of the seed that is largest
        "bytes_total": largest([run.total_bytes for run in judged]),
        "bytes_code": largest([run.code_bytes for run in judged]),
        # One entry per seed, though a seed may have several logs
        "seeds": list(dict.fromkeys(run.seed for run in group if run.seed is not None)),
        "seed_results": seed_results(group, stage),
        "hardware": common_value(group, "hardware"),
        "pytorch_version": common_value(group, "pytorch_version"),
        "compliance": compliance(group, stage, p),
    }


def differences(found, expected, where=""):
    """One line per place that differs.

    Claims and seeds that the runs do not know are differences, other additional fields are not.
    """
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return [] if agree(found, expected, where) else [f"{where}: {found}, expected {expected}"]
    # Both are objects: go down
    lines = []
    for name, value in expected.items():
        place = f"{where}.{name}" if where else name
        if name in found:
            lines += differences(found[name], value, place)
        # A claim need not be made; files of others name neither label nor scope, which then means
        # canonical.
        elif where != "compliance" and name != "score_label" and value != "canonical":
            lines.append(f"{place}: missing, expected {value}")
    # What the file says beyond the runs
    if where in ("compliance", "seed_results"):
        lines += [
            f"{where}.{name}: not backed by these runs" for name in found if name not in expected
        ]
    return lines


def agree(found, expected, where):
    """True if a value is what the runs say, a number at its decimals (a score at 4 or more)."""
    # The author may write what he likes, but not nothing
    if expected is ANY_TEXT:
        return isinstance(found, str) and bool(found.strip())
    if where in ("hardware", "pytorch_version") and expected is None:
        return True  # nothing to compare with: scripts of the field do not log them
    if where == "seeds" and isinstance(found, list):
        return sorted(map(str, found)) == sorted(map(str, expected))
    if not isinstance(expected, float):
        return found == expected
    if not isinstance(found, (int, Decimal)) or not Decimal(found).is_finite():
        return False
    # A file may round; one that rounds to nothing would agree with everything
    decimals = max(-Decimal(found).as_tuple().exponent, 4 if "val_" in where else 1)
    return abs(float(Decimal(found)) - expected) <= 0.5000001 * 10.0**-decimals


# --- Command line --------------------------------------------------------------------------------


def write_files(directory, contents):
    """Write {name: bytes} into a directory, by renames: no file is ever half there."""
    try:
        # The first call may be what makes the directory
        directory.mkdir(parents=True, exist_ok=True)
        # In the same directory, or a rename would copy
        with tempfile.TemporaryDirectory(prefix=".collect.", dir=directory) as scratch:
            for name, data in contents.items():
                Path(scratch, name).write_bytes(data)
            for name in contents:
                os.replace(Path(scratch, name), directory / name)
    except OSError as error:
        raise UsageProblem(
            f"--out {directory}: {error.strerror}; expected a directory to write to"
        ) from None


def number_from_0(text):
    """An argument that has to be a finite number of at least 0."""
    # argparse makes a message of the ValueError
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def iso_date(text):
    """An argument that has to be a date, YYYY-MM-DD."""
    return str(datetime.date.fromisoformat(text))


def build_parser():
    """The parser of the command line; --help shows the module's docstring."""
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="collect.py",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directory or log, one per seed, or a folder of logs",
    )
    add(
        "--out",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="where submission.json, results.md and curves.png go (default: here)",
    )
    add(
        "--ablation",
        action="store_true",
        help="allow several configurations: matrix of differing settings, no submission.json",
    )
    add(
        "--check",
        type=Path,
        metavar="FILE",
        help="compare a submission.json with the runs, number by number; writes nothing",
    )
    order = ", ".join(HEADLINE_ORDER)
    add(
        "--headline",
        metavar="SCORE",
        help=f"score to submit, by stage or label (default: first of {order})",
    )
    add_test_options(parser.add_argument_group("significance"))
    add_author_options(parser.add_argument_group("author's fields of submission.json"))
    return parser


def add_test_options(group):
    """Options of the significance test."""
    group.add_argument(
        "--baseline",
        action="append",
        metavar="FILE|MEAN,SD,N",
        help="what to beat: a submission.json, or val_bpb as mean,sd,runs; run directories and "
        "logs one by one, repeating the option",
    )
    # The challenge states its threshold in nats, its scores in bits: one of the two at a time.
    threshold = group.add_mutually_exclusive_group()
    threshold.add_argument(
        "--threshold-nats",
        type=number_from_0,
        default=0.005,
        metavar="X",
        help="improvement to prove, in nats per token (default 0.005)",
    )
    threshold.add_argument(
        "--threshold-bpb",
        type=number_from_0,
        metavar="X",
        help="the same in bits per byte (default: converted by the runs' bytes per token)",
    )


def add_author_options(group):
    """Options for what no run can tell."""
    add = group.add_argument
    add("--author", default="anonymous", help="default: anonymous")
    add("--github-id", help="default: the author")
    add("--name", help="default: the preset")
    add("--blurb", help="one sentence (default: preset, score and number of seeds)")
    add("--track", default="non-record-16mb", help="default: non-record-16mb")
    add("--date", type=iso_date, metavar="YYYY-MM-DD", help="default: today in UTC")


def collect_ablation(args, runs):
    """Write and print the matrix over configurations."""
    for name in ("check", "baseline", "headline"):
        if getattr(args, name):
            raise UsageProblem(
                f"--{name} is for one configuration; leave out either it or --ablation"
            )
    text = ablation_text(runs, group_runs(runs, ablation=True))
    write_files(
        args.out, {"results.md": text.encode(), "curves.png": draw_curves(runs, "Ablation", True)}
    )
    sys.stdout.write(text)
    return 0


def check_submission(path, submission):
    """Print where a submission.json differs from the runs; returns the exit code."""
    if not path.exists():
        raise UsageProblem(
            f"--check {path}: no such file; leave out --check to write a submission.json"
        )
    found = read_json(
        path, parse_float=Decimal, parse_constant=Decimal
    )  # Decimals keep what was written
    lines = differences(found, submission | dict.fromkeys(AUTHOR_FIELDS, ANY_TEXT))
    sys.stderr.writelines(f"{path}: {line}\n" for line in lines)
    if lines:
        return 1
    print(f"{path}: agrees with {len(submission['seeds'])} run(s), {submission['score_label']}")
    return 0


def collect_submission(args, runs):
    """Write and print the results of one configuration, or check a submission.json against them."""
    # Without --ablation there is one group, or an error that names the differences
    (group,) = group_runs(runs, ablation=False)
    stage = choose_headline(group, args.headline)
    p, significance = significance_of(args, group, stage)
    submission = build_submission(args, group, stage, p)
    # Nothing is drawn or written for a check
    if args.check:
        return check_submission(args.check, submission)
    # Not an error: a first seed is worth a page as well
    if len(group) == 1:
        sys.stderr.write(
            f"collect.py: note: one finished run ({group[0].path}): val_bpb_std is null; it "
            "takes at least 2 seeds\n"
        )
    text = submission_text(submission, runs, group, stage, significance)
    # allow_nan=False: NaN is no JSON, and no result either
    as_json = json.dumps(submission, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_files(
        args.out,
        {
            "submission.json": as_json.encode(),
            "results.md": text.encode(),
            "curves.png": draw_curves(runs, submission["name"], False),
        },
    )
    sys.stdout.write(text)
    return 0


def main(arguments=None):
    """Returns the exit code; see the module's docstring."""
    args = build_parser().parse_args(arguments)
    try:
        runs = load_runs(args.runs)
        return collect_ablation(args, runs) if args.ablation else collect_submission(args, runs)
    except (UsageProblem, RunDataProblem) as error:
        sys.stderr.write(f"collect.py: error: {error}\n")
        return error.exit_code
    # A folder in place of a file, say: what it is called tells more than a traceback
    except OSError as error:
        sys.stderr.write(
            f"collect.py: error: {error.filename}: {error.strerror}; expected a readable file\n"
        )
        return RunDataProblem.exit_code


if __name__ == "__main__":
    sys.exit(main())
