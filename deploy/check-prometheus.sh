#!/usr/bin/env bash
# Runs the tests of monitoring, which use the machine's Prometheus, with Prometheus 3: scrapes, alerts, dashboard.
# Needs Go and twenty minutes, for it is built here. Not part of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
module=github.com/prometheus/prometheus
GOBIN=$bin go install -tags remove_all_sd $module/cmd/{prometheus,promtool}@v0.316.0 # which is v3.16.0
CI=true PATH=$bin:$PATH go test -count 1 -v -run '^(TestMonitoring|TestAlerts)$' .
