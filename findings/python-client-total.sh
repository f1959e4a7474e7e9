#!/usr/bin/env bash
# The text parser of prometheus_client 0.16.0 for Python (Debian 12) renames what it reads: each sample of a family
# that is a counter gets _total, which the text of version 0.0.4 does not ask for. So a tool that looks for the name
# that the page shows does not find it, and what it writes again has another name. Go and Prometheus keep the name.
#
# Seen: "# TYPE restarts counter" and "restarts 3" came back as the sample restarts_total, and as restarts with any
# other type or without one; so did "# TYPE seen_count counter" as seen_count_total.
# Fails if that changes. Needs bash, python3, apt-get, dpkg.
set -euo pipefail
version="0.16.0-*"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
apt-get download -qq "python3-prometheus-client=$version" 2>/dev/null
dpkg -x python3-prometheus-client_*.deb .
cat >try.py <<'P'
from prometheus_client.parser import text_string_to_metric_families as parse
def names(text):
    return [s.name for family in parse(text) for s in family.samples]
counter = names("# TYPE restarts counter\nrestarts 3\n# TYPE seen_count counter\nseen_count 1\n")
other = names("# TYPE restarts gauge\nrestarts 3\nplain 4\n")
print("counters:", counter, "others:", other)
assert counter == ["restarts_total", "seen_count_total"] and other == ["restarts", "plain"]
P
PYTHONPATH=usr/lib/python3/dist-packages python3 try.py
