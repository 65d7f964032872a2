#!/usr/bin/env bash
# Fetch checkpoints, feature networks and test sets; what there is to fetch stands in particledaps/priors/cards.yaml.
# Needs bash, curl, awk and sha256sum (or shasum); Python only to convert a checkpoint, after its download.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
CARDS="$ROOT/particledaps/priors/cards.yaml"
CHECKPOINTS="$ROOT/checkpoints"
CACHE="${PARTICLEDAPS_CACHE:-$CHECKPOINTS}"
MIRROR="${PARTICLEDAPS_MIRROR:-}"
TORCH_HUB="${TORCH_HOME:-${XDG_CACHE_HOME:-${HOME:-$ROOT}/.cache}/torch}/hub/checkpoints"
ATTEMPTS="${PARTICLEDAPS_ATTEMPTS:-5}"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
PROTOCOLS=(--proto '=https' --proto-redir '=https') # also for what a host redirects to
NAMES=() VARIABLE=""

say() { printf '%s\n' "$*"; }
complain() { printf 'download.sh: %s\n' "$*" >&2; }
stop() {
    complain "$2"
    exit "$1"
}

# --- the cards -------------------------------------------------------------------------------------------------------

table() { # a line "name<tab>key<tab>value" for every entry of the cards that is not null
    awk '
        /^[^ #]/ { name = $0; sub(/:$/, "", name) }
        match($0, /^  [a-z0-9_]+: /) {
            key = substr($0, 3, RLENGTH - 4)
            value = substr($0, RLENGTH + 1)
            if (value != "null") print name "\t" key "\t" value
        }
    ' "$CARDS"
}

variable() { VARIABLE="CARD_${1//[!a-z0-9]/_}_$2"; } # where the entry KEY of card NAME is kept

read_cards() {
    local name key value
    while IFS=$'\t' read -r name key value; do
        case " ${NAMES[*]-} " in *" $name "*) ;; *) NAMES+=("$name") ;; esac
        variable "$name" "$key"
        printf -v "$VARIABLE" '%s' "$value"
    done < <(table)
}

card() { # NAME KEY: the value, empty where there is none
    variable "$1" "$2"
    printf '%s\n' "${!VARIABLE-}"
}

arguments() { # every name that download.sh takes, in the order of the cards
    local name
    for name in "${NAMES[@]}"; do card "$name" download; done | awk 'NF && !seen[$0]++'
}

cards_of() { # the cards that ARGUMENT stands for
    local name argument
    for name in "${NAMES[@]}"; do
        argument="$(card "$name" download)"
        if [ -z "$argument" ]; then continue; fi
        if [ "$1" = all ] && [ "$(card "$name" in_all)" != no ]; then say "$name"; fi
        if [ "$1" = "$argument" ]; then say "$name"; fi
    done
}

folder_of() { # where the file of CARD belongs
    case "$(card "$1" place)" in
        torch_hub) say "$TORCH_HUB" ;;
        dataset) say "$ROOT/dataset" ;;
        *) say "$CACHE" ;;
    esac
}

size_text() { awk -v mb="$1" 'BEGIN { if (mb >= 1000) printf "%.1f GB", mb / 1000; else printf "%d MB", mb }'; }

usage() {
    local name size total=0 left_out=""
    say "usage: bash download.sh NAME [NAME ...]"
    say
    for name in "${NAMES[@]}"; do
        if [ -z "$(card "$name" download)" ]; then continue; fi
        size="$(card "$name" megabytes)"
        printf '  %-16s %8s  %s\n' "$(card "$name" download)" "$(size_text "$size")" "$(card "$name" title)"
        if [ "$(card "$name" in_all)" = no ]; then left_out="$left_out, $name"; else total=$((total + size)); fi
    done
    printf '  %-16s %8s  %s\n' all "$(size_text "$total")" "everything but ${left_out#, }"
    say
    say "PARTICLEDAPS_CACHE    folder for the files (default: checkpoints/ of this checkout)"
    say "PARTICLEDAPS_MIRROR   take every file from \$PARTICLEDAPS_MIRROR/<file name> instead (an https:// address)"
    say "PARTICLEDAPS_ATTEMPTS how often a broken transfer is resumed (5)"
    for name in "${NAMES[@]}"; do
        if [ -z "$(card "$name" hub)" ]; then continue; fi
        say "$(card "$name" title): hf download $(card "$name" hub)"
    done
}

