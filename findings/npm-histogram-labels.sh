#!/usr/bin/env bash
# parse-prometheus-text-format 1.1.1 (npm) loses most of a histogram or summary that has labels of its own: the
# labels, the sum and the count are not there, and of several series only the last one is, without an error. Counters
# and gauges keep their labels, and so one does not notice. A histogram without labels is whole.
#
# Seen: of request times of GET (1 of 0.5 s) and POST (7 of 9 s) it has one histogram with 7 in its bucket, no sum, no
# count, no "method"; of those of GET alone without the label, all.
# Fails if that changes. Needs bash, Node.js, npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
npm install --silent --no-fund --no-audit parse-prometheus-text-format@1.1.1
cat >try.mjs <<'J'
import assert from 'node:assert';
import parse from 'parse-prometheus-text-format';
const series = (labels, n, sum) => `t_bucket{${labels}le="+Inf"} ${n}\nt_sum{${labels}} ${sum}\nt_count{${labels}} ${n}\n`;
const read = text => parse('# HELP t Seconds.\n# TYPE t histogram\n' + text)[0].metrics;
const two = read(series('method="GET",', 1, 0.5) + series('method="POST",', 7, 63));
const plain = read(series('', 1, 0.5));
console.log('GET and POST:', JSON.stringify(two), 'no labels:', JSON.stringify(plain));
assert.deepEqual(two, [{ buckets: { '+Inf': '7' } }]);
assert.deepEqual(plain, [{ buckets: { '+Inf': '1' }, sum: '0.5', count: '1' }]);
J
node try.mjs
