#!/usr/bin/env bash
# Experiment 5: the best setting on 100 images.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment exp5_final "--imagenet --ffhq" "$@"
