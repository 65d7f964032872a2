#!/usr/bin/env bash
# Experiment 4: experiment 2 with latent optimisation.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment exp4_optimization "--1 --10 --90" "$@"
