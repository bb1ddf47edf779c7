"""Which runs go together: what must hold before anything is averaged.

load_runs() reads the runs and gives the scores of evaluations to the runs they evaluated;
group_runs() makes groups of one configuration, data set and seed each. Both raise UsageProblem for
runs that must not be mixed and RunDataProblem for numbers that contradict each other.
"""

from __future__ import annotations

import math
import re

import claims
import logs
import pandas
from runs import HEADLINE_ORDER, RunDataProblem, UsageProblem, read_path

IDENTITY = {"seed", "run_id", "run_dir"}  # settings that tell runs of one configuration apart
ABSENT = "(absent)"  # a setting that a run does not have

# Scripts of the field count the bytes of a token a little differently in their evaluations (first
# tokens, cut tails); another text, or a part of it, shows by more than this share.
BYTES_SLACK = 1e-3
# Bytes of the challenge's validation split (50,000 documents), whatever the tokenizer.
CANONICAL_BYTES = 151_080_000
# Logs in one folder should be seeds of one configuration. Repetitions of one seed differ by up to
# 0.0015 bits per byte in the field, seeds by less than 0.005; ablations lie further apart.
SAME_SEED_BPB = 0.003
FOLDER_BPB = 0.02


def load_runs(paths):
    """The Runs at the paths; finished EVAL_ONLY runs gave their scores to the training runs.

    Only evaluations stay as they are. UsageProblem for an evaluation among training runs that
    scored the artifact of none of them, or scored it differently.
    """
    runs = [run for path in paths for run in read_path(path)]
    for run in runs:
        if run.finished:
            check_scores(run)
    if all(run.eval_only for run in runs):
        return runs
    # An evaluation belongs to the run whose artifact it names by its checksum
    owners = {run.artifact_sha256: run for run in runs if run.finished and not run.eval_only}
    for run in runs:
        if run.finished and run.eval_only:
            if run.artifact_sha256 not in owners:
                raise UsageProblem(
                    f"{run.path}: scored an artifact of no finished run; expected its training run "
                    "as well. Pass both, or only evaluations."
                )
            merge_evaluation(owners[run.artifact_sha256], run)
    return [run for run in runs if not (run.finished and run.eval_only)]


def merge_evaluation(owner, run):
    """Give `owner` the scores and the audit of `run`, an evaluation of its artifact."""
    for stage in [stage for stage in owner.scores if stage in run.scores]:
        theirs, ours = run.scores[stage], owner.scores[stage]
        if abs(theirs.val_bpb - ours.val_bpb) > 1e-6:
            raise UsageProblem(
                f"{run.path}: {theirs.label} val_bpb is {theirs.val_bpb:.8f}, in {owner.path} "
                f"{ours.val_bpb:.8f} for the same artifact; expected one score. Leave one out."
            )
    if run.scores.keys() - owner.scores.keys():
        # An evaluation may choose the settings of kind "eval" anew.
        for name in run.kinds.get("eval", ()):
            owner.settings[name] = run.settings[name]
    # Both have been compared, so it does not matter whose score stays
    owner.scores = {**run.scores, **owner.scores}
    # One failed audit of an artifact is a failed audit
    audits = {owner.audit_passed, run.audit_passed} - {None}
    owner.audit_passed = all(audits) if audits else None


def check_scores(run):
    """RunDataProblem unless a finished run has finite scores that imply the same bytes.

    tokens * val_loss / (ln 2 * val_bpb) is the number of bytes behind a score, whatever the model
    is: every evaluation has to imply the same number, and the data's own.
    """
    if not run.scores:
        raise RunDataProblem(f"{run.path}: finished without a score; score the run again")
    for stage, score in run.scores.items():
        # A line may print val_bpb alone
        loss = 1.0 if score.val_loss is None else score.val_loss
        if not (0 < loss < math.inf and 0 < score.val_bpb < math.inf):
            raise RunDataProblem(
                f"{run.path}: {stage} ({score.label}) has val_loss {score.val_loss}, val_bpb "
                f"{score.val_bpb}; expected positive numbers. Repeat the run."
            )
    # The last validation may stand for the float weights; it is judged with its likes below
    measured = [
        score
        for score in run.scores.values()
        if score.val_loss is not None and score not in run.validations
    ]
    if not measured:
        return
    slack = 0.0
    if run.bytes and run.tokens:
        source, expected = "the data fingerprint", run.bytes / run.tokens
    else:  # then every evaluation against the one printed with the most decimals
        best = min(measured, key=lambda score: score.rounding)
        source, expected, slack = best.label, best.bytes_per_token, best.rounding
    if not run.whole_config:
        slack += BYTES_SLACK
        measured += training_validations(run, expected)
    for score in measured:
        if abs(score.bytes_per_token / expected - 1) > slack + score.rounding:
            raise RunDataProblem(other_bytes(run, score, source, expected))


