#!/usr/bin/env bash
# The body of every *.sbatch here: train on this job's nodes, and requeue the job when it is stopped.
#
#   slurm/train.sh TASK [options]
#   slurm/train.sh --run-dir FOLDER -- python SCRIPT [options]
#
# TASK is gan or lstm, or a task of your own: path/to/file.py:Class or package.module:Class. SCRIPT has a loop of its
# own, and keeps its run in FOLDER: of it, this script reads FOLDER/status.json and the exit code, 75 when it was stopped.
set -euo pipefail

main() { # a function is read as a whole: the file may change while the job runs
    # Slurm sends USR1 to this shell alone, ahead of the time limit, and TERM to all processes when it ends the job.
    stopping=
    trap 'stopping=yes' USR1
    trap 'stopping=sent' TERM

    export PYTHONHASHSEED=${PYTHONHASHSEED:-0} # the order of a set of words, the same in every process and start
    local task=$1
    shift
    [ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH

    # In an array, scontrol and scancel would take the SLURM_JOB_ID of one task for the whole array.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    restart=${SLURM_RESTART_COUNT:-0}

    if [ "$task" = --run-dir ]; then
        run=$1
        [ "${2-} ${3-}" = "-- python" ] || { say "after --run-dir FOLDER give -- python SCRIPT" && exit 2; }
        shift 3
    else
        case $task in
            *:* | *.py) set -- launch/train.py "$task" "$@" ;;
            *) set -- "launch/$task.py" "$@" ;;
        esac
        # Options that are not allowed are refused here, once, and not on every node.
        local config
        config=$(python "$@" --dry-run)
        # A task's file may print something before.
        run=$(python -c 'import json, sys
said = sys.stdin.read()
print(json.loads(said[said.rfind("\n{") + 1 :])["run_dir"])' <<<"$config")
    fi

    before=$(version) first=$(status step)
    code=75
    if [ -z "$stopping" ]; then train "$@"; fi
    finish
}

say() { echo "slurm: $*"; }
status() { sed -n "s/^ *\"$1\": \"*\([a-z0-9]*\).*/\1/p" -- "$run/status.json" 2>/dev/null || true; }
version() { stat --format '%i %y' -- "$run/status.json" 2>/dev/null || true; }

# Start one launcher on each node and wait for them; `code` becomes the largest of their exit codes.
train() { # SCRIPT [OPTIONS]
    local nodes=$SLURM_JOB_NUM_NODES processes threads head port step srun
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        processes=$SLURM_GPUS_ON_NODE
    else
        processes=${SLURM_NTASKS_PER_NODE:-1}
        export CUDA_VISIBLE_DEVICES= # a node's GPUs that are not this job's
    fi
    threads=$((${SLURM_CPUS_ON_NODE:-1} / processes))
    export CS324DIST_THREADS=${CS324DIST_THREADS:-$((threads > 0 ? threads : 1))}

    # The rendezvous of another job, or of this one before its restart, has another port and another name.
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    port=$((10000 + (SLURM_JOB_ID + 997 * restart) % 20000))
    export PET_RDZV_ID=$SLURM_JOB_ID-$restart

    step=$(status step)
    say "job $job, restart $restart, nodes: $nodes ($SLURM_JOB_NODELIST), processes on each: $processes;" \
        "$run $([ -n "$step" ] && echo "goes on from step $step" || echo "starts")"

    # One task a node, with all that the job has there: the tasks and CPUs asked for are those of the processes.
    unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_GPUS_PER_TASK \
        SLURM_TRES_PER_TASK SLURM_DISTRIBUTION
    # Slurm numbers the steps of each start from 0. A node that was cut off from the network and comes back has its
    # srun cancel its step by number, and would take this start's with it: every second start begins with step 1.
    local number=$((restart % 2))
    [ "$number" = 0 ] || srun --nodes=1 --ntasks=1 true || { code=$? && return; }
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --export=ALL --kill-on-bad-exit=1 \
        python slurm/accelerate_launch.py --config_file accelerate_configs/multi_node.yaml \
        --num_machines "$nodes" --num_processes $((nodes * processes)) \
        --main_process_ip "$head" --main_process_port "$port" \
        ${ACCELERATE_MIXED_PRECISION:+--mixed_precision "$ACCELERATE_MIXED_PRECISION"} "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do
        # The step may not be there yet. Once is enough: workers that are asked too often give up at once.
        if [ "$stopping" = yes ] && scancel --signal=TERM "$job.$number" 2>/dev/null; then stopping=sent; fi
        sleep 2 &
        wait -n "$srun" $! || true # a signal ends it at once
    done
    code=0
    wait "$srun" || code=$?
}

# Say how it ended, and requeue the job unless the run is at its end.
finish() {
    local state='' what step facts crashes count
    # status.json decides, if it was written since the start; launchers may have been killed before they could tell.
    [ "$(version)" = "$before" ] || state=$(status state)
    crashes=.crashes-$SLURM_JOB_ID # in the checkout, where only its owner writes
    case $state-$code in
        finished-* | *-0)
            rm -f "$crashes"
            exit 0
            ;;
        *-77)
            say "refused, see above"
            exit 2
            ;;
        stopped-* | *-75) what=stopped ;;
        *) if [ -n "$stopping" ]; then what=stopped; else what="crashed with exit code $code"; fi ;;
    esac
    step=$(status step)
    say "$what after step ${step:-0}"

    facts=" $(scontrol --oneliner show job "$job") "
    case $facts in
        # Slurm has ended this job, or it runs on other nodes since this one was cut off.
        *" JobState=RUNNING "*" Restarts=$restart "*) ;;
        *) exit 75 ;;
    esac
    case $facts in
        # Slurm requeues a preempted job when its script has ended; scontrol would have it do so twice.
        *" PreemptTime="[0-9]*)
            say "preempted: Slurm requeues this job"
            exit 75
            ;;
    esac
    if [ "$what" != stopped ] || [ "$step" = "$first" ]; then
        count=$(cat "$crashes" 2>/dev/null || echo 0)
        case $count in [0-3]) ;; *) count=0 ;; esac # nothing else is counted with
        if [ "$count" = 3 ]; then
            rm -f "$crashes"
            say "requeued 3 times after a crash or without progress, and no more: submit the job again to go on"
            exit 1
        fi
        echo $((count + 1)) >"$crashes"
    fi
    say "requeued"
    scontrol requeue "$job" || {
        say "that failed: submit the job again to go on"
        exit 75
    }
    exit 0
}

main "$@"
