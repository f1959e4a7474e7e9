#!/usr/bin/env bash
# Runs the table of CLIENTS.md again, in some two minutes: bash clients/run.sh [NAME...]
# Needs Go, Node.js 20, npm and curl. The pinned clients are installed in a folder that goes away.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
(cd "$here/.." && go build -o "$dir/sidecast" .)
cp "$here"/*.mjs "$dir"
cd "$dir"
npm install --no-audit --no-fund --silent eventsource5@npm:eventsource@5.1.5 eventsource@npm:eventsource@4.1.1 \
  eventsource2@npm:eventsource@2.0.2 undici@7.30.2 eventsource-client@1.2.0 @microsoft/fetch-event-source@2.0.1 \
  event-source-polyfill@1.0.31 event-source-plus@0.1.15 sse.js@2.8.0 happy-dom@21.0.4 launchdarkly-eventsource@2.2.0 \
  extended-eventsource@2.1.0 reconnecting-eventsource@1.6.5
node table.mjs "$@"
