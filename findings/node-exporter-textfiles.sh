#!/usr/bin/env bash
# node_exporter 1.5.0 (Debian 12) leaves out what a file of its textfile collector has of a metric to which an earlier
# file gives another type, or a type where this one has no TYPE line, and still says that all is well: the collector
# succeeded, node_textfile_scrape_error is 0, and node_textfile_mtime_seconds, "of textfiles successfully read", has
# the file. All that tells is a counter of the HTTP handler and the log. Which file loses is a matter of their names.
#
# Seen: of a.prom with a TYPE and b.prom without one, a page with the sample of a.prom alone, 0 for the error, both
# mtimes, and 1 for promhttp_metric_handler_errors_total{cause="gathering"}.
# Fails if that changes. Needs bash, curl, apt-get, dpkg.
set -euo pipefail
version="1.5.0*"
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "prometheus-node-exporter=$version" 2>/dev/null
dpkg -x prometheus-node-exporter_*.deb .
mkdir texts
printf '# HELP backup_seconds Of the last backup.\n# TYPE backup_seconds gauge\nbackup_seconds{of="mail"} 10\n' >texts/a.prom
printf 'backup_seconds{of="web"} 20\n' >texts/b.prom
usr/bin/prometheus-node-exporter --collector.disable-defaults --collector.textfile --collector.textfile.directory=texts \
  --web.listen-address=127.0.0.1:18641 2>log &
sleep 2
curl -s http://127.0.0.1:18641/metrics >/dev/null
page=$(curl -s http://127.0.0.1:18641/metrics | grep -E '^(backup|node_textfile|node_scrape_collector_success|promhttp_.*gathering)')
usr/bin/prometheus-node-exporter --version 2>&1 | head -1
echo "$page"
has() { grep -q "^$1" <<<"$page"; }
has 'backup_seconds{of="mail"} 10' && ! has 'backup_seconds{of="web"}' && has 'node_textfile_scrape_error 0' &&
  has 'node_scrape_collector_success{collector="textfile"} 1' && has 'node_textfile_mtime_seconds{file="texts/b.prom"}' &&
  has 'promhttp_metric_handler_errors_total{cause="gathering"} [1-9]'
