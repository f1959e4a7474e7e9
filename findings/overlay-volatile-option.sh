#!/usr/bin/env bash
# An overlay that is mounted with the option "volatile", as container tools do for throw-away containers, ignores every
# sync. A program that must know looks for the word among the options in /proc/self/mountinfo. Linux 6.18 shows it there
# as "fsync=volatile", so a program that compares whole words does not find it.
#
# Linux 6.18.44 (the kernel cannot be installed: on another one this says so), seen:
#   mounted with: volatile,lowerdir=…
#   mountinfo:    rw,lowerdir=…,uuid=on,fsync=volatile
#   a word "volatile" is there: no
set -euo pipefail

case $(uname -r) in
6.18.*) ;;
*) echo "this is Linux $(uname -r): seen with 6.18"; exit 0 ;;
esac
command -v unshare >/dev/null || { echo 'needs unshare (util-linux)'; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
options=$(unshare --map-root-user --mount bash -euc '
  mount -t tmpfs tmpfs "$0"
  mkdir "$0"/{lower,upper,work,merged}
  mount -t overlay overlay -o "volatile,lowerdir=$0/lower,upperdir=$0/upper,workdir=$0/work" "$0/merged"
  grep " $0/merged " /proc/self/mountinfo | sed "s/.* - overlay overlay //"
' "$work")
echo "mounted with: volatile,lowerdir=…"
echo "mountinfo:    ${options//$work/}"

case ",$options," in
*,volatile,*) echo 'a word "volatile" is there: yes. It has changed.'; exit 1 ;;
*,fsync=volatile,*) echo 'a word "volatile" is there: no' ;;
*) echo 'neither is there: it has changed.'; exit 1 ;;
esac
