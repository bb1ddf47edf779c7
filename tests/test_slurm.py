"""The job scripts, most of them on a real SLURM with pretend nodes (tests/slurm_node.sh)."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, environment, read_json

SLURM = ROOT / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
NODE = Path(__file__).with_name("slurm_node.sh")

# Stands in for train_gpt.py where only the launcher is tested: it counts to ITERATIONS, remembers
# how far it came, and does as the real one with signals, the STOPPED file and exit codes.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

if "SEEDS" in os.environ:
    sys.exit("SEEDS is a variable of the job scripts")
wishes = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: wishes.append(signal.Signals(number).name))
rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
folder = Path(os.environ["RUN_DIR"])
folder.mkdir(parents=True, exist_ok=True)
known = folder / f"steps.{rank}"
steps = int(known.read_text()) if known.exists() else 0
print(f"rank {rank} of {world} starts at {steps}", flush=True)
(folder / "STOPPED").unlink(missing_ok=True)
while steps < int(os.environ["ITERATIONS"]):
    time.sleep(0.1)
    steps += 1
    known.write_text(str(steps))
    if wishes:
        time.sleep(0.5)
        if rank == "0":
            (folder / "STOPPED").write_text(wishes[0])
        sys.exit(75)
print(f"rank {rank} of {world} finished with SEED {os.environ.get('SEED')}", flush=True)
sys.exit(int(os.environ.get("EXIT_WITH", "0")))
"""


def finished(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def bash(script, *arguments, **variables):
    return finished("bash", str(script), *arguments, env=environment(**variables))


# --- Without SLURM -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [*SCRIPTS, SLURM / "common.sh", NODE], ids=lambda path: path.name
)
def test_the_script_is_sound_bash(script):
    parsed = finished("bash", "-n", str(script))
    assert (parsed.returncode, parsed.stderr) == (0, "")
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = finished("shellcheck", "-x", "-P", str(ROOT), str(script))
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_explains_itself_asks_to_be_warned_and_requeued_and_names_no_site(script):
    shown = bash(script, "--help")
    assert shown.returncode == 0
    assert f"bash slurm/{script.name} [--list | --help" in shown.stdout
    assert "#SBATCH" not in shown.stdout and "#!" not in shown.stdout
    text = script.read_text() + (SLURM / "common.sh").read_text()
    options = re.findall(r"^#SBATCH (.*)", text, re.M)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)
    assert not re.findall(
        r"--(?:partition|account|qos)[= ]\w|/(?:home|scratch|gpfs|lustre)\b", text
    )


def test_seeds_are_listed_as_one_task_each():
    listed = bash(SLURM / "train_seeds.sbatch", "--list", PRESET="base_7k").stdout.split("\n")
    assert [line.split() for line in listed[:-1]] == [
        ["0", "base_7k_seed42", "SEED=42"],
        ["1", "base_7k_seed1337", "SEED=1337"],
        ["2", "base_7k_seed2025", "SEED=2025"],
    ]


def test_the_ablation_lists_the_matrix_and_both_sweeps_each_configuration_once():
    lines = bash(SLURM / "ablation.sbatch", "--list").stdout.splitlines()
    tasks = [dict(word.split("=") for word in line.split()[2:]) for line in lines]
    found = [
        (t["NFM_ENABLED"], t["TTT_ENABLED"], t["NFM_LOSS_WEIGHT"], t["NFM_HIDDEN_DIM"])
        for t in tasks
    ]
    matrix = [(nfm, ttt, "0.10", "256") for nfm in "01" for ttt in "01"]
    weights = [("1", "0", weight, "256") for weight in ("0.01", "0.05", "0.20")]
    widths = [("1", "0", "0.10", width) for width in ("128", "512")]
    assert found == matrix + weights + widths
    assert [line.split()[0] for line in lines] == [str(i) for i in range(9)]
    assert f"--array=0-{len(lines) - 1}\n" in (SLURM / "ablation.sbatch").read_text()


def test_artifacts_may_be_runs_or_files():
    artifacts = "runs/a runs/b/final_model.int6.ptz c.ptz"
    listed = bash(SLURM / "evaluate.sbatch", "--list", ARTIFACTS=artifacts).stdout.splitlines()
    assert [line.split()[1:3] for line in listed] == [
        ["eval_a", "EVAL_ONLY=runs/a/final_model.int6.ptz"],
        ["eval_b", "EVAL_ONLY=runs/b/final_model.int6.ptz"],
        ["eval_c.ptz", "EVAL_ONLY=c.ptz"],
    ]


