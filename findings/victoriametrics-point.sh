#!/usr/bin/env bash
# VictoriaMetrics 1.79.5 (Debian 12) leaves out samples whose number has no digit on one side of its point, such as .5
# and 5., and keeps the others of the page: the scrape counts as good, with up 1, and only its own log has a line. The
# format takes what Go's ParseFloat takes, and Prometheus does. bc(1) writes .50 for a half.
#
# Seen: of a 0.5, b .5, c 5. and d 5 in a page that is scraped, a and d are there, b and c are not, and up is 1.
# Fails if that changes. Needs bash, curl, python3, apt-get, dpkg.
set -euo pipefail
version="1.79.5*"
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "victoria-metrics=$version" 2>/dev/null
dpkg -x victoria-metrics_*.deb .
mkdir page
printf 'a 0.5\nb .5\nc 5.\nd 5\n' >page/metrics
printf 'scrape_configs: [{ job_name: j, scrape_interval: 1s, static_configs: [{ targets: ["127.0.0.1:18631"] }] }]\n' >scrape.yml
python3 -m http.server --bind 127.0.0.1 -d page 18631 >/dev/null 2>&1 &
sleep 1
usr/bin/victoria-metrics -storageDataPath=data -httpListenAddr=127.0.0.1:18632 -promscrape.config=scrape.yml 2>log &
sleep 5
curl -s http://127.0.0.1:18632/internal/force_flush
sleep 1
seen=$(curl -s -G http://127.0.0.1:18632/api/v1/export -d 'match[]={job="j",__name__=~"[a-d]|up"}' |
  sed -E 's/.*"__name__":"(\w+)".*"values":\[.*[,[]([0-9.]+)\],"timestamps.*/\1=\2/' | sort | paste -sd ' ')
grep -o 'cannot unmarshal Prometheus line.*' log | sort -u
echo "$(dpkg-deb -f victoria-metrics_*.deb Version): $seen"
[ "$seen" = 'a=0.5 d=5 up=1' ]
