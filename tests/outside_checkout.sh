#!/usr/bin/env bash
# What a user has who installs the wheel: a file of a task in an empty folder. It is trained by two processes, stopped
# by TERM to all of them, continued to its end, audited and reported.
#   tests/outside_checkout.sh BIN    (the folder of the commands of the environment that the wheel is in)
set -euo pipefail
bin=$(realpath "$1") checkout=$(realpath "$(dirname "$0")/..")
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
export PATH=$bin:$PATH CS324DIST_THREADS=1
cp "$checkout/examples/mlp.py" my_task.py
cp "$checkout/examples/spirals.csv" table.csv
cp "$checkout/accelerate_configs/cpu_ddp.yaml" two.yaml
train() {
    exec setsid accelerate launch --config_file two.yaml my_task.py --data table.csv --wandb disabled --run-dir run \
        --steps 2000 --log-every 10 --checkpoint-every 500
}

train &
until grep -qs '"step": 600,' run/metrics.jsonl; do
    kill -0 $! || { echo "it ended before it could be stopped" >&2; exit 1; }
    sleep 0.1
done
kill -TERM -- -$!
wait $! && { echo "it was not stopped" >&2; exit 1; }
grep '"state": "stopped"' run/status.json
(train)
grep '"state": "finished"' run/status.json
python -m torch.distributed.run --nproc_per_node 2 -m cs324dist.launch.audit run --task my_task.py:MLPTask --from-start
python -m cs324dist.launch.report run --out report.html
grep -c '<svg' report.html
