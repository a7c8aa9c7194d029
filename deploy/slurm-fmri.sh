#!/bin/bash
# fMRI decoding on one Slurm node: raypipe takes cores and memory from the allocation (SLURM_*).
#
#   sbatch deploy/slurm-fmri.sh mvpa --bids-dir /data/fmriprep --raw-dir /data/raw --task faces \
#       --atlas /data/atlas.nii.gz --delay-s 5 --run-dir /data/runs/faces
#
# A job that hits its time limit or is preempted is submitted again as it is: finished units stay.
# Several nodes: an array, each task with subjects and a run folder of its own, e.g. --subjects "$ID".
#SBATCH --job-name=raypipe-fmri
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=INT@60
set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: sbatch $0 roi|mvpa|searchlight|betas OPTIONS (see raypipe fmri mvpa --help)" >&2
  exit 2
fi
if [ -n "${RAYPIPE_VENV:-}" ]; then
  # shellcheck disable=SC1091
  . "$RAYPIPE_VENV/bin/activate"
fi

# Unpacked scans on the node's own disk, where it has one; they are made again on another node.
scratch="${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
export RAYPIPE_CACHE_DIR="${RAYPIPE_CACHE_DIR:-$scratch/raypipe-voxels-$(id -un)}"
# Ray's sockets lie below its folder, whose path must be short.
export RAY_TMPDIR="${RAY_TMPDIR:-/tmp/ray-${SLURM_JOB_ID:-$$}}"
export RAY_USAGE_STATS_ENABLED=0
# One core a worker is the plan's; libraries that look at the node would take all of it.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

trap 'rm -rf "$RAY_TMPDIR"' EXIT
command=$1
shift
# Not exec: the trap above runs after it. srun passes the warning signal on: Ctrl-C, resumable.
srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" raypipe fmri "$command" "$@"
