#!/usr/bin/env bash
# Runs the tables of CLIENTS.md that are not of npm again: bash clients/go.sh [NAME...]
# A name is a row's, such as "go r3labs", or "go" or "shell" for all of a kind. Needs Go; for some rows curl, wget,
# chromium, firefox-esr, webkit2gtk-driver and xvfb. The program is a module of its own, in a folder that goes away.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
(cd "$here/.." && go build -o "$dir/sidecast" .)
cd "$dir"
for file in "$here"/*.go.txt; do name=${file##*/}; cp "$file" "${name%.txt}"; done
go mod init clients 2>/dev/null
go get github.com/tmaxmax/go-sse@v0.12.0 github.com/r3labs/sse/v2@v2.10.0 github.com/launchdarkly/eventsource@v1.11.0 \
  github.com/donovanhide/eventsource@v0.0.0-20210830082556-c59027999da0 2>/dev/null
go build -o table .
if [ $# -gt 0 ]; then
  ./table "$@"
else
  for name in go shell "browser chromium" "browser chromium, service worker" "browser firefox" \
    "browser firefox, service worker" "browser webkitgtk"; do ./table "$name"; done
fi
