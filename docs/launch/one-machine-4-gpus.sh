#!/usr/bin/env bash
# One machine with 4 GPUs, in one process. Run it in a checkout of the project, on the machine: it makes the environment,
# trains, and goes on by itself after a crash.
#
# One process, not four: JAX drives all GPUs of a machine from one process, which reads the data once, needs no
# --distributed, and sums gradients over NVLink all the same. Four processes would keep four copies of the vocabulary, of
# the page cache and of the compiled step, and one that dies ends all. They are worth it only where one process cannot
# read and decode fast enough: share_input in metrics.jsonl says so; raise config.data.read_threads first.
set -euo pipefail

CUDA=${CUDA:-cuda12}              # cuda13 for drivers from 580 on; `make setup` refuses what does not fit
DATA=${DATA:-data_sets/mine}      # made by `shnet data ...`, on a local disk
BERT=${BERT:-bert}                # folder of a BERT; `make minilm` and BERT=minilm for a small one
WORKDIR=${WORKDIR:-runs/mine}     # checkpoints, logs, results
TRIES=${TRIES:-3}

# Code and environment.
make setup EXTRAS="$CUDA"

# Train. A failure is tried again, from the last checkpoint; Ctrl-C, SIGTERM (130, 143) and wrong flags (2) are not.
train() {
  .venv/bin/shnet train --config=vse:f30k --workdir="$WORKDIR" \
    --config.data.dir="$DATA" --config.text.weights="$BERT" \
    --config.train.batch_size=512
}
for ((try = 1; try <= TRIES; try++)); do
  status=0
  train || status=$?
  case $status in 0 | 2 | 130 | 143) break ;; esac
  echo "attempt $try of $TRIES ended with status $status" >&2
done
[ "$status" -eq 0 ] || exit "$status"

.venv/bin/shnet eval --workdir="$WORKDIR" --config.data.dir="$DATA" --config.eval.split=test

# Watch, in another terminal:  tail -f runs/mine/metrics.jsonl      nvidia-smi dmon
#   pip install tensorboard; tensorboard --logdir=runs/mine/tensorboard
# Resume: run this script again.