# --- checksums -------------------------------------------------------------------------------------------------------

sha256_of() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}

byte_count() { wc -c <"$1" | tr -d ' '; }

record_name() { case "$1" in "$CACHE"/*) say "${1#"$CACHE"/}" ;; *) say "$1" ;; esac; }

recorded() { # the checksum that the first download of FILE left, or nothing
    if [ -f "$CACHE/checksums.txt" ]; then
        awk -v name="$(record_name "$1")" 'substr($0, 67) == name { print $1 }' "$CACHE/checksums.txt"
    fi
}

record() { # FILE SUM, in the format of sha256sum --check
    local list="$CACHE/checksums.txt"
    { if [ -f "$list" ]; then cat "$list"; fi; printf '%s  %s\n' "$2" "$(record_name "$1")"; } >"$list.part" &&
        mv -f "$list.part" "$list"
}

# verify CARD FILE KEPT: FILE is what the card or the first download of KEPT says; what is new is recorded.
# bytes and sha256 of a card are those of its file, not of an archive around it.
verify() {
    local known="" bytes="" found
    if is_web_page "$2"; then
        complain "$1: got a web page instead of the file"
        return 1
    fi
    if [ "$(basename "$3")" = "$(card "$1" file)" ]; then
        bytes="$(card "$1" bytes)" known="$(card "$1" sha256)"
    fi
    if [ -n "$bytes" ] && [ "$(byte_count "$2")" != "$bytes" ]; then
        complain "$1: $(basename "$3") has $(byte_count "$2") bytes, not $bytes"
        return 1
    fi
    found="$(sha256_of "$2")"
    if [ -z "$known" ]; then known="$(recorded "$3")"; fi
    if [ -n "$known" ] && [ "$found" != "$known" ]; then
        complain "$1: $(basename "$3") has sha256 $found, not $known"
        return 1
    fi
    if [ -z "$(recorded "$3")" ] && ! record "$3" "$found"; then
        complain "$1: cannot write $CACHE/checksums.txt"
        return 1
    fi
}

is_web_page() { # the first line that is not blank opens a page, or a host's error in XML
    head -c 1024 "$1" | LC_ALL=C tr -d '\000' | LC_ALL=C tr '[:upper:]' '[:lower:]' | LC_ALL=C awk '
        NF && !seen++ && /^[^a-z]*<(!doctype|html|head|\?xml|error)/ { page = 1 }
        END { exit !page }
    '
}

# --- one file --------------------------------------------------------------------------------------------------------

url_of() { if [ -n "$MIRROR" ]; then say "${MIRROR%/}/$2"; else card "$1" url; fi; }

host_of() { say "$1" | awk -F/ '{ print ($3 == "") ? $0 : $3 }'; }

by_hand() { # CARD FILE: what to do where no program gets through
    local page terms
    page="$(card "$1" page)" terms="$(card "$1" terms)"
    say "  By hand:"
    if [ -n "$terms" ]; then say "    accept the terms of use:  $terms"; fi
    say "    download in a browser:    ${page:-$(card "$1" url)}"
    say "    save it as:               $2"
    say "    and run again:            bash download.sh $(card "$1" download)"
}

# transfer CARD URL PART: resumes PART until it is complete. Status 3: no connection at all
transfer() {
    local attempt code=0 http total quiet=(--silent)
    if [ -t 2 ]; then quiet=(--progress-bar); fi
    for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
        code=0
        http="$(curl "${PROTOCOLS[@]}" --fail --location --continue-at - --connect-timeout 20 \
            --speed-limit 1000 --speed-time 60 "${quiet[@]}" --output "$3" --write-out '%{http_code}' "$2")" || code=$?
        if [ -f "$3" ] && [ ! -s "$3" ]; then rm -f "$3"; fi
        if [ "$http" = 416 ]; then # nothing is left to send: PART is complete, or longer than the file
            total="$(curl "${PROTOCOLS[@]}" --silent --location --head "$2" | tr -d '\r' |
                awk 'tolower($1) == "content-length:" { n = $2 } END { print n }')"
            if [ -f "$3" ] && [ "$(byte_count "$3")" = "$total" ]; then return 0; fi
            rm -f "$3"
            continue
        fi
        case "$code" in
            0)
                if [ -f "$3" ]; then return 0; fi
                complain "$1: $(host_of "$2") sent an empty file"
                return 1
                ;;
            1)
                complain "$1: refused: $2 is or leads to an address without https"
                return 1
                ;;
            5 | 6 | 7) if [ "$attempt" = 1 ]; then return 3; fi ;;
            28) if [ "$attempt" = 1 ] && [ "$http" = 000 ]; then return 3; fi ;;
            22)
                case "$http" in
                    408 | 429 | 5??) ;;
                    *)
                        complain "$1: $(host_of "$2") answers $http for $2"
                        return 1
                        ;;
                esac
                ;;
            33) rm -f "$3" ;; # the host cannot resume
            18 | 35 | 52 | 55 | 56 | 92) ;;
            23)
                complain "$1: cannot write $3 (disk full?)"
                return 1
                ;;
            *)
                complain "$1: curl failed with status $code for $2"
                return 1
                ;;
        esac
        if ((attempt < ATTEMPTS)); then sleep "$((attempt < 5 ? attempt : 5))"; fi
    done
    complain "$1: the transfer broke $ATTEMPTS times; what arrived is kept, run the same command again to go on"
    return 1
}

unpack() { # ARCHIVE FOLDER
    if command -v unzip >/dev/null; then
        unzip -q -o "$1" -d "$2"
    else
        local python="$PYTHON"
        if ! command -v "$python" >/dev/null; then python=python3; fi
        "$python" -m zipfile -e "$1" "$2"
    fi
}

# extract CARD ARCHIVE FILE: the member of the archive, or all of it as a folder, becomes FILE
extract() {
    local scratch="$3.unpack" member inner
    member="$(card "$1" member)"
    rm -rf "$scratch"
    if ! unpack "$2" "$scratch" 2>/dev/null; then
        rm -rf "$scratch"
        complain "$1: $(basename "$2") is not a readable zip archive, or there is no room to unpack it (needs unzip or python3)"
        return 1
    fi
    inner="$scratch"
    if [ -n "$member" ]; then
        inner="$(find "$scratch" -name "$member" -type f | awk 'NR == 1')"
    else
        rm -rf "$scratch/__MACOSX"
        inner="$(find "$scratch" -mindepth 1 -maxdepth 1)"
        if [ ! -d "$inner" ]; then inner="$scratch"; fi # several entries, or a single file
    fi
    if [ -z "$inner" ]; then
        rm -rf "$scratch"
        complain "$1: $(basename "$2") holds no $member"
        return 1
    fi
    mv -f "$inner" "$3" && rm -rf "$scratch" "$2"
}

# fetch CARD: its file is in place and checked afterwards. Status 3: no connection
fetch() {
    local folder file name fetched url status=0
    folder="$(folder_of "$1")" file="$(folder_of "$1")/$(card "$1" file)"
    name="$(card "$1" fetched_as)"
    fetched="$folder/${name:-$(card "$1" file)}"
    if [ -d "$file" ]; then
        say "$1: is there ($file)"
        return 0
    fi
    if [ -f "$file" ]; then
        if verify "$1" "$file" "$file"; then say "$1: is there, checksum agrees ($file)"; return 0; fi
        complain "$1: delete $file to fetch it again"
        return 1
    fi
    if [ ! -f "$fetched" ]; then
        url="$(url_of "$1" "$(basename "$fetched")")"
        if [ -z "$MIRROR" ] && [ -n "$(card "$1" terms)" ]; then
            say "$1: its host wants you to sign in."
            by_hand "$1" "$fetched"
            return 1
        fi
        say "$1: fetching $(basename "$fetched") from $(host_of "$url")"
        if ! mkdir -p "$folder" 2>/dev/null || [ ! -w "$folder" ]; then
            complain "$1: cannot write into $folder"
            return 1
        fi
        transfer "$1" "$url" "$fetched.part" || status=$?
        if [ "$status" -ne 0 ]; then
            if [ "$status" -eq 1 ] && [ -z "$MIRROR" ] && [ -n "$(card "$1" page)" ]; then by_hand "$1" "$fetched"; fi
            return "$status"
        fi
        if ! verify "$1" "$fetched.part" "$fetched"; then
            rm -f "$fetched.part"
            complain "$1: deleted what was fetched"
            if [ -z "$MIRROR" ] && [ -n "$(card "$1" page)" ]; then by_hand "$1" "$fetched"; fi
            return 1
        fi
        mv -f "$fetched.part" "$fetched" || return 1
    elif ! verify "$1" "$fetched" "$fetched"; then
        complain "$1: delete $fetched to fetch it again"
        return 1
    fi
    if [ "$fetched" != "$file" ]; then extract "$1" "$fetched" "$file" || return 1; fi
    if [ -f "$file" ]; then verify "$1" "$file" "$file" || return 1; fi
    say "$1: done, $file"
}

# --- after the download ----------------------------------------------------------------------------------------------

convert() { # CARD: the folder that the loader reads
    local file folder family
    file="$CACHE/$(card "$1" file)" folder="$CACHE/$(card "$1" becomes)" family="$(card "$1" family)"
    if is_converted "$1"; then return 0; fi
    if ! command -v "$PYTHON" >/dev/null; then
        say "$1: convert it once there is an environment (make setup):"
        say "  .venv/bin/python tools/convert_checkpoint.py \"$file\" \"$folder\"${family:+ --family $family}"
        return 0
    fi
    say "$1: converting"
    if ! "$PYTHON" "$ROOT/tools/convert_checkpoint.py" "$file" "$folder" ${family:+--family "$family"}; then
        complain "$1: the conversion failed; the download is kept in $file"
        return 1
    fi
}

link() { # CARD: a cache elsewhere is visible in checkpoints/, where the configurations look
    local name target
    if [ "$CACHE" -ef "$CHECKPOINTS" ]; then return 0; fi
    for name in "$(card "$1" becomes)" "$(card "$1" file)"; do
        target="$CHECKPOINTS/$name"
        if [ -z "$name" ] || [ ! -e "$CACHE/$name" ] || [ -e "$target" ]; then continue; fi
        if mkdir -p "$CHECKPOINTS" 2>/dev/null && ln -sfn "$CACHE/$name" "$target" 2>/dev/null; then
            say "$1: linked checkpoints/$name"
        else
            say "$1: checkpoints/ cannot be written; name the folder with model.path=$CACHE/$name"
        fi
    done
}

is_converted() { [ -n "$(card "$1" becomes)" ] && [ -f "$CACHE/$(card "$1" becomes)/card.json" ]; }

get() { # CARD: fetched, converted, linked
    local status=0
    if is_converted "$1" && [ ! -e "$CACHE/$(card "$1" file)" ]; then
        say "$1: is there, converted ($CACHE/$(card "$1" becomes))"
    else
        fetch "$1" || status=$?
        if [ "$status" -ne 0 ]; then return "$status"; fi
        if [ -n "$(card "$1" becomes)" ]; then convert "$1" || return 1; fi
    fi
    if [ -z "$(card "$1" place)" ]; then link "$1"; fi
}

# --- the whole run ---------------------------------------------------------------------------------------------------

plan() { # list names, sizes and licences; refuse where the disk is too small
    local name size total=0 room=0 free file
    say "into $CACHE:"
    for name in "$@"; do
        file="$(folder_of "$name")/$(card "$name" file)"
        if [ -e "$file" ] || is_converted "$name"; then
            printf '  %-16s %8s  %s\n' "$name" "is there" "$(card "$name" licence)"
        else
            size="$(card "$name" megabytes)"
            printf '  %-16s %8s  %s\n' "$name" "$(size_text "$size")" "$(card "$name" licence)"
            total=$((total + size)) room=$((room + size))
            if [ -n "$(card "$name" fetched_as)" ]; then room=$((room + size)); fi # its archive, for a while
            if [ -n "$(card "$name" becomes)" ]; then room=$((room + size)); fi
        fi
    done
    free="$(df -Pm "$CACHE" | awk 'NR == 2 { print $4 }')"
    say "to fetch: $(size_text "$total"); room needed while at work: $(size_text "$room"), free: $(size_text "$free")"
    if [ "$room" -gt "$free" ]; then
        stop 1 "the disk of $CACHE is too small; set PARTICLEDAPS_CACHE to a folder elsewhere"
    fi
}

check_mirror() { # PARTICLEDAPS_MIRROR: https, or http with a warning
    case "$MIRROR" in
        "" | [Hh][Tt][Tt][Pp][Ss]://*) ;;
        [Hh][Tt][Tt][Pp]://*)
            complain "PARTICLEDAPS_MIRROR=$MIRROR is not encrypted: anyone on the way can change files; checksums are still compared"
            PROTOCOLS=(--proto '=http,https' --proto-redir '=http,https')
            ;;
        *) stop 2 "PARTICLEDAPS_MIRROR=$MIRROR: must begin with https:// (or http://, which is not encrypted)" ;;
    esac
}

prepare() {
    local tool
    check_mirror
    [[ "$ATTEMPTS" =~ ^[1-9][0-9]?$ ]] || stop 2 "PARTICLEDAPS_ATTEMPTS=$ATTEMPTS: must be a number from 1 to 99"
    for tool in curl awk; do
        command -v "$tool" >/dev/null || stop 1 "needs $tool; install it with the package manager of this system"
    done
    command -v sha256sum >/dev/null || command -v shasum >/dev/null || stop 1 "needs sha256sum or shasum"
    mkdir -p "$CACHE" 2>/dev/null || stop 1 "cannot create $CACHE; set PARTICLEDAPS_CACHE to a folder that can be written"
    CACHE="$(cd "$CACHE" && pwd)"
    [ -w "$CACHE" ] || stop 1 "cannot write into $CACHE; set PARTICLEDAPS_CACHE to another folder"
    if command -v flock >/dev/null; then
        exec 9<"$CACHE"
        flock -n 9 || stop 1 "another download.sh is at work in $CACHE; wait for it"
    fi
}

main() {
    local argument name names=() failed=() status known
    [ -r "$CARDS" ] || stop 1 "$CARDS is missing: run download.sh from a complete checkout"
    read_cards
    if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
        usage
        exit 0
    fi
    known=" $(arguments | tr '\n' ' ')all "
    for argument in "$@"; do
        if [[ -z "$argument" || "$argument" == *" "* || "$known" != *" $argument "* ]]; then
            stop 2 "'$argument' is unknown; allowed are${known% }"
        fi
        for name in $(cards_of "$argument"); do
            case " ${names[*]-} " in *" $name "*) ;; *) names+=("$name") ;; esac
        done
    done
    prepare
    plan "${names[@]}"
    for name in "${names[@]}"; do
        status=0
        get "$name" || status=$?
        if [ "$status" -eq 3 ]; then
            stop 1 "no connection to $(host_of "$(url_of "$name" "")"); what is complete is kept, run the same command again when there is one"
        fi
        if [ "$status" -ne 0 ]; then failed+=("$name"); fi
    done
    if [ ${#failed[@]} -gt 0 ]; then stop 1 "not there yet: ${failed[*]}"; fi
}

main "$@"
