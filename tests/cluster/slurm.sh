#!/usr/bin/env bash
# A Slurm of two node names on this one machine, for tests: slurm.sh up FOLDER, then SLURM_CONF=FOLDER/slurm.conf; slurm.sh down FOLDER.
# As root; Slurm and munge are installed already. Nothing outside FOLDER is written, but munge's socket.
set -euo pipefail
folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf

if [[ $1 == down ]]; then
    scancel --user="$(id -un)" 2>/dev/null || true
    for name in slurmd.one slurmd.two slurmctld munged; do
        [[ -s $folder/$name.pid ]] && kill "$(cat "$folder/$name.pid")" 2>/dev/null || true
    done
    exit
fi

# Each worker of pytest-xdist brings up a Slurm of its own. The last four digits of a job's number decide on the port at
# which its processes meet, so the numbers of two Slurms must not be the same.
worker=${PYTEST_XDIST_WORKER:-gw0}
first=$(((${worker#gw} % 9 + 1) * 1000 + RANDOM % 900))
port=$((20000 + RANDOM % 10000))
mkdir -p "$folder"/{state,one,two,munge}
chmod 0755 "$folder" "$folder/munge"
chmod 0700 "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 0400 "$folder/munge/key"
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"

cat > "$SLURM_CONF" <<END
ClusterName=tests
FirstJobId=$first
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=300
JobRequeue=1
NodeName=one,two NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)),$((port + 2)) CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=one,two Default=YES MaxTime=INFINITE State=UP
END

slurmctld
slurmd -N one
slurmd -N two
for _ in $(seq 120); do
    [[ $(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l) == 2 ]] && exit 0
    sleep 0.25
done
tail -n 20 "$folder"/*.log >&2
exit 1