def training_validations(run, expected):
    """The validations of the training loop that have to be of the same text as the final scores.

    Some scripts validate on a part of the text while they train. Then nothing but the size of the
    canonical text tells whether the final evaluation is of all of it.
    """
    # tokens * bytes per token is the size of the text, and that is known for the canonical one
    whole = run.tokens and abs(run.tokens * expected / CANONICAL_BYTES - 1) < BYTES_SLACK
    usable = [each for each in run.validations if each.val_loss > 0 and each.val_bpb > 0]
    return [] if whole else usable


def other_bytes(run, score, source, expected):
    """The message for a score that is of another text than the rest."""
    # In bytes of the whole text where its tokens are known: those can be looked up
    tokens, unit = (run.tokens, "bytes") if run.tokens else (1, "bytes per token")
    return (
        f"{run.path}: {score.label} implies {tokens * score.bytes_per_token:,.4f} {unit}, {source} "
        f"{tokens * expected:,.4f}; expected the same (tokens * val_loss / (ln 2 * val_bpb)). One "
        "of them is "
        "wrong or scored a part of the text: score the run again."
    )


def compared_settings(runs):
    """One {name: value} per run, of the settings that make a configuration.

    Runs of one configuration may differ in what tells them apart and in where and how they were
    carried out (kind "run" in config.json). Logs do not tell the kinds: among logs alone
    everything else counts.
    """
    # What one run folder tells is true for the logs beside it as well
    operational = IDENTITY.union(*(run.kinds.get("run", ()) for run in runs))
    return [
        {name: value for name, value in run.settings.items() if name not in operational}
        for run in runs
    ]


def settings_table(runs):
    """A frame of the settings that differ: a row per run, a column per setting."""
    settings = compared_settings(runs)
    # In the order of the configuration, so that related settings stand together
    names = list(dict.fromkeys(name for each in settings for name in each))
    # Settings that a run of train_gpt.py must have: there absence is a difference
    complete = {name for run, each in zip(runs, settings) if run.whole_config for name in each}
    rows = [{name: each.get(name, ABSENT) for name in names} for each in settings]
    frame = pandas.DataFrame(rows, columns=names, dtype=object)

    def differs(name):
        # A script of the field logs few settings: what is absent there is unknown, not different.
        known = [
            value
            for run, value in zip(runs, frame[name])
            if value != ABSENT or (run.whole_config and name in complete)
        ]
        return len(set(known)) > 1

    return frame[[name for name in names if differs(name)]]


def check_one_configuration(runs):
    """UsageProblem if the runs differ in more than their seed and operational settings."""
    table = settings_table(runs)
    if table.empty or not len(table.columns):
        return
    # The preset first, though it is no difference of its own: it explains the others
    shown = {"preset": [run.preset for run in runs], **table.iloc[:, :8].to_dict("list")}
    lines = []
    for name, values in shown.items():
        each = ", ".join(f"{value} ({run.name})" for value, run in zip(values, runs))
        lines.append(f"  {name}: {each}")
    if len(table.columns) > 8:
        lines.append(f"  ... and {len(table.columns) - 8} more")
    raise UsageProblem(
        "the runs have different configurations; expected the same in all but the seed:\n"
        + "\n".join(lines)
        + "\nPass the runs of one configuration, or use --ablation."
    )


def check_same_data(runs):
    """UsageProblem if the runs were scored on different validation data."""
    attributes = {"val_sha256": "sha256", "tokens": "targets", "bytes": "bytes", "scope": "scope"}
    for name, what in attributes.items():
        values = {}
        for run in runs:
            if getattr(run, name) is not None:
                values[getattr(run, name)] = run.name
        if len(values) > 1:
            shown = ", ".join(f"{value} ({run})" for value, run in values.items())
            raise UsageProblem(
                f"the runs differ in the {what} of the validation data: {shown}; expected one "
                "data set"
            )


