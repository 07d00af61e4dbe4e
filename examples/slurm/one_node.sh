#!/usr/bin/env bash
# Tries pretrain.sbatch on this machine: a SLURM of one node, from Debian's packages, for as long as this script runs. The job's
# time is over before its run is; it is requeued, and goes on to the end.
#
#     sudo apt-get install slurm-wlm munge
#     sudo examples/slurm/one_node.sh
#
# It needs root, a build (cargo build --release --workspace) and about four minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

for program in munged slurmctld slurmd; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "slurmctld and slurmd start as root: use sudo" >&2; exit 1; }

room=$(mktemp -d /tmp/slurm.XXXXXX)
chmod 755 "$room"
export SLURM_CONF=$room/slurm.conf
cleanup() {
    scancel --user="$(id -un)" 2>/dev/null || true
    for name in slurmctld slurmd; do
        [ -f "$room/$name.pid" ] && kill "$(<"$room/$name.pid")" 2>/dev/null || true
    done
    [ -z "${munge_started:-}" ] || munged --stop
}
trap cleanup EXIT

cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for its old credentials to expire.
AuthInfo=cred_expire=5
StateSaveLocation=$room/state
SlurmdSpoolDir=$room/spool
SlurmctldPidFile=$room/slurmctld.pid
SlurmdPidFile=$room/slurmd.pid
SlurmctldLogFile=$room/slurmctld.log
SlurmdLogFile=$room/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$room/state" "$room/spool"
if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
    mkdir -p /run/munge && chown munge: /run/munge
    runuser -u munge -- munged
    munge_started=1
fi
slurmctld
slurmd
until sinfo --noheader --format=%t 2>/dev/null | grep -q idle; do sleep 1; done

# The signal comes a little earlier or later than asked for: SLURM looks twice a minute.
JEPA_HOST=$PWD/target/release/jepa-host sbatch --time=2 --signal=USR1@60 --output="$room/job.out" \
    examples/slurm/pretrain.sbatch --plugin simclr --config configs/demo.toml run.dir="$room/runs" \
    trainer.epochs="${EPOCHS:-4}" eval.every_epochs=0 eval.at_start=false
job=$(squeue --noheader --format=%i)
while squeue --noheader --job="$job" --format="%T %r, %M" 2>/dev/null | grep .; do sleep 10; done
cat "$room/job.out"
grep -q "going on at step" "$room/job.out" || { echo "it never went on: $room" >&2; exit 1; }
grep -q "^checkpoint " "$room/job.out" || { echo "it did not come to its end: $room" >&2; exit 1; }
echo "requeued, resumed and done; all of it is in $room"
