#!/usr/bin/env bash
# Experiment 0: independent particles.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment exp0_baseline "--1 --10 --90" "$@"
