#!/usr/bin/env bash
# Experiment 3: two particles from start to end.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment exp3_2particle "--10 --90" "$@"
