#!/usr/bin/env bash
# Experiment 1: particles that repel each other early on.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment exp1_repulsion "--1 --10 --90" "$@"
