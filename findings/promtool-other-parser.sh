#!/usr/bin/env bash
# "promtool check metrics" does not read a page as Prometheus does: in 2.42.0 (Debian 12) each accepts what the other
# one refuses, from the same package and for the same format. Of the three lines here, all of which the format's
# description allows, promtool refuses a blank at the end of one, which Prometheus scrapes, and has no objection to a
# blank at its start and a time before 1970, for each of which Prometheus drops the whole page, with up 0. (3.16 takes
# the blank at the start; the other two are the same.)
#
# Seen: promtool 1 0 0, for which 0 is all right; Prometheus 1 0 0, for which 1 is up.
# Fails if that changes. Needs bash, python3, apt-get, dpkg.
set -euo pipefail
version="2.42.0*"
dir=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "prometheus=$version" 2>/dev/null
dpkg -x prometheus_*.deb .

cat >server.py <<'P'
import http.server, pathlib
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.end_headers()
        self.wfile.write(pathlib.Path(self.path[1:]).read_bytes())
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 18621), Page).serve_forever()
P
pages=(end start time)
text='# HELP a_seconds A.\n# TYPE a_seconds gauge\n'
printf "${text}a_seconds 1 \n" >end
printf "$text a_seconds 1\n" >start
printf "${text}a_seconds 1 -1000\n" >time
{
  printf 'scrape_configs:\n'
  for page in "${pages[@]}"; do
    printf '  - { job_name: %s, scrape_interval: 1s, metrics_path: /%s, static_configs: [{ targets: ["127.0.0.1:18621"] }] }\n' $page $page
  done
} >prometheus.yml
python3 server.py &
usr/bin/prometheus --config.file=prometheus.yml --web.listen-address=127.0.0.1:18622 --log.level=error &
sleep 5
for page in "${pages[@]}"; do
  status=0
  usr/bin/promtool check metrics <$page || status=$?
  echo "$page: promtool $status" >>promtool
done
cat >query.py <<'P'
import json, urllib.request
page = urllib.request.urlopen("http://127.0.0.1:18622/api/v1/targets").read()
for target in json.loads(page)["data"]["activeTargets"]:
    print(target["labels"]["job"], target["health"], target["lastError"])
P
python3 query.py | tee targets
cat promtool
up() { grep -c "^$1 up" targets || true; }
usr/bin/prometheus --version 2>&1 | head -1
[ "$(sed 's/.* //' promtool | paste -s)" = $'1\t0\t0' ]
[ "$(up end) $(up start) $(up time)" = '1 0 0' ]