def unfinish_cut_logs(runs):
    """A log does not say what was to be scored: one that lacks what others have was cut."""
    # A run of train_gpt.py says itself when it is finished
    scored = {stage for run in runs if run.finished for stage in run.packed_scores}
    for run in runs:
        missing = [stage for stage in HEADLINE_ORDER if stage in scored - set(run.scores)]
        if run.finished and not run.whole_config and missing:
            run.status = "unfinished"
            run.note = f"no {', '.join(missing)} score, which the other logs have"


def group_runs(runs, ablation):
    """The finished runs as lists of one configuration each, in the order given.

    Errors: UsageProblem for mixed configurations (unless `ablation`), mixed data or two runs of
    one seed; RunDataProblem if no run is finished.
    """
    if not ablation:
        check_one_configuration([run for run in runs if run.settings and not run.eval_only] or runs)
        unfinish_cut_logs(runs)
    finished = [run for run in runs if run.finished]
    if not finished:
        listing = "\n".join(f"  {run.path}: {run.status}, {run.note}" for run in runs)
        raise RunDataProblem(
            f"none of {len(runs)} run(s) is finished, so there is nothing to report:\n{listing}\n"
            "Run the same commands again to resume them."
        )
    check_same_data(finished)
    groups = {}
    # Runs with the same differing settings are one configuration
    for run, values in zip(finished, settings_table(finished).itertuples(index=False, name=None)):
        groups.setdefault(values, []).append(run)
    if not groups:  # no setting differs
        groups[()] = finished
    for group in groups.values():
        check_seeds(group)
    return list(groups.values())


def check_seeds(group):
    """UsageProblem for two runs of one seed, unless they are repetitions in one folder of logs."""
    # Copies in a folder were left out when it was read: what is the same here is a repetition
    seen = {}
    for run in group:
        if run.seed is None:
            continue
        other = seen.setdefault(run.seed, run)
        if other is run:
            continue
        if run.folder is None or run.folder != other.folder or run.whole_config:
            hint = ", or add the training runs that know the seeds" if run.eval_only else ""
            raise UsageProblem(
                f"two runs of seed {run.seed}: {other.path} and {run.path}; expected one, or the "
                "mean would "
                f"count it twice. Leave one out{hint}."
            )
        run.remarks.append(
            f"a repetition of {other.name}, seed {run.seed}: a seed counts once, by its mean"
        )
        check_close([other, run], SAME_SEED_BPB, f"two logs of seed {run.seed}")
    # Logs of train_gpt.py tell their configuration, so nothing has to be guessed from their scores
    foreign = [run for run in group if run.folder and not run.whole_config]
    check_names([run for run in foreign if run.seed is None])
    names = {logs.without_seed(run.path.stem) for run in foreign}
    stated = all(logs.SEED_NAME.search(run.path.stem) for run in foreign)
    # Names that differ in nothing but the seed say so themselves, however far apart the seeds are
    if stated and len(names) == 1:
        return
    check_close(foreign, FOLDER_BPB, "the logs of a folder")
    remark_on_names([run for run in foreign if run.path.stem != "train"])


def check_names(runs):
    """UsageProblem for logs of unknown seeds whose names tell more than a number apart."""
    names = sorted({logs.without_counter(run.path.stem) for run in runs})
    if len(names) > 1:
        raise UsageProblem(
            f"the seeds of {len(runs)} logs are unknown and their names differ: "
            f"{', '.join(names)}; expected seeds of one configuration, or their mean says nothing. "
            "Pass those that belong together, one by one."
        )


def remark_on_names(runs):
    """Remark on the first of logs whose names differ in words: they may be ablations."""
    words = {re.sub(r"\d+", "", claims.family(run)[1]): run.name for run in runs}
    if len(words) > 1:
        runs[0].remarks.append(
            f"the names of the logs differ in more than the seed ({', '.join(words.values())}): "
            "are they of one configuration?"
        )


def check_close(runs, limit, what):
    """UsageProblem if the runs' strongest scores are too far apart for one configuration."""
    # The strongest score: packed_scores is in the order of the headline
    best = [next(iter(run.packed_scores.values()), None) for run in runs]
    bpbs = [score.val_bpb for score in best if score]
    if bpbs and max(bpbs) - min(bpbs) > limit:
        names = ", ".join(f"{run.name} {score.val_bpb}" for run, score in zip(runs, best) if score)
        raise UsageProblem(
            f"{what} differ by {max(bpbs) - min(bpbs):.4f} bits per byte, more than {limit}: "
            f"{names}; expected "
            "runs of one configuration. Pass those that belong together, one by one."
        )
