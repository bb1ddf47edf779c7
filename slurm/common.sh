# shellcheck shell=bash
# The job scripts of this folder source this file; it does nothing by itself.
#
# The one place for a site's settings. Each is an environment variable, read at submission and in the job:
#   GOLF_PARTITION, GOLF_ACCOUNT, GOLF_QOS   handed to sbatch when set; sbatch's own options override them
#   GOLF_RUNS          folder of the runs, one folder per task in it    [runs/<job name>_<job id>]
#   GOLF_LOGS          folder of the jobs' own output                   [runs/slurm]
#   GOLF_SCRIPT        the script to run                                [train_gpt.py]
#   GOLF_SETUP         a file to source before anything else            [none]
#   GOLF_MODULES       modules to load, separated by spaces             [none]
#   GOLF_CONDA_ENV     conda environment to activate                    [none]
#   GOLF_VENV          virtual environment to activate                  [none]
#   GOLF_PYTHON        interpreter                                      [python3]
#   GOLF_CONTAINER     image to run in                                  [none]
#   GOLF_CONTAINER_RUN how an image is run; must pass signals on        [apptainer exec --nv]
#   GOLF_PROCS         processes per node                               [GPUs of the job on the node, else 1]
#   GOLF_MAX_REQUEUES  how often a job may requeue itself               [20]
# Relative paths count from the repository's root. All other variables reach train_gpt.py as they are.

set -euo pipefail

