#!/usr/bin/env bash
# A TPU v5e slice of 64 chips (16 hosts) by queued resources, spot: asks for it, sets it up, trains, and does so again
# when it is taken away. Run it in a checkout, on a machine that stays: a laptop, or a small VM with tmux.
# Needs gcloud with a project in which the TPU API is on, a bucket with the data set, and a Filestore share in the zone's
# network for the work folder, as all 16 hosts write to it.
set -euo pipefail

NAME=${NAME:-shnet}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-64}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
BUCKET=${BUCKET:-gs://my-bucket}     # has mine/ (made by `shnet data ...`) and bert/
SHARE=${SHARE:-10.0.0.2:/share}      # Filestore
WAIT=${WAIT:-60}                     # seconds between two looks at the queue
SPOT=${SPOT---spot}                  # SPOT= for a slice that is not taken away
TRIES=${TRIES:-3}                    # failures on a slice that stays, such as wrong flags, after which it gives up
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

queue() { gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }
state() { queue describe "$NAME" --format='value(state.state)' 2>/dev/null || echo NONE; }
on_all_hosts() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

ask() {
  # shellcheck disable=SC2086  # SPOT may be no word
  queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" $SPOT
}

set_up() {
  # Code: this commit. --worker=all copies to every host.
  git archive --format=tar.gz --prefix=shnet/ --output="$SCRATCH/shnet.tar.gz" HEAD &&
  gcloud compute tpus tpu-vm scp "$SCRATCH/shnet.tar.gz" "$NAME": --zone="$ZONE" --worker=all &&
  # The runtime's own Python is 3.10. The data set goes to each host's disk, the work folder is the same for all.
  on_all_hosts "set -e
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3.11 python3.11-venv nfs-common
    tar -xzf shnet.tar.gz
    make -C shnet setup EXTRAS=tpu PYTHON=python3.11
    sudo mkdir -p /share
    mountpoint -q /share || sudo mount -o hard $SHARE /share
    sudo chown \"\$(id -u)\" /share
    mkdir -p data
    gcloud storage rsync --recursive $BUCKET data"
}

train() {
  # As a service, so that it survives a lost connection, and gets SIGTERM and time to save when the host is stopped: the
  # 30 s that a spot slice is given. The next command waits for its end and has its status.
  on_all_hosts "cd shnet && sudo systemctl reset-failed shnet 2>/dev/null
    systemctl is-active --quiet shnet || sudo systemd-run --unit=shnet --uid=\"\$(id -u)\" --working-directory=\"\$PWD\" \
      --setenv=HOME=\"\$HOME\" --property=TimeoutStopSec=30 --property=RemainAfterExit=no --quiet \
      \"\$PWD/.venv/bin/shnet\" train --distributed --start_seconds=1800 --heartbeat_seconds=60 \
      --config=base --workdir=/share/runs/mine \
      --config.data.dir=\"\$HOME/data/mine\" --config.text.weights=\"\$HOME/data/bert\" \
      --config.train.batch_size=8192 --config.loss.pairs.strategy=streamed
    while systemctl is-active --quiet shnet; do sleep 5; done
    [ \"\$(systemctl show --property=ExecMainStatus --value shnet)\" = 0 ]"
}

failures=0
while true; do
  case $(state) in
    NONE) ask ;;
    ACTIVE)
      if set_up && train; then break; fi
      now=$(state)
      echo "training stopped; the slice is $now" >&2
      if [ "$now" = ACTIVE ]; then failures=$((failures + 1)); else failures=0; fi
      if [ "$failures" -ge "$TRIES" ]; then
        echo "gave up after $failures failures; $NAME is still there and costs: mend the cause and run this again" >&2
        exit 1
      fi
      ;;
    SUSPENDING | DELETING) ;; # on its way out
    SUSPENDED | FAILED) queue delete "$NAME" --force --quiet ;; # taken away: ask again
    *) ;; # waiting for the slice
  esac
  sleep "$WAIT"
done
queue delete "$NAME" --force --quiet # a slice costs while it is there

# Watch:   gcloud compute tpus tpu-vm ssh shnet --worker=0 --command="journalctl -fu shnet"
# Resume:  run this script again; it goes on with the slice and the work folder that it finds.
