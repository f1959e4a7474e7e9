#!/usr/bin/env bash
# Runs the table of CLIENTS.md again: bash clients/run.sh [NAME...]
# Needs Go, Node.js 20, npm and curl. The pinned clients are installed in a folder that goes away.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
(cd "$here/.." && go build -o "$dir/sidecast" .)
cp "$here/table.mjs" "$dir"
cd "$dir"
npm install --no-audit --no-fund --silent eventsource@npm:eventsource@4.1.1 eventsource2@npm:eventsource@2.0.2 \
  eventsource-client@1.2.0 reconnecting-eventsource@1.6.5
node table.mjs "$@"