cancelled='' warned=''  # SIGTERM, SIGUSR1 has come
labels=()    # name of each task's run folder
settings=()  # the variables each task sets: NAME=VALUE words
script=${0##*/}

say() { printf 'slurm: %s\n' "$*" >&2; }

die() {  # die STATUS MESSAGE…
  local status=$1
  shift
  say "error: $*"
  exit "$status"
}

# SLURM runs its own copy of a job script, under this name.
in_job() { [ "$script" = slurm_script ]; }

add_task() {  # add_task LABEL [NAME=VALUE…]
  labels+=("$1")
  shift
  settings+=("$*")
}

show_help() {  # the comment at the top of the script, without its #SBATCH lines
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0"
}

list_tasks() {
  local i
  for i in "${!labels[@]}"; do
    printf '%3d  %-28s %s\n' "$i" "${labels[$i]}" "${settings[$i]}"
  done
}

# Prints the job's id alone on standard output, so that another submission can depend on it.
submit() {  # submit [OPTION OF SBATCH…]
  local options=(--parsable --export=ALL --chdir="$root") logs=${GOLF_LOGS:-runs/slurm}
  command -v sbatch >/dev/null || die 2 "sbatch is not on PATH: submit from a SLURM login node"
  [[ $logs = /* ]] || logs=$root/$logs
  mkdir -p "$logs"
  if [ -n "${settings[0]}" ]; then  # the tasks of an array differ in what they set
    options+=(--array="0-$((${#labels[@]} - 1))" --output="$logs/%x_%A_%a.out")
  else
    options+=(--output="$logs/%x_%j.out")
  fi
  options+=(${GOLF_PARTITION:+--partition="$GOLF_PARTITION"} ${GOLF_ACCOUNT:+--account="$GOLF_ACCOUNT"})
  options+=(${GOLF_QOS:+--qos="$GOLF_QOS"})
  list_tasks >&2
  sbatch "${options[@]}" "$@" "$0"
}

# Outside a job: print the help or the list, or submit, and exit. Inside a job: return.
submit_unless_in_job() {  # submit_unless_in_job "$@"
  local seen=()
  mapfile -t seen < <(printf '%s\n' "${labels[@]}" | sort | uniq -d)
  [ ${#seen[@]} = 0 ] || die 2 "two tasks would share the run folder ${seen[0]}"
  [ -z "${RUN_DIR:-}${RUN_ID:-}" ] || die 2 "RUN_DIR and RUN_ID name one run, and each task has its own:" \
    "unset them and name the folder of all runs with GOLF_RUNS"
  if in_job; then
    trap 'warned=1' USR1
    return
  fi
  case ${1:-} in
    --list) list_tasks ;;
    *) submit "$@" ;;
  esac
  exit
}

activate() {  # the software environment; a site's files rarely bear strict mode
  local modules=()
  read -ra modules <<<"${GOLF_MODULES:-}"
  set +eu
  # shellcheck source=/dev/null
  [ -z "${GOLF_SETUP:-}" ] || . "$GOLF_SETUP" || die 2 "GOLF_SETUP=$GOLF_SETUP failed"
  [ ${#modules[@]} = 0 ] || module load "${modules[@]}" || die 2 "GOLF_MODULES=$GOLF_MODULES did not load"
  if [ -n "${GOLF_CONDA_ENV:-}" ]; then
    eval "$(conda shell.bash hook)"
    conda activate "$GOLF_CONDA_ENV" || die 2 "GOLF_CONDA_ENV=$GOLF_CONDA_ENV was not activated"
  fi
  # shellcheck source=/dev/null
  [ -z "${GOLF_VENV:-}" ] || . "$GOLF_VENV/bin/activate" || die 2 "GOLF_VENV=$GOLF_VENV was not activated"
  set -eu
}

# Sets `python`, the words that start the interpreter, `procs`, the processes per node, and `gpt`, the script.
prepare() {
  local wrap=()
  activate
  procs=${GOLF_PROCS:-${SLURM_GPUS_ON_NODE:-1}}
  gpt=${GOLF_SCRIPT:-train_gpt.py}
  [ -f "$gpt" ] || die 2 "GOLF_SCRIPT: there is no $gpt in $PWD"
  if [ -n "${GOLF_CONTAINER:-}" ]; then
    read -ra wrap <<<"${GOLF_CONTAINER_RUN:-apptainer exec --nv}"
    wrap+=("$GOLF_CONTAINER")
  fi
  python=("${wrap[@]}" "${GOLF_PYTHON:-python3}")
  command -v "${python[0]}" >/dev/null || die 2 "${python[0]} is not on PATH: set GOLF_PYTHON or GOLF_VENV"
  # torchrun gives each of several processes one thread unless it is told otherwise.
  if [ "$procs" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    export OMP_NUM_THREADS=$((${SLURM_CPUS_ON_NODE:-1} > procs ? SLURM_CPUS_ON_NODE / procs : 1))
  fi
}

# Sets `torchrun`: PyTorch's launcher, told to hand SIGUSR1 to its workers and to give them time to save. Else
# it would die of the signal and leave the workers behind, or kill them after 30 s.
prepare_torchrun() {
  torchrun=("${python[@]}" -m torch.distributed.run --nproc-per-node="$procs"
    --signals-to-handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout=110)
}

# Sets up task number SLURM_ARRAY_TASK_ID: exports its settings and RUN_DIR.
begin_task() {
  local task=${SLURM_ARRAY_TASK_ID:-} count=${#labels[@]} assignments=()
  [ -n "$task" ] || [ "$count" = 1 ] || die 2 "there are $count tasks and this job is no array:" \
    "submit with 'bash slurm/$SLURM_JOB_NAME.sbatch', or give sbatch --array=0-$((count - 1))"
  task=${task:-0}
  [ "$task" -lt "$count" ] || die 2 "task $task of the array has nothing to do: there are $count tasks"
  [ "${SLURM_ARRAY_TASK_COUNT:-1}" = "$count" ] ||
    say "note: the array has ${SLURM_ARRAY_TASK_COUNT:-1} tasks of $count"
  read -ra assignments <<<"${settings[$task]}"
  RUN_DIR=${GOLF_RUNS:-runs/${SLURM_JOB_NAME}_${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}/${labels[$task]}
  export RUN_DIR ${assignments[@]+"${assignments[@]}"}
  say "task $task ${labels[$task]}: ${settings[$task]} RUN_DIR=$RUN_DIR restart=${SLURM_RESTART_COUNT:-0}"
}

# Prints inode and time of the run's STOPPED file, nothing without one. train_gpt.py writes the file when it stops
# with a checkpoint and removes it when it goes on.
stopped_mark() { stat -c '%i %y' "$RUN_DIR/STOPPED" 2>/dev/null || true; }

requeue_or_exit() {  # the run has stopped with everything saved
  local restarts=${SLURM_RESTART_COUNT:-0} most=${GOLF_MAX_REQUEUES:-20}
  local again="to go on, submit again with GOLF_RUNS=${RUN_DIR%/*}"
  [ -z "$cancelled" ] || die 75 "cancelled; the run is saved. $again"
  [ "$restarts" -lt "$most" ] || die 75 "saved, after $restarts requeues (GOLF_MAX_REQUEUES). $again"
  say "stopped with everything saved: requeue $((restarts + 1)) of at most $most"
  trap '' TERM USR1  # SLURM ends this script as part of the requeue
  scontrol requeue "$SLURM_JOB_ID" || die 75 "the job could not be requeued. $again"
}

pass_warning() {  # pass_warning PID: only once, a second signal means "at once" to train_gpt.py and torchrun
  [ -z "$warned" ] || return 0
  warned=1
  say "SIGUSR1: asking the run to stop"
  [ -z "$1" ] || kill -USR1 "$1" || true
}

# Runs a command that stops by itself on SIGUSR1, which SLURM sends to this shell alone (--signal=B:USR1@…)
# shortly before the time limit, and requeues the job when the run was saved. Dies with the command's status.
run_resumable() {  # run_resumable COMMAND…
  local child='' status before mark interrupted=''
  before=$(stopped_mark)
  export -n SEEDS  # train_gpt.py warns of a variable that resembles SEED
  trap 'interrupted=1; pass_warning "$child"' USR1
  # SLURM sends SIGTERM to every process of a job, the run included: nothing to pass on.
  trap 'interrupted=1; cancelled=1' TERM
  "$@" &
  child=$!
  [ -z "$warned" ] || kill -USR1 "$child"
  while :; do
    interrupted=''
    wait "$child" && status=0 || status=$?
    [ -n "$interrupted" ] || break  # else it was the signal that ended the wait
  done
  mark=$(stopped_mark)
  if [ "$status" = 0 ]; then
    say "done"
  elif [ "$status" = 75 ] || { [ -n "$mark" ] && [ "$mark" != "$before" ]; }; then
    requeue_or_exit  # torchrun ends with 1 whatever its workers say: there the file tells
  elif [ -n "$warned" ] && [ "$status" = 138 ]; then
    say "SIGUSR1 came before the run could catch it: it goes on from its last checkpoint"
    requeue_or_exit
  else
    die "$status" "the run ended with status $status"
  fi
}

# Runs train_gpt.py for the task that has begun: one process, or torchrun when there are several GPUs.
run_task() {
  prepare
  if [ "$procs" -gt 1 ]; then
    prepare_torchrun
    run_resumable "${torchrun[@]}" --standalone "$gpt"
  else
    run_resumable "${python[@]}" "$gpt"
  fi
}

case ${1:-} in
  -h | --help)
    show_help
    exit
    ;;
esac