@pytest.mark.parametrize(
    "script, variables, message",
    [
        ("train_seeds", {"SEEDS": "1 x"}, "SEEDS holds 'x'"),
        ("train_seeds", {"SEEDS": " "}, "SEEDS is empty"),
        ("train_seeds", {"SEEDS": "1 2 1"}, "two tasks would share the run folder nfm_7k_seed1"),
        ("train_seeds", {"RUN_DIR": "runs/a"}, "RUN_DIR and RUN_ID name one run"),
        ("evaluate", {}, "ARTIFACTS is empty"),
        ("evaluate", {"ARTIFACTS": "a/x b/x"}, "two tasks would share the run folder eval_x"),
    ],
)
def test_what_cannot_be_submitted_is_refused_with_one_message(script, variables, message):
    refused = bash(SLURM / f"{script}.sbatch", "--list", **variables)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"slurm: error: {message}") and refused.stderr.count("\n") == 1


# --- On a real SLURM -----------------------------------------------------------------------------


def why_slurm_cannot_run():
    missing = [
        name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)
    ]
    if missing:
        packages = "slurmctld slurmd slurm-client munge"
        return f"SLURM is not installed ({', '.join(missing)} missing): apt-get install {packages}"
    return "a SLURM of one's own needs root" if os.geteuid() else ""


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}


class Job:
    """A submitted job; `runs` is the folder of its runs."""

    def __init__(self, cluster, number, runs):
        self.cluster, self.number, self.runs = cluster, number, runs

    def tasks(self):
        """{task: {field: value}} as SLURM knows them; task 0 alone for a job that is no array."""
        shown = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number).stdout
        fields = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown.splitlines()]
        tasks = [{"ArrayTaskId": "0", **task} for task in fields]
        return {int(task["ArrayTaskId"]): task for task in tasks if task["ArrayTaskId"].isdigit()}

    def wait(self, tasks=1, limit=400):
        """Its tasks when all have ended. A requeued job is pending meanwhile."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            found = self.tasks()
            if len(found) == tasks and all(task["JobState"] in ENDED for task in found.values()):
                return found
            time.sleep(0.5)
        pytest.fail(
            f"job {self.number} has not ended after {limit} s: {self.tasks()}\n{self.output()}"
        )

    def wait_for_output(self, text, limit=200):
        deadline = time.monotonic() + limit
        while text not in self.output():
            assert time.monotonic() < deadline, f"no {text!r} in {self.output()}"
            time.sleep(0.2)

    def output(self):
        logs = sorted(self.runs.glob("log/*.out"))
        return "\n".join(log.read_text() for log in logs)

    def warn(self):
        """Send SIGUSR1 to the job's shell, as SLURM does when the time limit is near."""
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.number)

    def scores(self, name):
        return read_json(self.runs / name / "scores.json")


class Cluster:
    """A real SLURM of four pretend nodes with one GPU each."""

    def __init__(self, folder, real_settings):
        self.folder, self.real_settings = folder, real_settings
        started = finished("bash", str(NODE), "start", str(folder / "slurm"), "4")
        self.conf = re.search(r"export SLURM_CONF=(.*)", started.stdout)
        assert started.returncode == 0 and self.conf, started.stderr
        self.conf = self.conf.group(1)
        self.stand_in = folder / "stand_in.py"
        self.stand_in.write_text(STAND_IN)

    def call(self, *command, **variables):
        return finished(*command, env=environment(SLURM_CONF=self.conf, **variables))

    def submit(self, script, name, *options, **variables):
        """Submit a job script as a user does; it runs the stand-in unless told otherwise."""
        runs = self.folder / name
        settings = {
            "GOLF_PYTHON": sys.executable,
            "GOLF_RUNS": str(runs),
            "GOLF_LOGS": str(runs / "log"),
            "GOLF_SCRIPT": str(self.stand_in),
            "iterations": "3",
        }
        done = self.call(
            "bash",
            str(SLURM / f"{script}.sbatch"),
            "--cpus-per-task=1",
            "--time=10",
            *options,
            **{**settings, **variables},
        )
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), runs)

    def submit_real(self, script, name, *options, **variables):
        """The same with train_gpt.py itself, at its tiniest."""
        real = {**self.real_settings, "GOLF_SCRIPT": "train_gpt.py", **variables}
        return self.submit(script, name, *options, **real)

    def stop(self):
        self.call("scancel", "--user=root")
        time.sleep(1)
        finished("bash", str(NODE), "stop", str(self.folder / "slurm"))


