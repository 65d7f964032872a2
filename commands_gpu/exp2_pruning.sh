#!/usr/bin/env bash
# Experiment 2: experiment 1, pruned from 4 particles to 2.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment exp2_pruning "--1 --10 --90" "$@"
