# Shared by expN_*.sh; sourced, not run.
#   experiment NAME "--1 --10" "$@"    runs configs/experiment/NAME.yaml for each flag, in that order
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python)}"

describe() {
    case "$1" in
        --1) echo "image 0 (a sanity check)" ;;
        --10) echo "images 0-9" ;;
        --90) echo "images 10-99 (with --10: the full 100)" ;;
        --imagenet) echo "ImageNet 256, images 0-99" ;;
        --ffhq) echo "FFHQ 256, images 0-99" ;;
    esac
}

overrides() {
    case "$1" in
        --1) echo "data.start_id=0 data.end_id=1" ;;
        --10) echo "data.start_id=0 data.end_id=10" ;;
        --90) echo "data.start_id=10 data.end_id=100" ;;
        --imagenet) echo "data.start_id=0 data.end_id=100" ;;
        --ffhq) echo "model=ffhq256ldm data=test-ffhq data.start_id=0 data.end_id=100" ;;
    esac
}

usage() {
    echo "usage: bash commands_gpu/$(basename "$0") FLAGS [-- OVERRIDES of posterior_sample.py]"
    for flag in $1; do printf '  %-11s %s\n' "$flag" "$(describe "$flag")"; done
    echo "Flags can be combined and run in this order; results: results/${2}_<flag>/."
    echo "Default prior and data: ImageNet 256 LDM. On any machine:"
    echo "  bash commands_gpu/$(basename "$0") ${1%% *} -- model=cats64 data=folder data.dir=/path/to/images"
    echo "(relative paths start at the checkout; --10 needs at least 10 images)"
}

experiment() {
    local name="$1" known="$2" wanted=() flag
    shift 2
    while [ $# -gt 0 ] && [ "$1" != "--" ]; do
        case " $known " in
            *" $1 "*) wanted+=("$1") ;;
            *) echo "$(basename "$0"): unknown flag $1" >&2; usage "$known" "$name" >&2; exit 2 ;;
        esac
        shift
    done
    if [ ${#wanted[@]} -eq 0 ]; then
        usage "$known" "$name"
        exit 0
    fi
    if [ $# -gt 0 ]; then shift; fi
    cd "$ROOT"
    for flag in $known; do
        case " ${wanted[*]} " in *" $flag "*) ;; *) continue ;; esac
        echo "==> $name $flag: $(describe "$flag")"
        # shellcheck disable=SC2046
        "$PYTHON" posterior_sample.py "experiment=$name" model=imagenet256ldm data=test-imagenet \
            $(overrides "$flag") "name=${name}_${flag#--}" "$@"
    done
}