# SLURM looks at time limits every 30 s. The job that is to be hit by its limit gets a short one as
# soon as it trains, and its backward passes wait a little until it is hit. Each start begins with a
# long limit, so that the second one finishes.
LONG_LIMIT = 'scontrol update JobId="$SLURM_JOB_ID" TimeLimit=20\n'
HIT_BY_THE_LIMIT = f"""
import os, subprocess, sys, time
started = time.monotonic() - 10
sys.path.insert(0, {str(ROOT)!r})
import torch
import train_gpt

backward, calls = torch.Tensor.backward, []
def slowly(*arguments, **options):
    if not calls:
        minutes = int((time.monotonic() - started) / 60) + 2
        job = "JobId=" + os.environ["SLURM_JOB_ID"]
        subprocess.run(["scontrol", "update", job, f"TimeLimit={{minutes}}"])
    calls.append(0)
    time.sleep(0.2)
    return backward(*arguments, **options)

if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    torch.Tensor.backward = slowly
train_gpt.main()
"""


def submit_real_jobs(cluster):
    """The runs of train_gpt.py itself. They compute while the tests below wait for jobs that
    mostly sleep."""
    two = cluster.submit_real("train_seeds", "two_seeds", SEEDS="1 2")
    runs = " ".join(str(two.runs / f"nfm_7k_seed{seed}") for seed in (1, 2))
    setup, limited = cluster.folder / "setup.sh", cluster.folder / "limited.py"
    setup.write_text(LONG_LIMIT)
    limited.write_text(HIT_BY_THE_LIMIT)
    return {
        "two_seeds": two,
        "evaluation": cluster.submit_real(
            "evaluate",
            "evaluation",
            f"--dependency=afterok:{two.number}",
            ARTIFACTS=runs,
            ttt_epochs="2",
        ),
        "time_limit": cluster.submit_real(
            "train_seeds", "time_limit", SEEDS="2", GOLF_SETUP=str(setup), GOLF_SCRIPT=str(limited)
        ),
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_data):
    reason = why_slurm_cannot_run()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(
        tmp_path_factory.mktemp("cluster"), {**tiny_data.settings, "iterations": "300"}
    )
    try:
        cluster.jobs = submit_real_jobs(cluster)
        yield cluster
    finally:
        cluster.stop()


def only_task(job, state, restarts, code="0:0"):
    """Wait for a job of one task and check how SLURM says that it ended."""
    (task,) = job.wait().values()
    found = task["JobState"], task["Restarts"], task["ExitCode"]
    assert found == (state, str(restarts), code), job.output()


def test_a_warned_run_saves_itself_and_the_requeued_job_goes_on(cluster):
    job = cluster.submit("train_seeds", "warned", SEEDS="7", iterations="30")
    job.wait_for_output("starts at 0")
    job.warn()
    only_task(job, "COMPLETED", 1)
    assert "stopped with everything saved: requeue 1 of at most 20" in job.output()
    first, second = map(int, re.findall(r"starts at (\d+)", job.output()))
    assert first == 0 < second < 30
    assert "finished with SEED 7" in job.output()


def test_a_job_requeues_itself_only_so_often(cluster):
    settings = dict(SEEDS="7", iterations="300", GOLF_MAX_REQUEUES="0")
    job = cluster.submit("train_seeds", "bounded", **settings)
    job.wait_for_output("starts at 0")
    job.warn()
    only_task(job, "FAILED", 0, "75:0")
    assert f"submit again with GOLF_RUNS={job.runs}" in job.output()


def test_a_cancelled_run_saves_itself_and_is_not_requeued(cluster):
    job = cluster.submit("train_seeds", "cancelled", SEEDS="7", iterations="300")
    job.wait_for_output("starts at 0")
    cluster.call("scancel", job.number)
    (task,) = job.wait().values()
    assert (task["JobState"], task["Restarts"]) == ("CANCELLED", "0"), job.output()
    assert (job.runs / "nfm_7k_seed7" / "STOPPED").exists()


def test_a_failed_run_fails_its_job_with_the_same_exit_code(cluster):
    job = cluster.submit("train_seeds", "failed", SEEDS="7", EXIT_WITH="3")
    only_task(job, "FAILED", 0, "3:0")


@pytest.mark.parametrize(
    "script, options, variables",
    [
        ("train_seeds", [], dict(SEEDS="5", GOLF_PROCS="2")),
        pytest.param(
            "train_multinode", ["--nodes=2", "--gres=gpu:1"], dict(SEED="5"), marks=pytest.mark.slow
        ),
    ],
)
def test_processes_meet_through_torchrun_and_a_warning_reaches_each(
    cluster, script, options, variables
):
    job = cluster.submit(script, f"processes_{script}", *options, iterations="50", **variables)
    for rank in (0, 1):
        job.wait_for_output(f"rank {rank} of 2 starts at 0")
    job.warn()
    only_task(job, "COMPLETED", 1)
    assert len(re.findall(r"rank \d of 2 starts at [1-9]", job.output())) == 2
    assert len(re.findall(r"rank \d of 2 finished with SEED 5", job.output())) == 2


def test_an_array_of_two_seeds_runs_to_the_end_and_an_evaluation_waits_for_it(cluster):
    training, evaluation = cluster.jobs["two_seeds"], cluster.jobs["evaluation"]
    tasks = training.wait(tasks=2).values()
    assert {task["JobState"] for task in tasks} == {"COMPLETED"}, training.output()
    results = [training.scores(f"nfm_7k_seed{seed}") for seed in (1, 2)]
    assert [(result["finished"], result["seed"]) for result in results] == [(True, 1), (True, 2)]
    assert results[0]["scores"]["legal_ttt"] != results[1]["scores"]["legal_ttt"]
    last_end = max(task["EndTime"] for task in tasks)
    tasks = evaluation.wait(tasks=2).values()
    assert {task["JobState"] for task in tasks} == {"COMPLETED"}, evaluation.output()
    assert min(task["StartTime"] for task in tasks) >= last_end
    for seed in (1, 2):
        trained = training.scores(f"nfm_7k_seed{seed}")["scores"]
        scored = evaluation.scores(f"eval_nfm_7k_seed{seed}")["scores"]
        sliding, ttt = "final_int6_sliding_window", "legal_ttt"
        assert scored[sliding]["val_bpb"] == trained[sliding]["val_bpb"]
        assert scored[ttt]["val_bpb"] != trained[ttt]["val_bpb"], "it was given more epochs"


def test_a_job_hit_by_its_time_limit_finishes_with_the_uninterrupted_result(cluster):
    limited, two_seeds = cluster.jobs["time_limit"], cluster.jobs["two_seeds"]
    (task,) = limited.wait().values()
    two_seeds.wait(tasks=2)
    output = limited.output()
    assert task["JobState"] == "COMPLETED" and int(task["Restarts"]) >= 1, output
    assert re.search(r"^resumed_from:\S+ step:[1-9]", output, re.M), output
    interrupted = limited.scores("nfm_7k_seed2")["scores"]
    for label, score in two_seeds.scores("nfm_7k_seed2")["scores"].items():
        for name in ("val_loss", "val_bpb"):
            assert interrupted[label][name] == score[name], (label, name)


@pytest.mark.slow
def test_a_real_run_over_two_nodes_survives_a_warning(cluster):
    options = ("--nodes=2", "--gres=gpu:1")
    settings = {"iterations": "400", "SEED": "4"}
    job = cluster.submit_real("train_multinode", "real_nodes", *options, **settings)
    whole = cluster.submit_real("train_multinode", "whole_nodes", *options, **settings)
    job.wait_for_output("step:5/400")
    job.warn()
    only_task(job, "COMPLETED", 1)
    whole.wait()
    assert read_json(job.runs / "nfm_7k_seed4" / "manifest.json")["world_size"] == 2
    interrupted = job.scores("nfm_7k_seed4")["scores"]
    for label, score in whole.scores("nfm_7k_seed4")["scores"].items():
        assert interrupted[label]["val_loss"] == pytest.approx(score["val_loss"], rel=1e-6)
